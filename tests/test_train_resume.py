"train.resume: a run continues on its own base and rows only, with settings that may change, and a run that diverged has a way out."
import json, os, shutil

import pytest
from safetensors.torch import load_file, save_file

from toy_runs import new_run, rows, save_toy_model
from homelab_ft import cli
from homelab_ft.config import RunConfig
from homelab_ft.core import ConfigError, DataError, HomelabError, ModelError, RunError
from homelab_ft.data.tokenize import save_cache
from homelab_ft.evaluate.inference import load_fine_tuned
from homelab_ft.io import append_jsonl, write_json
from homelab_ft.train import trainer as training
from homelab_ft.train.checkpoint import checkpoints, read_checkpoint
from homelab_ft.train.launcher import follow, start
from homelab_ft.train.resume import CHANGEABLE, REASONS, change_settings, why_fixed
from homelab_ft.train.run_folder import events, history, status

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def stopped_once(tmp_path_factory):
    "A run on a model of its own, stopped after its first step."
    folder = tmp_path_factory.mktemp('stopped')
    run = new_run(folder, save_toy_model(folder / 'model'), 'run', lr_scheduler_type='constant')
    append_jsonl(run.control_path, {'command': 'stop', 'value': None})
    assert training.train(run).state == 'stopped'
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    "A copy of it, to be changed: `(run, folder of its model)`."
    shutil.copytree(stopped_once, tmp_path / 'all')
    from homelab_ft.train.run_folder import RunFolder
    run = RunFolder(tmp_path / 'all' / 'run')
    config = run.config_path.read_text().replace(str(stopped_once), str(tmp_path / 'all'))
    run.config_path.write_text(config)
    return run, tmp_path / 'all' / 'model'


def rates(run): return {r['step']: r['learning_rate'] for r in history(run)['train']}


# ---------------------------------------------------------------- base and rows


def test_a_run_continues_where_nothing_changed(stopped):
    run, model = stopped
    os.utime(model / 'model.safetensors')                # a copy: other times, the same bytes
    assert training.train(run, resume=True).state == 'finished'


def change_weight(model):
    tensors = load_file(model / 'model.safetensors')
    tensors['model.norm.weight'] *= 1.01
    save_file(tensors, model / 'model.safetensors', metadata={'format': 'pt'})


def change_config(model):
    config = json.loads((model / 'config.json').read_text())
    (model / 'config.json').write_text(json.dumps(config | dict(rms_norm_eps=1e-3)))


@pytest.mark.parametrize('change, name', [(change_weight, 'model.safetensors'), (change_config, 'config.json')], ids=['weights', 'config'])
def test_other_base_weights_are_refused(stopped, change, name):
    run, model = stopped
    change(model)
    before = run.config_path.read_text()
    with pytest.raises(ModelError, match=f'not the one this run was trained on\n  seen: .*{name}'): training.train(run, resume=True)
    with pytest.raises(ModelError, match=name): load_fine_tuned(run)            # evaluation, parity and chat
    assert cli.main(['run', '--resume', str(run.path), '--set', 'learning_rate=1e-3']) == 2 and run.config_path.read_text() == before


def test_a_manifest_of_an_old_version_still_refuses_another_base(stopped):
    run, model = stopped
    manifest = run.manifest()
    del manifest['base_files'], manifest['validation_rows']
    write_json(run.manifest_path, manifest)
    assert load_fine_tuned(run)
    change_weight(model)
    with pytest.raises(ModelError, match='config or weights'): load_fine_tuned(run)


@pytest.mark.parametrize('part', ['train', 'validation'])
def test_other_rows_are_refused(stopped, part):
    run, _ = stopped
    save_cache(rows(40, seed=9), run.data_path / f'{part}.safetensors')
    with pytest.raises(DataError, match=f'not those that this run was trained on\n  seen: .*{part}.safetensors'): training.train(run, resume=True)


# ---------------------------------------------------------------- settings


def test_every_setting_may_change_or_has_a_reason():
    assert CHANGEABLE <= set(RunConfig.model_fields) and {n for names in REASONS.values() for n in names} <= set(RunConfig.model_fields)
    assert not CHANGEABLE & {n for names in REASONS.values() for n in names} and all(why_fixed(n) for n in set(RunConfig.model_fields) - CHANGEABLE)


def test_a_new_learning_rate_takes_effect_once_and_is_recorded(stopped):
    run, _ = stopped
    assert rates(run) == {1: 1e-2}
    change_settings(run, learning_rate=1e-3, weight_decay=0.1)
    append_jsonl(run.control_path, {'command': 'evaluate', 'value': None})
    training.train(run, resume=True)
    assert set(rates(run).values()) == {1e-2, 1e-3} and rates(run)[2] == 1e-3
    assert run.config().learning_rate == 1e-3 and run.manifest()['changes'][0]['settings']['learning_rate'] == [1e-2, 1e-3]
    assert [e['changes'] for e in events(run) if e['event'] == 'settings'] == [dict(learning_rate=[1e-2, 1e-3], weight_decay=[0, 0.1])]
    saved = read_checkpoint(checkpoints(run.checkpoints_path)[-1])
    assert saved['state']['changes'] == 1 and {g['weight_decay'] for g in saved['optimizer']['param_groups']} == {0.1}


def test_a_new_length_takes_effect_and_the_learning_rate_stays(stopped):
    run, _ = stopped
    change_settings(run, max_steps=6, eval_steps=3)
    assert training.train(run, resume=True).step == 6 and rates(run)[6] == 1e-2
    assert [r['step'] for r in history(run)['eval']] == [3, 6]


