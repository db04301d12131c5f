"plan.shape: every parameter count against the real model class, built without memory on torch's meta device."
import json
from pathlib import Path

import pytest

from homelab_ft.core import ModelError
from homelab_ft.plan.shape import ARCHITECTURES, KNOWN, known_shapes, model_shape
from homelab_ft.plan.vram import adapter_params

CONFIGS = Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'configs'
FILES = sorted(CONFIGS.glob('*.json'))
SUPPORTED = [f for f in FILES if json.loads(f.read_text()).get('model_type') in ARCHITECTURES]
need_configs = pytest.mark.skipif(not FILES, reason='the folder of published configurations is not beside the project')


def meta_model(config):
    "The real class with parameters that have shapes and no memory."
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    config = dict(config)
    with torch.device('meta'):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(config.pop('model_type'), **config))


def count(model): return sum(p.numel() for p in model.parameters())


@need_configs
@pytest.mark.parametrize('file', SUPPORTED, ids=lambda f: f.stem)
def test_published_configs(file):
    model, shape = meta_model(json.loads(file.read_text())), model_shape(file)
    assert shape.n_params == count(model)
    layer = model.model.layers[0]
    real = {name.split('.')[-1]: (m.in_features, m.out_features, m.bias is not None) for name, m in layer.named_modules() if hasattr(m, 'in_features')}
    assert shape.linears == real
    assert shape.num_hidden_layers * shape.linear_params + shape.embedding_params + shape.small_params == count(model)


@need_configs
def test_unsupported_is_named():
    refused = [f for f in FILES if f not in SUPPORTED]
    for file in refused:
        with pytest.raises(ModelError, match=json.loads(file.read_text())['architectures'][0]): model_shape(file)


@need_configs
@pytest.mark.parametrize('name', KNOWN)
def test_known_names(name):
    file = next(f for f in SUPPORTED if name.lower().replace('llama-3.1', 'meta-llama-3.1') in f.stem.lower())
    assert known_shapes()[name] == model_shape(file)


SMALL = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=128, pad_token_id=0)


@pytest.mark.parametrize('extra', [{}, dict(attention_bias=True), dict(mlp_bias=True), dict(tie_word_embeddings=True)], ids=str)
@pytest.mark.parametrize('kind', ARCHITECTURES)
def test_every_architecture(kind, extra):
    config = dict(SMALL, model_type=kind, **extra)
    if 'mlp_bias' in extra and kind != 'llama' or 'attention_bias' in extra and kind not in ('llama', 'qwen3', 'gemma2', 'gemma3_text'):
        pytest.skip('the model class has no such setting')
    assert model_shape(config).n_params == count(meta_model(config))


@pytest.mark.parametrize('missing', [('num_key_value_heads',), ('head_dim',), ('num_key_value_heads', 'head_dim'), ('tie_word_embeddings',)], ids=str)
@pytest.mark.parametrize('kind', ['llama', 'mistral', 'phi3', 'gemma2', 'gemma3_text', 'qwen3'])
def test_defaults_of_the_classes(kind, missing):
    "What a configuration leaves out is what the model class assumes."
    config = dict(SMALL, model_type=kind, hidden_size=512, num_attention_heads=8, vocab_size=256)
    config = {k: v for k, v in config.items() if k not in missing}
    assert model_shape(config).n_params == count(meta_model(config))


@pytest.mark.parametrize('targets', ['all-linear', ['q_proj', 'v_proj'], ['down_proj']], ids=str)
@pytest.mark.parametrize('r', [1, 16])
def test_adapter_counts(r, targets):
    "LoRA parameters against peft itself."
    torch, peft = pytest.importorskip('torch'), pytest.importorskip('peft')
    config = dict(SMALL, model_type='qwen2')
    with torch.device('meta'): model = peft.get_peft_model(meta_model(config), peft.LoraConfig(r=r, target_modules=targets, task_type='CAUSAL_LM'))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_params(model_shape(config), r, targets) == trained


def test_hub_without_network(monkeypatch):
    import huggingface_hub
    def refuse(*a, **k): raise OSError('offline')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', refuse)
    with pytest.raises(ModelError, match='owner/name') as e: model_shape('owner/name')
    assert 'network' in str(e.value)


@pytest.mark.parametrize('text', ['', 'not json', '[]', '"llama"', '\x00'])
def test_broken_config(tmp_path, text):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(ModelError): model_shape(tmp_path)
