"A run that was stopped, evaluated and merged, and then trained further: nothing of the stopped model is taken for the finished one."
import json, os, time

import pytest

from homelab_ft import api, cli
from homelab_ft.config import make_config
from homelab_ft.core import RunError
from homelab_ft.deploy.merge import MERGE_INFO, merge, merged_is_current
from homelab_ft.deploy.parity import current_parity, load_parity, parity
from homelab_ft.deploy.registry import current_evaluation, register
from homelab_ft.deploy.report import report_markdown
from homelab_ft.evaluate.compare import compare, load_evaluation
from homelab_ft.io import append_jsonl, write_json
from homelab_ft.pipeline import new_run, resume_pipeline
from homelab_ft.train.lora import adapter_fingerprint
from homelab_ft.train.trainer import train

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    "Stopped after one step, evaluated, merged and compared."
    folder = tmp_path_factory.mktemp('stale')
    rows = [dict(prompt=f'What is {a} plus {b}?', completion=f'{a + b}') for a in range(10) for b in range(8)]
    settings = dict(max_steps=6, eval_steps=3, eval_max_rows=8, generate_max_rows=2, n_bootstrap=100, max_new_tokens=4, learning_rate=5e-3)
    data = api.save_rows(rows, folder)
    run = new_run(make_config(data=data, runs_dir=str(folder), run_name='sums', device='cpu', **settings), log=lambda line: None)
    append_jsonl(run.control_path, {'command': 'stop', 'value': None})
    assert train(run).state == 'stopped'
    compare(run, progress=False)
    parity(run, merge(run), n_examples=4, progress=False)
    return run


@pytest.fixture(scope='module')
def resumed(stopped):
    "What was there before, and the run after it has finished."
    before = dict(adapter=adapter_fingerprint(stopped), evaluation=load_evaluation(stopped), parity=load_parity(stopped),
                  merged=(stopped.merged_path / 'model.safetensors').read_bytes())
    assert train(stopped, resume=True).state == 'finished'
    middle = dict(evaluation=current_evaluation(stopped), parity=current_parity(stopped), merged=merged_is_current(stopped), entry=register(stopped),
                  report=report_markdown(stopped, register(stopped), before['evaluation'], before['parity']))
    resume_pipeline(stopped, log=lambda line: None)
    return before, middle, stopped


def test_results_name_their_adapter(resumed):
    before, _, run = resumed
    assert before['evaluation'].adapter == before['parity'].adapter == before['adapter'] != adapter_fingerprint(run)


def test_results_of_the_stopped_model_are_not_shown_as_final(resumed):
    _, middle, _ = resumed
    assert middle['evaluation'] is None and middle['parity'] is None and not middle['merged']
    assert middle['entry']['metrics'] == {} and middle['entry']['parity'] is None
    assert 'Not evaluated.' in middle['report'] and 'results of an earlier adapter' in middle['report'] and 'passed' not in middle['report']


def test_the_pipeline_makes_them_anew(resumed):
    before, _, run = resumed
    now = adapter_fingerprint(run)
    assert current_evaluation(run).adapter == current_parity(run).adapter == now
    assert current_evaluation(run)['NLL per token'].fine_tuned != before['evaluation']['NLL per token'].fine_tuned
    assert json.loads((run.merged_path / MERGE_INFO).read_text())['adapter'] == now and merged_is_current(run)
    assert (run.merged_path / 'model.safetensors').read_bytes() != before['merged']
    entry = json.loads(run.entry_path.read_text())
    assert entry['adapter']['fingerprint'] == now and entry['metrics'] and entry['parity']['passed']
    assert current_evaluation(run).conclusion in run.report_path.read_text(encoding='utf-8')


def test_what_is_current_is_not_made_again(resumed, monkeypatch):
    _, _, run = resumed
    def again(*_, **__): raise AssertionError('measured again')
    for name in ('homelab_ft.pipeline.compare', 'homelab_ft.pipeline.merge', 'homelab_ft.pipeline.parity', 'homelab_ft.evaluate.compare.compare'):
        monkeypatch.setattr(name, again)
    resume_pipeline(run, log=lambda line: None)
    assert api.evaluate(run) == load_evaluation(run) and api.export(run) == run.merged_path
    with pytest.raises(RunError, match='nothing is overwritten'): merge(run)


def test_results_of_an_old_version_count_unless_the_adapter_is_newer(resumed):
    _, _, run = resumed
    record = json.loads(run.evaluation_path.read_text())
    del record['adapter']
    write_json(run.evaluation_path, record)
    info = run.merged_path / MERGE_INFO
    kept = info.read_text()
    info.unlink()
    assert current_evaluation(run) and merged_is_current(run) and api.export(run) == run.merged_path
    os.utime(run.adapter_path / 'adapter_model.safetensors', (time.time() + 60,) * 2)
    assert current_evaluation(run) is None and not merged_is_current(run)
    os.utime(run.adapter_path / 'adapter_model.safetensors', (0, 0))
    info.write_text(kept)


def test_a_parity_of_another_folder_is_not_the_run_s(resumed, tmp_path):
    _, _, run = resumed
    result = json.loads((run.path / 'parity.json').read_text())
    write_json(run.path / 'parity.json', result | dict(merged='elsewhere'))
    assert load_parity(run).merged == 'elsewhere' and current_parity(run) is None
    write_json(run.path / 'parity.json', result)


def test_the_command_line_says_that_a_stopped_model_is_not_final(stopped, capsys):
    from homelab_ft.train.run_folder import log_event
    assert cli.main(['eval', str(stopped.path)]) == 0 and 'not the final model' not in capsys.readouterr().out
    log_event(stopped, 'started')
    log_event(stopped, 'stopped')
    assert cli.main(['eval', str(stopped.path)]) == 0 and 'not the final model: stopped, step 6/6' in capsys.readouterr().out
