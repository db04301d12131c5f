"Packing: properties of the packers and of the arrays, and parity with a padded batch."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from homelab_ft.train.engine.padded import accumulate
from homelab_ft.train.engine.batching import collate
from homelab_ft.train.engine.packing import collate_packed, epoch_packing, round_up, bucket_shape, bin_pack

KEYS = ['input_ids', 'position_ids', 'cu_seqlens', 'label_positions', 'targets', 'weights']


class Sequences:
    def __init__(self, sequences): self.sequences, self.lengths = sequences, np.array([len(ids) for ids, _ in sequences])
    def row(self, i): return self.sequences[i]
    def label_tokens(self): return [int((mask[1:] > 0).sum()) for _, mask in self.sequences]
    def __len__(self): return len(self.sequences)


def random_sequences(lengths, seed=0, share=0.4, vocab=96):
    rng = np.random.default_rng(seed)
    return Sequences([(rng.integers(1, vocab, n).astype(np.int32), (rng.random(n) < share).astype(np.uint8)) for n in lengths])


def batch_of(cache, numbers, bucket_size, max_seq_len, n):
    bucket = bucket_shape(cache.lengths, cache.label_tokens(), numbers, bucket_size, max_seq_len)
    return collate_packed(cache, numbers, bucket, max_seq_len, n)


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=120)


@given(lengths, st.integers(50, 130), st.randoms())
@settings(max_examples=60, deadline=None)
def test_every_sequence_once_and_never_above_the_limit(lengths, max_tokens, random):
    rows = random.sample(range(len(lengths)), random.randint(1, len(lengths)))
    micro_batches = bin_pack(lengths, rows, max_tokens)
    used = [sum(lengths[r] for r in p) for p in micro_batches]
    assert sorted(r for p in micro_batches for r in p) == sorted(rows) and all(micro_batches)
    assert max(used) <= max_tokens
    # first fit: no sequence of a later micro-batch would have fitted into an earlier one
    assert all(used[i] + lengths[r] > max_tokens for j, p in enumerate(micro_batches) for r in p for i in range(j))
    assert micro_batches == bin_pack(np.array(lengths), rows, max_tokens)


def test_no_more_micro_batches_than_an_exhaustive_search_allows():
    def best(sizes, max_tokens):       # smallest number of micro_batches, by trying them all
        def place(i, used):
            if i == len(sizes): return len(used)
            options = [place(i + 1, used[:j] + [u + sizes[i]] + used[j + 1:]) for j, u in enumerate(used) if u + sizes[i] <= max_tokens]
            return min([*options, place(i + 1, used + [sizes[i]])])
        return place(0, [])
    rng = np.random.default_rng(0)
    for _ in range(40):
        sizes = rng.integers(1, 10, 7).tolist()
        assert 9 * len(bin_pack(sizes, list(range(7)), 10)) <= 11 * best(sizes, 10) + 6


def test_a_sequence_above_the_limit_is_named():
    with pytest.raises(ValueError, match='sequence 2 has 11 tokens, and a micro-batch holds 10'): bin_pack([3, 4, 11], [0, 1, 2], 10)
    with pytest.raises(ValueError, match='sequence 0 has 65'): epoch_packing([65], 64, 0, 0)


