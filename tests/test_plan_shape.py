"plan.shape, plan.models: every parameter count, and what 8 and 4 bits reach, against the real model class, built without memory on torch's meta device."
import json, subprocess, sys, timeit
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import ModelError
from homelab_ft.plan.model_catalog import COLUMNS, KNOWN, MIXTURES, known_config
from homelab_ft.plan.model_shape import ARCHITECTURES, known_shapes, model_shape, what_quantizes
from homelab_ft.plan.memory.padded_step import layer_bytes
from homelab_ft.plan.memory.estimate import estimate
from homelab_ft.plan.memory.static import adapter_params, weight_bytes

CONFIGS = Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'configs'
FILES = sorted(CONFIGS.glob('*.json'))
need_configs = pytest.mark.skipif(not FILES, reason='the folder of published configurations is not beside the project')
DENSE = [kind for kind, arch in ARCHITECTURES.items() if not arch.get('mixture')]
MIXED = [kind for kind in ARCHITECTURES if kind not in DENSE]


def meta_model(config):
    "The real class with parameters that have shapes and no memory."
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    config = {k: v for k, v in config.items() if k != 'quantization_config'}
    with torch.device('meta'):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(config.pop('model_type'), **config))


def count(model): return sum(p.numel() for p in model.parameters())


def kind_of(name):
    "Which kind of module a parameter belongs to, told from its name in transformers."
    if name.startswith('lm_head'): return 'head'
    if 'embed_tokens' in name: return 'embeddings'
    if 'norm' in name: return 'norms'
    if 'self_attn' in name: return 'attention'
    if '.experts.' in name: return 'experts'
    if 'router' in name or '.gate.' in name: return 'router'
    assert '.mlp.' in name, name
    return 'mlp'


def real_counts(model):
    counts = dict.fromkeys(('attention', 'mlp', 'experts', 'router', 'norms', 'embeddings', 'head'), 0)
    for name, p in model.named_parameters(): counts[kind_of(name)] += p.numel()     # tied parameters come once
    return counts


def linears_of(layer):
    import torch
    return {name.split('.')[-1]: (m.in_features, m.out_features, m.bias is not None) for name, m in layer.named_modules() if type(m) is torch.nn.Linear}


def check_counts(shape, model):
    "Total, each kind of module, and each matrix of each layer."
    assert shape.n_params == count(model)
    assert shape.counts == real_counts(model) and sum(shape.counts.values()) == shape.n_params
    layers = model.model.layers
    assert len(layers) == shape.num_hidden_layers and all(linears_of(layer) == shape.linears for layer in layers)


@lru_cache(maxsize=2)
def known_model(name): return meta_model(known_config(name))


def test_a_wrong_count_is_seen():
    model, shape = known_model('SmolLM2-135M'), model_shape('SmolLM2-135M')
    check_counts(shape, model)
    for wrong in (dict(vocab_size=shape.vocab_size + 1), dict(tie_word_embeddings=False), dict(qk_norm=True), dict(layer_norms=4), dict(sinks=True),
                  dict(num_hidden_layers=29), dict(num_experts=1, expert_size=1), dict(linears=shape.linears | dict(k_proj=(576, 576, False)))):
        with pytest.raises(AssertionError): check_counts(replace(shape, **wrong), model)


# ---------------------------------------------------------------- published models

@need_configs
@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_published_configs(file):
    check_counts(model_shape(file), meta_model(json.loads(file.read_text())))


@pytest.mark.parametrize('name', [*KNOWN, *MIXTURES])
def test_catalogue_counts(name): check_counts(model_shape(name), known_model(name))


@need_configs
@pytest.mark.parametrize('file', [f for f in FILES if 'Qwen2-0.5B' not in f.stem], ids=lambda f: f.stem)
def test_catalogue_repeats_the_published_files(file):
    "What the catalogue says of a model equals what its file says (Qwen2 0.5B is not in the catalogue)."
    plain = lambda name: name.lower().replace('meta-', '').replace('_config', '')
    names = [n for n in [*KNOWN, *MIXTURES] if n.lower() in plain(file.stem)]
    assert model_shape(max(names, key=len)) == model_shape(file)


