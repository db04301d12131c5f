"Recorded steps: what a replay refuses, and on a card parity with the step as it is."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from homelab_ft.train.graph import StepGraph, why_not_replay
from homelab_ft.train.recompute import Recompute
from homelab_ft.train.shelf import Offloaded

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no card')
TYPES = [torch.int64, torch.int32, torch.float32]
shapes = st.dictionaries(st.sampled_from('abc'), st.tuples(st.lists(st.integers(1, 3), max_size=3), st.sampled_from(TYPES)))


def tensors(spec): return {k: torch.zeros(shape, dtype=dtype) for k, (shape, dtype) in spec.items()}


@given(shapes, shapes)
@settings(max_examples=200, deadline=None)
def test_a_batch_is_replayed_only_on_what_was_recorded(a, b):
    why = why_not_replay(tensors(a), tensors(b))
    assert (why == '') == (a == b)
    assert why_not_replay(tensors(a), tensors(a)) == ''


def test_the_reason_names_what_differs():
    a = dict(ids=torch.zeros(1, 8, dtype=torch.long))
    assert why_not_replay(a, dict(ids=torch.zeros(1, 4, dtype=torch.long))) == 'ids has the shape [1, 4], recorded was [1, 8]'
    assert 'ids is torch.int32' in why_not_replay(a, dict(ids=torch.zeros(1, 8, dtype=torch.int32)))
    assert why_not_replay(a, {}).startswith('recorded with ids')


def test_tensors_in_host_memory_are_refused_before_any_step():
    def step(batch): raise AssertionError('ran')
    with pytest.raises(ValueError, match='x is in host memory'): StepGraph(step, dict(x=torch.zeros(2)))


# ---------------------------------------------------------------- with a card


def parts(draws=False):
    "A small model whose middle layer is computed twice, its step, and batches of a number of tokens."
    torch.manual_seed(0)
    ends, drop = [torch.nn.Embedding(50, 32).cuda(), torch.nn.Linear(32, 50).cuda()], torch.nn.Dropout(.5 if draws else 0.)
    middle = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.SiLU(), drop, torch.nn.Linear(64, 32)).cuda()
    parameters = [p for m in (*ends, middle) for p in m.parameters()]

    def step(batch):
        hidden = Recompute.apply(ends[0](batch['ids']), middle, None, draws)
        return (F.cross_entropy(ends[1](hidden), batch['targets'], reduction='none') * batch['weights']).sum()

    def batch(n, seed, learned=None):
        g = torch.Generator().manual_seed(seed)
        weights = (torch.arange(n) < (learned or n)) / n
        return dict(ids=torch.randint(0, 50, (n,), generator=g).pin_memory(), targets=torch.randint(0, 50, (n,), generator=g).pin_memory(), weights=weights.pin_memory())

    return step, batch, parameters


def on_card(batch): return {k: v.cuda() for k, v in batch.items()}


def plain(step, batch, parameters):
    for p in parameters: p.grad = None
    loss = step(on_card(batch))
    loss.backward()
    return loss.item(), [p.grad.clone() for p in parameters]


@cuda
def test_parity_of_replays_in_two_shapes_of_one_pool():
    step, batch, parameters = parts()
    want = {key: plain(step, batch(*key), parameters) for key in [(64, 1), (16, 2), (64, 3, 40), (16, 4)]}
    graphs = {64: StepGraph(step, on_card(batch(64, 0)))}
    graphs[16] = StepGraph(step, on_card(batch(16, 0)), graphs[64].graph.pool())
    places = [p.grad.data_ptr() for p in parameters]
    for key, (loss, grads) in want.items():
        for p in parameters: p.grad.zero_()
        assert abs(graphs[key[0]](batch(*key)).item() - loss) <= 1e-5 * abs(loss)
        assert all((p.grad - g).norm() <= 1e-5 * g.norm() for p, g in zip(parameters, grads))
    for p in parameters: p.grad.zero_()
    total = sum(graphs[key[0]](batch(*key)).clone() for key in want)      # gradients are added over replays
    assert abs(total.item() - sum(loss for loss, _ in want.values())) <= 1e-4
    assert all((p.grad - sum(gs)).norm() <= 1e-5 * sum(gs).norm() for p, *gs in zip(parameters, *(g for _, g in want.values())))
    assert places == [p.grad.data_ptr() for p in parameters]


@cuda
def test_what_a_recorded_step_refuses():
    step, batch, _ = parts()
    graph = StepGraph(step, on_card(batch(8, 0)))
    with pytest.raises(ValueError, match=r'ids has the shape \[1\], recorded was \[8\]'): graph(batch(1, 0))
    step, batch, _ = parts(draws=True)
    with pytest.raises(RuntimeError, match='cannot be put back in a recorded step'): StepGraph(step, on_card(batch(8, 0)))
    w = torch.ones(8, device='cuda', requires_grad=True)
    with pytest.raises(RuntimeError, match='level offload cannot be recorded'): StepGraph(lambda b: (Offloaded(b['weights']).get() * w).sum(), on_card(batch(8, 0)))
    torch.cuda.synchronize()
