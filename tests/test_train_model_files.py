"train.model_files: healthy models of every family are taken, damaged ones are refused before any work, and no code of a model is run."
import json, shutil, struct, time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from homelab_ft.api import chat, finetune
from homelab_ft.config import make_config
from homelab_ft.core import DataError, HomelabError, ModelError, embedded_model
from homelab_ft.data.chat_template import load_tokenizer
from homelab_ft.pipeline import check_inputs
from homelab_ft.train.base_model import load_base
from homelab_ft.train.model_files import check_weights, load_on_meta, require_complete

CONFIGS = Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'configs'
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def model(tmp_path):
    "A copy of the embedded model, to damage."
    return Path(shutil.copytree(embedded_model(), tmp_path / 'model'))


def change(model, drop=(), **add):
    "Rewrite the weights without some, and with others."
    tensors = load_file(model / 'model.safetensors')
    tensors = {name: t for name, t in tensors.items() if name not in drop} | add
    save_file(tensors, model / 'model.safetensors', metadata={'format': 'pt'})


def edit_config(model, **fields):
    path = model / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---------------------------------------------------------------- damaged


NORM, UP = 'model.norm.weight', 'model.layers.2.mlp.up_proj.weight'


def one_tensor(m): change(m, drop=[NORM])
def one_too_many(m): change(m, **{'model.layers.2.mlp.up_proj.bias': torch.zeros(640)})
def other_shape(m): change(m, **{NORM: torch.ones(255)})
def half_a_file(m): (m / 'model.safetensors').write_bytes((m / 'model.safetensors').read_bytes()[:100_000])
def empty(m): (m / 'model.safetensors').write_bytes(b'')
def only_pickled(m): (m / 'model.safetensors').rename(m / 'pytorch_model.bin')
def own_names(m): (m / 'model.safetensors').rename(m / 'consolidated.safetensors')
def broken_config(m): (m / 'config.json').write_text('{')
def awq(m): edit_config(m, quantization_config=dict(quant_method='awq', bits=4))
def with_adapter(m): (m / 'adapter_config.json').write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')


def pointer(m):
    (m / 'model.safetensors').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n')


def tokenizer_pointer(m):
    (m / 'tokenizer.json').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n')


def shard_missing(m):
    (m / 'model.safetensors').rename(m / 'model-00001-of-00002.safetensors')
    names = dict(a='model-00001-of-00002.safetensors', b='model-00002-of-00002.safetensors')
    (m / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=names)))


def exl2(m):
    tensors = load_file(m / 'model.safetensors')
    packed = {n.replace('.weight', '.q_weight'): torch.zeros(3, dtype=torch.int32) for n in tensors if n.endswith('proj.weight')}
    change(m, drop=[n for n in tensors if n.endswith('proj.weight')], **packed)


def code_of_its_own(m):
    edit_config(m, model_type='mine', auto_map=dict(AutoConfig='code.Mine', AutoModelForCausalLM='code.Mine'))
    (m / 'code.py').write_text('raise SystemExit("code from the model folder ran")')


DAMAGE = {one_tensor: 'lacks weights', one_too_many: 'does not have', other_shape: 'other shapes', half_a_file: 'is cut off', empty: 'cut off',
          only_pickled: 'only pytorch_model.bin', own_names: 'no model.safetensors', broken_config: 'config cannot be read', awq: 'awq',
          with_adapter: 'also holds an adapter', pointer: 'lfs pull', tokenizer_pointer: 'tokenizer.json', shard_missing: '1 of 2: model-00002',
          exl2: 'quantized by a program', code_of_its_own: 'code of its own'}