# in billions, as the authors give them: with and without embeddings where both are given
PUBLISHED = {'Qwen2.5-0.5B': (0.49, 0.36), 'Qwen2.5-1.5B': (1.54, 1.31), 'Qwen2.5-3B': (3.09, 2.77), 'Qwen2.5-7B': (7.61, 6.53),
             'Qwen2.5-14B': (14.7, 13.1), 'Qwen2.5-32B': (32.5, 31.0), 'Qwen3-4B': (4.0, 3.6), 'Qwen3-8B': (8.2, 6.95), 'Qwen3-14B': (14.8, 13.2),
             'Qwen3-32B': (32.8, 31.2), 'Qwen3-30B-A3B': (30.5, 29.9), 'Llama-3.2-1B': (1.23, None), 'Llama-3.2-3B': (3.21, None),
             'Phi-4-mini': (3.8, None), 'gpt-oss-20b': (20.9, None), 'gpt-oss-120b': (116.8, None)}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_totals(name):
    shape, (total, without) = model_shape(name), PUBLISHED[name]
    near = lambda n, said: n / 1e9 == pytest.approx(said, rel=0.015)     # authors round, and cut; a wrong tie is 5 % and more
    assert near(shape.n_params, total)
    if without: assert near(shape.n_params - shape.embedding_params, without)


# ---------------------------------------------------------------- made-up models

SMALL = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=128, pad_token_id=0)
EXPERTS = dict(mixtral=dict(num_local_experts=3), qwen3_moe=dict(num_experts=5, moe_intermediate_size=24), gpt_oss=dict(num_local_experts=4))


@st.composite
def configs(draw, kind):
    "A small configuration: groups of heads, narrow and wide heads, biases, ties; keys that the class has a default for may be missing."
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = groups * per_group
    c = dict(model_type=kind, hidden_size=heads * 8 * draw(st.integers(1, 3)), num_hidden_layers=draw(st.integers(1, 3)), intermediate_size=draw(st.integers(1, 80)),
             num_attention_heads=heads, num_key_value_heads=groups, vocab_size=draw(st.integers(2, 200)), pad_token_id=0, **EXPERTS.get(kind, {}))
    if 'num_local_experts' in c: c['num_local_experts'] = draw(st.integers(1, 5))
    for key, values in dict(attention_bias=st.booleans(), mlp_bias=st.booleans(), tie_word_embeddings=st.booleans(), head_dim=st.sampled_from([8, 16, 24])).items():
        if draw(st.booleans()): c[key] = draw(values)
    return c


@pytest.mark.parametrize('kind', ARCHITECTURES)
def test_every_architecture(kind):
    "Also settings that a class does not read: they must not change the count."
    pytest.importorskip('torch'), pytest.importorskip('transformers')

    @given(config=configs(kind))
    @settings(max_examples=25, deadline=None)
    def check(config): check_counts(model_shape(config), meta_model(config))
    check()


@pytest.mark.parametrize('missing', [('num_key_value_heads',), ('head_dim',), ('num_key_value_heads', 'head_dim'), ('tie_word_embeddings',)], ids=str)
@pytest.mark.parametrize('kind', [kind for kind in ARCHITECTURES if kind != 'qwen2'])     # its default, 32 heads of keys, goes with 32 heads only
def test_defaults_of_the_classes(kind, missing):
    "What a configuration leaves out is what the model class assumes."
    config = dict(SMALL, model_type=kind, hidden_size=512, num_attention_heads=8, vocab_size=256, **EXPERTS.get(kind, {}))
    config = {k: v for k, v in config.items() if k not in missing}
    check_counts(model_shape(config), meta_model(config))


@pytest.mark.parametrize('kind', MIXED)
def test_both_names_of_the_number_of_experts(kind):
    "transformers 5 saves `num_local_experts` for all; Qwen published `num_experts`."
    transformers = pytest.importorskip('transformers')
    config = dict(SMALL, model_type=kind, **EXPERTS[kind])
    saved = transformers.AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != 'model_type'}).to_dict()
    assert model_shape(saved).n_params == model_shape(config).n_params and model_shape(saved).num_experts == model_shape(config).num_experts


@pytest.mark.parametrize('kind', ['qwen2', 'qwen3', 'qwen3_moe'])
def test_window_only_if_switched_on(kind):
    transformers = pytest.importorskip('transformers')
    for extra in ({}, dict(sliding_window=7), dict(use_sliding_window=True), dict(use_sliding_window=True, sliding_window=7), dict(use_sliding_window=False, sliding_window=7)):
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
    wanted = bnb.nn.Linear4bit if four else bnb.nn.Linear8bitLt
    return {name: (m.in_features, m.out_features, m.bias is not None) for name, m in model.named_modules() if isinstance(m, wanted)}


