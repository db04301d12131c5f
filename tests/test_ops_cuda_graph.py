"CUDA graphs: what a replay refuses, and on a GPU parity with the step as it is."
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from homelab_ft.train.engine.ops import cuda_graph as module
from homelab_ft.train.engine.ops.cuda_graph import StepGraph, why_not_replay
from homelab_ft.train.engine.ops.checkpointing import CheckpointedLayer
from homelab_ft.train.engine.ops.offload import OffloadedTensor

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
TYPES = [torch.int64, torch.int32, torch.float32]
shapes = st.dictionaries(st.sampled_from('abc'), st.tuples(st.lists(st.integers(1, 3), max_size=3), st.sampled_from(TYPES)))


def tensors(spec): return {k: torch.zeros(shape, dtype=dtype) for k, (shape, dtype) in spec.items()}


@given(shapes, shapes)
@settings(max_examples=100, deadline=None)
def test_a_batch_is_replayed_only_with_the_captured_tensors(a, b):
    why = why_not_replay(tensors(a), tensors(b))
    assert (why == '') == (a == b)
    assert why_not_replay(tensors(a), tensors(a)) == ''


def test_tensors_in_cpu_ram_are_refused_before_any_step():
    def step(batch): raise AssertionError('ran')
    with pytest.raises(ValueError, match='x is in CPU RAM'): StepGraph(step, dict(x=torch.zeros(2)))


class OnGpu:
    "As much of a tensor on a GPU as `StepGraph` reads before it captures."
    is_cuda = True
    def clone(self): return self


@pytest.mark.parametrize('ended', [True, False], ids=['capture ended', 'capture did not end'])
def test_a_failed_repair_does_not_hide_why_the_capture_failed(monkeypatch, ended):
    done = []

    @contextmanager
    def failing_capture(graph, pool, stream):
        try: yield
        except RuntimeError as e:
            if ended: raise
            raise RuntimeError('not permitted: the capture was invalidated') from e

    def broken(*_): raise RuntimeError('a second failure')
    for name, fake in dict(graph=failing_capture, CUDAGraph=lambda: 'graph', set_stream=lambda s: done.append(s.device_index),
                               current_stream=lambda: SimpleNamespace(device_index=3)).items(): monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(module, 'forward_backward', lambda step, batch, after: warm.pop() if warm else step(batch))
    capture_stream = SimpleNamespace(pool=SimpleNamespace(id=(0, 7)), stream='its own', active=nullcontext, broken=False)
    monkeypatch.setattr(module, 'release_pool', lambda device, pool: (done.append((device, pool)), broken()))
    monkeypatch.setattr(module, 'repair_generator', lambda device: (done.append('random'), broken()))
    def reads_a_value(batch): raise RuntimeError('operation not permitted when stream is capturing')
    warm = [None, None]
    with pytest.raises(RuntimeError, match='not permitted'): StepGraph(reads_a_value, dict(x=OnGpu()), capture_stream)
    assert done == [3, (3, (0, 7)), 3, 'random', 3] and capture_stream.broken


# ---------------------------------------------------------------- on a GPU


def parts(draws=False):
    "A small model whose middle layer is recomputed, its step, and batches of a number of tokens."
    torch.manual_seed(0)
    ends, drop = [torch.nn.Embedding(50, 32).cuda(), torch.nn.Linear(32, 50).cuda()], torch.nn.Dropout(.5 if draws else 0.)
    middle = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.SiLU(), drop, torch.nn.Linear(64, 32)).cuda()
    parameters = [p for m in (*ends, middle) for p in m.parameters()]

    def step(batch):
        hidden = CheckpointedLayer.apply(ends[0](batch['ids']), middle, None, draws)
        return (F.cross_entropy(ends[1](hidden), batch['targets'], reduction='none') * batch['weights']).sum()

    def batch(n, seed, labels=None):
        g = torch.Generator().manual_seed(seed)
        weights = (torch.arange(n) < (labels or n)) / n
        return dict(ids=torch.randint(0, 50, (n,), generator=g).pin_memory(), targets=torch.randint(0, 50, (n,), generator=g).pin_memory(), weights=weights.pin_memory())

    return step, batch, parameters


