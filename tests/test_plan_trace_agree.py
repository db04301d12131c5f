"The formula compared with traces of random settings, as benchmarks/plan/agree.py recorded them; one of them is traced again."
import json, random, sys
from pathlib import Path
from statistics import median

import pytest

FOLDER = Path(__file__).resolve().parents[1] / 'benchmarks' / 'plan'
RECORDED = json.loads((FOLDER / 'agree.json').read_text())
ROWS = RECORDED['rows']


@pytest.fixture(scope='module')
def agree():
    sys.path.insert(0, str(FOLDER))
    import agree
    sys.path.remove(str(FOLDER))
    return agree


def test_rows_are_as_drawn(agree):
    rng = random.Random(RECORDED['seed'])
    for row in ROWS:
        settings = agree.draw(rng)
        assert (settings, agree.draw_microbatch(rng, settings)) == (row['settings'], row['drawn'])


@pytest.mark.parametrize('kind, usual, worst', [('allocated', 0.002, 0.02), ('process', 0.01, 0.02)])
def test_the_formula_of_today_agrees_with_the_traces(agree, kind, usual, worst):
    errors = [abs(agree.error(row | dict(closed=agree.estimated(row)), kind)) for row in ROWS]
    assert len(errors) >= 60 and median(errors) < usual and max(errors) < worst


def test_a_trace_is_as_recorded(agree):
    row = min(ROWS, key=lambda r: r['trace']['seconds'])
    again = agree.traced(row['settings'], row['drawn'])
    assert again['allocated'] == pytest.approx(row['trace']['allocated'], rel=1e-4)
    assert again['process'] == pytest.approx(row['trace']['process'], rel=2e-3)
