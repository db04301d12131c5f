"Rows end to end: properties of the packers and of the arrays, and parity with the plain step on padded rows."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from homelab_ft.train.engine.padded import accumulate
from homelab_ft.train.engine.batching import collate
from homelab_ft.train.engine.packing import collate_packed, epoch_packing, round_up, bucket_shape, bin_pack

KEYS = ['input_ids', 'position_ids', 'cu_seqlens', 'at', 'targets', 'weights']


class PackedStep:
    def __init__(self, rows): self.rows, self.lengths = rows, np.array([len(ids) for ids, _ in rows])
    def row(self, i): return self.rows[i]
    def learned(self): return [int((mask[1:] > 0).sum()) for _, mask in self.rows]
    def __len__(self): return len(self.rows)


def random_rows(lengths, seed=0, share=0.4, vocab=96):
    rng = np.random.default_rng(seed)
    return PackedStep([(rng.integers(1, vocab, n).astype(np.int32), (rng.random(n) < share).astype(np.uint8)) for n in lengths])


def batch_of(cache, rows, grain, longest, n): return collate_packed(cache, rows, bucket_shape(cache.lengths, cache.learned(), rows, grain, longest), longest, n)


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=120)


@given(lengths, st.integers(50, 130), st.randoms())
@settings(max_examples=150, deadline=None)
def test_every_row_once_and_never_above_the_budget(lengths, budget, random):
    rows = random.sample(range(len(lengths)), random.randint(1, len(lengths)))
    passes = bin_pack(lengths, rows, budget)
    used = [sum(lengths[r] for r in p) for p in passes]
    assert sorted(r for p in passes for r in p) == sorted(rows) and all(passes)
    assert max(used) <= budget
    # first fit: no row of a later pass would have fitted into an earlier one
    assert all(used[i] + lengths[r] > budget for j, p in enumerate(passes) for r in p for i in range(j))
    assert passes == bin_pack(np.array(lengths), rows, budget)


def test_no_more_passes_than_an_exhaustive_search_allows():
    def best(sizes, budget):       # smallest number of passes, by trying them all
        def place(i, used):
            if i == len(sizes): return len(used)
            options = [place(i + 1, used[:j] + [u + sizes[i]] + used[j + 1:]) for j, u in enumerate(used) if u + sizes[i] <= budget]
            return min([*options, place(i + 1, used + [sizes[i]])])
        return place(0, [])
    rng = np.random.default_rng(0)
    for _ in range(40):
        sizes = rng.integers(1, 10, 7).tolist()
        assert 9 * len(bin_pack(sizes, list(range(7)), 10)) <= 11 * best(sizes, 10) + 6


def test_a_row_above_the_budget_is_named():
    with pytest.raises(ValueError, match='row 2 has 11 tokens, and a pass holds 10'): bin_pack([3, 4, 11], [0, 1, 2], 10)
    with pytest.raises(ValueError, match='row 0 has 65'): epoch_packing([65], 64, 0, 0)


