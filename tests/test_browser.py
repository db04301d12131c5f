"""The tutorial as a person meets it: JupyterLab in a real browser, buttons, sliders, a kernel restart.

Needs Debian's chromium and Playwright's Python package; `.ci/run` installs both.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from homelab_ft.train.run_folder import events, list_runs, send, status
from homelab_ft.ui.planner import LABELS

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'google-chrome', 'chromium-browser'))), None)
SECONDS = 180                    # for any one thing to happen, on a busy machine
STEPS = 100_000                  # the training lasts until somebody stops it
SETTINGS = {
    'notebook-extension/tracker': {'windowingMode': 'none'},                              # cells out of sight are in the page, too
    'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False},  # no network, no questions
}
HARMLESS = [
    # JupyterLab asks for the settings of a workspace that does not exist yet.
    r'Failed to load resource: the server responded with a status of 404 \(Not Found\).*/lab/api/workspaces/',
]


def tutorial(folder):
    "The tutorial with a longer training, and a last cell that attaches to the newest run."
    notebook = json.loads((ROOT / 'nbs/tutorials/first_finetune.ipynb').read_text(encoding='utf-8'))
    notebook['metadata'].pop('widgets', None)
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code': cell['outputs'] = []
    settings, = [c for c in notebook['cells'] if 'num_train_epochs=2' in ''.join(c['source'])]
    source = ''.join(settings['source']).replace('num_train_epochs=2', f'max_steps={STEPS}, save_steps=200')
    settings['source'] = source.replace('train_batch_size=16', 'train_batch_size=4')      # short steps
    attach = 'from homelab_ft.ui.dashboard import dashboard\ndashboard()'
    notebook['cells'].append(dict(cell_type='code', id='attach', metadata={}, source=attach, outputs=[], execution_count=None))
    (folder / 'tutorial.ipynb').write_text(json.dumps(notebook))


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def wait_until(condition, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f'not in {seconds} s'
        time.sleep(0.2)


@contextmanager
def jupyter_lab(folder, settings=SETTINGS):
    "A JupyterLab on `folder`, with settings of its own; yields its address."
    home, port = folder / '.jupyter', free_port()
    for name, values in settings.items():
        path = home / 'settings' / '@jupyterlab' / f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    env = os.environ | dict(JUPYTER_CONFIG_DIR=str(home), JUPYTER_RUNTIME_DIR=str(home / 'runtime'), IPYTHONDIR=str(home / 'ipython'),
                            JUPYTERLAB_SETTINGS_DIR=str(home / 'settings'), JUPYTERLAB_WORKSPACES_DIR=str(home / 'workspaces'),
                            OMP_NUM_THREADS='1', MPLBACKEND='module://matplotlib_inline.backend_inline',
                            PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}',
               '--IdentityProvider.token=', '--ServerApp.password=', f'--ServerApp.root_dir={folder}', '--ServerApp.port_retries=0']
    address = f'http://127.0.0.1:{port}'
    def answers():
        assert process.poll() is None, (home / 'log').read_text()[-2000:]
        try: return bool(urllib.request.urlopen(f'{address}/api'))
        except OSError: return False
    with open(home / 'log', 'w') as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            wait_until(answers)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            try: process.wait(30)
            except subprocess.TimeoutExpired: process.kill()


class Notebook:
    "A notebook that is open in JupyterLab."
    def __init__(self, page, address, name):
        self.page, self.errors = page, []
        page.set_default_timeout(SECONDS * 1000)
        page.on('console', lambda m: m.type == 'error' and self.errors.append(f'{m.text} {m.location.get("url", "")}'))
        page.on('pageerror', lambda error: self.errors.append(str(error)))
        page.goto(f'{address}/lab/tree/{name}?reset')
        page.wait_for_selector('.jp-Notebook .jp-Cell')
        self.wait_for_kernel()

    def wait_for_kernel(self): self.page.wait_for_selector('#jp-main-statusbar :text("(ipykernel) | Idle")')

    def accept_dialog(self):
        "Say yes: to a restart, or to the kernel that a notebook which is still being opened asks for."
        accept = self.page.locator('.jp-Dialog button.jp-mod-accept')
        if accept.count(): accept.first.click()

    def menu(self, menu, item):
        self.page.click(f'.lm-MenuBar-itemLabel:text-is("{menu}")')
        self.page.click(f'.lm-Menu-itemLabel:text-is("{item}")')

    def run_all(self):
        "The first request can be lost while the page is still loading: repeat it until a cell says that it was run."
        for _ in range(10):
            self.accept_dialog()
            self.menu('Run', 'Run All Cells')
            try: return self.page.wait_for_selector('.jp-InputPrompt:text-matches("\\\\[(\\\\*|[0-9]+)\\\\]")', timeout=5000)
            except self.page.timeout_error: continue
        raise AssertionError('the cells were not run')

    def cell(self, text):
        "The code cell that holds `text`."
        return self.page.locator('.jp-CodeCell', has=self.page.locator('.jp-InputArea', has_text=text)).first

    def restart(self):
        self.menu('Kernel', 'Restart Kernel…')
        self.page.wait_for_selector('.jp-Dialog')
        self.accept_dialog()
        self.page.wait_for_selector('.jp-Dialog', state='detached')
        self.wait_for_kernel()

    def run_cell(self, cell, shows):
        "Run one cell until its output has something that fits the selector `shows`."
        for _ in range(10):
            cell.locator('.jp-InputArea-editor').click()
            self.page.keyboard.press('Control+Enter')
            try: return cell.locator(shows).first.wait_for(timeout=20_000)
            except self.page.timeout_error: continue
        raise AssertionError('the cell was not run')

    def unexpected_errors(self):
        return [e for e in self.errors if not any(re.search(pattern, e) for pattern in HARMLESS)]


@contextmanager
def browser_page(**options):
    "A page of a browser without a window."
    from playwright.sync_api import TimeoutError, sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'])
        page = browser.new_page(viewport=dict(width=1300, height=1000), **options)
        page.timeout_error = TimeoutError
        try: yield page
        finally: browser.close()


def button(cell, name): return cell.locator(f'button.jupyter-button:has-text("{name}")').first


def planner_peak(cell):
    "The longest of the planner's bars, in GiB."
    texts = cell.locator('.jp-OutputArea svg text').all_text_contents()
    return max(float(text.split()[0]) for text in texts if re.fullmatch(r'[\d.]+ GiB', text))


def stop_training(folder):
    "Nothing trains on when the test ends, however it ends."
    for run in list_runs(folder / 'runs'):
        if status(run).state in ('new', 'running', 'paused'):
            send(run, 'stop')
            wait_until(lambda: status(run).state == 'stopped', 60)


@pytest.mark.skipif(not CHROMIUM, reason='no chromium: apt-get install chromium')
def test_tutorial_in_a_browser(tmp_path):
    pytest.importorskip('playwright', reason='no playwright: pip install playwright')
    tutorial(tmp_path)
    (tmp_path / '.jupyter').mkdir()
    with jupyter_lab(tmp_path) as address, browser_page() as page:
        try: walk(Notebook(page, address, 'tutorial.ipynb'), tmp_path)
        except BaseException:
            page.screenshot(path=tmp_path / 'failed.png')
            print('see', tmp_path / 'failed.png')
            raise
        finally: stop_training(tmp_path)


def walk(notebook, folder):
    notebook.run_all()

    planner = notebook.cell('planner_widget()')
    handle = planner.locator(f'.widget-hslider:has-text("{LABELS["length"]}") .noUi-handle')
    handle.wait_for()
    before = planner_peak(planner)
    handle.focus()
    for _ in range(2): notebook.page.keyboard.press('ArrowRight')
    wait_until(lambda: planner_peak(planner) > before)      # longer sequences need more memory

    board = notebook.cell('dashboard(run)')
    board.locator('text=/[1-9][0-9]* of 100,000/').wait_for()
    run, = list_runs(folder / 'runs')
    rate = board.locator('input[type=number]')
    assert 0 < float(rate.input_value()) <= run.config().learning_rate
    button(board, 'pause').click()                          # while the next cell awaits the end of the training
    board.locator('text="paused"').first.wait_for()
    assert status(run).state == 'paused'
    rate.fill('0.0005')
    button(board, 'set').click()
    board.locator('text="learning rate changed"').first.wait_for()
    assert rate.input_value() == '0.0005'
    step = status(run).step
    button(board, 'resume').click()
    wait_until(lambda: status(run).state == 'running' and status(run).step > step)
    happened = [(e['event'], e.get('value')) for e in events(run) if e['event'] in ('paused', 'learning_rate', 'resumed')]
    assert happened == [('paused', None), ('learning_rate', 0.0005), ('resumed', None)]

    notebook.restart()
    assert status(run).state == 'running'                   # the training did not notice
    attach = notebook.cell('dashboard()')
    notebook.run_cell(attach, 'text=/[1-9][0-9]* of 100,000/')
    button(attach, 'stop').click()
    attach.locator('text="stopped"').first.wait_for()
    assert status(run).state == 'stopped' and status(run).step > step
    assert notebook.unexpected_errors() == []
