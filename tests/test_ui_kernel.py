"ui.dashboard in a real kernel, without JupyterLab's subshells: a button works while a cell awaits the end of a training."
import os
import time
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

from homelab_ft.config import RunConfig
from homelab_ft.train.run_folder import RunLock, create_run, log_event, log_metrics, pending_commands

ROOT = Path(__file__).resolve().parent.parent
SETUP = """
from homelab_ft.train.launcher import wait
from homelab_ft.ui.dashboard import dashboard
board = dashboard(refresh_seconds=0.1)
print(board.run.name, board.buttons['pause'].comm.comm_id, board.rate.comm.comm_id)
"""


@pytest.fixture
def kernel(tmp_path):
    manager, client = start_new_kernel(cwd=str(tmp_path), env=os.environ | dict(PYTHONPATH=str(ROOT)), startup_timeout=120)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f'not in {seconds} s'
        time.sleep(0.05)


def run_code(kernel, code):
    "Run a cell; returns what it printed."
    printed = []
    def keep(message):
        if message['msg_type'] == 'stream': printed.append(message['content']['text'])
    reply = kernel.execute_interactive(code, output_hook=keep, timeout=120)
    assert reply['content']['status'] == 'ok', reply['content']
    return ''.join(printed)


def send_comm(kernel, comm_id, **data):
    "What a frontend sends when a widget is used."
    kernel.shell_channel.send(kernel.session.msg('comm_msg', dict(comm_id=comm_id, data=data)))


def test_a_button_works_while_a_cell_awaits(tmp_path, kernel):
    run = create_run(RunConfig(run_name='one'), tmp_path / 'runs')
    with RunLock(run):
        log_event(run, 'started', total_steps=9)
        log_metrics(run, kind='train', step=1, loss=2.0, learning_rate=3e-4, seconds=1.0)
        name, pause, rate = run_code(kernel, SETUP).split()      # `dashboard()` found the run by itself
        assert name == 'one'
        waiting = kernel.execute('end = await wait(board.run)')
        send_comm(kernel, pause, method='custom', content=dict(event='click'), buffers=[])
        send_comm(kernel, rate, method='update', state=dict(value=7e-5), buffer_paths=[])
        wait_for(lambda: pending_commands(run, 0)[0])
        assert pending_commands(run, 0)[0][0]['command'] == 'pause'
        log_event(run, 'finished')
    wait_for(lambda: kernel.get_shell_msg(timeout=60)['parent_header'].get('msg_id') == waiting)
    assert run_code(kernel, 'print(end.state, board.rate.value, board.rate_edited)').split() == ['finished', '7e-05', 'True']
