"The closed form beside traces of random settings, as benchmarks/plan/agree.py recorded them; one of them is traced again."
import json, random, sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / 'benchmarks' / 'plan'
ROWS = json.loads((FOLDER / 'agree.json').read_text())['rows']


@pytest.fixture(scope='module')
def agree():
    sys.path.insert(0, str(FOLDER))
    import agree
    sys.path.remove(str(FOLDER))
    return agree


def test_rows_are_as_drawn(agree):
    told = json.loads((FOLDER / 'agree.json').read_text())
    rng = random.Random(told['seed'])
    for row in told['rows']:
        settings = agree.draw(rng)
        assert (settings, agree.draw_pass(rng, settings)) == (row['settings'], row['drawn'])


def test_there_is_a_bit_of_everything():
    assert len(ROWS) >= 60
    assert {r['settings']['method'] for r in ROWS} == {'full', 'lora', 'int8', 'qlora'} and len({r['settings']['model'] for r in ROWS}) >= 20
    assert sum(r['trace']['rows'] == 'on' for r in ROWS) > 20 < sum(r['trace']['rows'] != 'on' for r in ROWS)
    assert sum(bool(r['drawn']['policies']) for r in ROWS) >= 5 <= sum(bool(r['drawn']['learned']) for r in ROWS)


def test_the_closed_form_on_file_is_that_of_today(agree):
    for row in ROWS: assert agree.closed(row) == row['closed'], 'run benchmarks/plan/agree.py 0'


def test_tensors_agree(agree):
    found = sorted(abs(agree.apart(r, 'allocated')) for r in ROWS)
    assert found[len(found) // 2] < 0.002 and found[-1] < 0.02


def test_processes_agree(agree):
    found = [agree.apart(r, 'process') for r in ROWS]
    assert -0.02 < min(found) and max(found) < 0.02
    assert sorted(map(abs, found))[len(found) // 2] < 0.01


def test_a_trace_is_as_recorded(agree):
    row = min(ROWS, key=lambda r: r['trace']['seconds'])
    again = agree.traced(row['settings'], row['drawn'])
    assert again['allocated'] == pytest.approx(row['trace']['allocated'], rel=1e-4) and again['process'] == pytest.approx(row['trace']['process'], rel=2e-3)
