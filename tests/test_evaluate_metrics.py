"Metrics on random classes and texts."
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from homelab_ft.core import DataError
from homelab_ft.evaluate.metrics import (accuracy, chrf, confusion, exact_matches, is_free_text, macro_f1, prefers_chosen, reward_accuracy, rouge_l,
                                         words)

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

SENTENCES = ['Please return it within 14 days.', 'Die Größe paßt nicht, tut mir leid.', "L'été, où êtes-vous allés ?", '¿Cuándo llegará mi pedido mañana?', 'Когда придёт мой заказ?',
             '我的订单什么时候到？', '返品は十四日以内にお願いします。', 'आपका ऑर्डर कल आएगा।', 'คำสั่งซื้อจะมาถึงพรุ่งนี้', 'سيصل طلبك غدا', '주문은 내일 도착합니다']

@pytest.mark.parametrize('text', SENTENCES)
def test_text_metrics_read_every_script(text):
    kept = ''.join(words(text))
    assert [len([c for c in text if c.isalpha()]) <= len(kept), len(words(text)) > 2] == [True, True]
    others = [t for t in SENTENCES if t != text]
    assert rouge_l([text], [text.upper() + ' !'])[0] == 1 and chrf([text], [text])[0] == pytest.approx(100)
    assert max(rouge_l([text] * len(others), others)) < 0.2
    half = text[:len(text) // 2]
    assert 0.3 < rouge_l([text], [half])[0] < 1 and 20 < chrf([text], [half])[0] < 100

def test_rouge_l_is_that_of_rouge_score_in_english():
    from rouge_score.rouge_scorer import RougeScorer
    pairs = [('the cat sat on the mat', 'the cat is on a mat'), ('Please return it, within 14 days!', 'return it in 14 days'), ('a b c d', 'd c b a')]
    reference = [RougeScorer(['rougeL']).score(*pair)['rougeL'].fmeasure for pair in pairs]
    assert rouge_l(*zip(*pairs)) == pytest.approx(reference)

def test_texts_without_words_score_nothing_and_break_nothing():
    assert rouge_l(['', '!?', 'a'], ['', '!?', '']).tolist() == [0, 0, 0] and rouge_l([], []).tolist() == [] == chrf([], []).tolist()
    assert chrf(['', 'a'], ['', '']).tolist() == [0, 0]

def test_free_text_is_known_by_the_expected_answers():
    assert is_free_text(SENTENCES[:1] * 3 + ['yes']) and is_free_text(['我的订单什么时候到？']) and not is_free_text(['card payments', '42', '{"team": "sales"}'])
