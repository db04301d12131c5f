"""Every notebook runs from its first cell to its last: the same as `nbdev_test`, side by side with the other tests.

Each runs in a process of its own, since notebooks define operators, classes and settings of libraries anew. The processes are
forks of a server that has imported the large libraries once.
"""
import io, shutil
from contextlib import redirect_stderr
from multiprocessing import get_context
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FIRST = ('parity', 'pipeline', 'compare', 'launcher')
forks = get_context('forkserver')
forks.set_forkserver_preload(['nbdev.test', 'torch', 'transformers', 'peft', 'bitsandbytes', 'fastcore.test', 'matplotlib.pyplot'])


def notebooks():
    "All notebooks, those that take longest first."
    paths = sorted(Path(p).resolve().relative_to(ROOT) for p in nbglob(ROOT / 'nbs'))
    return sorted(paths, key=lambda p: not any(name in p.stem for name in LONGEST_FIRST))


def run_notebook(path, skip_flags, pipe):
    "Run one notebook; what went wrong goes into the pipe."
    from nbdev.test import test_nb
    with redirect_stderr(io.StringIO()) as errors:
        passed, _ = test_nb(path, skip_flags=skip_flags, basepath=ROOT)
    pipe.send('' if passed else errors.getvalue() or 'failed without a message')


@pytest.mark.parametrize('path', notebooks(), ids=str)
def test_notebook(path, tmp_path):
    if 'tutorials' in path.parts: path = Path(shutil.copy(ROOT / path, tmp_path))      # it makes folders beside itself
    receiver, sender = forks.Pipe(duplex=False)
    process = forks.Process(target=run_notebook, args=(ROOT / path, get_config(path=ROOT).tst_flags.split(), sender))
    process.start()
    sender.close()
    try: error = receiver.recv()
    except EOFError: error = 'the process ended before the notebook did'
    process.join()
    assert not error, error
