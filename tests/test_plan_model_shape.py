"plan.model_shape, plan.model_catalog: parameter counts, and what 8 and 4 bits reach, against the real model class, built without memory on torch's meta device."
import json, subprocess, sys, timeit
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import ModelError
from homelab_ft.plan.model_catalog import KNOWN, MIXTURES, known_config
from homelab_ft.plan.model_shape import ARCHITECTURES, model_shape, what_quantizes
from homelab_ft.plan.memory.padded_step import layer_bytes
from homelab_ft.plan.memory.estimate import estimate, verdict
from homelab_ft.plan.memory.static import adapter_params, weight_bytes

CONFIGS = Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'configs'
FILES = sorted(CONFIGS.glob('*.json'))
MIXED = [kind for kind, arch in ARCHITECTURES.items() if arch.mixture]


def meta_model(config):
    "The real class with parameters that have shapes and no memory."
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    config = {k: v for k, v in config.items() if k != 'quantization_config'}
    with torch.device('meta'):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(config.pop('model_type'), **config))


def kind_of(name):
    "Which kind of module a parameter belongs to, by its name in transformers."
    if name.startswith('lm_head'): return 'head'
    if 'embed_tokens' in name: return 'embeddings'
    if 'norm' in name: return 'norms'
    if 'self_attn' in name: return 'attention'
    if '.experts.' in name: return 'experts'
    if 'router' in name or '.gate.' in name: return 'router'
    assert '.mlp.' in name, name
    return 'mlp'


def linears_of(layer):
    import torch
    return {name.split('.')[-1]: (m.in_features, m.out_features, m.bias is not None) for name, m in layer.named_modules() if type(m) is torch.nn.Linear}


def check_counts(shape, model):
    "Total, each kind of module, and each matrix of each layer."
    counts = dict.fromkeys(shape.counts, 0)
    for name, p in model.named_parameters(): counts[kind_of(name)] += p.numel()     # tied parameters come once
    assert shape.counts == counts and shape.n_params == sum(counts.values())
    layers = model.model.layers
    assert len(layers) == shape.num_hidden_layers and all(linears_of(layer) == shape.linears for layer in layers)


def test_a_wrong_count_is_seen():
    model, shape = meta_model(known_config('SmolLM2-135M')), model_shape('SmolLM2-135M')
    check_counts(shape, model)
    for wrong in (dict(vocab_size=shape.vocab_size + 1), dict(tie_word_embeddings=False), dict(qk_norm=True), dict(layer_norms=4), dict(sinks=True),
                  dict(num_hidden_layers=29), dict(num_experts=1, expert_size=1), dict(linears=shape.linears | dict(k_proj=(576, 576, False)))):
        with pytest.raises(AssertionError): check_counts(replace(shape, **wrong), model)


# ---------------------------------------------------------------- published models

def test_one_model_of_each_architecture_counts():
    smallest = {model_shape(name).model_type: name for name in [*reversed(KNOWN), *reversed(MIXTURES)]}
    assert smallest.keys() == ARCHITECTURES.keys()
    for name in smallest.values(): check_counts(model_shape(name), meta_model(known_config(name)))


@pytest.mark.slow
def test_every_model_of_the_catalogue_counts():
    for name in [*KNOWN, *MIXTURES]: check_counts(model_shape(name), meta_model(known_config(name)))


@pytest.mark.skipif(not FILES, reason='the folder of published configurations is not beside the project')
def test_published_files():
    "Their shapes count, and what the catalogue says of a model equals what its file says (Qwen2 0.5B is not in the catalogue)."
    for i, file in enumerate(FILES):
        if i % 5 == 0: check_counts(model_shape(file), meta_model(json.loads(file.read_text())))
        if 'Qwen2-0.5B' in file.stem: continue
        stem = file.stem.lower().replace('meta-', '').replace('_config', '')
        names = [n for n in [*KNOWN, *MIXTURES] if n.lower() in stem]
        assert model_shape(max(names, key=len)) == model_shape(file), file


