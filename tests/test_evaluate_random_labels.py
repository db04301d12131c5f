"Labels dealt at random, and a model against itself: nothing may be called better."
import csv
import random
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pytest
from toy_runs import train_briefly

from homelab_ft.config import make_config
from homelab_ft.data.chat_template import load_tokenizer
from homelab_ft.data.sample.tickets import make_tickets
from homelab_ft.evaluate.bootstrap import paired_shares
from homelab_ft.evaluate.compare import Evaluation, MetricResult, compare, load_evaluation, shuffle_answers
from homelab_ft.train.base_model import load_base
from homelab_ft.train.lora import attach_lora
from homelab_ft.train.run_folder import create_run

TOK = load_tokenizer('embedded')
KINDS = {
    'accuracy': dict(dataset_format='classification', text_columns=['text'], label_column='label', generate_max_rows=0),
    'exact match': dict(dataset_format='prompt_completion', prompt_column='text', completion_column='label', generate_max_rows=40),
}


def random_label_run(folder, kind, seed):
    "A run on tickets whose labels are coins, three of four `yes`, and its model, trained until it writes nothing but labels."
    draw = random.Random(seed)
    texts = dict.fromkeys(t['body'] for t in make_tickets(160, seed) if t['body'].strip())
    with open(folder / 'data.csv', 'w', newline='') as file:
        csv.writer(file).writerows([('text', 'label'), *((text, draw.choice(['yes', 'yes', 'yes', 'no'])) for text in texts)])
    config = make_config(data=str(folder / 'data.csv'), run_name='coins', seed=seed, lora_r=8, learning_rate=3e-3, eval_fraction=0.5, max_length=256, overlong_rows='drop',
                         eval_max_rows=40, n_bootstrap=200, **KINDS[kind])
    run = create_run(config, folder)
    return run, train_briefly(run, TOK, 20)


def evaluation_of(kind, base, fine_tuned, expected):
    "The evaluation of two models that said this."
    right = [np.equal(said, expected) for said in (base, fine_tuned)]
    gain = asdict(paired_shares(*right))
    metric = MetricResult(kind, right[0].mean(), right[1].mean(), len(expected), True, **gain)
    rows = [dict(row=i, true=e, expected=e, base=b, fine_tuned=f) for i, (e, b, f) in enumerate(zip(expected, base, fine_tuned))]
    result = Evaluation([metric], len(rows), 99, answers=rows, classes=rows)
    result.shuffled = shuffle_answers(result)
    return result


@pytest.mark.parametrize('base', ['coins', 'one class', 'essays'])
@pytest.mark.parametrize('n, share', [(12, 0.5), (40, 0.5), (40, 0.75), (100, 0.9)])
def test_random_labels_are_not_called_better(base, n, share):
    "200 evaluations: by chance one in a hundred may pass both tests. Without the second test, nearly all of those with essays would."
    better = gained = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        expected, coins, guesses = np.where(draw.random((3, n)) < share, 'yes', 'no')
        said = dict(coins=coins, essays=np.full(n, 'Well, ...'))
        result = evaluation_of('exact match', said.get(base, np.full(n, 'no')), guesses, expected)
        better += result.better
        gained += result.deciding.conclusion == 'better'
    assert better / 200 <= 0.01 + 3 * (0.01 / 200)**0.5
    if base == 'essays': assert gained > 75


def test_what_was_learned_is_called_better():
    expected = np.array(list('yynynyynny') * 4)
    learned = np.array([*expected[:32], *'nnynyyny'])
    assert evaluation_of('accuracy', np.full(40, 'y'), learned, expected).better
    assert not evaluation_of('accuracy', learned, np.full(40, 'y'), expected).better


@pytest.fixture(scope='module', params=KINDS)
def trained(request, tmp_path_factory):
    return request.param, *random_label_run(tmp_path_factory.mktemp('coins'), request.param, 0)


def check_random_labels(kind, run, model):
    "The likelihood rises, and nobody says better."
    result = compare(run, model=model, tok=TOK, progress=False)
    print(result.conclusion)
    assert result.deciding.name == kind and result['NLL per token'].conclusion == 'better'
    assert not result.better and load_evaluation(run).verdict == result.verdict
    if kind == 'exact match': assert result.deciding.low > 0 and result.verdict == 'form learned'     # from 0 to some 75 %


def test_a_random_label_run_is_not_better(trained): check_random_labels(*trained)


def test_a_model_against_itself_shows_no_difference(trained, monkeypatch):
    kind, run, model = trained
    if kind == 'accuracy': model = attach_lora(load_base('embedded'), run.config()).eval()      # LoRA starts as the base
    else: monkeypatch.setattr(model, 'disable_adapter', nullcontext)                            # the trained adapter stays on
    result = compare(run, model=model, tok=TOK, progress=False)
    assert result.verdict == 'no difference shown' and result.deciding.low < 0 < result.deciding.high
    assert all(m.gain in (0, None) for m in result.metrics)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 11))
@pytest.mark.parametrize('kind', KINDS)
def test_ten_random_label_runs_are_not_better(tmp_path, kind, seed): check_random_labels(kind, *random_label_run(tmp_path, kind, seed))
