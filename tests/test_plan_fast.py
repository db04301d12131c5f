"The closed form of the fast step: against the traced mode, which made its terms from toys, at real sizes; and its rules."
import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import ConfigError
from homelab_ft.config import make_config
from homelab_ft.plan.memory import packed_step as fast
from homelab_ft.plan.model_shape import known_shapes, model_shape
from homelab_ft.plan.summary import about_step
from homelab_ft.plan.memory.estimate import MemoryEstimate, estimate, estimate_for, estimate_with_checkpointing
from homelab_ft.train.engine.memory_budget import StepOptions
from homelab_ft.train.engine.packing import bucket_shape

SHAPES = known_shapes()
COVERED = sorted(name for name, shape in SHAPES.items() if not fast.why_no_terms(shape, 'qlora'))
CASES = {'everything kept': (dict(model='Llama-3.1-8B', method='qlora', max_length=2048, per_device_train_batch_size=2), None),
         'inputs kept': (dict(model='Qwen3-4B', method='lora', max_length=1024, per_device_train_batch_size=4), dict(layer=36)),
         'three policies': (dict(model='Qwen2.5-7B', method='qlora', max_length=8192, lora_r=64, optim='adamw_8bit'), dict(none=4, mlp=12, layer=12)),
         'not compiled': (dict(model='Qwen3-1.7B', method='qlora', max_length=2048, torch_compile=False), dict(mlp=28)),
         'tied embeddings, a small vocabulary': (dict(model='SmolLM2-360M', method='lora', max_length=512, per_device_train_batch_size=8), None)}


@pytest.mark.parametrize('case', CASES)
def test_the_closed_form_and_the_traced_mode_agree(case):
    "Within 2 %, as promised; in fact far less."
    pytest.importorskip('torch')
    from homelab_ft.plan.trace.trace import trace
    said, policies = CASES[case]
    config, shape = make_config(**said), model_shape(said['model'])
    traced = trace(config, policies)
    est = estimate(shape, config.method, config.lora_r, batch_size=config.per_device_train_batch_size, length=config.max_length, optim=config.optim,
                   policies=policies, torch_compile=config.torch_compile is not False)
    print(f'{case}: {est.allocated / traced.allocated - 1:+.4%}')
    assert est.step == 'fast' and est.allocated == pytest.approx(traced.allocated, rel=0.005)


@pytest.mark.parametrize('name', COVERED)
@pytest.mark.parametrize('method', ['lora', 'qlora'])
def test_what_is_there_before_a_step_is_counted_right(name, method):
    "Weights, adapter and workspace by counts, against the sums read off from toys; a tied head is one matrix less than in these, but for Gemma's."
    shape = SHAPES[name]
    mode = fast.known_terms(method)['modes'][f'{method}/keep/{fast.FAMILIES[shape.model_type]}/compiled']
    number = fast._evaluator(fast.sizes_of(shape, 1024, 1024))
    wanted = number(mode['rest'][0]) + (shape.num_hidden_layers - 2) * number(mode['rest'][1])
    if shape.tie_word_embeddings and shape.model_type != 'gemma3_text': wanted -= 2 * shape.vocab_size * shape.hidden_size
    est = estimate(shape, method, card='ampere')      # as the toys
    assert est.weights + est.adapter + est.workspaces == pytest.approx(wanted, rel=2e-3)     # tables of a few kB for each matrix in 4 bits are left out


WISHES = dict(name=st.sampled_from(COVERED), method=st.sampled_from(['lora', 'qlora']), lora_r=st.sampled_from([4, 16, 128]), batch_size=st.integers(1, 8),
              length=st.sampled_from([128, 512, 2048]), label_share=st.floats(0.05, 1))


