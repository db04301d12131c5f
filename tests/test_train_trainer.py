"The training process: killed at every kind of moment, steered, stopped, failed."
import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from homelab_ft.core import HomelabError, RunError
from homelab_ft.config import make_config
from homelab_ft.data.tokenize import make_cache, save_cache
from homelab_ft.io import append_jsonl, read_jsonl
from homelab_ft.train import checkpoint, run_folder, trainer as training
from homelab_ft.train.launcher import follow, start
from homelab_ft.train.run_folder import create_run, events, history, send, status

FORKS = multiprocessing.get_context('forkserver')      # children start with the heavy imports done
FORKS.set_forkserver_preload(['torch', 'transformers.models.llama.modeling_llama', 'peft', 'homelab_ft.train.trainer'])


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('model')
    LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                 tie_word_embeddings=True)).save_pretrained(folder)
    return str(folder)


def new_run(folder, model, name='r', n=96, **settings):
    defaults = dict(model=model, run_name=name, device='cpu', lora_r=4, learning_rate=1e-2, lora_dropout=0.1, per_device_train_batch_size=4,
                    gradient_accumulation_steps=2, num_train_epochs=5, eval_steps=7, save_steps=5)
    run = create_run(make_config(**defaults | settings), folder)
    rng, rows = np.random.default_rng(0), []
    for i in range(n + 16):
        ids = [10 + i % 4, *rng.integers(100, 500, rng.integers(4, 12)).tolist(), 50 + i % 4, 4]
        rows.append((ids, [0] * (len(ids) - 2) + [1, 1]))
    run.data_path.mkdir()
    save_cache(make_cache(rows[:n], range(n)), run.data_path / 'train.safetensors')
    save_cache(make_cache(rows[n:], range(16)), run.data_path / 'validation.safetensors')
    return run


def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)


def torn_save(obj, path, **_):
    "Half a file, then death."
    path.write_bytes(b'half')
    die()


def torn_line(run, **fields):
    "Half a line of metrics, then death."
    with open(run.metrics_path, 'ab') as f: f.write(b'{"kind": "train", "st')
    die()


def nth(function, n, then):
    "`function` for n - 1 calls, `then` at the n-th."
    calls = []
    def wrapped(*a, **k):
        calls.append(1)
        return (then if len(calls) == n else function)(*a, **k)
    return wrapped


def later(event): return lambda run, name, **k: die() if name == event else append_jsonl(run.events_path, {'event': name, **k})


FAULTS = {
    'while the data is loaded': lambda: setattr(training, 'load_cache', die),
    'while the weights are loaded': lambda: setattr(training, 'attach', die),
    'before the first checkpoint': lambda: setattr(training, 'train_step', nth(training.train_step, 3, die)),
    'in the first checkpoint': lambda: setattr(torch, 'save', torn_save),
    'before a checkpoint gets its name': lambda: setattr(checkpoint.os, 'rename', nth(os.rename, 2, die)),
    'while old checkpoints are deleted': lambda: setattr(checkpoint.shutil, 'rmtree', nth(checkpoint.shutil.rmtree, 8, die)),
    'in the middle of a metrics line': lambda: setattr(training, 'log_metrics', nth(training.log_metrics, 4, torn_line)),
    'during validation': lambda: setattr(training, 'mean_nll', nth(training.mean_nll, 2, die)),
    'between the end and the adapter': lambda: setattr(training, 'save_adapter', die),
    'in the adapter': lambda: setattr(training, 'save_adapter', half_adapter),
    'between the adapter and the last event': lambda: setattr(training, 'log_event', later('finished')),
}


def half_adapter(model, folder, *_):
    checkpoint.write_folder(folder, lambda new: torn_save(None, new / 'adapter_model.safetensors'))


def child(path, resume, fault, threads=1):
    torch.set_num_threads(threads)
    if fault: FAULTS[fault]()
    raise SystemExit(training.main([path, '--resume'] if resume else [path]))


def launch(run, resume=False, fault=None):
    process = FORKS.Process(target=child, args=(str(run.path), resume, fault))
    process.start()
    return process


def finish(run):
    process = launch(run, resume=status(run).state != 'new')
    process.join(300)
    assert process.exitcode == 0, (status(run), run.path)


def assert_same(run, whole):
    a, b = events(run)[-1], events(whole)[-1]
    assert a['event'] == 'finished'
    assert abs(a['final_loss'] - b['final_loss']) < 1e-4 and abs(a['best_eval_loss'] - b['best_eval_loss']) < 1e-4
    for kind in ('train', 'eval'):
        for field in ('step', 'loss', 'tokens'):
            np.testing.assert_allclose([r[field] for r in history(run)[kind]], [r[field] for r in history(whole)[kind]], atol=1e-6)
    x, y = (load_file(r.adapter_path / 'adapter_model.safetensors') for r in (run, whole))
    assert x.keys() == y.keys() and all((x[k] - y[k]).abs().max() < 1e-5 for k in x)
    assert not [p for p in [*run.path.iterdir(), *run.checkpoints_path.iterdir()] if p.name.endswith(('.tmp', '.old'))]


