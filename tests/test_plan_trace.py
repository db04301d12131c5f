"Traces: models from their names, what is refused, and errors of the process."
import json, subprocess, sys
from types import SimpleNamespace

import pytest

from homelab_ft.core import ConfigError, ModelError, RunError
from homelab_ft.config import make_config
from homelab_ft.plan.trace import trace as module
from homelab_ft.plan.trace.trace import trace


@pytest.fixture
def no_process(monkeypatch):
    monkeypatch.setattr(module.subprocess, 'run', lambda *a, **k: pytest.fail('a process was started'))


def test_planning_imports_no_torch():
    code = 'import sys, homelab_ft.plan.trace.trace, homelab_ft.plan.probe; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_a_70b_from_its_name():
    config = make_config(model='Llama-3.1-70B', method='qlora', max_length=4096, per_device_train_batch_size=1)
    large = trace(config, policies=dict(none=10, layer=70))
    assert 40 * 2**30 < large.allocated < 60 * 2**30 and large.layers == [4, 5, 5]
    assert large.allocated < large.reserved < large.process
    assert 'peak' in str(large) and large.phase in str(large)


def test_a_cuda_graph_reserves_more_than_one_pool():
    settings = dict(max_length=64, per_device_train_batch_size=2, torch_compile=False)
    captured, launched = (trace(make_config(**settings, cuda_graph=graph)) for graph in ('auto', False))
    assert captured.cuda_graph and not launched.cuda_graph
    assert captured.allocated == launched.allocated and captured.reserved > launched.reserved


@pytest.mark.parametrize('settings, given, error, words', [
    (dict(model='no-such-model'), {}, ModelError, 'no such model'),
    (dict(model='SmolLM2-135M', max_length=8193), {}, ConfigError, 'length'),
    (dict(), dict(policies=dict(none=2)), ConfigError, 'do not add up'),
    (dict(), dict(policies=dict(none=7, mlp=-1)), ConfigError, 'do not add up'),
    (dict(), dict(bucket=(10, 5)), ConfigError, 'bucket'),
    (dict(), dict(mlp_chunk=1.5), ConfigError, 'mlp_chunk'),
    (dict(method='full'), dict(policies=dict(offload=6)), ConfigError, 'policy'),
], ids=str)
def test_what_cannot_be_is_refused_before_the_process_starts(no_process, settings, given, error, words):
    with pytest.raises(error, match=words): trace(make_config(**settings), **given)


def test_an_unsupported_architecture_is_named(tmp_path, no_process):
    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='bert', architectures=['BertModel'])))
    with pytest.raises(ModelError, match='BertModel'): trace(make_config(model=str(tmp_path)))


@pytest.mark.parametrize('out', ['', 'null\n{"half'])
def test_a_dry_run_that_breaks_off_is_an_error_with_its_last_words(monkeypatch, out):
    done = SimpleNamespace(stdout=out, stderr='first\nMemoryError: all gone\n', returncode=1)
    monkeypatch.setattr(module.subprocess, 'run', lambda *a, **k: done)
    with pytest.raises(RunError, match='all gone'): trace(make_config())