@pytest.mark.parametrize('damage', DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_model_is_refused_before_data_and_run_folder(model, tmp_path, damage):
    damage(model)
    config = make_config(model=str(model), data=str(tmp_path / 'absent.csv'), runs_dir=str(tmp_path / 'runs'), device='cpu')
    with pytest.raises(ModelError, match=DAMAGE[damage]) as refused: check_inputs(config)
    assert refused.value.next_step and not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('damage', [one_tensor, one_too_many, exl2], ids=lambda f: f.__name__)
@pytest.mark.parametrize('method', ['lora', 'int8', 'qlora', 'full'])
def test_loading_refuses_it_whatever_the_method(model, damage, method):
    damage(model)
    with pytest.raises(ModelError, match=DAMAGE[damage]): load_base(str(model), method)
    with pytest.raises(ModelError, match=DAMAGE[damage]): chat(str(model))


def test_what_was_loaded_is_compared_once_more():
    require_complete(dict(missing_keys=[], unexpected_keys=[], mismatched_keys=[]), 'm')
    with pytest.raises(ModelError, match='lacks weights\n  seen: m: 3, such as a, b\n'): require_complete(dict(missing_keys={'c', 'a', 'b'}), 'm')


def test_a_model_that_is_repaired_is_taken(model):
    whole = (model / 'model.safetensors').read_bytes()
    one_tensor(model)
    with pytest.raises(ModelError): check_weights(str(model))
    (model / 'model.safetensors').write_bytes(whole)
    check_weights(str(model))


# ---------------------------------------------------------------- healthy


def stored_names(config):
    "Names and shapes as `save_pretrained` would store them: tied weights once, converted ones under the names of the files."
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion
    with torch.device('meta'): model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tied = set(model.all_tied_weights_keys)
    tensors = {name: t for name, t in model.state_dict().items() if name not in tied}
    return {name: tuple(t.shape) for name, t in revert_weight_conversion(model, tensors).items()}


def file_with_header_only(path, shapes):
    "A sparse safetensors file: the header, and as many bytes as it promises."
    at, header = 0, {}
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = dict(dtype='BF16', shape=list(shape), data_offsets=[at, at + size])
        at += size
    text = json.dumps(header).encode()
    with open(path, 'wb') as f:
        f.write(struct.pack('<Q', len(text)) + text)
        f.truncate(8 + len(text) + at)


def known(path):
    from transformers import AutoConfig
    settings = json.loads(path.read_text())
    settings.pop('quantization_config', None)
    return AutoConfig.for_model(**settings)


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.json')) or [pytest.param(None, marks=pytest.mark.skip(reason='no configs beside the project'))],
                         ids=lambda p: p and p.stem)
