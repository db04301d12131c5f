"Intervals: what the notebook's examples do not try."
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from homelab_ft.core import DataError
from homelab_ft.evaluate import bootstrap
from homelab_ft.evaluate.bootstrap import MIN_EXAMPLES, Interval, paired_bootstrap, paired_shares, shuffle_test, sign_flip_test

examples = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50), st.integers(1, 40)), min_size=MIN_EXAMPLES, max_size=40)

@settings(max_examples=30, deadline=None)
@given(examples)
def test_interval_lies_within_the_examples_and_swapping_the_models_mirrors_it(data):
    base, fine_tuned, tokens = map(np.array, zip(*data))
    gain, mirrored = paired_bootstrap(base, fine_tuned, tokens, 200), paired_bootstrap(fine_tuned, base, tokens, 200)
    each = (base - fine_tuned) / tokens
    assert each.min() - 1e-9 <= gain.low <= gain.high <= each.max() + 1e-9
    assert each.min() - 1e-9 <= gain.gain <= each.max() + 1e-9
    np.testing.assert_allclose([gain.gain, gain.low, gain.high], [-mirrored.gain, -mirrored.high, -mirrored.low], atol=1e-9)

def test_examples_without_answer_tokens_change_nothing():
    base, fine_tuned, tokens = np.arange(10.) + 1, np.arange(10.), np.full(10, 2)
    padded = paired_bootstrap(np.append(base, 0), np.append(fine_tuned, 0), np.append(tokens, 0))
    assert padded == paired_bootstrap(base, fine_tuned, tokens)

def test_batches_of_resamples_change_nothing_and_the_width_is_the_textbooks(monkeypatch):
    rng = np.random.default_rng(0)
    base, fine_tuned, tokens = rng.normal(5, 1, 1000), rng.normal(4, 1, 1000), np.ones(1000)
    gain = paired_bootstrap(base, fine_tuned, tokens, 1500)
    monkeypatch.setattr(bootstrap, 'MAX_RESAMPLED_VALUES', 70_000)       # 70 resamples at a time
    assert gain == paired_bootstrap(base, fine_tuned, tokens, 1500)
    error = np.std(base - fine_tuned) / np.sqrt(1000)
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * error, rel=0.15)

def test_level_widens_the_interval():
    rng = np.random.default_rng(0)
    base, fine_tuned = rng.normal(5, 1, 100), rng.normal(4.8, 1, 100)
    narrow, wide = (paired_bootstrap(base, fine_tuned, np.ones(100), level=level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high

@pytest.mark.parametrize('n, conclusion', [(MIN_EXAMPLES - 1, 'no difference shown'), (MIN_EXAMPLES, 'better')])
def test_few_examples_lead_to_no_conclusion(n, conclusion):
    assert paired_bootstrap(np.full(n, 2.), np.ones(n), np.ones(n)).conclusion == conclusion

outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=MIN_EXAMPLES, max_size=60)


@settings(max_examples=60, deadline=None)
@given(outcomes)
def test_shares_of_right_answers_agree_with_the_exact_test(data):
    base, fine_tuned = map(np.array, zip(*data))
    gain, mirrored = paired_shares(base, fine_tuned), paired_shares(fine_tuned, base)
    assert -1 <= gain.low < gain.high <= 1 and gain.low <= gain.gain <= gain.high
    np.testing.assert_allclose([gain.low, gain.high], [-mirrored.high, -mirrored.low], atol=1e-9)
    p = sign_flip_test(fine_tuned.astype(int) - base)
    if gain.conclusion != 'no difference shown' and sum(base != fine_tuned) <= 12: assert p <= 0.05


@pytest.mark.parametrize('differ', [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize('n', [8, 20, 50])
def test_equally_good_models_are_seldom_called_better(n, differ):
    rng = np.random.default_rng(n)
    better = 0
    for _ in range(400):
        coin = rng.random(n) < 0.5
        other = coin ^ (rng.random(n) < differ)
        better += paired_shares(coin, other).conclusion == 'better'
    assert better / 400 <= 0.025 + 3 * (0.025 / 400)**0.5


def test_answers_that_do_not_depend_on_the_question_are_found_out():
    rng = np.random.default_rng(0)
    expected = rng.choice(4, 60)
    found = [shuffle_test(np.equal.outer(rng.choice(4, 60), expected), 200, seed).p <= 0.05 for seed in range(200)]
    assert np.mean(found) <= 0.05 + 3 * (0.05 / 200)**0.5
    assert shuffle_test(np.equal.outer(expected, expected)).p < 0.001


def test_nothing_to_measure_is_an_error():
    with pytest.raises(DataError, match='have no tokens'): paired_bootstrap([1.], [1.], [0])
    assert str(Interval(0.1)).endswith('[too few examples]')
