"From a prepared data folder to evaluation.json, with the dataset formats that the notebook does not show."
import json, subprocess, sys
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
    assert [m.name for m in result.metrics] == ['exact match', 'NLL per token', 'perplexity']
    assert result.conclusion.startswith('No difference shown: exact match') and not result.better
    assert load_evaluation(run) == result

def test_greedy_answers_can_be_left_out(tmp_path):
    run, tok = make_run(tmp_path, generate_max_rows=0)
    result = compare(run, model=adapter(run), tok=tok, progress=False)
    assert [m.name for m in result.metrics] == ['NLL per token', 'perplexity'] and result.answers == []

def test_a_broken_adapter_gives_less_likely_answers(tmp_path):
    run, tok = make_run(tmp_path, generate_max_rows=4)
    result = compare(run, model=adapter(run, scale=1.), tok=tok, progress=False)
    assert result.conclusion.startswith('Less likely answers; too few answers to judge exact match: NLL per token') and not result.better

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
    assert [s.row for s in result.samples] == [3] and result.samples[0].worst
    assert result.answers[0] == dict(row=3, prompt='p', expected='a', base='b', fine_tuned='a') and result.classes[0]['fine_tuned'] == 'a'

def metric(name, ends=(None, None), percent=True, n=99): return MetricResult(name, .5, .5, n, percent, 0. if ends[0] is None else sum(ends) / 2, *ends)


UP, DOWN, OPEN, NOTHING, NONE = (.1, .3), (-.3, -.1), (-.1, .3), (0., 0.), (None, None)


@pytest.mark.parametrize('nll, acc, verdict', [(UP, UP, 'better'), (UP, OPEN, 'more likely answers'), (UP, NOTHING, 'more likely answers'), (UP, DOWN, 'worse'), (OPEN, UP, 'better'),
                                               (DOWN, UP, 'better'), (DOWN, OPEN, 'less likely answers'), (OPEN, NOTHING, 'no difference shown'), (UP, NONE, 'more likely answers'),
                                               (OPEN, NONE, 'no difference shown'), (NONE, NONE, 'too few examples')])
@pytest.mark.parametrize('task', ['accuracy', 'exact match', 'ROUGE-L', 'preference accuracy'])
def test_the_task_decides_and_likelihood_alone_is_never_better(task, nll, acc, verdict):
    result = Evaluation([metric(task, acc), metric('NLL per token', nll, False)], 99, 200)
    assert (result.verdict, result.better) == (verdict, verdict == 'better')
    assert result.conclusion.lower().startswith('no conclusion' if verdict == 'too few examples' else verdict)
    if not result.better: assert 'better' not in result.conclusion.lower()


@pytest.mark.parametrize('nll, verdict', [(UP, 'more likely answers'), (DOWN, 'less likely answers'), (OPEN, 'no difference shown'), (NONE, 'too few examples')])
def test_plain_text_has_no_task(nll, verdict):
    result = Evaluation([metric('NLL per token', nll, False)], 99, 200)
    assert result.verdict == verdict and not result.better and result.deciding is None


def test_a_gain_with_another_loss_is_mixed():
    result = Evaluation([metric('accuracy', UP), metric('exact match', DOWN), metric('NLL per token', UP, False)], 99, 200)
    assert result.verdict == 'mixed' and not result.better and 'exact match is worse (-20.0 points' in result.conclusion


@pytest.mark.parametrize('n, setting', [(20, 'generate_max_rows'), (5, '')])
def test_a_small_evaluation_says_so(n, setting):
    result = Evaluation([metric('exact match', (-.2, .2) if setting else NONE, n=n)], n, 200)
    assert f'{n} examples' in result.advice and setting in result.advice
    assert result.advice.startswith('A small' if setting else 'A very small')
    assert all(len(line) <= 80 for line in str(result).splitlines())


REPLIES = ['Please return the parcel within 14 days of its arrival.', 'Die Rechnung schicken wir Ihnen noch heute per Post zu.', 'Nous vous rappelons demain dans la matinée, promis !']


@pytest.fixture
def free_text(tmp_path):
    "A run with answers of ten words, as if the base and the fine-tuned model had said this and that."
    run, tok = create_run(make_config(run_name='r', lora_r=2, n_bootstrap=100), tmp_path), load_tokenizer('embedded')
    talks = [[{'role': 'user', 'content': f'Question {i} <b>'}, {'role': 'assistant', 'content': f'{REPLIES[i % 3]} No. {i}'}] for i in range(12)]
    save_cache(make_cache([tuple(encode(t, tok)) for t in talks], list(range(1, 13))), run.data_path / 'test.safetensors')
    write_atomic(run.data_path / 'test_examples.jsonl', ''.join(json.dumps({'messages': t, 'label': None, 'row': i}) + '\n' for i, t in enumerate(talks, 1)))
    write_json(run.data_path / 'data.json', {'labels': None})
    return run, tok, [t[-1]['content'] for t in talks]


@pytest.mark.parametrize('said, verdict', [('expected', 'better'), ('canned', 'form learned'), ('nothing', 'no difference shown')])
def test_free_text_is_judged_by_what_it_shares_with_the_expected_answers(free_text, monkeypatch, said, verdict):
    run, tok, expected = free_text
    answers = iter([dict(expected=expected, canned=[expected[0]] * 12, nothing=['Hm.'] * 12)[said], ['Hm.'] * 12])
    monkeypatch.setattr('homelab_ft.evaluate.compare.answer_greedily', lambda *_: next(answers))
    result = compare(run, model=adapter(run), tok=tok, progress=False)
    assert [m.name for m in result.metrics] == ['ROUGE-L', 'exact match', 'chrF', 'NLL per token', 'perplexity']
    assert result.verdict == verdict and result.better == (verdict == 'better')
    assert load_evaluation(run) == result and len(result.samples) == 6 and '<b>' not in result._repr_html_().replace('<p><b>', '')
    if said == 'expected': assert result['ROUGE-L'].fine_tuned == 1 and result['chrF'].fine_tuned == 100


def test_short_answers_load_no_text_metrics(tmp_path):
    code = 'import sys, homelab_ft.evaluate.compare, homelab_ft.pipeline; assert not {"rouge_score", "sacrebleu", "nltk"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)
    run, tok = make_run(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        for name in ('rouge_score', 'sacrebleu'): patch.setitem(sys.modules, name, None)        # an import fails
        compare(run, model=adapter(run), tok=tok, progress=False)
