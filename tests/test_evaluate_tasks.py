"Scores and answers against the plain way, on several kinds of model."
import random
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from homelab_ft.core import DataError
from homelab_ft.evaluate import inference as tasks
from homelab_ft.evaluate.metrics import accuracy, confusion_counts, exact_match, macro_f1
from homelab_ft.evaluate.inference import generate_greedy, label_logprobs

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

@pytest.mark.parametrize('k', [1, 2, 3])
def test_scores_on_a_card_that_is_too_full(model, monkeypatch, k):
    whole, tried, score = label_logprobs(model, PROMPTS, LABELS, batch_size=4, progress=False), [], tasks._rest_logprobs
    def full(model, cache, mask, labels):
        tried.append(len(mask))
        if len(mask) > k: raise torch.OutOfMemoryError('CUDA out of memory.')
        return score(model, cache, mask, labels)
    monkeypatch.setattr(tasks, '_rest_logprobs', full)
    np.testing.assert_allclose(label_logprobs(model, PROMPTS, LABELS, batch_size=4, progress=False), whole, atol=1e-5)
    assert tried == {1: [4, 2, 1, 1, 1, 1, 1], 2: [4, 2, 2, 1], 3: [4, 2, 2, 1]}[k]

@pytest.mark.parametrize('k', [1, 2, 3])
def test_answers_on_a_card_that_fills_up_on_the_way(model, k):
    "The cache grows with every token; the batch begins anew, by half as many."
    whole, tried = generate_greedy(model, PROMPTS, {1}, 10, batch_size=4, progress=False), []
    def full(module, args, kwargs):
        ids = kwargs['input_ids']
        if ids.shape[1] > 1: tried.append(len(ids))
        elif len(ids) > k and kwargs['past_key_values'].get_seq_length() > 12: raise torch.OutOfMemoryError('CUDA out of memory.')
    hook = model.base_model.register_forward_pre_hook(full, with_kwargs=True)
    try: assert generate_greedy(model, PROMPTS, {1}, 10, batch_size=4, progress=False) == whole
    finally: hook.remove()
    assert tried[:2] == [4, 2] and max(tried[1:]) == 2

def test_one_prompt_that_is_too_much_is_an_error(model, monkeypatch):
    def full(*_): raise torch.OutOfMemoryError('CUDA out of memory.')
    monkeypatch.setattr(tasks, '_greedy_batch', full)
    monkeypatch.setattr(tasks, '_score_batch', full)
    with pytest.raises(torch.OutOfMemoryError): generate_greedy(model, PROMPTS, {1}, 10, progress=False)
    with pytest.raises(torch.OutOfMemoryError): label_logprobs(model, PROMPTS, LABELS, progress=False)
