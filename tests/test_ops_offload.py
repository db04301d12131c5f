"Offloading: tensors that leave and come back, saved attention."
import gc

import pytest
import torch
from hypothesis import given, settings, strategies as st

from homelab_ft.train.engine.ops.checkpointing import CheckpointedLayer
from homelab_ft.train.engine.ops.offload import PINNED_CHUNK, OffloadedTensor, ActivationOffloader, pinned_chunks

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def test_two_micro_batches_in_any_order():
    w = torch.tensor(3., requires_grad=True)
    for order in ((0, 1), (1, 0)):
        offloader, outs, xs = ActivationOffloader(), [], [torch.tensor(2., requires_grad=True), torch.tensor(5., requires_grad=True)]
        for x in xs:
            for _ in range(3): x = CheckpointedLayer.apply(x, lambda h: h * w, offloader)
            outs.append(x)
        for i in order: outs[i].backward()
        assert [x.grad.item() for x in xs] == [27, 27]


def test_inputs_of_a_failed_micro_batch_are_freed_with_it():
    offloader, w = ActivationOffloader(), torch.tensor(3., requires_grad=True)
    y = CheckpointedLayer.apply(torch.tensor(2., requires_grad=True), lambda h: h * w, offloader)
    left = offloader.last
    assert left().host[0].item() == 2
    del y
    gc.collect()
    assert left() is None
    CheckpointedLayer.apply(torch.tensor(2., requires_grad=True), lambda h: h * w, offloader).backward()
    assert w.grad.item() == 2


def test_an_offloaded_tensor_is_a_copy_and_is_fetched_once():
    x = torch.arange(4.)
    away = OffloadedTensor(x)
    x.fill_(-1)
    away.fetch()
    first = away.get()
    away.fetch()
    assert away.get() is first and first.tolist() == [0, 1, 2, 3]


def test_reloading_an_input_fetches_the_one_before():
    offloader = ActivationOffloader()
    items = [offloader.offload(torch.tensor(float(i))) for i in range(3)]
    assert offloader.reload(items[2]).item() == 2 and items[1].on_gpu is not None and items[0].on_gpu is None
    assert items[2].host is items[2].on_gpu is None
    assert [offloader.reload(items[i]).item() for i in (1, 0)] == [1, 0]


@given(st.lists(st.integers(1, 5), max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_a_tensor_of_any_shape_and_order_comes_back_as_it_was(shape, random):
    order = random.sample(range(len(shape)), len(shape))
    x = torch.randn(shape).permute(order)
    away, expected = OffloadedTensor(x), x.clone()
    x.zero_()
    back = away.get()
    assert torch.equal(back, expected) and back.stride() == x.stride() and away.nbytes == expected.nbytes


def test_chunks_are_of_64_mib_and_leave_nothing_out():
    for dtype, n in ((torch.bfloat16, PINNED_CHUNK // 2 * 2 + 3), (torch.float32, PINNED_CHUNK // 4), (torch.float32, 0)):
        sizes = [len(p) for p in pinned_chunks(torch.empty(n, dtype=dtype))]
        assert sum(sizes) == n and all(k * dtype.itemsize == PINNED_CHUNK for k in sizes[:-1]) and sizes[-1] * dtype.itemsize <= PINNED_CHUNK


def test_room_for_attention_is_never_exceeded_and_given_back():
    offloader = ActivationOffloader(attention_bytes=100)
    kept = [offloader.offload_if_room(torch.zeros(10)) for _ in range(4)]
    assert [k is not None for k in kept] == [True, True, False, False]
    kept.clear()
    gc.collect()
    assert offloader.offload_if_room(torch.zeros(25)) is not None and ActivationOffloader().offload_if_room(torch.zeros(1)) is None


def attention(q, causal=True): return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal)


def twice(layer, room):
    "A gradient by way of `CheckpointedLayer`, and how often attention ran."
    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += 'scaled_dot_product' in func.name() and 'backward' not in func.name()
            return func(*args, **(kwargs or {}))
    offloader, x = ActivationOffloader(room), torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with Counted() as seen: CheckpointedLayer.apply(x, offloader.save_attention(layer), offloader).square().sum().backward()
    gc.collect()
    assert not offloader.attention
    return x.grad, seen.n


@pytest.mark.parametrize('layer, once', [(attention, 1), (lambda x: attention(attention(x) + x), 2), (lambda x: x * 2, 0)], ids=['one', 'two', 'none'])
def test_parity_of_saved_attention(layer, once):
    expected, n = twice(layer, 0)
    assert n == 2 * once
    result, n = twice(layer, 10**6)
    assert n == once and torch.allclose(result, expected, atol=1e-6)
    if once == 2: assert twice(layer, 500)[1] == 3          # room for the first only


def test_another_operator_the_second_time_computes():
    "A saved result belongs to the operator that returned it."
    def layer(x):
        if not torch.is_grad_enabled(): return attention(x)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH): return attention(x)
    expected, result = twice(attention, 0)[0], twice(layer, 10**6)[0]
    assert torch.allclose(result, expected, atol=1e-6)


def test_saved_attention_of_a_failed_micro_batch_is_freed_with_it():
    offloader = ActivationOffloader(10**6)
    y = CheckpointedLayer.apply(torch.randn(1, 2, 5, 8, requires_grad=True), offloader.save_attention(attention), offloader)
    assert len(offloader.attention) == 2
    del y
    gc.collect()
    assert not offloader.attention


@cuda
def test_an_offloaded_tensor_comes_back_to_the_last_bit_though_its_memory_is_used_again():
    for _ in range(20):
        x = torch.randn(2048, 2048, device='cuda')
        expected, away = x.clone(), OffloadedTensor(x)
        assert all(p.is_pinned() for p in away.host)
        del x
        torch.full((2048, 2048), 7., device='cuda')
        assert torch.equal(away.get(), expected)


@cuda
@pytest.mark.parametrize('kind', ['FLASH_ATTENTION', 'CUDNN_ATTENTION', 'EFFICIENT_ATTENTION', 'varlen'])
def test_parity_of_saved_attention_on_a_gpu(kind):
    from homelab_ft.train.engine.ops import varlen_attention as ours
    x = torch.randn(512, 4, 64, device='cuda', dtype=torch.bfloat16)
    cu = torch.tensor([0, 200, 512], dtype=torch.int32, device='cuda')

    def layer(x):
        if kind == 'varlen': return ours.varlen_attention(x, x, x, cu, 512, None)
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, kind)): return ours.batched_attention(x, x, x, 256, None)

    grads = []
    for room in (0, 10**9):
        offloader, h = ActivationOffloader(room), x.clone().requires_grad_()
        CheckpointedLayer.apply(h, offloader.save_attention(layer) if room else layer, offloader).float().square().sum().backward()
        grads.append(h.grad)
    assert (grads[0] - grads[1]).float().norm() <= 1e-3 * grads[0].float().norm()
