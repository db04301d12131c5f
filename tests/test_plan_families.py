"Models without a formula of their own: what the plan says beside what an H200 measured on 2026-11-30."
import json, sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / 'benchmarks' / 'families'
ROWS = json.loads((FOLDER / 'measured.json').read_text())['rows']
PADDED = [row for row in ROWS if row['settings'].get('padding_free') is False]


@pytest.fixture(scope='module')
def run():
    sys.path.insert(0, str(FOLDER))
    import run
    yield run
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize('row', PADDED, ids=lambda row: f"{row['model']}-{'-'.join(map(str, row['settings'].values()))}")
def test_padded_steps_take_what_the_plan_says(run, row):
    layers = row['layers'] if row['layers'] < run.hf_config(row['model'], 0)['num_hidden_layers'] else 0
    said = run.predict(row['model'], layers, row['settings'])
    assert said == row['estimated'], 'the file is not what the plan says today'
    assert said['allocated'] == pytest.approx(row['measured']['allocated'], rel=0.02)
    assert said['process'] == pytest.approx(row['measured']['process'], rel=0.05)