def test_an_interrupted_start_does_not_lose_the_change(stopped, monkeypatch):
    run, _ = stopped
    change_settings(run, learning_rate=1e-3)
    def killed(*_): raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, 'training_loop', killed)
        training.train(run, resume=True)
    training.train(run, resume=True)
    assert rates(run)[2] == 1e-3


@pytest.mark.parametrize('given, words', [
    (['--set', 'lora_r=8'], 'lora_r cannot change'), (['--data', 'other.csv'], 'data cannot change'), (['--model', 'embedded'], 'model cannot change'),
    (['--max-rows', '50'], 'max_rows cannot change'), (['--config', 'x.yaml'], '--config describes a new run'), (['--name', 'other'], 'run_name cannot change'),
    (['--set', 'per_device_train_batch_size=2'], 'which rows a step reads'), (['--set', 'method=qlora'], 'method cannot change'),
    (['--set', 'lerning_rate=1e-4'], 'did you mean learning_rate'), (['--set', 'learning_rate=2'], 'less than 1'), (['--seed', '7'], 'seed cannot change')], ids=str)
@pytest.mark.parametrize('command', ['run', 'train'])
def test_what_is_not_applied_is_an_error(stopped, capsys, command, given, words):
    run, _ = stopped
    before = run.config_path.read_text(), len(events(run))
    assert cli.main([command, '--resume', str(run.path), *given]) == 2
    assert words in capsys.readouterr().err and (run.config_path.read_text(), len(events(run))) == before


@pytest.mark.parametrize('state', ['finished', 'paused'])
def test_a_run_that_is_finished_or_training_is_left_alone(stopped, state, monkeypatch):
    run, _ = stopped
    append_jsonl(run.events_path, dict(time='', event='started'))
    append_jsonl(run.events_path, dict(time='', event=state))
    monkeypatch.setattr('homelab_ft.train.run_folder.is_locked', lambda run: True)
    with pytest.raises(RunError, match=f'is {state}'): change_settings(run, learning_rate=1e-3)
    assert change_settings(run, learning_rate=1e-2) == {}


@pytest.mark.parametrize('name', ['data', 'test_data'])
def test_the_quickstart_takes_no_data(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['quickstart', '--set', f'{name}=other.csv']) == 2
    assert f'the quickstart has its own {name}' in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- not a number

# Each step multiplies the weights by 1 - learning rate x weight decay: by -18, and after a resume with a tenth of it by -0.9.
DIVERGES = dict(learning_rate=0.5, weight_decay=38., lr_scheduler_type='constant', save_steps=4, max_steps=12, eval_steps=100)


def test_a_run_that_diverged_continues_with_the_command_that_its_error_names(tmp_path, toy_model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = new_run(tmp_path / 'runs', toy_model, 'hot', **DIVERGES)
    with pytest.raises(RunError) as failed: follow(run, start(run))             # a process of its own, and its own error
    error = failed.value
    step = int(error.what.split()[-1])
    assert error.what.startswith('the loss is no longer a number at step') and error.next_step.startswith('homelab-ft run --resume runs/hot --set')
    left = checkpoints(run.checkpoints_path)
    assert left and f'the last good checkpoint is {left[-1].name}' in error.value and int(left[-1].name[5:]) < step - 1
    assert all(t.isfinite().all() for path in left for t in read_checkpoint(path)['adapter'].values())
    command = error.next_step.split()[1:]
    assert cli.main(['train', *command[1:]]) == 0                              # `run` would evaluate, and this toy has no test rows
    assert status(run).state == 'finished' and status(run).step == 12
    assert {r['learning_rate'] for r in history(run)['train'] if r['step'] > int(left[-1].name[5:])} == {0.05}
    assert all(r['loss'] == r['loss'] for r in history(run)['train']) and 'setting   learning_rate from 0.5 to 0.05' in capsys.readouterr().out
    assert all(t.isfinite().all() for t in load_file(run.adapter_path / 'adapter_model.safetensors').values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path, toy_model, monkeypatch):
    run, real = new_run(tmp_path, toy_model, 'inf'), training.train_step
    def poisoned(ctx):
        real(ctx)
        if ctx.state.step == 8: ctx.parameters[0].data[0, 0] = float('inf')     # the loss of this step was finite
    monkeypatch.setattr(training, 'train_step', poisoned)
    with pytest.raises(RunError, match='weights are no longer numbers at step 8'): training.train(run)
    assert [p.name for p in checkpoints(run.checkpoints_path)] == ['step-000004'] and not run.adapter_path.exists()


def test_a_checkpoint_of_an_old_version_that_is_not_finite_is_passed_over(stopped):
    run, _ = stopped
    path = checkpoints(run.checkpoints_path)[-1]
    later = path.with_name('step-000003')
    shutil.copytree(path, later)
    tensors = load_file(later / 'adapter.safetensors')
    save_file({name: tensor * float('nan') for name, tensor in tensors.items()}, later / 'adapter.safetensors')
    assert training.train(run, resume=True).state == 'finished' and not later.exists()
    assert any(e['event'] == 'not_finite' and e['checkpoint'] == later.name for e in events(run))


def test_an_error_of_the_training_process_is_the_same_error_here():
    for error in (ConfigError('a', 1, 'b', 'c'), ModelError('a'), HomelabError('a', next_step='d')):
        again = HomelabError.from_record(json.loads(json.dumps(error.record())))
        assert type(again) is type(error) and str(again) == str(error)