# in billions, as the authors give them: with and without embeddings where both are given
PUBLISHED = {'Qwen2.5-0.5B': (0.49, 0.36), 'Qwen2.5-1.5B': (1.54, 1.31), 'Qwen2.5-3B': (3.09, 2.77), 'Qwen2.5-7B': (7.61, 6.53),
             'Qwen2.5-14B': (14.7, 13.1), 'Qwen2.5-32B': (32.5, 31.0), 'Qwen3-4B': (4.0, 3.6), 'Qwen3-8B': (8.2, 6.95), 'Qwen3-14B': (14.8, 13.2),
             'Qwen3-32B': (32.8, 31.2), 'Qwen3-30B-A3B': (30.5, 29.9), 'Llama-3.2-1B': (1.23, None), 'Llama-3.2-3B': (3.21, None),
             'Phi-4-mini': (3.8, None), 'gpt-oss-20b': (20.9, None), 'gpt-oss-120b': (116.8, None)}

def test_published_totals():
    for name, (total, without) in PUBLISHED.items():
        shape = model_shape(name)
        assert shape.n_params / 1e9 == pytest.approx(total, rel=0.015)     # authors round, and cut; a wrong tie is 5 % and more
        if without: assert (shape.n_params - shape.embedding_params) / 1e9 == pytest.approx(without, rel=0.015)


# ---------------------------------------------------------------- made-up models

SMALL = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=128, pad_token_id=0)
EXPERTS = dict(mixtral=dict(num_local_experts=3), qwen3_moe=dict(num_experts=5, moe_intermediate_size=24), gpt_oss=dict(num_local_experts=4))


@st.composite
def configs(draw):
    "A small configuration: groups of heads, narrow and wide heads, biases, ties; keys that the class has a default for may be missing."
    kind = draw(st.sampled_from(sorted(ARCHITECTURES)))
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = groups * per_group
    c = dict(model_type=kind, hidden_size=heads * 8 * draw(st.integers(1, 3)), num_hidden_layers=draw(st.integers(1, 3)), intermediate_size=draw(st.integers(1, 80)),
             num_attention_heads=heads, num_key_value_heads=groups, vocab_size=draw(st.integers(2, 200)), pad_token_id=0, **EXPERTS.get(kind, {}))
    if 'num_local_experts' in c: c['num_local_experts'] = draw(st.integers(1, 5))
    for key, values in dict(attention_bias=st.booleans(), mlp_bias=st.booleans(), tie_word_embeddings=st.booleans(), head_dim=st.sampled_from([8, 16, 24])).items():
        if draw(st.booleans()): c[key] = draw(values)
    return c


@given(config=configs())
@settings(max_examples=60, deadline=None)
def test_any_small_model(config):
    "Also settings that a class does not read: they must not change the count."
    check_counts(model_shape(config), meta_model(config))


def test_defaults_of_the_classes():
    "What a configuration leaves out is what the model class assumes."
    for kind in [kind for kind in ARCHITECTURES if kind != 'qwen2']:     # its default, 32 key heads, goes with 32 heads only
        config = dict(SMALL, model_type=kind, hidden_size=512, num_attention_heads=8, vocab_size=256, **EXPERTS.get(kind, {}))
        for missing in (('num_key_value_heads', 'head_dim'), ('tie_word_embeddings',)):
            given = {k: v for k, v in config.items() if k not in missing}
            check_counts(model_shape(given), meta_model(given))


def test_both_names_of_the_number_of_experts():
    "transformers 5 saves `num_local_experts` for all; Qwen published `num_experts`."
    transformers = pytest.importorskip('transformers')
    for kind in MIXED:
        config = dict(SMALL, model_type=kind, **EXPERTS[kind])
        saved = transformers.AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != 'model_type'}).to_dict()
        assert model_shape(saved).n_params == model_shape(config).n_params and model_shape(saved).num_experts == model_shape(config).num_experts


@pytest.mark.parametrize('kind', ['qwen2', 'qwen3', 'qwen3_moe'])
def test_window_only_if_switched_on(kind):
    transformers = pytest.importorskip('transformers')
    for extra in ({}, dict(sliding_window=7), dict(use_sliding_window=True), dict(use_sliding_window=True, sliding_window=7)):
        config = dict(SMALL, **EXPERTS.get(kind, {}), **extra)
        assert model_shape(config | dict(model_type=kind)).sliding_window == transformers.AutoConfig.for_model(kind, **config).sliding_window


# ---------------------------------------------------------------- what 8 and 4 bits reach

def replaced(model, four):
    "Names and sizes of the matrices that transformers itself hands to bitsandbytes."
    bnb = pytest.importorskip('bitsandbytes')
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert
    skip = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]
    replace_with_bnb_linear(model, modules_to_not_convert=skip, quantization_config=BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four))
    kind = bnb.nn.Linear4bit if four else bnb.nn.Linear8bitLt
    return {name: (m.in_features, m.out_features, m.bias is not None) for name, m in model.named_modules() if isinstance(m, kind)}


