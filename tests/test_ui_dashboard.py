"ui.dashboard: folders with nothing, torn lines, vanished runs; threads that end."
import time

import pytest

from homelab_ft.config import RunConfig
from homelab_ft.core import RunError
from homelab_ft.train.run_folder import (RunLock, RunStatus, create_run, events, history, log_event, log_metrics, pending_commands,
                                         status)
from homelab_ft.ui import dashboard as ui


@pytest.fixture
def run(tmp_path): return create_run(RunConfig(run_name='one'), tmp_path)


@pytest.fixture
def board(run):
    board = ui.Dashboard(run, refresh_seconds=0.02, patience=0.2)
    yield board
    board.close()
    board.thread.join(10)
    assert not board.thread.is_alive()


def wait_for(condition, seconds=15):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition(): time.sleep(0.02)
    assert condition()


def test_empty_folder(run): assert 'no step finished yet' in ui.dashboard_html(status(run), history(run), run.name)


def test_torn_lines(run):
    log_event(run, 'started', total_steps=10)
    log_metrics(run, kind='train', step=1, loss=2.0, learning_rate=1e-4, seconds=1.0)
    for path in (run.metrics_path, run.events_path):
        with open(path, 'ab') as f: f.write(b'{"kind": "train", "st')
    page = ui.dashboard_html(status(run), history(run), run.name)
    assert '1 of 10' in page and '2.0000' in page


def test_every_cut_of_the_metrics(run):
    "The file may end anywhere: what is whole is shown."
    for step in (1, 2, 3): log_metrics(run, kind='train', step=step, loss=3.0 - step, learning_rate=1e-4, seconds=step)
    whole = run.metrics_path.read_bytes()
    for end in range(0, len(whole), 7):
        run.metrics_path.write_bytes(whole[:end])
        assert '<svg' in ui.dashboard_html(status(run), history(run))


def test_text_is_escaped():
    page = ui.dashboard_html(RunStatus('<s>', error='<img src=x>'), {'train': [], 'eval': []}, '<u>')
    assert not any(bad in page for bad in ('<s>', '<img', '<u>'))


def test_buttons_write_control_lines(run, board):
    for command in ('pause', 'stop', 'save', 'evaluate'): board.buttons[command].click()
    assert [c['command'] for c in pending_commands(run, 0)[0]] == ['pause', 'stop', 'save', 'evaluate']
    assert 'sent: evaluate' in board.message.value


@pytest.mark.parametrize('rate', [0, -1, 2, float('nan')])
def test_wrong_rate_is_refused(run, board, rate):
    board.rate.value = rate
    board.buttons['learning_rate'].click()
    assert 'between 0 and 1' in board.message.value and pending_commands(run, 0)[0] == []


def test_ends_with_the_run(run, board):
    log_event(run, 'started', total_steps=1)
    log_event(run, 'stopped')
    wait_for(lambda: not board.thread.is_alive())
    assert 'stopped' in board.view.value and board.buttons['stop'].disabled


def test_folder_vanishes_and_comes_back(run, board):
    content = {p.name: p.read_bytes() for p in run.path.iterdir() if p.is_file()}
    run.metrics_path.mkdir()                                     # reading it fails
    wait_for(lambda: board.message.value)
    assert board.thread.is_alive()
    run.metrics_path.rmdir()
    log_metrics(run, kind='train', step=5, loss=1.25, learning_rate=1e-4, seconds=1.0)
    wait_for(lambda: '1.2500' in board.view.value)
    assert content.keys() <= {p.name for p in run.path.iterdir()}


def test_ended_run_is_watched_for_a_while(run):
    log_event(run, 'started', total_steps=1)
    log_event(run, 'stopped')
    board = ui.Dashboard(run, refresh_seconds=0.02, patience=0.3)
    assert board.thread.is_alive()
    wait_for(lambda: not board.thread.is_alive())


def test_close_twice(run):
    board = ui.dashboard(run, refresh_seconds=0.02)
    board.close()
    board.close()
    board.thread.join(10)
    assert not board.thread.is_alive()


