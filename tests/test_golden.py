"What every command prints at 80 columns; `python tests/golden_update.py` renews the files when an output was meant to change."
import difflib

import pytest

from golden_cases import CASES, COMMANDS, GOLDEN, run_all, same, typed


@pytest.fixture(scope='module')
def printed(tmp_path_factory):
    "What the cases print now."
    return dict(run_all(tmp_path_factory.mktemp('golden')))


def test_every_command_and_every_file_has_a_case():
    from homelab_ft.cli import make_parser
    assert set(make_parser().commands) == set(COMMANDS)
    assert {file.stem for file in GOLDEN.glob('*.txt')} == set(CASES)


@pytest.mark.parametrize('name', CASES)
def test_output(name, printed):
    expected = (GOLDEN / f'{name}.txt').read_text(encoding='utf-8')
    actual = f'{typed(CASES[name])}\n{printed[name]}'
    difference = difflib.unified_diff(expected.splitlines(), actual.splitlines(), 'expected', 'printed', lineterm='')
    renew = f'If this was meant: python tests/golden_update.py {name}'
    assert same(name, expected) == same(name, actual), '\n'.join(difference) + f'\n\n{renew}'
    assert [line for line in printed[name].splitlines() if len(line) > 80] == []
    assert '\r' not in printed[name] and '\x1b' not in printed[name]