@pytest.mark.parametrize('four', [True, False], ids=['4 bits', '8 bits'])
@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])
@pytest.mark.parametrize('kind', ARCHITECTURES)
def test_what_bitsandbytes_replaces(kind, tied, four):
    config = dict(SMALL, model_type=kind, tie_word_embeddings=tied, **EXPERTS.get(kind, {}))
    shape, done = model_shape(config), replaced(meta_model(config), four)
    predicted = {(layer, name): size for layer in range(shape.num_hidden_layers) for name, size in shape.linears.items()}
    assert {(int(name.split('.')[2]), name.split('.')[-1]): size for name, size in done.items()} == predicted and len(done) == len(predicted)
    assert sum(i * o for i, o, _ in done.values()) == shape.num_hidden_layers * shape.linear_params
    assert (kind in MIXED) == ('gate_proj' not in shape.linears and 'gate_up_proj' not in shape.linears)


@pytest.mark.parametrize('kind', MIXED)
def test_experts_and_router_are_plain_parameters(kind):
    "Three-dimensional experts and a router that is no torch.nn.Linear: the reason why nothing packs them."
    torch = pytest.importorskip('torch')
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
    assert 'packed as mxfp4' in what_quantizes(model_shape('gpt-oss-20b'))


@pytest.mark.parametrize('name', [*KNOWN, *MIXTURES])
def test_the_statement_has_the_numbers(name):
    shape, said = model_shape(name), what_quantizes(model_shape(name))
    share = shape.num_hidden_layers * shape.linear_params / shape.n_params
    assert f'({share:.1%})' in said and all(n in said for n in shape.linears)
    assert ('experts' in said) == (name in MIXTURES) == (share < 0.06)


@pytest.mark.parametrize('name', MIXTURES)
def test_mixtures_are_not_planned(name):
    shape = model_shape(name)
    for refused in (lambda: estimate(shape), lambda: estimate(shape, method='full', length=128), lambda: layer_bytes(shape, 'lora', 128), shape.reject_moe):
        with pytest.raises(ModelError, match='mixture of experts'): refused()
    assert weight_bytes(shape, 'lora') == 2 * shape.n_params        # the weights alone can be counted
    assert weight_bytes(shape, 'qlora') > 2 * (shape.n_params - shape.num_hidden_layers * shape.linear_params)


@pytest.mark.parametrize('name', KNOWN)
def test_dense_models_are_planned(name): assert estimate(model_shape(name), length=512).peak > 0


def trained_by_peft(config, r, targets):
    "Name -> size of what peft makes trainable."
    torch, peft = pytest.importorskip('torch'), pytest.importorskip('peft')
    with torch.device('meta'): model = peft.get_peft_model(meta_model(config), peft.LoraConfig(r=r, target_modules=targets, task_type='CAUSAL_LM'))
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('targets', ['all-linear', ['q_proj', 'v_proj'], ['down_proj']], ids=str)
@pytest.mark.parametrize('r', [1, 16])
def test_adapter_counts(r, targets):
    "LoRA parameters against peft itself."
    config = dict(SMALL, model_type='qwen2')
    assert adapter_params(model_shape(config), r, targets) == sum(trained_by_peft(config, r, targets).values())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind, beyond', [('mixtral', True), ('qwen3_moe', True), ('gpt_oss', False)])
def test_adapters_of_a_mixture_are_refused(kind, beyond):
    "`all-linear` is more than linear layers there: peft adapts Mixtral's and Qwen3's experts and router too, and not those of gpt-oss."
    config = dict(SMALL, model_type=kind, **EXPERTS[kind])
    assert any('.mlp.' in name for name in trained_by_peft(config, 2, 'all-linear')) == beyond
    with pytest.raises(ModelError, match='mixture of experts'): adapter_params(model_shape(config), 2)


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize('kind, near', [('gemma3', 'gemma3_text'), ('qwen4', 'qwen3'), ('llama4', 'llama'), ('gptoss', 'gpt_oss'), ('phimoe', 'phi3'), ('deepseek_v3', None), (None, None), (['llama'], 'llama')], ids=str)
def test_unsupported_is_named(kind, near):
    with pytest.raises(ModelError) as e: model_shape(dict(SMALL, model_type=kind, architectures=['SomeForCausalLM']))
    assert 'SomeForCausalLM' in str(e.value) and str(kind) in str(e.value)
    assert (near is None) == ('built otherwise' not in str(e.value)) and (near or '') in str(e.value).split('next step')[1]


