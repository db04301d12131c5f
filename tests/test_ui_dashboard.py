"ui.dashboard: folders with nothing, torn lines, vanished runs; threads that end."
import time

import pytest

from homelab_ft.config import RunConfig
from homelab_ft.train.run_folder import RunStatus, create_run, history, log_event, log_metrics, pending_commands, status
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
