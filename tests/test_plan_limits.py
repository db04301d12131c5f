"plan.limits, plan.remedies: largest values grow with the GPU, the map repeats estimates, and savings are differences."
import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import GiB, HomelabError
from homelab_ft.plan.limits import largest_model, length_batch_map, max_value
from homelab_ft.plan.memory.estimate import METHODS, EstimateSpec, estimate, estimate_with_checkpointing
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.remedies import explain, remedies

SHAPES = {name: model_shape(name) for name in ('SmolLM2-135M', 'Llama-3.2-1B', 'Qwen2.5-7B', 'Llama-3.1-8B', 'Phi-4')}
LLAMA = SHAPES['Llama-3.1-8B']
shapes, gibs = st.sampled_from(sorted(SHAPES)), st.floats(2, 140)
few = settings(max_examples=15, deadline=None)


@few
@given(shapes, gibs, st.floats(0.1, 60), st.sampled_from(['length', 'lora_r', 'batch_size']), st.sampled_from(METHODS))
def test_the_largest_value_fits_and_grows_with_the_gpu(name, gib, more, what, method):
    shape, given = SHAPES[name], dict(method=method) | ({} if what == 'length' else dict(length=1024))
    (small, est), (large, _) = (max_value(size * GiB, shape, what, **given) for size in (gib, gib + more))
    assert small <= large and est.fits(gib * GiB) == (small > 0) and large <= dict(length=shape.max_position_embeddings).get(what, 4096)


@few
@given(gibs, st.floats(0.1, 60))
def test_the_largest_model_grows_with_the_gpu(gib, more):
    (a, est), (b, _) = (largest_model(size * GiB, list(SHAPES), length=512) for size in (gib, gib + more))
    assert a is None or est.fits(gib * GiB) and SHAPES[a].n_params <= SHAPES[b].n_params


@pytest.mark.parametrize('name, given', [('Llama-3.1-8B', dict()), ('Llama-3.2-1B', dict(method='lora', label_share=0.1)), ('Llama-3.2-1B', dict(padding_free=False))], ids=str)
def test_the_map_repeats_the_estimates(name, given):
    "Pairs of as many tokens are computed once where only tokens count."
    shape, limit, lengths, batches = SHAPES[name], 16 * GiB, [96, 512, 768, 8192], [1, 3, 8]
    peaks = length_batch_map(limit, shape, lengths, batches, **given)
    for i, length in enumerate(lengths):
        for j, batch in enumerate(batches):
            assert peaks[i, j] == estimate_with_checkpointing(shape, limit, length=length, batch_size=batch, **given).min_required


@pytest.mark.parametrize('call, message', [
    (lambda: max_value(0, LLAMA), 'limit_bytes'), (lambda: max_value(GiB, LLAMA, 'lora'), 'did you mean lora_r'), (lambda: max_value(GiB, LLAMA, margin=-1), 'margin'),
    (lambda: max_value(GiB, LLAMA, 'lora_r', lora_r=8), 'unknown setting'), (lambda: largest_model(GiB, ['Lama-3.1-8B']), 'Llama-3.1-8B'),
    (lambda: length_batch_map(GiB, LLAMA, [0], [1]), 'length'), (lambda: length_batch_map(GiB, LLAMA, [8], [0]), 'batch_size'),
    (lambda: length_batch_map(0, LLAMA, [8], [1]), 'limit_bytes'), (lambda: explain(estimate(LLAMA), LLAMA, 0), 'limit_bytes'),
    (lambda: explain(estimate(LLAMA), LLAMA, GiB, rank=3), 'unknown setting'), (lambda: explain(estimate(LLAMA), LLAMA, GiB, lora_r=8), 'other settings')])
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(HomelabError, match=message): call()


@few
@given(shapes, st.sampled_from(METHODS), st.integers(1, 8), st.integers(16, 2000), gibs, st.booleans())
def test_savings_are_differences_of_two_estimates(name, method, batch, length, gib, fit_policies):
    shape, spec = SHAPES[name], EstimateSpec(method=method, batch_size=batch, length=length)
    est = estimate_with_checkpointing(shape, gib * GiB, spec=spec) if fit_policies else estimate(shape, spec)
    found = remedies(est, shape, gib * GiB, spec=spec)
    for r in found:
        assert r.saved == est.peak - r.memory.peak > 0
        if not fit_policies: assert r.memory.peak == estimate(shape, spec, **r.changes).peak
    assert [bool(r.what_changes) for r in found] == sorted(bool(r.what_changes) for r in found)
    free = [max(0, r.more_time) / r.saved for r in found if not r.what_changes]
    assert free == sorted(free)
    table = explain(est, shape, gib * GiB, spec=spec)
    assert [row[0] for row in table.rows] == [r.name for r in found[:3]] and est.phase in table.title