@pytest.fixture(scope='module')
def whole(tmp_path_factory, model):
    run = new_run(tmp_path_factory.mktemp('whole'), model)
    finish(run)
    return run


def test_the_same_seed_gives_the_same_numbers(tmp_path, model, whole):
    run = new_run(tmp_path, model)
    finish(run)
    assert_same(run, whole)
    assert [r['loss'] for r in history(run)['train']] == [r['loss'] for r in history(whole)['train']]


ORDINARY = ('in the first checkpoint', 'in the middle of a metrics line', 'between the adapter and the last event')


@pytest.mark.parametrize('fault', [pytest.param(f, marks=[] if f in ORDINARY else pytest.mark.slow) for f in FAULTS])
def test_killed_at_a_chosen_moment(tmp_path, model, whole, fault):
    run = new_run(tmp_path, model)
    process = launch(run, fault=fault)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, 'the fault was never reached'
    assert status(run).state in ('interrupted', 'new')
    finish(run)
    assert_same(run, whole)


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments(tmp_path, model, whole):
    run, rng, kills = new_run(tmp_path, model), random.Random(0), 0
    for _ in range(12):
        if status(run).state == 'finished': break
        seen = status(run).step
        process = launch(run, resume=status(run).state != 'new')
        wanted = seen + rng.randint(0, 9)
        while process.is_alive() and status(run).step < wanted: time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        kills += process.is_alive()
        process.kill()
        process.join()
    if status(run).state != 'finished': finish(run)
    assert kills >= 3
    assert_same(run, whole)


def test_killed_between_the_last_evaluation_and_its_checkpoint(tmp_path, model, whole, monkeypatch):
    run, saves = new_run(tmp_path, model), []
    save = training.save

    def interrupted(ctx):
        saves.append(ctx.state.step)
        if saves.count(60) == 2: raise KeyboardInterrupt      # step 60 is saved by save_steps, then evaluated, then saved again
        save(ctx)
    monkeypatch.setattr(training, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt): training.train(run)
    monkeypatch.setattr(training, 'save', save)
    assert history(run)['eval'][-1]['step'] == 60
    finish(run)
    assert_same(run, whole)


def test_the_process_started_by_start_survives_kill_9(tmp_path, model, whole):
    run = new_run(tmp_path, model)
    process = start(run)
    while process.poll() is None and status(run).step < 8: time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and status(run).state == 'interrupted'
    with pytest.raises(RunError, match='--resume'): start(run)
    assert follow(run, start(run, resume=True)).state == 'finished'
    assert_same(run, whole)


@pytest.mark.parametrize('settings', [dict(method='qlora', optim='adamw_8bit'), dict(gradient_checkpointing=True, dtype='bfloat16')], ids=str)
def test_resume_in_other_methods(tmp_path, model, settings):
    whole, part = (new_run(tmp_path, model, name, num_train_epochs=1, **settings) for name in ('whole', 'part'))
    training.train(whole)
    append_jsonl(part.control_path, {'command': 'stop', 'value': None})
    assert training.train(part).state == 'stopped'
    assert training.train(part, resume=True).state == 'finished'
    assert_same(part, whole)


