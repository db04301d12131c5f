"How long plans take: the benchmark's quick part, with limits that a busy machine keeps too."
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / 'benchmarks' / 'plan'


@pytest.fixture
def latency(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import latency
    return latency


def test_no_part_of_the_plan_loads_what_takes_seconds(latency):
    found = latency.in_new_process(f'import importlib, json, sys; [importlib.import_module(m) for m in {latency.MODULES}]; print(json.dumps([m for m in {latency.HEAVY} if m in sys.modules]))')
    assert found == [] and {'homelab_ft.plan.memory.estimate', 'homelab_ft.plan.trace.trace', 'homelab_ft.plan.autoconfigure'} <= set(latency.MODULES)


def test_what_comes_along_is_seen(latency):
    assert latency.imported('homelab_ft.train.engine.ops.chunked_loss')[1] == ['torch']
    seen = latency.row('import x', [1.], 'ms', loaded=['torch'])
    assert not seen['kept'] and 'loads torch' in str(latency.table([seen]))


@pytest.mark.parametrize('model', ['Llama-3.2-1B', 'Llama-3.1-70B'])
def test_every_estimate_is_quick(latency, model):
    found = latency.estimates(model, 5)
    assert len(found) > 50 and max(found) < 5 * latency.CALL_MS


@pytest.mark.parametrize('worst, rc', [(1.9, 0), (2.1, 1)])
def test_a_limit_that_is_not_kept_ends_in_an_error(latency, monkeypatch, tmp_path, capsys, worst, rc):
    monkeypatch.setattr(latency, 'HERE', tmp_path)
    monkeypatch.setattr(latency, 'quick_rows', lambda repeats: [latency.row('estimate', [0.1, worst], 'ms', 2), latency.row('no limit', [99.], 's')])
    monkeypatch.setattr(latency, 'trace_rows', lambda: [])
    assert latency.main('1') == rc and (tmp_path / 'latency.json').exists()
    assert ('NOT KEPT' in capsys.readouterr().out) == bool(rc)
