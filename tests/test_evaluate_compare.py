"From a prepared data folder to evaluation.json, with the dataset formats that the notebook does not show."
import json
import pytest, torch
from homelab_ft.config import make_config
from homelab_ft.data.chat_template import encode, load_tokenizer
from homelab_ft.data.tokenize import make_cache, save_cache
from homelab_ft.evaluate.compare import Evaluation, MetricResult, compare, load_evaluation_data, load_evaluation
from homelab_ft.evaluate.bootstrap import MIN_EXAMPLES
from homelab_ft.io import write_atomic, write_json
from homelab_ft.train.lora import attach_lora, save_adapter
from homelab_ft.train.base_model import load_base
from homelab_ft.train.run_folder import create_run

CONVERSATIONS = [[{'role': 'user', 'content': f'Say {i}'}, {'role': 'assistant', 'content': f'{i} it is'}] for i in range(12)]

def make_run(folder, labels=None, n=12, **settings):
    run, tok = create_run(make_config(run_name='r', lora_r=2, n_bootstrap=100, **settings), folder), load_tokenizer('embedded')
    save_cache(make_cache([tuple(encode(t, tok)) for t in CONVERSATIONS[:n]], list(range(1, n + 1))), run.data_path / 'test.safetensors')
    lines = [json.dumps({'messages': t, 'label': None if labels is None else t[-1]['content'], 'row': i}) for i, t in enumerate(CONVERSATIONS[:n], 1)]
    write_atomic(run.data_path / 'test_examples.jsonl', '\n'.join(lines) + '\n')
    write_json(run.data_path / 'data.json', {'labels': labels})
    return run, tok

def adapter(run, scale=0.):
    model = attach_lora(load_base('embedded'), run.config())
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if 'lora_B' in name: p.data.normal_(0, scale) if scale else p.data.zero_()
    save_adapter(model, run.adapter_path)
    return model

def test_conversations_have_no_classes(tmp_path):
    run, tok = make_run(tmp_path)
    result = compare(run, model=adapter(run), tok=tok, progress=False)
    assert [m.name for m in result.metrics] == ['NLL per token', 'perplexity', 'exact match']
    assert result.conclusion.startswith('No measurable difference') and not result.better
    assert load_evaluation(run) == result

def test_greedy_answers_can_be_left_out(tmp_path):
    run, tok = make_run(tmp_path, generate_max_rows=0)
    result = compare(run, model=adapter(run), tok=tok, progress=False)
    assert [m.name for m in result.metrics] == ['NLL per token', 'perplexity'] and result.answers == []

def test_a_broken_adapter_is_called_worse(tmp_path):
    run, tok = make_run(tmp_path, generate_max_rows=4)
    result = compare(run, model=adapter(run, scale=1.), tok=tok, progress=False)
    assert result.conclusion.startswith('Worse') and not result.better

def test_few_test_rows_get_no_conclusion_but_valid_json(tmp_path):
    run, tok = make_run(tmp_path, n=MIN_EXAMPLES - 1)
    result = compare(run, model=adapter(run), tok=tok, progress=False)
    assert result.conclusion.startswith('No conclusion')
    json.loads(run.evaluation_path.read_text(), parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
    assert load_evaluation(run) == result

def test_the_model_is_left_as_it_was(tmp_path):
    run, tok = make_run(tmp_path, generate_max_rows=0)
    model = adapter(run, scale=0.02)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode(): before = model.eval()(ids).logits
    compare(run, model=model, tok=tok, progress=False)
    with torch.inference_mode(): assert torch.equal(before, model(ids).logits)

def test_same_seed_same_rows_same_numbers(tmp_path):
    run, tok = make_run(tmp_path, labels=[t[-1]['content'] for t in CONVERSATIONS], eval_max_rows=9, generate_max_rows=3)
    model = adapter(run, scale=0.02)
    one, two = (compare(run, model=model, tok=tok, progress=False) for _ in range(2))
    assert one.metrics == two.metrics and one.classes == two.classes and one.n_examples == 9
    assert [e.row for e in load_evaluation_data(run, run.config()).examples] == [c['row'] for c in one.classes]

def test_evaluations_of_older_versions_are_read(tmp_path):
    run, _ = make_run(tmp_path)
    old = {'measures': [dict(name='accuracy', base=.1, tuned=.9, rows=12, percent=True, gain=.8, low=.7, high=.9)], 'rows': 12, 'tokens': 40, 'level': .95, 'labels': ['a'],
           'answers': [dict(row=3, prompt='p', expected='a', base='b', tuned='a')], 'classes': [dict(row=3, true='a', base='b', tuned='a')], 'seconds': 1., 'time': 'then'}
    write_json(run.evaluation_path, old)
    result = load_evaluation(run)
    assert (result.n_examples, result['accuracy'].fine_tuned, result['accuracy'].n_examples, result.conclusion[:6]) == (12, .9, 12, 'Better')
    assert result.answers[0] == dict(row=3, prompt='p', expected='a', base='b', fine_tuned='a') and result.classes[0]['fine_tuned'] == 'a'

@pytest.mark.parametrize('nll, acc, better', [((.1, .3), (.1, .3), True), ((.1, .3), (-.1, .3), True), ((.1, .3), (-.3, -.1), False),
                                             ((-.1, .3), (.1, .3), False), ((-.3, -.1), (.1, .3), False)])
def test_better_needs_the_likelihood_and_nothing_worse(nll, acc, better):
    metrics = [MetricResult('NLL per token', 2, 1, 99, False, sum(nll) / 2, *nll), MetricResult('accuracy', .5, .5, 99, True, sum(acc) / 2, *acc)]
    result = Evaluation(metrics, 99, 200)
    assert result.better == better == result.conclusion.startswith('Better')
