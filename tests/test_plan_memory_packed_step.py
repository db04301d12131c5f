"The closed form of the packed step against the trace, which made its terms from toys, at real sizes; and its rules."
import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import ConfigError
from homelab_ft.config import make_config
from homelab_ft.plan.memory.packed_step import kept_bytes, packed_phases, why_no_terms
from homelab_ft.plan.memory.spec import EstimateSpec
from homelab_ft.plan.model_shape import known_shapes, model_shape
from homelab_ft.plan.memory.estimate import MemoryEstimate, estimate, estimate_for, estimate_with_checkpointing, resolve

SHAPES = known_shapes()
COVERED = sorted(name for name, shape in SHAPES.items() if not why_no_terms(shape, 'qlora'))
CASES = {'everything kept': (dict(model='Llama-3.1-8B', method='qlora', max_length=2048, per_device_train_batch_size=2), None),
         'inputs kept': (dict(model='Qwen3-4B', method='lora', max_length=1024, per_device_train_batch_size=4), dict(layer=36)),
         'three policies': (dict(model='Qwen2.5-7B', method='qlora', max_length=8192, lora_r=64, optim='adamw_8bit'), dict(none=4, mlp=12, layer=12)),
         'not compiled': (dict(model='Qwen3-1.7B', method='qlora', max_length=2048, torch_compile=False), dict(mlp=28)),
         'tied embeddings, a small vocabulary': (dict(model='SmolLM2-360M', method='lora', max_length=512, per_device_train_batch_size=8), None)}
SLOW = ('everything kept', 'inputs kept', 'three policies')


@pytest.mark.parametrize('case', [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES])
def test_the_closed_form_and_the_traced_mode_agree(case):
    "Within half a percent."
    pytest.importorskip('torch')
    from homelab_ft.plan.trace.trace import trace
    settings, policies = CASES[case]
    config, shape = make_config(**settings), model_shape(settings['model'])
    traced = trace(config, policies)
    est = estimate(shape, EstimateSpec.from_config(config), policies=policies)
    print(f'{case}: {est.allocated / traced.allocated - 1:+.4%}')
    assert est.step == 'packed' and est.allocated == pytest.approx(traced.allocated, rel=0.005)


CHANGES = dict(name=st.sampled_from(COVERED), method=st.sampled_from(['lora', 'qlora']), lora_r=st.sampled_from([4, 16, 128]), batch_size=st.integers(1, 8),
              length=st.sampled_from([128, 512, 2048]), label_share=st.floats(0.05, 1))


@settings(max_examples=60, deadline=None)
@given(limit=st.floats(2, 100), changes=st.fixed_dictionaries(CHANGES))
def test_policies_use_the_room_and_no_more(limit, changes):
    shape, least = SHAPES[changes.pop('name')], None
    est = estimate_with_checkpointing(shape, limit * 2**30, **changes)
    assert isinstance(est, MemoryEstimate) and sum(est.policies.values()) == shape.num_hidden_layers
    least = estimate(shape, **changes, gradient_checkpointing=True)
    if not est.fits(limit * 2**30): assert not least.fits(limit * 2**30)
    elif est.policies.get('layer'):       # one layer more would be too much, but for rounding and smaller chunks of the loss
        sizes = kept_bytes(resolve(shape, EstimateSpec(**changes)))
        assert est.peak + 4 * max(sizes.values()) > 0.95 * limit * 2**30 - 2**28


def test_a_run_is_planned_with_the_step_it_would_take():
    shape = model_shape('Llama-3.1-8B')
    config = make_config(model='Llama-3.1-8B', method='qlora', max_length=1024)
    step = lambda **settings: estimate_for(config.model_copy(update=settings), shape, limit_bytes=24 * 2**30).step
    assert step() == 'packed' == step(torch_compile=False)
    for other in (dict(padding_free=False), dict(device='cpu'), dict(method='full'), dict(lora_dropout=0.1), dict(objective='dpo'), dict(dtype='float32')):
        assert step(**other) == 'padded', other
    assert 'gemma' in estimate(model_shape('gemma-2-2b'), length=512).padded_reason and estimate(model_shape('gemma-2-2b'), length=512).step == 'padded'
    with pytest.raises(ConfigError, match='no formula for packed sequences'): estimate(shape, method='full', padding_free=True)
    with pytest.raises(ConfigError, match='add up'): estimate(shape, policies=dict(none=31))
    with pytest.raises(ConfigError, match='did you mean mlp'): estimate(shape, policies=dict(mpl=32))


def test_pairs_recompute_every_layer_on_a_card_and_none_on_a_processor():
    shape, config = model_shape('SmolLM2-135M'), make_config(model='SmolLM2-135M', method='lora', objective='dpo', data='x.jsonl', max_length=512)
    policies = lambda device: estimate_for(config.model_copy(update=dict(device=device)), shape, limit_bytes=2**40).policies
    assert set(policies('cuda')) == {'layer'} and set(policies('cpu')) == {'none'}


@pytest.mark.parametrize('targets', [('q_proj', 'v_proj'), ('q_proj', 'k_proj'), ('down_proj',), ('v_proj',)], ids=str)
def test_fewer_adapters_keep_no_more(targets):
    shape = model_shape('Llama-3.2-1B')
    for policy in ('none', 'mlp', 'layer'):
        few, every = (packed_phases(resolve(shape, EstimateSpec(policies={policy: 16}, target_modules=names))) for names in (targets, 'all-linear'))
        for phase, parts in few.items(): assert sum(parts.values()) <= sum(every[phase].values()) * 1.005, (policy, phase)
