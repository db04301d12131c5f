"All tests: no network, no windows, the tools importable."
import os, sys
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tools'))


@pytest.fixture(scope='module')
def one_thread():
    "PyTorch on one thread, here and in processes started from here: the same numbers every time, and a core left for others."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('OMP_NUM_THREADS', '1')
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def toy_model(tmp_path_factory):
    "Folder of a Llama of toy size."
    from toy_runs import save_toy_model
    return save_toy_model(tmp_path_factory.mktemp('model'))


def pytest_collection_modifyitems(items):
    "With xdist, a file's tests stay together, so that what a file prepares is prepared once; each notebook is a group of its own."
    for item in items:
        group = item.name if item.path.name == 'test_notebooks.py' else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