# ---------------------------------------------------------------- the box for the learning rate


def log_step(run, step, rate): log_metrics(run, kind='train', step=step, loss=2.0, learning_rate=rate, seconds=float(step))


def test_rate_follows_the_run_until_it_is_edited(run, board):
    assert board.rate.value == run.config().learning_rate
    log_step(run, 1, 3e-4)
    wait_for(lambda: board.rate.value == 3e-4)
    board.rate.value = 5e-5                                      # somebody types
    log_step(run, 2, 2e-4)
    wait_for(lambda: '2.00e-04' in board.view.value)
    assert board.rate.value == 5e-5
    log_event(run, 'learning_rate', step=2, value=5e-5)          # it was set: the box follows again
    wait_for(lambda: not board.rate_edited)
    log_step(run, 3, 4e-5)
    wait_for(lambda: board.rate.value == 4e-5)


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize('machine, names', [
    ({}, []),
    (dict(ram_bytes=2**30), ['CPU RAM']),
    (dict(gpu_used_bytes=2**30, gpu_total_bytes=2**34, temperature=0, power_watts=0.0), ['GPU memory', 'temperature', 'power']),
])
def test_only_what_is_known_is_shown(machine, names): assert list(ui.machine_figures(machine)) == names


def test_time_left_has_its_interval(run):
    log_event(run, 'started', total_steps=100)
    for step in range(1, 11): log_metrics(run, kind='train', step=step, loss=1.0, seconds=step + 0.1 * (step % 2), tokens=50 * step)
    with RunLock(run): now = status(run)
    assert now.eta_low < now.eta_seconds < now.eta_high and 80 < now.eta_seconds < 100
    assert ' to ' in ui.figures(now)['left'] and ui.figures(now)['tokens per second'] == '51'
    now.eta_low = None
    assert ' to ' not in ui.figures(now)['left']


def test_metrics_of_an_old_version(run):
    "Before tokens per second and the GPU's figures were logged, and before steps had a learning rate."
    run.metrics_path.write_text('{"kind": "train", "step": 1, "loss": 2.0}\n{"kind": "train", "step": 2, "loss": 1.5}\n')
    log_event(run, 'started', total_steps=4)
    page = ui.dashboard_html(status(run), history(run), run.name, events(run))
    assert '2 of 4' in page and 'tokens per second' not in page
    assert ui.current_rate(events(run), history(run), 1e-3) == 1e-3


def test_a_run_that_starts_has_its_total(run):
    log_event(run, 'launched', total_steps=12345)
    page = ui.dashboard_html(status(run), history(run), run.name)
    assert 'starting' in page and '0 of 12,345' in page


def test_events_are_marked(run):
    log_step(run, 1, 1e-4)
    for event in ('paused', 'resumed', 'checkpoint', 'stopped'): log_event(run, event, step=1)
    page = ui.dashboard_html(status(run), history(run), run.name, events(run))
    assert all(f'{label} at step 1' in page for label in ('paused', 'resumed', 'checkpoint', 'stopped'))


# ---------------------------------------------------------------- finding the run


def test_chooser_watches_what_is_chosen(tmp_path):
    for name in ('one', 'two'): create_run(RunConfig(run_name=name), tmp_path)
    chooser = ui.dashboard(refresh_seconds=0.02, runs_dir=tmp_path)
    first = chooser.board
    other = next(run for _, run in chooser.choice.options if run.name != first.run.name)
    chooser.choice.value = other
    assert chooser.board.run is other and chooser.children[1] is chooser.board
    first.thread.join(10)
    assert not first.thread.is_alive()                           # the one before reads no more
    chooser.close()
    chooser.board.thread.join(10)
    assert not chooser.board.thread.is_alive()


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match='no runs here'): ui.dashboard(runs_dir=tmp_path)
    with pytest.raises(RunError, match='no such run'): ui.dashboard('other', runs_dir=tmp_path)