def test_healthy_models_of_every_family_are_taken(path, tmp_path):
    config, folder = known(path), tmp_path / 'm'
    config.save_pretrained(folder)
    shapes = stored_names(config)
    file_with_header_only(folder / 'model.safetensors', shapes)
    began = time.process_time()
    check_weights(str(folder))
    assert time.process_time() - began < 2      # some tenths of a second
    name = list(shapes)[len(shapes) // 2]
    with pytest.raises(ModelError, match='lacks weights'): require_complete(load_on_meta(config, {n: s for n, s in shapes.items() if n != name})[1], 'm')


def small(model_type, **settings):
    from transformers import AutoConfig
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    return AutoConfig.for_model(model_type, **sizes | settings)


@pytest.mark.parametrize('model_type, settings', [
    ('llama', dict(tie_word_embeddings=True)), ('qwen3_moe', dict(num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)),
    ('mixtral', dict(num_local_experts=4)), ('olmo2', {}), ('granite', {}), ('smollm3', dict(pad_token_id=0)), ('gemma2', {}), ('phi3', dict(pad_token_id=0)),
    ('gpt2', dict(n_embd=32, n_layer=2, n_head=4)), ('mistral', {})], ids=str)
def test_saved_models_are_taken(model_type, settings, tmp_path):
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_config(small(model_type, **settings)).save_pretrained(tmp_path / 'm', max_shard_size='20KB')
    assert {p.device.type for p in check_weights(str(tmp_path / 'm')).parameters()} == {'meta'}
    load_base(str(tmp_path / 'm'))


@pytest.mark.parametrize('names', [
    ['model.layers.0.self_attn.rotary_emb.inv_freq', 'model.layers.1.self_attn.rotary_emb.inv_freq'], ['lm_head.weight']], ids=str)
def test_extra_tensors_that_do_no_harm_are_taken(model, names):
    tensors = load_file(model / 'model.safetensors')
    extra = tensors['model.embed_tokens.weight'].clone() if names == ['lm_head.weight'] else torch.ones(32)
    change(model, **{name: extra.clone() for name in names})
    load_base(str(model))


def test_a_text_model_out_of_a_multimodal_folder_is_taken():
    from transformers import AutoConfig
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    text, vision = sizes | dict(vocab_size=64), dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
    config = AutoConfig.for_model('gemma3', text_config=text, vision_config=vision)
    shapes = stored_names(config)
    assert any('vision' in name for name in shapes)
    require_complete(load_on_meta(config, shapes)[1], 'm')


@pytest.mark.parametrize('method', ['qlora', 'int8'])
def test_weights_stored_by_bitsandbytes_are_taken(model, tmp_path, method):
    stored = load_base(str(model), method)
    stored.save_pretrained(tmp_path / 'stored')
    check_weights(str(tmp_path / 'stored'))
    tensors = load_file(tmp_path / 'stored' / 'model.safetensors')
    del tensors[UP]
    save_file(tensors, tmp_path / 'stored' / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ModelError): check_weights(str(tmp_path / 'stored'))


# ---------------------------------------------------------------- code and tokens


def test_a_tokenizer_with_code_is_refused_and_asks_nothing(model, monkeypatch):
    (model / 'code.py').write_text('raise SystemExit("code from the model folder ran")')
    path = model / 'tokenizer_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(tokenizer_class='MyTokenizer', auto_map=dict(AutoTokenizer=['code.MyTokenizer', None]))))
    edit_config(model, model_type='mine', auto_map=dict(AutoConfig='code.Mine'))
    def asked(*_): raise AssertionError('a question was asked')
    monkeypatch.setattr('builtins.input', asked)
    with pytest.raises(ModelError, match='code of its own'): load_tokenizer(str(model))
    with pytest.raises(ModelError, match='code of its own'): load_base(str(model))


def test_a_known_model_with_code_beside_it_runs_without_that_code(model, monkeypatch):
    (model / 'code.py').write_text('raise SystemExit("code from the model folder ran")')
    (model / 'custom_generate').mkdir()
    (model / 'custom_generate' / 'generate.py').write_text('raise SystemExit("code from the model folder ran")')
    edit_config(model, auto_map=dict(AutoConfig='code.Mine', AutoModelForCausalLM='code.Mine'))
    def asked(*_): raise AssertionError('a question was asked')
    monkeypatch.setattr('builtins.input', asked)
    assert chat(str(model)).generate('Hello', max_new_tokens=2) is not None


CHATML = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def test_a_tokenizer_larger_than_the_table_is_refused_where_it_matters(model, tmp_path):
    rows = [dict(prompt=f'Name number {i}.', completion=f'It is {i}.') for i in range(60)]
    tok = load_tokenizer(str(model))
    tok.add_special_tokens({'additional_special_tokens': ['<|im_start|>', '<|im_end|>']})
    tok.save_pretrained(model)
    check_inputs(make_config(model=str(model), data='x', runs_dir=str(tmp_path / 'runs'), device='cpu'))     # nothing uses them yet
    tok.chat_template = CHATML
    tok.save_pretrained(model)
    with pytest.raises(ModelError, match=r'no embedding for\n  seen: 2 tokens: <\|im_start\|> \(4096\), <\|im_end\|>'):
        finetune(rows, model=str(model), runs_dir=str(tmp_path / 'runs'), device='cpu')
    assert not list((tmp_path / 'runs').glob('*/config.yaml'))
    with pytest.raises(DataError, match='no embedding for'): chat(str(model)).generate('Hello')


@pytest.mark.parametrize('settings', [dict(), dict(method='int8'), dict(method='qlora'), dict(objective='dpo')], ids=str)
@pytest.mark.parametrize('targets', [['mlp.q_proj', 'v_proj'], ['all-linear', 'q_porj'], ['layers.99.self_attn.q_proj'], 'q_porj', []], ids=str)
def test_targets_that_match_nothing_are_refused_before_data_and_run_folder(tmp_path, targets, settings):
    config = make_config(data=str(tmp_path / 'absent.csv'), runs_dir=str(tmp_path / 'runs'), target_modules=targets, device='cpu', **settings)
    with pytest.raises(HomelabError, match='target_modules'): check_inputs(config)
    assert not (tmp_path / 'runs').exists()