def wait_for(run, condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert process.is_alive() and time.monotonic() < end, (status(run), events(run)[-3:])
        time.sleep(0.005)


def happened(run, name): return [e for e in events(run) if e['event'] == name]


def test_commands_act_within_a_step(tmp_path, model):
    run = new_run(tmp_path, model, max_steps=4000, eval_steps=100000, save_steps=100000)
    process = launch(run)
    wait_for(run, lambda: status(run).step > 3, process)
    send(run, 'pause')
    wait_for(run, lambda: status(run).state == 'paused', process)
    at = status(run).step
    time.sleep(0.3)
    assert status(run).step == at == happened(run, 'paused')[0]['step']
    send(run, 'save')
    send(run, 'evaluate')
    wait_for(run, lambda: happened(run, 'evaluated'), process)
    assert happened(run, 'checkpoint')[-1]['step'] == at == history(run)['eval'][-1]['step']
    send(run, 'learning_rate', 5e-4)
    send(run, 'resume')
    wait_for(run, lambda: status(run).step > at + 2, process)
    rates = [r['learning_rate'] for r in history(run)['train'] if r['step'] > at]
    assert rates[0] == pytest.approx(5e-4, rel=1e-3) and max(rates) <= 5e-4
    send(run, 'stop')
    process.join(60)
    assert process.exitcode == 0 and status(run).state == 'stopped'
    stopped = status(run).step
    assert checkpoint.checkpoints(run.checkpoints_path)[-1].name == f'step-{stopped:06d}'
    process = launch(run, resume=True)
    wait_for(run, lambda: status(run).step > stopped + 2, process)
    assert history(run)['train'][-1]['learning_rate'] <= 5e-4 and not status(run).state == 'paused'     # old commands are not repeated, the rate is kept
    assert sum(r['seconds'] < 0 for r in history(run)['train']) == 0
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0 and status(run).state == 'stopped'


def test_one_process_at_a_time(tmp_path, model):
    run = new_run(tmp_path, model, max_steps=4000)
    process = launch(run)
    wait_for(run, lambda: status(run).step > 1, process)
    with pytest.raises(RunError, match='another process'): training.train(run, resume=True)
    assert status(run).state == 'running'
    process.kill()
    process.join()


def test_early_stopping(tmp_path, model):
    run = new_run(tmp_path, model, learning_rate=0.2, num_train_epochs=40, eval_steps=4, early_stopping_patience=2, lr_scheduler_type='constant')
    training.train(run)
    end, early = events(run)[-1], happened(run, 'early_stopped')[0]
    assert end['event'] == 'finished' and end['step'] < 480 and early['step'] == end['best_step'] + 8
    assert end['best_eval_loss'] == min(r['loss'] for r in history(run)['eval'])


def test_max_minutes_lays_the_schedule_over_what_fits(tmp_path, model):
    run = new_run(tmp_path, model, num_train_epochs=2000, max_minutes=0.05, eval_steps=20)
    began = time.monotonic()
    training.train(run)
    assert time.monotonic() - began < 30
    short = happened(run, 'shortened')[-1]
    assert short['total_steps'] < 24000 and events(run)[-1]['step'] == short['total_steps']
    assert history(run)['train'][-1]['learning_rate'] < 0.3 * 1e-2


def test_nan_keeps_the_last_good_checkpoint(tmp_path, model, monkeypatch):
    run, real = new_run(tmp_path, model), training.train_step
    def poisoned(ctx):
        if ctx.state.step == 12: ctx.parameters[0].data.fill_(float('nan'))
        real(ctx)
    monkeypatch.setattr(training, 'train_step', poisoned)
    with pytest.raises(RunError, match='no longer a number at step 13'): training.train(run)
    assert status(run).state == 'failed' and 'no longer a number' in status(run).error
    assert [p.name for p in checkpoint.checkpoints(run.checkpoints_path)] == ['step-000005', 'step-000010']
    monkeypatch.setattr(training, 'train_step', real)
    assert training.train(run, resume=True).state == 'finished'


def test_exit_codes_and_where_the_error_is_written(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    run = new_run(tmp_path, model, 'typo', target_modules='q_porj')
    assert training.main([str(run.path)]) == 2
    printed = capsys.readouterr()
    assert 'did you mean q_proj' in printed.out and 'Traceback' not in printed.out + printed.err
    assert 'did you mean q_proj' in events(run)[-1]['error']
    run = new_run(tmp_path, model, 'crash')
    (run.checkpoints_path).write_text('a file where a folder should be')
    assert training.main([str(run.path)]) == 1
    assert 'Traceback' in capsys.readouterr().err and events(run)[-1]['event'] == 'failed'
    assert training.main([str(tmp_path / 'nothing')]) == 2


def test_a_full_disk_is_noticed_before_training(tmp_path, model, monkeypatch):
    run = new_run(tmp_path, model)
    monkeypatch.setattr(training, 'check_disk', lambda path, need: (_ for _ in ()).throw(HomelabError('not enough disk space')))
    with pytest.raises(HomelabError, match='disk space'): training.train(run)
    assert not history(run)['train']


OLD_NAMES = {new: old for old, new in checkpoint.RENAMED_STATE.items()}


def test_a_run_of_an_earlier_version_can_be_read_and_continued(tmp_path, model, whole):
    run = new_run(tmp_path, model)
    append_jsonl(run.control_path, {'command': 'stop', 'value': None})
    training.train(run)
    manifest = json.loads(run.manifest_path.read_text())
    del manifest['manifest_version']
    manifest['engine'] = dict(rows='a processor', recompute={})          # as version 1 wrote it
    run.manifest_path.write_text(json.dumps(manifest))
    for path in checkpoint.checkpoints(run.checkpoints_path):
        state = json.loads((path / 'state.json').read_text())
        (path / 'state.json').write_text(json.dumps({OLD_NAMES.get(k, k): v for k, v in state.items()}))
    assert run.manifest()['manifest_version'] == run_folder.MANIFEST_VERSION and run.manifest()['engine']['packed'] == dict(on=False, reason='a processor')
    finish(run)
    assert_same(run, whole)
    assert json.loads(run.manifest_path.read_text())['manifest_version'] == run_folder.MANIFEST_VERSION


def test_the_finished_event_has_what_a_report_needs(whole):
    end = events(whole)[-1]
    assert end['tokens'] > 0 and end['tokens_per_second'] > 0 and end['joules'] > 0 and end['energy_source'] and end['peak_resident'] > 2**20
    projection = happened(whole, 'projection')[0]
    assert projection['seconds_low'] <= projection['seconds'] <= projection['seconds_high']
    assert run_folder.versions().items() <= whole.manifest()['versions'].items()
    assert [r['step'] for r in read_jsonl(whole.metrics_path) if r['kind'] == 'eval'][-1] == 60