@given(size=st.sampled_from(['hidden_size', 'num_hidden_layers', 'intermediate_size', 'num_attention_heads', 'num_key_value_heads', 'vocab_size', 'head_dim', 'max_position_embeddings']),
       bad=st.one_of(st.integers(max_value=-1), st.floats(), st.text(min_size=1), st.lists(st.integers(), min_size=1), st.just(True)))
@settings(max_examples=100, deadline=None)
def test_impossible_sizes(size, bad):
    if bad == 0: bad = -1
    with pytest.raises(ModelError, match=size): model_shape(dict(SMALL, model_type='llama', **{size: bad}) if size not in SMALL else dict(SMALL, model_type='llama') | {size: bad})


@pytest.mark.parametrize('size', ['hidden_size', 'num_hidden_layers', 'intermediate_size', 'num_attention_heads', 'vocab_size'])
@pytest.mark.parametrize('change', [None, 0], ids=['missing', 'zero'])
def test_sizes_that_must_be_there(size, change):
    with pytest.raises(ModelError, match=size): model_shape(dict(SMALL, model_type='llama') | {size: change})


@pytest.mark.parametrize('kind, change, word', [('mixtral', dict(num_local_experts=None), 'num_experts'), ('mixtral', dict(num_local_experts=0), 'num_experts'),
                                                ('qwen3_moe', dict(moe_intermediate_size=None), 'moe_intermediate_size'), ('gpt_oss', dict(num_local_experts=2.5), 'num_experts'),
                                                ('qwen3_moe', dict(mlp_only_layers=[0]), 'mlp_only_layers'), ('qwen3_moe', dict(decoder_sparse_step=2), 'decoder_sparse_step')], ids=str)
def test_mixtures_that_cannot_be(kind, change, word):
    with pytest.raises(ModelError, match=word): model_shape(dict(SMALL, model_type=kind, **EXPERTS[kind]) | change)


def test_hub_without_network(monkeypatch):
    import huggingface_hub
    def refuse(*a, **k): raise OSError('offline')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', refuse)
    with pytest.raises(ModelError, match='owner/name') as e: model_shape('owner/name')
    assert 'network' in str(e.value) and 'known without' not in str(e.value)
    with pytest.raises(ModelError, match='known without a network: Qwen2.5-7B'): model_shape('Qwen/Qwen2.5-7B-Instruct')


@pytest.mark.parametrize('typed, meant', [('Mixtral-8x7b', 'Mixtral-8x7B'), ('gpt-oss-20', 'gpt-oss-20b'), ('llama-3.1-8b', 'Llama-3.1-8B')])
def test_misspelt_names(typed, meant):
    with pytest.raises(ModelError, match=meant): model_shape(typed)


@pytest.mark.parametrize('model', ['~nobody-of-this-name', '~<i>', 'x' * 5000, '\x00', '', '/', 3, None, 2.5, ['Llama-3.1-8B']], ids=lambda m: str(m)[:20])
def test_anything_as_a_model(model):
    with pytest.raises(ModelError): model_shape(model)


@pytest.mark.parametrize('text', ['', 'not json', '[]', '"llama"', '\x00', '{"model_type": "llama", "architectures": 3}'])
def test_broken_config(tmp_path, text):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(ModelError): model_shape(tmp_path)


# ---------------------------------------------------------------- limits

def test_catalogue_is_well_formed():
    assert all(len(COLUMNS) - 1 <= len(row) <= len(COLUMNS) for row in [*KNOWN.values(), *MIXTURES.values()])
    assert set(known_shapes()) == set(KNOWN) and not any(s.num_experts for s in known_shapes().values())
    assert not KNOWN.keys() & MIXTURES.keys()


def test_fast():
    model_shape('Qwen3-8B')
    for name in ('Qwen3-8B', 'Mixtral-8x7B'):
        assert min(timeit.repeat(lambda: model_shape(name), number=50, repeat=10)) / 50 < 0.0005


def test_no_torch():
    code = ('import sys; from homelab_ft.plan.model_shape import model_shape, what_quantizes; what_quantizes(model_shape("Mixtral-8x7B")); '
            'print([m for m in ("torch", "transformers", "numpy", "huggingface_hub") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