@given(lengths, st.integers(50, 200), st.integers(0, 5), st.integers(0, 3), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_packed_epochs_hold_every_row_once_in_an_order_of_their_own(lengths, packed_length, seed, epoch, window):
    packed = epoch_packing(lengths, packed_length, seed, epoch, window)
    assert sorted(r for line in packed for r in line) == list(range(len(lengths)))
    assert all(sum(lengths[r] for r in line) <= packed_length for line in packed)
    assert packed == epoch_packing(np.array(lengths), packed_length, seed, epoch, window)
    if len(packed) > 12: assert packed != epoch_packing(lengths, packed_length, seed, epoch + 1, window)


def test_lines_stay_the_same_between_epochs_and_change_with_the_seed():
    first, second, other = epoch_packing([16] * 64, 64, 0, 0), epoch_packing([16] * 64, 64, 0, 1), epoch_packing([16] * 64, 64, 1, 0)
    assert first != second and {frozenset(line) for line in first} == {frozenset(line) for line in second}
    assert {frozenset(line) for line in first} != {frozenset(line) for line in other}


@given(st.integers(0, 10**6), st.integers(1, 4096))
def test_round_up_is_the_smallest_multiple(n, grain):
    up = round_up(n, grain)
    assert up % grain == 0 and 0 <= up - n < grain


@given(lengths, st.integers(1, 64), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_shapes_hold_their_rows(lengths, grain, seed):
    cache = random_rows(lengths, seed)
    size, labels, sequences = bucket_shape(cache.lengths, cache.learned(), list(range(len(cache))), grain, max(lengths))
    assert 0 <= size - sum(lengths) < grain and size % grain == 0
    assert max(1, sum(cache.learned())) <= labels <= size
    assert sequences >= len(lengths) + -(-(size - sum(lengths)) // max(lengths)) and sequences >= 8 and sequences & (sequences - 1) == 0


@given(lengths, st.integers(1, 64), st.integers(0, 99), st.integers(0, 500))
@settings(max_examples=200, deadline=None)
def test_the_arrays_say_what_the_rows_say(lengths, grain, seed, others):
    cache = random_rows(lengths, seed)
    rows, longest, learned = list(range(len(cache))), max(lengths), sum(cache.learned())
    n = max(1, learned + others)
    b = batch_of(cache, rows, grain, longest, n)
    size, cuts, total = b['input_ids'].shape[1], b['cu_seqlens'], sum(lengths)
    assert list(b) == KEYS and [b[k].dtype for k in KEYS] == [np.int64, np.int64, np.int32, np.int64, np.int64, np.float32]

    # boundaries: they begin at 0, never go back, end in the size, cut at every row, and no sequence is longer than the longest row
    assert cuts[0] == 0 and cuts[-1] == size and (np.diff(cuts) >= 0).all() and np.diff(cuts).max() <= longest
    assert cuts[:len(rows) + 1].tolist() == [0, *np.cumsum(lengths).tolist()]

    # tokens, and positions that begin again with every sequence
    assert b['input_ids'][0, :total].tolist() == np.concatenate([ids for ids, _ in cache.rows]).tolist() and not b['input_ids'][0, total:].any()
    expected = np.concatenate([np.arange(k) for k in np.diff(cuts)])
    assert b['position_ids'][0].tolist() == expected.tolist()

    # learned tokens: exactly those of the masks, the first of a row never; the rest has no weight
    found = [(r, int(p), int(ids[p + 1])) for r, (ids, mask) in enumerate(cache.rows) for p in range(len(ids) - 1) if mask[p + 1]]
    assert b['at'][:learned].tolist() == [int(cuts[r]) + p for r, p, _ in found]
    assert b['targets'][:learned].tolist() == [t for _, _, t in found]
    assert (b['weights'][:learned] == np.float32(1 / n)).all() and not b['weights'][learned:].any()
    assert abs(float(b['weights'].sum(dtype=np.float64)) - learned / n) < 1e-6
    assert not b['at'][learned:].any() and not b['targets'][learned:].any()


@given(st.lists(st.integers(2, 40), min_size=2, max_size=40), st.integers(40, 90), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_the_weights_of_all_passes_of_a_step_sum_to_one(lengths, budget, seed):
    cache = random_rows(lengths, seed, share=0.9)
    n = sum(cache.learned())
    passes = [batch_of(cache, p, 16, max(lengths), n) for p in bin_pack(lengths, list(range(len(lengths))), budget)]
    assert abs(sum(float(b['weights'].sum(dtype=np.float64)) for b in passes) - (1 if n else 0)) < 1e-5


@pytest.mark.parametrize('shape, message', [((39, 40, 8), '40 tokens, and its shape holds 39'), ((64, 5, 8), 'learned tokens, and its shape holds 5'),
                                            ((64, 64, 4), '5 sequences, filling included, and its shape holds 4')])
def test_rows_that_do_not_fit_their_shape_are_refused(shape, message):
    cache = random_rows([20, 12, 8], share=1.)
    with pytest.raises(ValueError, match=message): collate_packed(cache, [0, 1, 2], shape, 20, 10)


def test_numpy_numbers_are_as_good_as_plain_ones():
    cache = random_rows([5, 4, 8])
    shape = bucket_shape(cache.lengths, np.array(cache.learned()), [0, 1, 2], 16, cache.lengths.max())
    assert shape == bucket_shape([5, 4, 8], cache.learned(), [0, 1, 2], 16, 8) and all(type(n) is int for n in shape)
    assert collate_packed(cache, [0, 1, 2], shape, cache.lengths.max(), 7)['cu_seqlens'].tolist() == [0, 5, 9, 17, 25, 32, 32, 32, 32]


def test_a_fixed_shape_gives_the_same_sizes_for_any_rows():
    cache = random_rows([20, 12, 8, 3])
    sizes = {tuple(collate_packed(cache, rows, (64, 40, 16), 20, 9)[k].shape for k in KEYS) for rows in ([0], [3, 1], [0, 1, 2, 3])}
    assert sizes == {((1, 64), (1, 64), (17,), (40,), (40,), (40,))}


def test_nothing_learned_and_large_token_ids():
    cache = PackedStep([(np.array([2 ** 31 - 1, 7, 2 ** 31 - 2], np.int64), np.array([1, 0, 0], np.uint8)), (np.array([3, 2 ** 31 - 1]), np.array([0, 1], np.uint8))])
    b = batch_of(cache, [0], 4, 3, n=0)
    assert not b['weights'].any() and np.isfinite(b['weights']).all()
    assert batch_of(cache, [0, 1], 4, 3, n=1)['targets'][0] == 2 ** 31 - 1


@pytest.mark.parametrize('budget', [24, 40, 200])
@pytest.mark.parametrize('grain', [1, 16])
def test_parity_of_loss_and_gradient_with_padded_rows(budget, grain):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    cache = random_rows([7, 19, 3, 24, 11, 2, 16, 5], seed=3)
    rows = list(range(len(cache)))
    expected, n = accumulate(model, [collate(cache, rows[:4], 0), collate(cache, rows[4:], 0)])
    stock = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    total = 0.
    for part in bin_pack(cache.lengths, rows, budget):
        b = {k: torch.from_numpy(v) for k, v in batch_of(cache, part, grain, 24, n).items()}
        logits = model(input_ids=b['input_ids'], position_ids=b['position_ids'], use_cache=False).logits[0, b['at']]
        loss = (F.cross_entropy(logits, b['targets'], reduction='none') * b['weights']).sum()
        loss.backward()
        total += loss.item()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert n == sum(cache.learned()) and abs(total - expected.item()) < 1e-5
    assert (flat - stock).norm() / stock.norm() < 1e-5