@given(lengths, st.integers(50, 200), st.integers(0, 5), st.integers(0, 3), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_packed_epochs_hold_every_sequence_once_in_an_order_of_their_own(lengths, packed_length, seed, epoch, window):
    packed = epoch_packing(lengths, packed_length, seed, epoch, window)
    assert sorted(r for line in packed for r in line) == list(range(len(lengths)))
    assert all(sum(lengths[r] for r in line) <= packed_length for line in packed)
    assert packed == epoch_packing(np.array(lengths), packed_length, seed, epoch, window)
    if len(packed) > 12: assert packed != epoch_packing(lengths, packed_length, seed, epoch + 1, window)


def test_packed_sequences_stay_the_same_between_epochs_and_change_with_the_seed():
    first, second, other = epoch_packing([16] * 64, 64, 0, 0), epoch_packing([16] * 64, 64, 0, 1), epoch_packing([16] * 64, 64, 1, 0)
    assert first != second and {frozenset(line) for line in first} == {frozenset(line) for line in second}
    assert {frozenset(line) for line in first} != {frozenset(line) for line in other}


@given(st.integers(0, 10**6), st.integers(1, 4096))
def test_round_up_is_the_smallest_multiple(n, bucket_size):
    up = round_up(n, bucket_size)
    assert up % bucket_size == 0 and 0 <= up - n < bucket_size


@given(lengths, st.integers(1, 64), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_buckets_hold_their_sequences(lengths, bucket_size, seed):
    cache = random_sequences(lengths, seed)
    size, labels, sequences = bucket_shape(cache.lengths, cache.label_tokens(), list(range(len(cache))), bucket_size, max(lengths))
    assert 0 <= size - sum(lengths) < bucket_size and size % bucket_size == 0
    assert max(1, sum(cache.label_tokens())) <= labels <= size
    assert sequences >= len(lengths) + -(-(size - sum(lengths)) // max(lengths)) and sequences >= 8 and sequences & (sequences - 1) == 0


@given(lengths, st.integers(1, 64), st.integers(0, 99), st.integers(0, 500))
@settings(max_examples=80, deadline=None)
def test_the_arrays_hold_the_sequences(lengths, bucket_size, seed, others):
    cache = random_sequences(lengths, seed)
    rows, max_seq_len, learned = list(range(len(cache))), max(lengths), sum(cache.label_tokens())
    n = max(1, learned + others)
    b = batch_of(cache, rows, bucket_size, max_seq_len, n)
    size, cuts, total = b['input_ids'].shape[1], b['cu_seqlens'], sum(lengths)
    assert list(b) == KEYS and [b[k].dtype for k in KEYS] == [np.int64, np.int64, np.int32, np.int64, np.int64, np.float32]

    # boundaries: they begin at 0, never go back, end in the size, cut at every sequence, and none is longer than the longest sequence
    assert cuts[0] == 0 and cuts[-1] == size and (np.diff(cuts) >= 0).all() and np.diff(cuts).max() <= max_seq_len
    assert cuts[:len(rows) + 1].tolist() == [0, *np.cumsum(lengths).tolist()]

    # tokens, and positions that begin again with every sequence
    assert b['input_ids'][0, :total].tolist() == np.concatenate([ids for ids, _ in cache.sequences]).tolist() and not b['input_ids'][0, total:].any()
    expected = np.concatenate([np.arange(k) for k in np.diff(cuts)])
    assert b['position_ids'][0].tolist() == expected.tolist()

    # label tokens: exactly those of the masks, the first of a sequence never; the rest has no weight
    found = [(r, int(p), int(ids[p + 1])) for r, (ids, mask) in enumerate(cache.sequences) for p in range(len(ids) - 1) if mask[p + 1]]
    assert b['label_positions'][:learned].tolist() == [int(cuts[r]) + p for r, p, _ in found]
    assert b['targets'][:learned].tolist() == [t for _, _, t in found]
    assert (b['weights'][:learned] == np.float32(1 / n)).all() and not b['weights'][learned:].any()
    assert abs(float(b['weights'].sum(dtype=np.float64)) - learned / n) < 1e-6
    assert not b['label_positions'][learned:].any() and not b['targets'][learned:].any()


@given(st.lists(st.integers(2, 40), min_size=2, max_size=40), st.integers(40, 90), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_the_weights_of_all_micro_batches_of_a_step_sum_to_one(lengths, max_tokens, seed):
    cache = random_sequences(lengths, seed, share=0.9)
    n = sum(cache.label_tokens())
    micro_batches = [batch_of(cache, p, 16, max(lengths), n) for p in bin_pack(lengths, list(range(len(lengths))), max_tokens)]
    assert abs(sum(float(b['weights'].sum(dtype=np.float64)) for b in micro_batches) - (1 if n else 0)) < 1e-5


@pytest.mark.parametrize('bucket', [(39, 40, 8), (64, 5, 8), (64, 64, 4)])
def test_sequences_that_do_not_fit_their_bucket_are_refused(bucket):
    cache = random_sequences([20, 12, 8], share=1.)
    with pytest.raises(ValueError, match='does not fit into'): collate_packed(cache, [0, 1, 2], bucket, 20, 10)


def test_numpy_numbers_are_as_good_as_plain_ones():
    cache = random_sequences([5, 4, 8])
    shape = bucket_shape(cache.lengths, np.array(cache.label_tokens()), [0, 1, 2], 16, cache.lengths.max())
    assert shape == bucket_shape([5, 4, 8], cache.label_tokens(), [0, 1, 2], 16, 8) and all(type(n) is int for n in shape)
    assert collate_packed(cache, [0, 1, 2], shape, cache.lengths.max(), 7)['cu_seqlens'].tolist() == [0, 5, 9, 17, 25, 32, 32, 32, 32]


def test_a_fixed_bucket_gives_the_same_sizes_for_any_sequences():
    cache = random_sequences([20, 12, 8, 3])
    sizes = {tuple(collate_packed(cache, rows, (64, 40, 16), 20, 9)[k].shape for k in KEYS) for rows in ([0], [3, 1], [0, 1, 2, 3])}
    assert sizes == {((1, 64), (1, 64), (17,), (40,), (40,), (40,))}


def test_nothing_learned_and_large_token_ids():
    cache = Sequences([(np.array([2 ** 31 - 1, 7, 2 ** 31 - 2], np.int64), np.array([1, 0, 0], np.uint8)), (np.array([3, 2 ** 31 - 1]), np.array([0, 1], np.uint8))])
    b = batch_of(cache, [0], 4, 3, n=0)
    assert not b['weights'].any() and np.isfinite(b['weights']).all()
    assert batch_of(cache, [0, 1], 4, 3, n=1)['targets'][0] == 2 ** 31 - 1


@pytest.mark.parametrize('max_tokens, bucket_size', [(24, 1), (40, 16), (200, 16)])
def test_parity_of_loss_and_gradient_with_a_padded_batch(max_tokens, bucket_size):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    cache = random_sequences([7, 19, 3, 24, 11, 2, 16, 5], seed=3)
    rows = list(range(len(cache)))
    expected, n = accumulate(model, [collate(cache, rows[:4], 0), collate(cache, rows[4:], 0)])
    stock = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    total = 0.
    for part in bin_pack(cache.lengths, rows, max_tokens):
        b = {k: torch.from_numpy(v) for k, v in batch_of(cache, part, bucket_size, 24, n).items()}
        logits = model(input_ids=b['input_ids'], position_ids=b['position_ids'], use_cache=False).logits[0, b['label_positions']]
        loss = (F.cross_entropy(logits, b['targets'], reduction='none') * b['weights']).sum()
        loss.backward()
        total += loss.item()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert n == sum(cache.label_tokens()) and abs(total - expected.item()) < 1e-5
    assert (flat - stock).norm() / stock.norm() < 1e-5
