"Every notebook runs from its first cell to its last: the same as `nbdev_test`, side by side with the other tests."
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_notebook

run_notebook.__test__ = False
ROOT = Path(__file__).resolve().parent.parent
LONGEST_FIRST = ('first_finetune', 'pipeline', 'cli')


def notebooks():
    "All notebooks, those that take longest first."
    paths = sorted(Path(p).resolve().relative_to(ROOT) for p in nbglob(ROOT / 'nbs'))
    return sorted(paths, key=lambda p: not any(name in p.stem for name in LONGEST_FIRST))


@pytest.mark.parametrize('path', notebooks(), ids=str)
def test_notebook(path, capfd):
    passed, seconds = run_notebook(ROOT / path, skip_flags=get_config(path=ROOT).tst_flags.split(), basepath=ROOT)
    assert passed, capfd.readouterr().err