def on_gpu(batch): return {k: v.cuda() for k, v in batch.items()}


def plain(step, batch, parameters):
    for p in parameters: p.grad = None
    loss = step(on_gpu(batch))
    loss.backward()
    return loss.item(), [p.grad.clone() for p in parameters]


@cuda
def test_parity_of_replays_in_two_shapes_of_one_pool():
    step, batch, parameters = parts()
    expected = {key: plain(step, batch(*key), parameters) for key in [(64, 1), (16, 2), (64, 3, 40), (16, 4)]}
    for p in parameters: p.grad = torch.zeros_like(p)
    graphs = {64: StepGraph(step, on_gpu(batch(64, 0)))}
    graphs[16] = StepGraph(step, on_gpu(batch(16, 0)), graphs[64].capture_stream)
    places = [p.grad.data_ptr() for p in parameters]
    for key, (loss, grads) in expected.items():
        for p in parameters: p.grad.zero_()
        assert abs(graphs[key[0]](batch(*key)).item() - loss) <= 1e-5 * abs(loss)
        assert all((p.grad - g).norm() <= 1e-5 * g.norm() for p, g in zip(parameters, grads))
    for p in parameters: p.grad.zero_()
    total = sum(graphs[key[0]](batch(*key)).clone() for key in expected)      # gradients are added over replays
    assert abs(total.item() - sum(loss for loss, _ in expected.values())) <= 1e-4
    assert all((p.grad - sum(gs)).norm() <= 1e-5 * sum(gs).norm() for p, *gs in zip(parameters, *(g for _, g in expected.values())))
    assert places == [p.grad.data_ptr() for p in parameters]


@cuda
def test_what_a_captured_step_refuses():
    step, batch, _ = parts()
    graph = StepGraph(step, on_gpu(batch(8, 0)))
    with pytest.raises(ValueError, match=r'ids has the shape \[1\], captured was \[8\]'): graph(batch(1, 0))
    step, batch, _ = parts(draws=True)
    with pytest.raises(RuntimeError, match='cannot be restored in a CUDA graph capture'): StepGraph(step, on_gpu(batch(8, 0)))
    w = torch.ones(8, device='cuda', requires_grad=True)
    with pytest.raises(RuntimeError, match='policy offload cannot be captured'): StepGraph(lambda b: (OffloadedTensor(b['weights']).get() * w).sum(), on_gpu(batch(8, 0)))
    torch.cuda.synchronize()


def reading(step):
    "A step that cannot be captured: it reads its loss."
    def read(batch):
        loss = step(batch)
        return loss if loss.item() > -1 else None
    return read


def fail_capture(step, batch, capture_stream=None):
    "A capture that fails."
    with pytest.raises(RuntimeError, match='captur'): StepGraph(reading(step), batch, capture_stream)


@cuda
def test_after_a_failed_capture_the_gpu_draws_and_trains_on():
    step, batch, parameters = parts()
    first = plain(step, batch(64, 1), parameters)
    torch.cuda.manual_seed(7)
    expected = torch.rand(16, device='cuda'), torch.rand(16, device='cuda')
    torch.cuda.manual_seed(7)
    stream, drawn = torch.cuda.current_stream(), [torch.rand(16, device='cuda')]
    fail_capture(step, on_gpu(batch(64, 0)))
    assert torch.cuda.current_stream() == stream
    drawn.append(torch.rand(16, device='cuda'))
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected))              # the sequence goes on where it was
    torch.cuda.empty_cache()                                                  # refused while a capture is believed to be under way
    again = plain(step, batch(64, 1), parameters)
    assert abs(again[0] - first[0]) <= 1e-5 * abs(first[0]) and all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(again[1], first[1]))
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses = []
    for _ in range(20):
        losses.append(plain(step, batch(64, 1), parameters)[0])
        optimizer.step()
    assert losses[-1] < losses[0]


