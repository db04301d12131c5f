"Scores and answers against the plain way, on several kinds of model."
import random
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from homelab_ft.core import DataError
from homelab_ft.evaluate import tasks
from homelab_ft.evaluate.tasks import accuracy, confusion_counts, exact_match, generate_greedy, label_logprobs, macro_f1

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
KINDS = {'llama': (LlamaForCausalLM, LlamaConfig(**SHAPE)), 'qwen2': (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
         'mistral with a window': (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=6)),
         'gemma2': (Gemma2ForCausalLM, Gemma2Config(**SHAPE, head_dim=8, sliding_window=6))}

@pytest.fixture(scope='module', params=KINDS)
def model(request):
    torch.manual_seed(0)
    kind, config = KINDS[request.param]
    return kind(config).eval()

def rows(seed, lengths):
    rng = random.Random(seed)
    return [[rng.randrange(2, 64) for _ in range(n)] for n in lengths]

def naive(model, prompt, label):
    with torch.inference_mode(): logp = model(torch.tensor([prompt + label])).logits[0].float().log_softmax(-1)
    return sum(logp[len(prompt) + t - 1, token].item() for t, token in enumerate(label))

PROMPTS, LABELS = rows(0, (1, 5, 12, 3, 9)), [*rows(1, (1, 3, 2, 5)), *rows(2, (5,))]

def test_label_logprobs_equal_full_passes(model):
    plain = [[naive(model, x, y) for y in LABELS] for x in PROMPTS]
    for batch_size in (1, 2, 8):
        np.testing.assert_allclose(label_logprobs(model, PROMPTS, LABELS, batch_size=batch_size, progress=False), plain, atol=1e-4)

def test_label_portions_change_nothing(model, monkeypatch):
    whole = label_logprobs(model, PROMPTS, LABELS, progress=False)
    monkeypatch.setattr(tasks, 'CACHED_POSITIONS', 1)                      # one label at a time
    np.testing.assert_allclose(label_logprobs(model, PROMPTS, LABELS, progress=False), whole, atol=1e-5)

def test_pad_id_changes_nothing(model):
    np.testing.assert_allclose(label_logprobs(model, PROMPTS, LABELS, pad_id=7, progress=False),
                               label_logprobs(model, PROMPTS, LABELS, pad_id=0, progress=False), atol=1e-5)

def test_greedy_in_a_batch_equals_one_by_one_and_full_passes(model):
    together = generate_greedy(model, PROMPTS, {1}, 10, progress=False)
    assert together == [generate_greedy(model, [p], {1}, 10, progress=False)[0] for p in PROMPTS]
    for prompt, answer in zip(PROMPTS, together):
        ids = list(prompt)
        for token in answer:
            with torch.inference_mode(): assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)

def test_greedy_stops_at_every_end_token(model):
    free = generate_greedy(model, PROMPTS, set(), 10, progress=False)
    ends = {free[0][3], free[1][5]}
    for answer, full in zip(generate_greedy(model, PROMPTS, ends, 10, progress=False), free):
        stop = next((i for i, t in enumerate(full) if t in ends), 10)
        assert answer == full[:stop]

def test_greedy_of_nothing(model):
    assert generate_greedy(model, PROMPTS, {1}, 0, progress=False) == [[]] * len(PROMPTS)

labels = st.sampled_from('abc')

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(labels, labels), min_size=1, max_size=30))
def test_confusion_accuracy_and_f1_agree(pairs):
    true, predicted = map(list, zip(*pairs))
    counts = confusion_counts(true, predicted, list('abc'))
    assert counts.sum() == len(pairs)
    assert np.trace(counts) / len(pairs) == pytest.approx(accuracy(true, predicted))
    tp, total = np.diag(counts), counts.sum(0) + counts.sum(1)
    assert macro_f1(true, predicted, list('abc')) == pytest.approx((2 * tp[total > 0] / total[total > 0]).mean())

def test_macro_f1_agrees_with_scikit_learn():
    sklearn = pytest.importorskip('sklearn.metrics')
    rng = random.Random(0)
    true, predicted = rng.choices('abcd', k=200), rng.choices('abcd', k=200)
    assert macro_f1(true, predicted, list('abcd')) == pytest.approx(sklearn.f1_score(true, predicted, average='macro'))

@settings(max_examples=50, deadline=None)
@given(st.text())
def test_exact_match_ignores_blanks_only(text):
    assert exact_match([text], ['  ' + text + '\n']) == 1
    assert exact_match([text], [text + '!']) == 0

def test_lists_of_different_length_are_refused():
    for f in (lambda: accuracy([], []), lambda: exact_match(['a'], ['a', 'b']), lambda: macro_f1(['a'], [], ['a'])):
        with pytest.raises(DataError): f()
