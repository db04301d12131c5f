"The chunked loss: parity with full logits for any chunk, weights, smoothing and head; full logits never exist."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from homelab_ft.train.engine.ops.chunk_rules import chunk_size
from homelab_ft.train.engine.ops.chunked_loss import chunk_loss, chunked_loss, inplace_math

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def full_loss(hidden, weight, targets, weights, smoothing=0.):
    logits = (hidden @ weight.t()).float()
    return (F.cross_entropy(logits, targets, reduction='none', label_smoothing=smoothing) * weights).sum()


def case(n, vocab, d=8, seed=0, device='cpu'):
    g = torch.Generator().manual_seed(seed)
    made = torch.randn(n, d, generator=g), torch.randn(vocab, d, generator=g), torch.randint(0, vocab, (n,), generator=g), torch.rand(n, generator=g)
    return [t.to(device) for t in made]


def gradients(function, hidden, weight, targets, weights, head=True, factor=1., **options):
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_(head)
    loss = function(hidden, weight, targets, weights, **options)
    (loss * factor).backward()
    return loss.detach(), hidden.grad, weight.grad


def apart(result, expected): return ((result.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-20)).item()


# ---- the same numbers

@given(st.integers(1, 40), st.integers(2, 60), st.integers(1, 50), st.floats(0, 0.9), st.booleans(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_parity_for_any_chunk(n, vocab, chunk, smoothing, head, seed):
    tensors = case(n, vocab, seed=seed)
    result = gradients(chunked_loss, *tensors, head=head, chunk=chunk, smoothing=smoothing)
    expected = gradients(full_loss, *tensors, head=head, smoothing=smoothing)
    assert abs(result[0] - expected[0]) <= 1e-5 * max(1, abs(expected[0]))
    scale = max(1., expected[1].norm().item())
    assert (result[1] - expected[1]).norm() <= 1e-5 * scale
    if head: assert (result[2] - expected[2]).norm() <= 1e-5 * max(1., expected[2].norm().item())
    else: assert result[2] is None


@pytest.mark.parametrize('chunk, smoothing', [(1, 0.), (64, 0.1), (0, 0.)])
def test_relative_gradient_parity(chunk, smoothing):
    tensors = case(129, 500, d=32)
    result, expected = gradients(chunked_loss, *tensors, chunk=chunk, smoothing=smoothing), gradients(full_loss, *tensors, smoothing=smoothing)
    assert max(apart(g, w) for g, w in zip(result, expected)) < 1e-5


def test_parity_of_micro_batches_that_add_up():
    "Weights of the whole step make two micro-batches the same as one."
    hidden, weight, targets, weights = case(20, 30)
    together = gradients(chunked_loss, hidden, weight, targets, weights)
    parts = [gradients(chunked_loss, hidden[s], weight, targets[s], weights[s], chunk=3) for s in (slice(0, 13), slice(13, 20))]
    assert apart(torch.cat([p[1] for p in parts]), together[1]) < 1e-6 and apart(parts[0][2] + parts[1][2], together[2]) < 1e-5
    assert abs(parts[0][0] + parts[1][0] - together[0]) < 1e-4


@pytest.mark.parametrize('head', [torch.bfloat16, torch.float32])
def test_parity_in_bfloat16_is_within_its_rounding(head):
    hidden, weight, targets, weights = case(200, 300, d=64)
    hidden, weight, weights = (hidden / 4).bfloat16(), (weight / 4).to(head), weights / 200
    exact = gradients(full_loss, hidden.float(), weight.bfloat16().float(), targets, weights)
    result = gradients(chunked_loss, hidden, weight, targets, weights, chunk=64)
    assert result[1].dtype == torch.bfloat16 and result[2].dtype == head and result[0].dtype == torch.float32
    assert abs(result[0] - exact[0]) < 0.01 and max(apart(g, e) for g, e in zip(result[1:], exact[1:])) < 0.01


def test_parity_of_a_compiled_chunk_loss():
    tensors = case(40, 50)
    result = gradients(chunked_loss, *tensors, chunk=16, smoothing=0.1, math=torch.compile(chunk_loss))
    expected = gradients(chunked_loss, *tensors, chunk=16, smoothing=0.1)
    assert max(apart(g, w) for g, w in zip(result, expected)) < 1e-5


# ---- properties of a chunk's loss

@given(st.integers(1, 12), st.integers(1, 30), st.floats(0, 0.9), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_parity_in_place(n, vocab, smoothing, seed):
    g = torch.Generator().manual_seed(seed)
    logits, targets, weights = torch.randn(n, vocab, generator=g) * 5, torch.randint(0, vocab, (n,), generator=g), torch.rand(n, generator=g)
    torch.testing.assert_close(inplace_math(logits.clone(), targets, weights, smoothing), chunk_loss(logits, targets, weights, smoothing), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 12), st.integers(1, 30), st.floats(0, 0.9), st.floats(0.1, 200), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_gradients_sum_to_zero_and_stay_finite(n, vocab, smoothing, scale, seed):
    g = torch.Generator().manual_seed(seed)
    logits, targets = torch.randn(n, vocab, generator=g) * scale, torch.randint(0, vocab, (n,), generator=g)
    loss, slope = chunk_loss(logits, targets, torch.ones(n), smoothing)
    assert loss.dtype == torch.float32 and loss.ndim == 0 and torch.isfinite(loss) and loss > -1e-3
    assert slope.shape == logits.shape and slope.sum(-1).abs().max() < 1e-5 + 1e-6 * scale and slope.abs().max() <= 1 + 1e-6 * (1 + scale)     # float32 keeps 7 digits of the logits


@given(st.integers(0, 8), st.integers(0, 8))
@settings(max_examples=30, deadline=None)
def test_padding_of_weight_zero_changes_nothing(n, padding):
    hidden, weight, targets, weights = case(n + padding, 20)
    weights[n:], targets[n:] = 0, -100
    result = gradients(chunked_loss, hidden, weight, targets, weights, chunk=3)
    expected = gradients(chunked_loss, hidden[:n], weight, targets[:n], weights[:n], chunk=3)
    assert (result[1][n:] == 0).all()
    torch.testing.assert_close(result[1][:n], expected[1])
    torch.testing.assert_close((result[0], result[2]), (expected[0], expected[2]), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 2_000_000), st.integers(1, 2**30))
@settings(max_examples=100, deadline=None)
def test_chunks_keep_to_the_limit(vocab, limit):
    size = chunk_size(vocab, limit)
    assert size >= 128 and size % 128 == 0
    assert size == 128 or size * vocab <= limit
    assert (size + 128) * vocab > limit


# ---- full logits never exist

class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.values = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.values = max([self.values, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize('head, chunk', [(False, 32), (True, 100)])
def test_full_logits_never_exist(head, chunk):
    tensors = case(1000, 700)
    with Largest() as seen: gradients(chunked_loss, *tensors, head=head, chunk=chunk)
    assert seen.values == chunk * 700
    with Largest() as seen: gradients(full_loss, *tensors, head=head)
    assert seen.values == 1000 * 700


def test_only_gradients_are_saved():
    hidden, weight, targets, weights = case(50, 60)
    saved = []
    def note(t):
        saved.append(tuple(t.shape))
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): chunked_loss(hidden.requires_grad_(), weight, targets, weights)
    assert saved == [(50, 8)]


# ---- what is refused

@pytest.mark.parametrize('change, says', [
    (dict(hidden=torch.zeros(4, 9)), 'hidden states'), (dict(hidden=torch.zeros(1, 4, 8)), 'hidden states'), (dict(weight=torch.zeros(8, 20)), 'output head'),
    (dict(targets=torch.zeros(1, dtype=torch.int64)), 'targets'), (dict(weights=torch.ones(1)), 'weights'), (dict(weights=torch.ones(4, 1)), 'weights'),
    (dict(chunk=-1), 'chunk=-1'), (dict(smoothing=-0.1), 'smoothing=-0.1'), (dict(smoothing=1.), 'smoothing=1.0')])
def test_bad_input_is_refused(change, says):
    hidden, weight, targets, weights = case(4, 20)
    with pytest.raises(ValueError, match=says): chunked_loss(**{**dict(hidden=hidden, weight=weight, targets=targets, weights=weights), **change})


# ---- on a GPU

@cuda
@pytest.mark.parametrize('smoothing', [0., 0.1])
@pytest.mark.parametrize('compiled', [False, True])
def test_parity_on_a_gpu(smoothing, compiled):
    tensors = case(300, 1000, d=64, device='cuda')
    result = gradients(chunked_loss, *tensors, chunk=128, smoothing=smoothing, math=torch.compile(chunk_loss) if compiled else chunk_loss)
    expected = gradients(full_loss, *tensors, smoothing=smoothing)
    assert max(apart(g, w) for g, w in zip(result, expected)) < 1e-5