@cuda
def test_after_a_failed_capture_others_are_replayed_and_made():
    step, batch, parameters = parts()
    expected = {n: plain(step, batch(n, 1), parameters) for n in (64, 16)}
    earlier, grads = StepGraph(step, on_gpu(batch(64, 0))), [p.grad for p in parameters]
    for stream in (None, earlier.capture_stream): fail_capture(step, on_gpu(batch(32, 0)), stream)
    assert earlier.capture_stream.broken
    with earlier.capture_stream.active(): plain(step, batch(48, 1), parameters)
    for p, g in zip(parameters, grads): p.grad = g
    later = StepGraph(step, on_gpu(batch(16, 0)))
    for _ in range(2):
        for n, graph in {64: earlier, 16: later}.items():
            for p in parameters: p.grad.zero_()
            assert abs(graph(batch(n, 1)).item() - expected[n][0]) <= 1e-5 * abs(expected[n][0])
            assert all((p.grad - g).norm() <= 1e-5 * g.norm() for p, g in zip(parameters, expected[n][1]))
    torch.rand(4, device='cuda')


@cuda
def test_random_numbers_of_an_earlier_capture_go_on_after_a_failed_one():
    w = torch.ones(1000, device='cuda', requires_grad=True)
    drop = lambda b: (F.dropout(w, 0.5) * b['x']).sum()
    graph = StepGraph(drop, dict(x=torch.ones(1000, device='cuda')))
    def replayed(seed):
        torch.manual_seed(seed)
        return [graph(dict(x=torch.ones(1000, device='cuda'))).item() for _ in range(2)]
    expected = replayed(1)
    fail_capture(lambda b: (b['x'] * w).sum(), dict(x=torch.ones(8, device='cuda').repeat(125)))
    assert replayed(1) == expected and expected[0] != expected[1] and replayed(2) != expected


@cuda
def test_micro_batches_on_a_capture_stream_share_their_memory():
    w = torch.ones(2**20, device='cuda', requires_grad=True)
    w.grad = torch.zeros_like(w)
    step = lambda b: (w * b['x'][:, None]).tanh().square().sum()             # 4 MiB per value of x, several times
    def captured(n, stream=None): return StepGraph(step, dict(x=torch.ones(n, device='cuda')), stream)
    large = captured(64)
    reserved = torch.cuda.memory_reserved()
    small = captured(48, large.capture_stream)
    with large.capture_stream.active(): step(dict(x=torch.ones(56, device='cuda'))).backward()
    assert torch.cuda.memory_reserved() - reserved < 64 * 2**20                    # the micro-batches take 500 MiB and more
    for factor in (1., 2., 3.):
        w.grad.zero_()
        x = torch.full((64,), factor, device='cuda')
        loss, again = large(dict(x=x)).item(), step(dict(x=x))
        expected, = torch.autograd.grad(again, w)
        assert loss == pytest.approx(again.item(), rel=1e-5)
        assert (w.grad - expected).norm() <= 1e-5 * expected.norm()
        small(dict(x=x[:48]))


@cuda
def test_the_cpu_runs_ahead_of_two_replays():
    w = torch.randn(4096, 4096, device='cuda', requires_grad=True)
    w.grad = torch.zeros_like(w)
    def step(b):
        y = b['x']
        for _ in range(60): y = y @ w / 64
        return y.square().mean()
    graph, batch = StepGraph(step, dict(x=torch.ones(4096, 4096, device='cuda'))), dict(x=torch.ones(4096, 4096, device='cuda'))
    graph(batch), graph(batch)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    graph(batch), graph(batch)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()
