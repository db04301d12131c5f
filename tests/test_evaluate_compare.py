"From a prepared data folder to evaluation.json, with the layouts the notebook does not show."
import json
import numpy as np, pytest, torch
from homelab_ft.config import make_config
from homelab_ft.data.chat_template import encode, load_tokenizer
from homelab_ft.data.tokenize import make_cache, save_cache
from homelab_ft.evaluate.compare import Evaluation, Measure, compare, held_out_rows, load_evaluation
from homelab_ft.evaluate.bootstrap import MIN_ROWS
from homelab_ft.io import write_atomic, write_json
from homelab_ft.train.lora import attach_lora, save_adapter
from homelab_ft.train.base_model import load_base
from homelab_ft.train.run_folder import create_run

TALKS = [[{'role': 'user', 'content': f'Say {i}'}, {'role': 'assistant', 'content': f'{i} it is'}] for i in range(12)]

def make_run(folder, labels=None, n=12, **settings):
    run, tok = create_run(make_config(run_name='r', lora_r=2, n_bootstrap=100, **settings), folder), load_tokenizer('embedded')
    save_cache(make_cache([tuple(encode(t, tok)) for t in TALKS[:n]], list(range(1, n + 1))), run.data_path / 'test.safetensors')
    lines = [json.dumps({'messages': t, 'label': None if labels is None else t[-1]['content'], 'row': i}) for i, t in enumerate(TALKS[:n], 1)]
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
    assert [m.name for m in result.measures] == ['NLL per token', 'perplexity', 'exact match']
    assert result.verdict.startswith('No measurable difference') and not result.better
    assert load_evaluation(run) == result

def test_greedy_answers_can_be_left_out(tmp_path):
    run, tok = make_run(tmp_path, generate_max_rows=0)
    result = compare(run, model=adapter(run), tok=tok, progress=False)
    assert [m.name for m in result.measures] == ['NLL per token', 'perplexity'] and result.answers == []

def test_a_broken_adapter_is_called_worse(tmp_path):
    run, tok = make_run(tmp_path, generate_max_rows=4)
    result = compare(run, model=adapter(run, scale=1.), tok=tok, progress=False)
    assert result.verdict.startswith('Worse') and not result.better

def test_few_test_rows_get_no_verdict_but_valid_json(tmp_path):
    run, tok = make_run(tmp_path, n=MIN_ROWS - 1)
    result = compare(run, model=adapter(run), tok=tok, progress=False)
    assert result.verdict.startswith('No verdict')
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
    run, tok = make_run(tmp_path, labels=[t[-1]['content'] for t in TALKS], eval_max_rows=9, generate_max_rows=3)
    model = adapter(run, scale=0.02)
    one, two = (compare(run, model=model, tok=tok, progress=False) for _ in range(2))
    assert one.measures == two.measures and one.classes == two.classes and one.rows == 9
    assert [e.row for e in held_out_rows(run, run.config())[1]] == [c['row'] for c in one.classes]

@pytest.mark.parametrize('nll, acc, better', [((.1, .3), (.1, .3), True), ((.1, .3), (-.1, .3), True), ((.1, .3), (-.3, -.1), False),
                                             ((-.1, .3), (.1, .3), False), ((-.3, -.1), (.1, .3), False)])
def test_better_needs_the_likelihood_and_nothing_worse(nll, acc, better):
    measures = [Measure('NLL per token', 2, 1, 99, False, sum(nll) / 2, *nll), Measure('accuracy', .5, .5, 99, True, sum(acc) / 2, *acc)]
    result = Evaluation(measures, 99, 200)
    assert result.better == better == result.verdict.startswith('Better')
