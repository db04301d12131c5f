"Intervals and sums: what the notebook's examples do not try."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from homelab_ft.core import DataError
from homelab_ft.data.tokenize import make_cache
from homelab_ft.evaluate.bootstrap import MIN_ROWS, Interval, paired_bootstrap, paired_bootstrap_accuracy
from homelab_ft.evaluate.likelihood import perplexity, sequence_nll
from homelab_ft.train.base_model import load_base

rows = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50), st.integers(1, 40)), min_size=MIN_ROWS, max_size=40)

@settings(max_examples=60, deadline=None)
@given(rows)
def test_interval_lies_within_the_rows(data):
    base, tuned, tokens = map(np.array, zip(*data))
    gain = paired_bootstrap(base, tuned, tokens, n=200)
    each = (base - tuned) / tokens
    assert each.min() - 1e-9 <= gain.low <= gain.high <= each.max() + 1e-9
    assert each.min() - 1e-9 <= gain.mean <= each.max() + 1e-9

@settings(max_examples=40, deadline=None)
@given(rows)
def test_swapping_the_models_mirrors_the_interval(data):
    base, tuned, tokens = map(np.array, zip(*data))
    a, b = paired_bootstrap(base, tuned, tokens, n=200), paired_bootstrap(tuned, base, tokens, n=200)
    np.testing.assert_allclose([a.mean, a.low, a.high], [-b.mean, -b.high, -b.low], atol=1e-9)

def test_rows_without_answer_tokens_change_nothing():
    base, tuned, tokens = np.arange(10.) + 1, np.arange(10.), np.full(10, 2)
    padded = paired_bootstrap(np.append(base, 0), np.append(tuned, 0), np.append(tokens, 0))
    assert padded == paired_bootstrap(base, tuned, tokens)

def test_portions_give_the_same_spread_as_one_table(monkeypatch):
    rng = np.random.default_rng(0)
    base, tuned, tokens = rng.normal(5, 1, 3000), rng.normal(4, 1, 3000), np.ones(3000)
    gain = paired_bootstrap(base, tuned, tokens, n=1500)                   # 3000 rows: several portions
    error = np.std(base - tuned) / np.sqrt(3000)
    assert abs(gain.high - gain.low - 2 * 1.96 * error) < 0.15 * error * 4
    assert gain == paired_bootstrap(base, tuned, tokens, n=1500)

def test_level_widens_the_interval():
    rng = np.random.default_rng(0)
    base, tuned = rng.normal(5, 1, 100), rng.normal(4.8, 1, 100)
    narrow, wide = (paired_bootstrap(base, tuned, np.ones(100), level=level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high

@pytest.mark.parametrize('n, verdict', [(MIN_ROWS - 1, 'no measurable difference'), (MIN_ROWS, 'better')])
def test_few_rows_get_no_verdict(n, verdict):
    assert paired_bootstrap(np.full(n, 2.), np.ones(n), np.ones(n)).verdict == verdict

def test_accuracy_interval_counts_shares():
    gain = paired_bootstrap_accuracy([False] * 20, [True] * 20)
    assert (gain.mean, gain.low, gain.high) == (1, 1, 1)
    assert paired_bootstrap_accuracy([True] * 20, [False] * 20).verdict == 'worse'

def test_nothing_to_measure_is_an_error():
    with pytest.raises(DataError, match='no answer tokens'): perplexity([1.], [0])
    with pytest.raises(DataError, match='have no tokens'): paired_bootstrap([1.], [1.], [0])
    assert str(Interval(0.1, float('nan'), float('nan'))).endswith('[too few rows]')

@pytest.mark.parametrize('k', [1, 3, 4])
def test_a_card_that_is_too_full_changes_no_row(k):
    rng, model = np.random.default_rng(0), load_base('embedded').eval()
    lengths = rng.integers(2, 30, 13)
    cache = make_cache([(rng.integers(5, 4000, n), (rng.random(n) < 0.5).astype(np.uint8)) for n in lengths], list(range(13)))
    nll, tokens = sequence_nll(model, cache, 8, progress=False)
    tried = []
    def full(module, args, kwargs):
        tried.append(len(kwargs['input_ids']))
        if tried[-1] > k: raise torch.OutOfMemoryError('CUDA out of memory.')
    model.base_model.register_forward_pre_hook(full, with_kwargs=True)
    again = sequence_nll(model, cache, 8, progress=False)
    np.testing.assert_allclose(again[0], nll, atol=1e-4)
    assert (again[1] == tokens).all() and max(tried) == 8 and tried[-2] <= k and 8 not in tried[1:]
