"The shelf: tensors that leave and come back, and attention that is remembered."
import gc

import pytest
import torch
from hypothesis import given, settings, strategies as st

from homelab_ft.train.engine.ops.checkpointing import CheckpointedLayer
from homelab_ft.train.engine.ops.offload import PINNED_CHUNK, OffloadedTensor, ActivationOffloader, _dense, _pieces

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no card')


def test_a_shelf_serves_two_passes_in_any_order():
    w = torch.tensor(3., requires_grad=True)
    for order in ((0, 1), (1, 0)):
        shelf, outs, xs = ActivationOffloader(), [], [torch.tensor(2., requires_grad=True), torch.tensor(5., requires_grad=True)]
        for x in xs:
            for _ in range(3): x = CheckpointedLayer.apply(x, lambda h: h * w, shelf)
            outs.append(x)
        for i in order: outs[i].backward()
        assert [x.grad.item() for x in xs] == [27, 27]


def test_inputs_of_a_pass_that_broke_off_vanish_with_it():
    shelf, w = ActivationOffloader(), torch.tensor(3., requires_grad=True)
    y = CheckpointedLayer.apply(torch.tensor(2., requires_grad=True), lambda h: h * w, shelf)
    left = shelf.last
    assert left().host[0].item() == 2
    del y
    gc.collect()
    assert left() is None
    CheckpointedLayer.apply(torch.tensor(2., requires_grad=True), lambda h: h * w, shelf).backward()
    assert w.grad.item() == 2


def test_one_forward_pass_allows_one_backward_pass():
    y = CheckpointedLayer.apply(torch.tensor(2., requires_grad=True), lambda h: h * h, ActivationOffloader())
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='one backward pass at policy offload'): y.backward()


def test_offloaded_is_a_copy_and_fetching_twice_is_once():
    x = torch.arange(4.)
    away = OffloadedTensor(x)
    x.fill_(-1)
    away.fetch()
    first = away.get()
    away.fetch()
    assert away.get() is first and first.tolist() == [0, 1, 2, 3]


def test_taking_an_input_fetches_the_one_before():
    shelf = ActivationOffloader()
    items = [shelf.put(torch.tensor(float(i))) for i in range(3)]
    assert shelf.take(items[2]).item() == 2 and items[1].card is not None and items[0].card is None
    assert items[2].host is items[2].card is None
    assert [shelf.take(items[i]).item() for i in (1, 0)] == [1, 0]


@given(st.lists(st.integers(1, 5), max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_tensor_of_any_shape_and_order_comes_back_as_it_was(shape, random):
    order = random.sample(range(len(shape)), len(shape))
    x = torch.randn(shape).permute(order)
    away, want = OffloadedTensor(x), x.clone()
    x.zero_()
    back = away.get()
    assert torch.equal(back, want) and back.stride() == x.stride() and away.nbytes == want.nbytes


def test_a_tensor_with_gaps_comes_back_without_them():
    x = torch.arange(12.).view(3, 4)[:, ::2]
    assert torch.equal(OffloadedTensor(x).get(), x) and _dense(x).is_contiguous()


def test_pieces_are_of_64_mib_and_leave_nothing_out():
    for dtype, n in ((torch.bfloat16, PINNED_CHUNK // 2 * 2 + 3), (torch.float32, PINNED_CHUNK // 4), (torch.float32, 0)):
        sizes = [len(p) for p in _pieces(torch.empty(n, dtype=dtype))]
        assert sum(sizes) == n and all(k * dtype.itemsize == PINNED_CHUNK for k in sizes[:-1]) and sizes[-1] * dtype.itemsize <= PINNED_CHUNK


def test_room_is_never_exceeded_and_given_back():
    shelf = ActivationOffloader(room=100)
    kept = [shelf.spare(torch.zeros(10)) for _ in range(4)]
    assert [k is not None for k in kept] == [True, True, False, False]
    kept.clear()
    gc.collect()
    assert shelf.spare(torch.zeros(25)) is not None and ActivationOffloader().spare(torch.zeros(1)) is None


def attention(q, causal=True): return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal)


def twice(layer, room):
    "A gradient by way of `CheckpointedLayer`, and how often attention ran."
    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += 'scaled_dot_product' in func.name() and 'backward' not in func.name()
            return func(*args, **(kwargs or {}))
    shelf, x = ActivationOffloader(room), torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with Counted() as seen: CheckpointedLayer.apply(x, shelf.save_attention(layer), shelf).square().sum().backward()
    gc.collect()
    assert not shelf.others
    return x.grad, seen.n


@pytest.mark.parametrize('layer, once', [(attention, 1), (lambda x: attention(attention(x) + x), 2), (lambda x: x * 2, 0)], ids=['one', 'two', 'none'])
def test_parity_of_remembered_attention(layer, once):
    want, n = twice(layer, 0)
    assert n == 2 * once
    got, n = twice(layer, 10**6)
    assert n == once and torch.allclose(got, want, atol=1e-6)
    if once == 2: assert twice(layer, 500)[1] == 3          # room for the first only


def test_another_operator_the_second_time_gets_no_note():
    "A note belongs to the operator that wrote it."
    def layer(x):
        if not torch.is_grad_enabled(): return attention(x)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH): return attention(x)
    want, got = twice(attention, 0)[0], twice(layer, 10**6)[0]
    assert torch.allclose(got, want, atol=1e-6)


def test_what_a_pass_that_broke_off_remembered_vanishes_with_it():
    shelf = ActivationOffloader(10**6)
    y = CheckpointedLayer.apply(torch.randn(1, 2, 5, 8, requires_grad=True), shelf.save_attention(attention), shelf)
    assert len(shelf.others) == 2
    del y
    gc.collect()
    assert not shelf.others


@cuda
def test_an_offloaded_tensor_comes_back_to_the_last_bit_though_its_place_is_used_again():
    for _ in range(20):
        x = torch.randn(2048, 2048, device='cuda')
        want, away = x.clone(), OffloadedTensor(x)
        assert all(p.is_pinned() for p in away.host)
        del x
        torch.full((2048, 2048), 7., device='cuda')
        assert torch.equal(away.get(), want)


@cuda
@pytest.mark.parametrize('kind', ['FLASH_ATTENTION', 'CUDNN_ATTENTION', 'EFFICIENT_ATTENTION', 'varlen'])
def test_parity_of_remembered_attention_on_a_card(kind):
    from homelab_ft.train.engine.ops import varlen_attention as ours
    x = torch.randn(512, 4, 64, device='cuda', dtype=torch.bfloat16)
    cu = torch.tensor([0, 200, 512], dtype=torch.int32, device='cuda')

    def layer(x):
        if kind == 'varlen': return ours.varlen_attention(x, x, x, cu, 512, None)
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, kind)): return ours.batched_attention(x, x, x, 256, None)

    got = []
    for room in (0, 10**9):
        shelf, h = ActivationOffloader(room), x.clone().requires_grad_()
        CheckpointedLayer.apply(h, shelf.save_attention(layer) if room else layer, shelf).float().square().sum().backward()
        got.append(h.grad)
    assert (got[0] - got[1]).float().norm() <= 1e-3 * got[0].float().norm()
