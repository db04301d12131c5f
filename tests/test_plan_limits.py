"plan.limits, plan.remedies: largest values grow with the GPU, the map repeats estimates, and what is suggested fits."
from itertools import product

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import GiB, HomelabError
from homelab_ft.plan.limits import largest_model, length_batch_map, max_value
from homelab_ft.plan.memory.estimate import METHODS, EstimateSpec, estimate, estimate_with_checkpointing
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.model_catalog import KNOWN
from homelab_ft.plan.remedies import RemedySearch, remedies
from homelab_ft.plan.search import estimate_policies

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
    (lambda: length_batch_map(0, LLAMA, [8], [1]), 'limit_bytes'), (lambda: remedies(estimate(LLAMA), LLAMA, 0), 'limit_bytes')])
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(HomelabError, match=message): call()


SPECS = st.builds(
    EstimateSpec, method=st.sampled_from(METHODS), lora_r=st.sampled_from([4, 16, 64, 256]), length=st.sampled_from([64, 512, 2048]), batch_size=st.sampled_from([1, 2, 4, 12]),
    optim=st.sampled_from(['adamw_torch', 'adamw_8bit', 'paged_adamw_32bit']), gradient_accumulation_steps=st.sampled_from([1, 4]), padding_free=st.sampled_from(['auto', False]))


def every_combination(search):
    "The smallest values of what may change, every method and optimizer, every micro-batch."
    spec = search.spec
    lengths, ranks = {spec.length, *search.lengths[:1]}, {spec.lora_r, *search.ranks[:1]}
    for method, optim, length, rank, size in product([spec.method, *search.methods], {spec.optim, *search.optimizers}, lengths, ranks, search.sizes):
        yield dict(method=method, optim=optim, length=length, lora_r=rank, **search.divided(size))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(['embedded', *KNOWN]), SPECS, st.sampled_from([0.8, 2, 4, 6, 8, 12, 16, 24, 48, 80]), st.sampled_from([None, True, False]))
def test_where_a_combination_fits_one_is_suggested(name, spec, gib, checkpointing):
    "And what is suggested takes what it says, fits, and keeps the global batch."
    shape, limit = model_shape(name), gib * GiB
    spec = spec.replace(length=min(spec.length, shape.max_position_embeddings))
    est = estimate_policies(shape, limit, 0.05, spec, checkpointing)
    found = remedies(est, shape, limit, spec=spec)
    assert len(found) <= 3 and not (found and est.fits(limit))
    for r in found:
        applied = spec.replace(**r.changes)
        assert estimate_policies(shape, limit, 0.05, applied, True if r.checkpointing is True else None) == r.memory
        assert r.memory.fits(limit) and {*r.alters} == {*r.changes} & {'method', 'optim', 'length', 'lora_r'}
        assert applied.batch_size * applied.gradient_accumulation_steps == spec.batch_size * spec.gradient_accumulation_steps
    if found or est.fits(limit): return
    search = RemedySearch(shape, limit, 0.05, spec)
    assert not any(search.fits(**changes) for changes in every_combination(search))


def test_what_alters_least_comes_first():
    spec = EstimateSpec(method='lora', length=4096, batch_size=8)
    def names(gib): return [r.alters for r in remedies(estimate(LLAMA, spec), LLAMA, gib * GiB, spec=spec)]
    assert names(24)[0] == () and names(12)[0] == ('method',) and names(200) == names(4) == []
    assert all(len(alters) == 2 for alters in names(8))


def test_a_pair_is_not_divided():
    spec = EstimateSpec(method='lora', length=2048, batch_size=8, padding_free=False)
    found = remedies(estimate(LLAMA, spec), LLAMA, 40 * GiB, spec=spec, pairs=True)
    assert found and all(r.changes.get('batch_size', 8) % 2 == 0 for r in found)
