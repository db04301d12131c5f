"Plain text: tokens, splits, and the whole journey of a model without a chat template."
import json, random, shutil
import numpy as np, pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import DataError, ModelError, embedded_model
from homelab_ft.config import make_config
from homelab_ft.data.chat_template import load_tokenizer
from homelab_ft.data.formats import DatasetFormat, detect_format
from homelab_ft.data.plain_text import encode_text, end_ids, is_text_dataset, is_text
from homelab_ft.data.prepare import load_prepared, prepare
from homelab_ft.deploy.chat import load_chat
from homelab_ft.evaluate.compare import load_evaluation
from homelab_ft.evaluate.likelihood import sequence_nll
from homelab_ft.pipeline import new_run, run_pipeline
from homelab_ft.train.lora import load_adapter
from homelab_ft.train.base_model import load_base

TOK = load_tokenizer('embedded')
PEOPLE, THINGS, PLACES = ['Ada', 'Ben', 'Cleo', 'Dan', 'Eve'], ['boiler', 'pump', 'valve', 'fan', 'meter'], ['cellar', 'attic', 'hall', 'yard', 'shed']

def sentence(rng): return f'{rng.choice(PEOPLE)} checks the {rng.choice(THINGS)} in the {rng.choice(PLACES)} at {rng.randrange(24)} and writes {rng.randrange(10**6)} into the book.'

def texts(n, seed=0):
    rng = random.Random(seed)
    return [' '.join(sentence(rng) for _ in range(rng.randrange(1, 4))) for _ in range(n)]

def write(path, rows, column='text'):
    path.write_text(''.join(json.dumps({column: r}) + '\n' for r in rows), encoding='utf-8')
    return str(path)

@given(st.text(alphabet=st.characters(blacklist_categories=('Cs',)), min_size=1, max_size=200).filter(lambda t: '<|' not in t))
@settings(max_examples=60, deadline=None)
def test_every_token_is_learned_and_the_text_comes_back(text):
    ids, mask = encode_text([{'role': 'text', 'content': text}], TOK)
    assert ids[0] == TOK.bos_token_id and ids[-1] == TOK.eos_token_id and mask == [1] * len(ids)
    assert ids[1:-1] == TOK(text, add_special_tokens=False).input_ids

@pytest.mark.parametrize('rows, settings, expected', [
    ([{'text': 'a'}], {}, ['text']), ([{'Content': 'a', 'id': '1'}], {}, ['Content']), ([{'note': 'a', 'url': 'b'}], dict(text_columns=['note']), ['note']),
    ([{'note': 'a'}], dict(dataset_format='text'), ['note']), ([{'text': 'a', 'url': 'b'}], dict(dataset_format='text'), ['text'])], ids=str)
def test_found(rows, settings, expected):
    assert (found := detect_format(rows, make_config(**settings))).kind == 'text' and found.text_columns == expected

@pytest.mark.parametrize('rows, settings', [([{'note': 'a'}], {}), ([{'text': 'a', 'url': 'b'}], {}), ([{'a': 'x', 'b': 'y'}], dict(dataset_format='text')),
                                            ([{'a': 'x', 'b': 'y'}], dict(dataset_format='text', text_columns=['a', 'b']))], ids=str)
def test_not_guessed(rows, settings):
    with pytest.raises(DataError, match='cannot be told'): detect_format(rows, make_config(**settings))

def test_copies_go_and_near_copies_stay_together(tmp_path):
    rows = texts(80)
    near = [r.replace('book.', 'large book.', 1) for r in rows[:20]]
    data = prepare(make_config(data=write(tmp_path / 'd.jsonl', rows + near + rows[:5] + ['  ']), eval_fraction=0.3), TOK, tmp_path / 'p')
    assert data.rows['file'] == 106 and data.rows['cleaned'] == 100
    side = {row: part for part in ('train', 'validation', 'test') for row in getattr(data, part).rows.tolist()}
    assert all(side[i + 1] == side[80 + i + 1] for i in range(20))
    assert len(set(side.values())) == 3

def test_rows_of_the_test_file_leave_training(tmp_path):
    rows = texts(60)
    data = prepare(make_config(data=write(tmp_path / 'd.jsonl', rows), test_data=write(tmp_path / 't.jsonl', rows[:7])), TOK, tmp_path / 'p')
    assert ['dropped: also in test_data', 7, ''] in data.report[0].rows and data.rows['test'] == 7