@pytest.mark.parametrize('four, tied', [(True, True), (True, False), (False, True)], ids=['4 bits', '4 bits, untied', '8 bits'])
def test_what_bitsandbytes_replaces(tied, four):
    for kind in ARCHITECTURES:
        config = dict(SMALL, model_type=kind, tie_word_embeddings=tied, **EXPERTS.get(kind, {}))
        shape, done = model_shape(config), replaced(meta_model(config), four)
        predicted = {(layer, name): size for layer in range(shape.num_hidden_layers) for name, size in shape.linears.items()}
        assert {(int(name.split('.')[2]), name.split('.')[-1]): size for name, size in done.items()} == predicted and len(done) == len(predicted)


def test_experts_and_router_are_plain_parameters():
    "Three-dimensional experts and a router that is no torch.nn.Linear: the reason why nothing packs them."
    torch = pytest.importorskip('torch')
    for kind in MIXED:
        layer = meta_model(dict(SMALL, model_type=kind, **EXPERTS[kind])).model.layers[0].mlp
        matrices = [p for name, p in layer.experts.named_parameters() if not name.endswith('bias')]
        assert len(matrices) == 2 and all(p.dim() == 3 for p in matrices)
        assert not any(isinstance(m, torch.nn.Linear) for m in layer.modules())


def test_packed_checkpoints_are_not_packed_again():
    "What the page says of published gpt-oss weights: transformers raises."
    auto = pytest.importorskip('transformers.quantizers.auto')
    from transformers import BitsAndBytesConfig
    with pytest.raises(ValueError, match='Mxfp4Config'):
        auto.AutoHfQuantizer.merge_quantization_configs(known_config('gpt-oss-20b')['quantization_config'], BitsAndBytesConfig(load_in_4bit=True))


def test_mixtures_are_estimated():
    "A token pays for the experts that it goes to; memory of the weights is that of all of them, in 16 bits whatever the method."
    for name in MIXTURES:
        shape = model_shape(name)
        est = estimate(shape, length=512)
        assert est.estimated and est.step == 'padded' and est.least < est.min_required and 'not measured' in verdict(est, 10**12)
        assert weight_bytes(shape, 'lora') == 2 * shape.n_params and weight_bytes(shape, 'qlora') > 1.9 * shape.counts['experts']
        assert layer_bytes(shape, 'lora', 128) < layer_bytes(replace(shape, experts_per_token=shape.num_experts), 'lora', 128)
        assert 'experts' in what_quantizes(shape)


def test_dense_models_are_planned():
    for name in KNOWN: assert estimate(model_shape(name), length=512).peak > 0 and 'experts' not in what_quantizes(model_shape(name))


def trained_by_peft(config, r, targets):
    "Name -> size of what peft makes trainable."
    torch, peft = pytest.importorskip('torch'), pytest.importorskip('peft')
    with torch.device('meta'): model = peft.get_peft_model(meta_model(config), peft.LoraConfig(r=r, target_modules=targets, task_type='CAUSAL_LM'))
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('r, targets', [(16, 'all-linear'), (1, ['q_proj', 'v_proj']), (16, ['down_proj'])], ids=str)
def test_adapter_counts(r, targets):
    "LoRA parameters against peft itself."
    config = dict(SMALL, model_type='qwen2')
    assert adapter_params(model_shape(config), r, targets) == sum(trained_by_peft(config, r, targets).values())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', MIXED)
def test_adapters_of_a_mixture_are_on_its_attention(kind):
    "peft's own `all-linear` would adapt the experts and router of Mixtral and Qwen3 too."
    pytest.importorskip('peft')
    from homelab_ft.train.lora import peft_targets
    config = dict(SMALL, model_type=kind, **EXPERTS[kind])
    found = trained_by_peft(config, 2, peft_targets(meta_model(config), 'all-linear'))
    assert found and not any('.mlp.' in name for name in found)
    assert adapter_params(model_shape(config), 2) == sum(found.values())
    assert {*peft_targets(meta_model(config), ['q_proj'])} == {f'model.layers.{i}.self_attn.q_proj' for i in range(2)}


# ---------------------------------------------------------------- refusals

