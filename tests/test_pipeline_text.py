"pipeline with plain text: every step of a model without a chat template."
import json, random, shutil
import numpy as np, pytest

from homelab_ft.core import DataError, ModelError, embedded_model
from homelab_ft.config import make_config
from homelab_ft.data.chat_template import load_tokenizer
from homelab_ft.data.tokenize import end_ids, is_text, is_text_dataset
from homelab_ft.data.prepare import load_prepared
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

SMALL = dict(max_steps=12, per_device_train_batch_size=8, learning_rate=3e-3, eval_max_rows=40, n_bootstrap=100, max_length=128)

@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    "The embedded model as a base model without a chat template."
    folder = tmp_path_factory.mktemp('bare') / 'model'
    shutil.copytree(embedded_model(), folder, ignore=shutil.ignore_patterns('*.jinja'))
    return folder

@pytest.fixture(scope='module', params=['lora', pytest.param('full', marks=pytest.mark.slow)])
def run(request, bare, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    rate = {} if request.param == 'lora' else dict(learning_rate=1e-3)
    return run_pipeline(make_config(**SMALL | rate, method=request.param, model=str(bare), data=write(folder / 'd.jsonl', texts(240)), runs_dir=str(folder / 'runs'), run_name='text'),
                       log=lambda line: None)

def test_all_steps_without_a_template(run):
    result = load_evaluation(run)
    assert [m.name for m in result.metrics] == ['NLL per token', 'perplexity'] and result.answers == [] == result.classes
    gain = result['NLL per token']
    assert gain.low > 0 and gain.fine_tuned < 0.8 * gain.base and result.verdict == 'more likely answers' and not result.better
    assert abs(np.exp(gain.fine_tuned) - result['perplexity'].fine_tuned) < 1e-6
    assert json.loads((run.path / 'parity.json').read_text())['passed'] and run.report_path.exists()
    assert is_text_dataset(run.data_path) and all(is_text(e.messages) for e in load_prepared(run.data_path).test_examples)

def test_the_loss_is_that_of_all_tokens(run):
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

def test_other_formats_still_need_a_template(bare, tmp_path):
    path = tmp_path / 'd.csv'
    path.write_text('question,answer\n' + ''.join(f'q {i},a {i}\n' for i in range(30)))
    with pytest.raises(ModelError, match='no chat template'): new_run(make_config(model=str(bare), data=str(path), runs_dir=str(tmp_path / 'runs')))
    assert not (tmp_path / 'runs').exists()
