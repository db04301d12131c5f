"Scores and answers against the plain way, on several kinds of model."
import random
import numpy as np, pytest, torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from homelab_ft.evaluate import inference
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

def sequences(seed, lengths):
    rng = random.Random(seed)
    return [[rng.randrange(2, 64) for _ in range(n)] for n in lengths]

def naive_logprob(model, prompt, label):
    with torch.inference_mode(): logp = model(torch.tensor([prompt + label])).logits[0].float().log_softmax(-1)
    return sum(logp[len(prompt) + t - 1, token].item() for t, token in enumerate(label))

PROMPTS, LABELS = sequences(0, (1, 5, 12, 3, 9)), [*sequences(1, (1, 3, 2, 5)), *sequences(2, (5,))]

def test_label_logprobs_equal_full_forward_passes(model):
    plain = [[naive_logprob(model, x, y) for y in LABELS] for x in PROMPTS]
    for batch_size in (1, 2, 8):
        np.testing.assert_allclose(label_logprobs(model, PROMPTS, LABELS, batch_size=batch_size, progress=False), plain, atol=1e-4)

def test_groups_of_labels_change_nothing(model, monkeypatch):
    whole = label_logprobs(model, PROMPTS, LABELS, progress=False)
    monkeypatch.setattr(inference, 'MAX_CACHED_TOKENS', 1)                      # one label at a time
    np.testing.assert_allclose(label_logprobs(model, PROMPTS, LABELS, progress=False), whole, atol=1e-5)

def test_greedy_in_a_batch_equals_one_by_one_and_full_forward_passes(model):
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

@pytest.fixture(scope='module')
def llama():
    torch.manual_seed(0)
    kind, config = KINDS['llama']
    return kind(config).eval()

@pytest.mark.parametrize('k, sizes', [(1, [4, 2, 1, 1, 1, 1, 1]), (3, [4, 2, 2, 1])])
def test_scores_where_the_gpu_runs_out_of_memory(llama, monkeypatch, k, sizes):
    expected, tried, score = label_logprobs(llama, PROMPTS, LABELS, batch_size=4, progress=False), [], inference.rest_logprobs
    def full(model, cache, mask, labels):
        tried.append(len(mask))
        if len(mask) > k: raise torch.OutOfMemoryError('CUDA out of memory.')
        return score(model, cache, mask, labels)
    monkeypatch.setattr(inference, 'rest_logprobs', full)
    np.testing.assert_allclose(label_logprobs(llama, PROMPTS, LABELS, batch_size=4, progress=False), expected, atol=1e-5)
    assert tried == sizes

@pytest.mark.parametrize('k', [1, 3])
def test_answers_where_the_gpu_runs_out_of_memory_on_the_way(llama, k):
    "The cache grows with every token; the batch begins anew, by half as many."
    expected, tried = generate_greedy(llama, PROMPTS, {1}, 10, batch_size=4, progress=False), []
    def full(module, args, kwargs):
        ids = kwargs['input_ids']
        if ids.shape[1] > 1: tried.append(len(ids))
        elif len(ids) > k and kwargs['past_key_values'].get_seq_length() > 12: raise torch.OutOfMemoryError('CUDA out of memory.')
    hook = llama.base_model.register_forward_pre_hook(full, with_kwargs=True)
    try: assert generate_greedy(llama, PROMPTS, {1}, 10, batch_size=4, progress=False) == expected
    finally: hook.remove()
    assert tried[:2] == [4, 2] and max(tried[1:]) == 2

def test_one_prompt_that_is_too_much_is_an_error(llama):
    def full(*_): raise torch.OutOfMemoryError('CUDA out of memory.')
    hook = llama.base_model.register_forward_pre_hook(full)
    try:
        with pytest.raises(torch.OutOfMemoryError): generate_greedy(llama, PROMPTS, {1}, 10, progress=False)
        with pytest.raises(torch.OutOfMemoryError): label_logprobs(llama, PROMPTS, LABELS, progress=False)
    finally: hook.remove()