NOT_CAUSAL = 'no causal language model'
REFUSED = [(dict(model_type='bert', architectures=['BertForMaskedLM']), NOT_CAUSAL), (dict(model_type='roberta'), NOT_CAUSAL),
           (dict(model_type='t5', architectures=['T5ForConditionalGeneration']), NOT_CAUSAL),
           (dict(model_type='no_such_type', auto_map={'AutoModelForCausalLM': 'modeling_own.Own'}), 'never run'),
           (dict(model_type='no_such_type'), 'does not know'), (dict(model_type=None), 'does not know'), (dict(model_type=['llama']), 'does not know')]

@pytest.mark.parametrize('config, word', REFUSED, ids=str)
def test_what_cannot_train_is_refused(config, word):
    with pytest.raises(ModelError, match=word) as e: model_shape(config)
    assert e.value.next_step


SIZES = ['hidden_size', 'num_hidden_layers', 'intermediate_size', 'num_attention_heads', 'vocab_size']

@given(size=st.sampled_from([*SIZES, 'num_key_value_heads', 'head_dim', 'max_position_embeddings']),
       bad=st.one_of(st.integers(max_value=-1), st.floats(), st.text(min_size=1), st.lists(st.integers(), min_size=1), st.just(True)))
@settings(max_examples=100, deadline=None)
def test_impossible_sizes(size, bad):
    if bad == 0: bad = -1
    with pytest.raises(ModelError, match=size): model_shape(dict(SMALL, model_type='llama') | {size: bad})


def test_sizes_that_must_be_there():
    for size in SIZES:
        for change in (None, 0):
            with pytest.raises(ModelError, match=size): model_shape(dict(SMALL, model_type='llama') | {size: change})


@pytest.mark.parametrize('kind, change, word', [('mixtral', dict(num_local_experts=None), 'num_experts'), ('qwen3_moe', dict(moe_intermediate_size=None), 'moe_intermediate_size'),
                                                ('mixtral', dict(num_experts_per_tok=0), 'num_experts_per_tok')], ids=str)
def test_mixtures_that_cannot_be(kind, change, word):
    with pytest.raises(ModelError, match=word): model_shape(dict(SMALL, model_type=kind, **EXPERTS[kind]) | change)


def test_hub_without_network(monkeypatch):
    import huggingface_hub
    def refuse(*a, **k): raise OSError('offline')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', refuse)
    with pytest.raises(ModelError, match='owner/name') as e: model_shape('owner/name')
    assert 'network' in str(e.value) and 'known without' not in str(e.value)
    with pytest.raises(ModelError, match='known without a network: Qwen2.5-7B'): model_shape('Qwen/Qwen2.5-7B-Instruct')


@pytest.mark.parametrize('typed, meant', [('gpt-oss-20', 'gpt-oss-20b'), ('llama-3.1-8b', 'Llama-3.1-8B')])
def test_misspelt_names(typed, meant):
    with pytest.raises(ModelError, match=meant): model_shape(typed)


def test_anything_as_a_model():
    for model in ('~nobody-of-this-name', '~<i>', 'x' * 5000, '\x00', '', '/', 3, None, 2.5, ['Llama-3.1-8B']):
        with pytest.raises(ModelError): model_shape(model)


def test_broken_config(tmp_path):
    for text in ('', 'not json', '[]', '"llama"', '\x00', '{"model_type": "llama", "architectures": 3}', '{"model_type": 3, "architectures": 3}'):
        (tmp_path / 'config.json').write_text(text)
        with pytest.raises(ModelError): model_shape(tmp_path)


def test_a_configuration_can_be_changed_without_changing_the_catalogue():
    known_config('gpt-oss-20b')['quantization_config']['quant_method'] = 'other'
    assert known_config('gpt-oss-20b')['quantization_config']['quant_method'] == 'mxfp4'


# ---------------------------------------------------------------- limits

def test_fast():
    model_shape('Qwen3-8B')
    for name in ('Qwen3-8B', 'Mixtral-8x7B'):
        assert min(timeit.repeat(lambda: model_shape(name), number=50, repeat=10)) / 50 < 0.0005


def test_no_torch():
    code = ('import sys; from homelab_ft.plan.model_shape import model_shape, what_quantizes; what_quantizes(model_shape("Mixtral-8x7B")); '
            'print([m for m in ("torch", "transformers", "numpy", "huggingface_hub") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