@settings(max_examples=60, deadline=None)
@given(limit=st.floats(2, 100), wishes=st.fixed_dictionaries(WISHES))
def test_levels_are_spent_and_never_more_than_there_is(limit, wishes):
    shape, least = SHAPES[wishes.pop('name')], None
    est = estimate_with_checkpointing(shape, limit * 2**30, **wishes)
    assert isinstance(est, MemoryEstimate) and sum(est.policies.values()) == shape.num_hidden_layers
    least = estimate(shape, **wishes, gradient_checkpointing=True)
    if not est.fits(limit * 2**30): assert not least.fits(limit * 2**30)
    elif est.policies.get('layer'):       # one layer more would be too much, but for rounding and smaller chunks of the loss
        sizes = fast.kept_bytes(shape, wishes['method'], wishes['batch_size'] * wishes['length'], wishes['lora_r'])
        assert est.peak + 4 * max(sizes.values()) > 0.95 * limit * 2**30 - 2**28


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 7, 10, 14]), st.integers(0, 5000), st.integers(1, 40).map(lambda n: 128 * n), st.integers(1, 1000))
def test_more_positions_never_take_less(per_logit, learned, chunk, vocab):
    now, more = (fast.chunk_bytes(per_logit, n, chunk, vocab) for n in (learned, learned + 1))
    assert now <= more <= (per_logit + 2) * chunk * vocab


def test_a_run_is_planned_with_the_step_it_would_take():
    shape = model_shape('Llama-3.1-8B')
    config = make_config(model='Llama-3.1-8B', method='qlora', max_length=1024)
    step = lambda **said: estimate_for(config.model_copy(update=said), shape, limit_bytes=24 * 2**30).step
    assert step() == 'fast' == step(torch_compile=False)
    for said in (dict(padding_free=False), dict(device='cpu'), dict(method='full'), dict(lora_dropout=0.1), dict(objective='dpo'), dict(dtype='float32')):
        assert step(**said).startswith('plain: '), said
    assert 'gemma' in about_step(estimate(model_shape('gemma-2-2b'), length=512)) and estimate(model_shape('gemma-2-2b'), length=512).step != 'fast'
    with pytest.raises(ConfigError, match='no formula for rows end to end'): estimate(shape, 'full', padding_free=True)
    with pytest.raises(ConfigError, match='add up'): estimate(shape, policies=dict(none=31))
    with pytest.raises(ConfigError, match='did you mean mlp'): estimate(shape, policies=dict(mpl=32))
    with pytest.raises(ConfigError, match='no terms for this policy'): fast._modes(shape, 'qlora', dict(offload=32), 'eager' == 'compiled')


def test_pairs_recompute_every_layer_on_a_card_and_none_on_a_processor():
    shape, config = model_shape('SmolLM2-135M'), make_config(model='SmolLM2-135M', method='lora', objective='dpo', data='x.jsonl', max_length=512)
    policies = lambda device: estimate_for(config.model_copy(update=dict(device=device)), shape, limit_bytes=2**40).policies
    assert set(policies('cuda')) == {'layer'} and set(policies('cpu')) == {'none'}


@given(st.integers(1, 70_000), st.data())
def test_a_pass_is_padded_as_in_training(tokens, data):
    learned = data.draw(st.integers(1, tokens))
    assert fast.padded(tokens, learned) == bucket_shape([tokens], [learned], [0], 256, tokens)[:2]
    assert StepOptions(1, 1).bucket_size == fast.BUCKET_SIZE


@pytest.mark.parametrize('targets', [('q_proj', 'v_proj'), ('q_proj', 'k_proj'), ('down_proj',), ('v_proj',)], ids=str)
def test_fewer_adapters_keep_no_more(targets):
    shape = model_shape('Llama-3.2-1B')
    few, every = ({policy: fast.packed_phases(shape, 'qlora', {policy: 16}, 2048, 2048, targets=names) for policy in ('none', 'mlp', 'layer')} for names in (targets, ()))
    for policy in few:
        for phase, parts in few[policy].items(): assert sum(parts.values()) <= sum(every[policy][phase].values()) * 1.005, (policy, phase)
