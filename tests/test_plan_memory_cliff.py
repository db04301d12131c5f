"The cliff benchmark without a GPU: which cases it takes, what it calls running out, and that nothing hides it."
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
torch = pytest.importorskip('torch')

from homelab_ft.core import GiB
from homelab_ft.config import make_config
from homelab_ft.train.engine.features import OUT_OF_MEMORY, Feature, Features
from homelab_ft.plan.model_shape import model_shape

FOLDER = Path(__file__).resolve().parent.parent / 'benchmarks' / 'vram'


@pytest.fixture
def cliff(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import cliff
    return cliff


@pytest.fixture
def cases(cliff): return cliff.choose()


def test_cases_stand_just_on_both_sides_of_every_limit(cliff, cases):
    assert len(cases) == 40 and {limit for _, limit in cases} == {8, 12, 16, 24}
    for (inside, limit), (beyond, same) in zip(cases[::2], cases[1::2]):
        assert limit == same and inside | dict(max_length=0) == beyond | dict(max_length=0) and inside['max_length'] < beyond['max_length']
        low, high = (cliff.share(x, limit) for x in (inside, beyond))
        assert 0.95 <= low <= 0.97 and 1.03 <= high <= 1.05 and (cliff.verdict(low), cliff.verdict(high)) == ('fits', 'runs out')


def test_no_row_nearer_to_the_limit_is_left_out(cliff, cases):
    "One size more would not fit any more, one less would not run out."
    for settings, limit in cases:
        sizes = cliff.lengths(settings)
        i, told = sizes.index(settings['max_length']), cliff.verdict(cliff.share(settings, limit))
        nearer = settings | dict(max_length=sizes[i + (1 if told == 'fits' else -1)])
        assert cliff.verdict(cliff.share(nearer, limit)) == 'too close'


def test_cases_differ_and_are_single_configurations(cliff, cases):
    assert len({settings['model'] for settings, _ in cases}) >= 8
    assert {settings['method'] for settings, _ in cases} == {'lora', 'qlora', 'full'} and {settings['gradient_checkpointing'] for settings, _ in cases} == {False, True}
    for settings, limit in cases:
        config = make_config(**settings)            # raises for what cannot be
        assert config.max_length <= model_shape(config.model).max_position_embeddings
        fast = settings['method'] != 'full' and settings.get('padding_free') is not False
        assert (cliff.need(settings, limit)['step'] == 'packed') == fast
        assert not fast or config.max_length * config.per_device_train_batch_size % 256 == 0      # else the pass would be larger than what is predicted
        assert settings['method'] != 'qlora' or config.torch_compile is False


def test_what_is_compared_is_the_process_less_context_and_libraries(cliff, cases):
    from homelab_ft.plan.memory.overhead import process_bytes
    from homelab_ft.plan.memory.estimate import estimate
    settings, limit = next((s, l) for s, l in cases if s['method'] == 'qlora' and not s['gradient_checkpointing'])
    est = estimate(model_shape(settings['model']), method='qlora', batch_size=settings['per_device_train_batch_size'], length=settings['max_length'], torch_compile=False)
    assert cliff.need(settings, limit)['reserved'] == est.peak - process_bytes(0, est.policies, True, False) > est.allocated


def test_the_choice_is_always_the_same(cliff, cases): assert cliff.choose() == cases


@pytest.mark.parametrize('share, told', [(0.5, 'fits'), (0.97, 'fits'), (0.98, 'too close'), (1.02, 'too close'), (1.03, 'runs out'), (2, 'runs out')])
def test_verdicts(cliff, share, told): assert cliff.verdict(share) == told


def trained(cliff, settings, limit, **features):
    "A row as measure.py has it."
    config, n = make_config(**settings), model_shape(settings['model']).num_hidden_layers
    kept = {'layer' if config.gradient_checkpointing else 'none': n}
    on, off = dict(on=True, reason=''), dict(on=False, reason='switched off')
    given = dict(packed=on, cuda_graph=on, compile=off if config.torch_compile is False else on, policies=kept)
    if cliff.need(settings, limit)['step'] != 'packed': given = dict(packed=off, policies=kept if config.gradient_checkpointing else {})
    return dict(settings=settings, limit_gib=limit, features=given | features, chunk=cliff.chunk(config, limit), reserved=GiB)


def test_what_happened(cliff, cases):
    (inside, limit), (beyond, _) = cases[:2]
    judged = lambda settings, **found: cliff.judged(dict(settings=settings, limit_gib=limit, **found))
    for said in ('OutOfMemoryError: CUDA out of memory.', 'HardwareError: the GPU cannot hold one micro-batch'):
        assert judged(beyond, failed=said)['agrees'] is True and judged(inside, failed=said)['agrees'] is False
    assert judged(inside, failed='more than 170 s')['agrees'] is None
    for settings, agrees in ((inside, True), (beyond, False)):
        row = trained(cliff, settings, limit)
        assert cliff.judged(row)['agrees'] is agrees and cliff.judged(row)['unlike'] == []
        assert cliff.judged(trained(cliff, settings, limit, cuda_graph=dict(on=False, reason=OUT_OF_MEMORY)))['agrees'] is not agrees


@pytest.mark.parametrize('odd, i', [(odd, 0) for odd in (dict(compile=dict(on=False, reason='its gradient is 1e0 away')), dict(policies=dict(mlp=3)), dict(merged_layers=4), dict(cuda_graph=dict(on=False, reason='no GPU')), dict(packed=dict(on=False, reason='switched off')))] +
                         [(dict(packed=dict(on=True, reason='')), -1), (dict(policies={}), -10)])
def test_a_step_that_was_not_as_planned_counts_for_nothing(cliff, cases, odd, i):
    settings, limit = cases[i]
    row = cliff.judged(trained(cliff, settings, limit, **odd))
    assert row['outcome'] == 'trained' and row['agrees'] is None and row['unlike'] == [*odd]
    assert any('not as planned' in str(cell) for cell in cliff.table([row]).rows[0])


def test_nothing_hides_a_full_gpu(cliff):
    "In a run a full GPU costs captured graphs; measured as `fixed`, it ends the steps."
    import measure
    from homelab_ft.train.engine.packed import PackedStep
    engine, tries = PackedStep.__new__(PackedStep), []
    def passes(cache, rows):
        tries.append(rows)
        if len(tries) == 1: raise torch.OutOfMemoryError('full')
        return []
    vars(engine).update(device=torch.device('cpu'), adapter_casts=None, capture_stream=object(), graphs={}, label_tokens={0: 1}, microbatches=passes, model=torch.nn.Linear(1, 1), features=Features(cuda_graph=Feature(True)))
    engine.accumulate(None, [[0]])
    assert len(tries) == 2 and engine.features.cuda_graph == Feature(False, OUT_OF_MEMORY)          # tried again, with less
    tries.clear()
    measure.keep_all(SimpleNamespace(step=engine))
    with pytest.raises(torch.OutOfMemoryError): engine.accumulate(None, [[0]])
    assert len(tries) == 1


def test_a_run_of_the_benchmark(cliff, monkeypatch, tmp_path, capsys):
    "With a measurement that is made up: the file, the table, and the exit code."
    def measure(case, fixed, wrong=False):
        settings, limit = case
        out = (cliff.verdict(cliff.share(settings, limit)) == 'runs out') != (wrong and limit == 8)
        return dict(seconds=1.) | (dict(settings=settings, limit_gib=limit, failed='OutOfMemoryError: full') if out else trained(cliff, settings, limit))
    for wrong in (False, True):
        monkeypatch.setattr(cliff.matrix, 'measure', lambda case, fixed: measure(case, fixed, wrong))
        assert cliff.main(str(tmp_path / 'out.json'), '2') == wrong
        told = json.loads((tmp_path / 'out.json').read_text())['rows']
        assert len(told) == 40 and sum(not r['agrees'] for r in told) == 10 * wrong
        assert (' NO\n' in capsys.readouterr().out) == wrong


def test_what_ran_is_what_todays_plan_says(cliff):
    "Rows of the day they ran, judged by the closed form as it is now."
    rows = json.loads((Path(cliff.__file__).parent / 'cliff.json').read_text())['rows']
    assert len(rows) == 40 and {r['limit_gib'] for r in rows} == {8, 12, 16, 24} and all(r['agrees'] for r in rows)
    today = [cliff.judged({k: r[k] for k in r.keys() - {'predicted', 'share', 'verdict', 'gaps', 'agrees', 'unlike'}}) for r in rows]
    assert sum(r['agrees'] is True for r in today) >= 32 and not any(r['agrees'] is False for r in today)
    assert all((r['share'] < 1) == (r['outcome'] == 'trained') for r in today)       # also where the verdict is too close to call
    assert all(abs(a['share'] - b['share']) < 0.04 for a, b in zip(rows, today))
    assert all((r['share'] < 1) == (r['outcome'] == 'trained') for r in today)
    assert all(abs(a['share'] - b['share']) < 0.04 for a, b in zip(rows, today))
