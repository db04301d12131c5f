"""The whole pipeline from outside: killed in the middle, continued, the same numbers."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from homelab_ft import pipeline
from homelab_ft.core import HomelabError
from homelab_ft.pipeline import new_run, quickstart_config, resume_pipeline, run_pipeline
from homelab_ft.train.run_folder import RunFolder, events, history, status

SMALL = dict(max_rows=160, max_steps=14, per_device_train_batch_size=4, save_steps=5, eval_steps=7, eval_max_rows=8, generate_max_rows=2, n_bootstrap=100)


def command(folder, *argv):
    "Start `homelab-ft` as a person would."
    return subprocess.Popen([sys.executable, '-c', 'import sys; from homelab_ft.cli import main; sys.exit(main())', *argv], cwd=folder,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def small_run(folder, name):
    "Arguments of a small run on the sample tickets."
    config = quickstart_config(folder, **SMALL)
    settings = {k: getattr(config, k) for k in [*SMALL, 'max_length', 'overlong_rows', 'learning_rate', 'test_data']}
    return ['--data', config.data, '--name', name, *(x for k, v in settings.items() for x in ('--set', f'{k}={v}'))]


def wait_for(condition, seconds=120):
    "Until `condition()` holds."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)


def training_pid(run):
    "The pid that the training process wrote when it started, or None."
    return next((e['pid'] for e in reversed(events(run)) if e['event'] == 'started'), None)


def losses(run): return [(r['step'], r['loss']) for r in history(run)['train']]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An uninterrupted run."
    folder = tmp_path_factory.mktemp('whole')
    return run_pipeline(quickstart_config(folder, **SMALL, run_name='whole', runs_dir=str(folder / 'runs')), log=lambda line: None)


def test_a_run_leaves_everything(whole):
    assert status(whole).state == 'finished'
    entry = json.loads(whole.entry_path.read_text())
    assert entry['data']['rows']['test'] == 200 and entry['data']['fingerprint'] and entry['parity']['passed']
    report = whole.report_path.read_text()
    for word in ('NLL per token', 'accuracy', 'kWh', 'tokens per second', 'measured peak', 'loss.svg', 'To repeat it'): assert word in report
    assert '<polyline' in (whole.path / 'loss.svg').read_text()
    assert (whole.merged_path / 'model.safetensors').exists() and not list(whole.path.rglob('*.bin'))


def test_same_seed_same_numbers(whole, tmp_path):
    again = run_pipeline(quickstart_config(tmp_path, **SMALL, run_name='again', runs_dir=str(tmp_path / 'runs')), log=lambda line: None)
    assert losses(again) == losses(whole)
    values = [[(m['name'], m['base'], m['fine_tuned']) for m in json.loads(r.evaluation_path.read_text())['metrics']] for r in (whole, again)]
    assert values[0] == values[1]


def test_both_processes_killed_and_resumed(whole, tmp_path):
    process, run = command(tmp_path, 'run', *small_run(tmp_path, 'killed')), RunFolder(tmp_path / 'runs' / 'killed')
    wait_for(lambda: len(losses(run)) >= 8)
    process.kill()
    os.kill(training_pid(run), signal.SIGKILL)
    process.wait()
    wait_for(lambda: status(run).state == 'interrupted', 10)
    resumed = command(tmp_path, 'train', '--resume', 'killed')
    output = resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0, output
    assert losses(run)[-1][0] == 14 and [s for s, _ in losses(run)] == list(range(1, 15))
    assert abs(losses(run)[-1][1] - losses(whole)[-1][1]) <= 1e-4
    resume_pipeline(run, log=lambda line: None)
    assert run.report_path.exists()


def test_killed_before_the_first_step(whole, tmp_path):
    process, run = command(tmp_path, 'run', *small_run(tmp_path, 'early')), RunFolder(tmp_path / 'runs' / 'early')
    wait_for(lambda: training_pid(run))
    os.kill(training_pid(run), signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and '--resume' in output and 'Traceback' not in output
    resumed = command(tmp_path, 'train', '--resume', 'early')
    assert resumed.wait(300) == 0
    assert abs(losses(run)[-1][1] - losses(whole)[-1][1]) <= 1e-4


def test_a_finished_run_is_not_trained_again(whole, capsys):
    from homelab_ft.cli import main
    before = losses(whole)
    assert main(['train', '--resume', str(whole.path)]) == 2
    assert 'finished' in capsys.readouterr().err and losses(whole) == before


def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(whole, tmp_path):
    process, run = command(tmp_path, 'run', *small_run(tmp_path, 'stopped')), RunFolder(tmp_path / 'runs' / 'stopped')
    wait_for(lambda: len(losses(run)) >= 3)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and '--resume' in output and 'Traceback' not in output
    assert status(run).state == 'stopped' and len(losses(run)) < 14
    resume_pipeline(run, log=lambda line: None)
    assert losses(run) == losses(whole)


def test_what_nobody_set_is_chosen_once_the_rows_are_known(tmp_path, monkeypatch):
    seen, logged = [], []

    def choose(config, lengths):
        "Note the lengths, and change the batch."
        seen.append(list(lengths))
        return config.model_copy(update=dict(per_device_train_batch_size=3)), 'three rows'

    monkeypatch.setattr(pipeline, 'autoconfigure', choose)
    config = quickstart_config(tmp_path, **SMALL, run_name='chosen', runs_dir=str(tmp_path / 'runs'))
    run = new_run(config, lambda line: logged.append(str(line)), auto_settings=True)
    manifest = json.loads(run.manifest_path.read_text())
    assert run.config().per_device_train_batch_size == 3 and manifest['chosen'] == 'three rows'
    assert any('three rows' in line for line in logged) and len(seen) == 1 and max(seen[0]) <= config.max_length
    given = new_run(config.model_copy(update=dict(run_name='given')), lambda line: None)
    assert given.config().per_device_train_batch_size == 4 and 'chosen' not in json.loads(given.manifest_path.read_text())


def test_what_was_chosen_is_checked_too(tmp_path, monkeypatch):
    config = quickstart_config(tmp_path, **SMALL, run_name='refused', runs_dir=str(tmp_path / 'runs'))
    paged = dict(optim='paged_adamw_8bit', device='cpu')
    monkeypatch.setattr(pipeline, 'autoconfigure', lambda config, lengths: (config.model_copy(update=paged), 'paged'))
    with pytest.raises(HomelabError, match='paged_adamw_8bit'): new_run(config, lambda line: None, auto_settings=True)
    assert not (tmp_path / 'runs').exists()
