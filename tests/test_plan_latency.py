"How long plans take: the benchmark's quick part, with limits that a busy machine keeps too."
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / 'benchmarks' / 'plan'


@pytest.fixture
def latency(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import latency
    return latency


def test_a_heavy_import_is_seen(latency):
    assert latency.imported('homelab_ft.train.engine.ops.chunked_loss')[1] == ['torch']
    seen = latency.row('import x', [1.], 'ms', loaded=['torch'])
    assert not seen['within_limit'] and 'loads torch' in str(latency.table([seen]))


@pytest.mark.parametrize('model', ['Llama-3.2-1B', 'Llama-3.1-70B'])
def test_every_estimate_is_quick(latency, model):
    found = latency.estimates(model, 5)
    assert len(found) > 50 and max(found) < 5 * latency.CALL_MS


@pytest.mark.parametrize('worst, rc', [(1.9, 0), (2.1, 1)])
def test_an_exceeded_limit_ends_in_an_error(latency, monkeypatch, tmp_path, capsys, worst, rc):
    monkeypatch.setattr(latency, 'HERE', tmp_path)
    monkeypatch.setattr(latency, 'quick_rows', lambda repeats: [latency.row('estimate', [0.1, worst], 'ms', 2), latency.row('no limit', [99.], 's')])
    monkeypatch.setattr(latency, 'trace_rows', lambda: [])
    assert latency.main('1') == rc and (tmp_path / 'latency.json').exists()
    assert ('EXCEEDED' in capsys.readouterr().out) == bool(rc)
