"Metrics on random classes and texts."
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from homelab_ft.core import DataError
from homelab_ft.evaluate.metrics import accuracy, confusion, exact_matches, macro_f1, prefers_chosen, reward_accuracy

labels = st.sampled_from('abc')

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(labels, labels), min_size=1, max_size=30))
def test_confusion_accuracy_and_f1_agree(pairs):
    true, predicted = map(list, zip(*pairs))
    counts = np.array([row[1:] for row in confusion(true, predicted).rows])
    assert counts.sum() == len(pairs)
    assert np.trace(counts) / len(pairs) == pytest.approx(accuracy(true, predicted))
    tp, total = np.diag(counts), counts.sum(0) + counts.sum(1)
    assert macro_f1(true, predicted) == pytest.approx((2 * tp / total).mean())

@settings(max_examples=40, deadline=None)
@given(st.text())
def test_exact_match_ignores_white_space_only(text):
    assert exact_matches([text], ['  ' + text + '\n']) == [True]
    assert exact_matches([text], [text + '!']) == [False]

def test_lists_of_different_length_are_refused():
    for f in (lambda: accuracy([], []), lambda: exact_matches(['a'], ['a', 'b'])):
        with pytest.raises(DataError): f()

def test_reward_accuracy_counts_pairs_that_moved_the_right_way():
    rng = np.random.default_rng(0)
    base = rng.normal(-10, 2, (2, 200))
    fine_tuned = base + [[1.], [-1.]] + rng.normal(0, 0.5, (2, 200))
    assert reward_accuracy(base, fine_tuned).mean() > 0.95
    assert prefers_chosen(*fine_tuned).mean() > prefers_chosen(*base).mean() + 0.1