def test_long_texts(tmp_path):
    path = write(tmp_path / 'd.jsonl', texts(40) + ['word ' * 600])
    with pytest.raises(DataError, match='1 of 41 rows are longer'): prepare(make_config(data=path), TOK, tmp_path / 'e')
    dropped, cut = (prepare(make_config(data=path, max_length=128, overlong_rows=how), TOK, tmp_path / how) for how in ('drop', 'truncate'))
    assert dropped.rows['tokenized'] == 40 and cut.rows['tokenized'] == 41
    parts = [(p, i) for p in (cut.train, cut.validation, cut.test) for i, row in enumerate(p.rows) if row == 41]
    ids, mask = parts[0][0].row(parts[0][1])
    assert ids.tolist() == encode_text([{'role': 'text', 'content': ('word ' * 600).strip()}], TOK)[0][:128] and mask.all()

def test_no_system_prompt(tmp_path):
    with pytest.raises(DataError, match='no place for a system prompt'):
        prepare(make_config(data=write(tmp_path / 'd.jsonl', texts(20)), system_prompt='Be brief.'), TOK, tmp_path / 'p')
    assert not (tmp_path / 'p').exists()

# ---------------------------------------------------------------- the journey

SMALL = dict(max_steps=12, per_device_train_batch_size=8, learning_rate=3e-3, eval_max_rows=40, n_bootstrap=100, max_length=128)

@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    "The embedded model as a base model without a chat template."
    folder = tmp_path_factory.mktemp('bare') / 'model'
    shutil.copytree(embedded_model(), folder, ignore=shutil.ignore_patterns('*.jinja'))
    return folder

@pytest.fixture(scope='module', params=['lora', 'full'])
def run(request, bare, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    rate = {} if request.param == 'lora' else dict(learning_rate=1e-3)
    return run_pipeline(make_config(**SMALL | rate, method=request.param, model=str(bare), data=write(folder / 'd.jsonl', texts(240)), runs_dir=str(folder / 'runs'), run_name='text'),
                       log=lambda line: None)

def test_the_journey_without_a_template(run):
    result = load_evaluation(run)
    assert [m.name for m in result.metrics] == ['NLL per token', 'perplexity'] and result.answers == [] == result.classes
    gain = result['NLL per token']
    assert gain.low > 0 and gain.fine_tuned < 0.8 * gain.base and result.better
    assert abs(np.exp(gain.fine_tuned) - result['perplexity'].fine_tuned) < 1e-6
    assert json.loads((run.path / 'parity.json').read_text())['passed'] and run.report_path.exists()
    assert is_text_dataset(run.data_path) and all(is_text(e.messages) for e in load_prepared(run.data_path).test_examples)

def test_the_numbers_are_those_of_the_whole_text(run):
    data, result = load_prepared(run.data_path), load_evaluation(run)
    assert result.tokens == len(data.test.input_ids) - len(data.test)         # all but each row's first
    tuned = load_adapter(load_base(run.config().model, run.config().method), run.adapter_path)
    nll, tokens = sequence_nll(tuned, data.test, progress=False)
    assert abs(nll.sum() / tokens.sum() - result['NLL per token'].fine_tuned) < 1e-6

def test_it_continues_text(run):
    for target in (run.path, run.merged_path):
        chat = load_chat(target)
        assert isinstance(chat.generate('Ada checks the', 8), str)
        with pytest.raises(DataError, match='no chat template'): chat.generate([{'role': 'user', 'content': 'Hi'}], 8)
    ends = json.loads((run.merged_path / 'generation_config.json').read_text())['eos_token_id']
    assert set(ends if isinstance(ends, list) else [ends]) == end_ids(TOK)
    assert '<0x' not in chat.generate('Ada checks the', 8) and chat.tok.chat_template is None

def test_other_layouts_still_need_a_template(bare, tmp_path):
    path = tmp_path / 'd.csv'
    path.write_text('question,answer\n' + ''.join(f'q {i},a {i}\n' for i in range(30)))
    with pytest.raises(ModelError, match='no chat template'): new_run(make_config(model=str(bare), data=str(path), runs_dir=str(tmp_path / 'runs')))
    assert not (tmp_path / 'runs').exists()
