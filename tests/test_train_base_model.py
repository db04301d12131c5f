"train.base_model: 8-bit gradients, and what cannot be is refused before weights are loaded."
import importlib.util

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from homelab_ft.config import dump_config, make_config
from homelab_ft.core import ConfigError, HardwareError
from homelab_ft.data.tokenize import make_cache, save_cache
from homelab_ft.train import trainer as training
from homelab_ft.train.base_model import load_base, validate_method
from homelab_ft.train.run_folder import create_run, status

SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
pytestmark = pytest.mark.usefixtures('one_thread')


def rows(n=14, vocab=320, seed=0):
    draw = np.random.default_rng(seed)
    return make_cache([(draw.integers(1, vocab, k).tolist(), [0] + [1] * (k - 1)) for k in draw.integers(3, 20, n)], range(n))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('model')
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(path)
    return str(path)


def new_run(tmp_path, folder, name, **settings):
    config = make_config(**dict(model=folder, run_name=name, device='cpu', lora_r=4, learning_rate=1e-2, per_device_train_batch_size=4, max_length=64, max_steps=10,
                                eval_steps=5, save_steps=4) | settings)
    run = create_run(config, tmp_path)
    run.data_path.mkdir()
    save_cache(rows(40), run.data_path / 'train.safetensors')
    save_cache(rows(10, seed=1), run.data_path / 'validation.safetensors')
    return run


def test_parity_of_the_gradient_through_8_bit_weights_with_their_dense_values(folder):
    eight = load_base(folder, 'int8')
    layer = eight.model.layers[0].mlp.down_proj
    x, dy = torch.randn(50, layer.in_features, requires_grad=True), torch.randn(50, layer.out_features)
    y = layer(x)
    y.backward(dy)
    dense = layer.weight.data.float() * layer.state.SCB[:, None] / 127
    assert (x.grad - dy @ dense).norm() / (dy @ dense).norm() < 2e-3            # through 16 bits
    assert (y - x @ dense.t()).norm() / y.norm() < 2e-2                         # inputs are rounded to 8 bits


def refused_before_weights(run, monkeypatch, error, words):
    def loaded(*_, **__): raise AssertionError('weights were loaded')
    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', loaded)
    with pytest.raises(error, match=words): training.train(run)
    assert status(run).state == 'failed'


@pytest.mark.parametrize('settings', [dict(cuda_graph=True), dict(optim='paged_adamw_8bit')], ids=str)
def test_what_needs_a_gpu_is_refused_without_one(tmp_path, folder, monkeypatch, settings):
    refused_before_weights(new_run(tmp_path, folder, 'no', **settings), monkeypatch, HardwareError, 'needs a GPU')


@pytest.mark.parametrize('settings', [dict(method='qlora'), dict(method='int8'), dict(optim='adamw_8bit')], ids=str)
def test_without_bitsandbytes_the_message_says_how_to_get_it(tmp_path, folder, monkeypatch, settings):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name == 'bitsandbytes' else real(name, *a))
    refused_before_weights(new_run(tmp_path, folder, 'no', **settings), monkeypatch, ConfigError, 'pip install bitsandbytes')
    if 'method' in settings:
        with pytest.raises(ConfigError, match='pip install bitsandbytes'): load_base(folder, settings['method'])


def test_unknown_layers_are_refused_before_weights(tmp_path, folder, monkeypatch):
    refused_before_weights(new_run(tmp_path, folder, 'no', target_modules='q_porj'), monkeypatch, ConfigError, 'did you mean q_proj')


@pytest.mark.parametrize('settings, words', [
    (dict(packing=True, padding_free=False), 'packing=true needs packed'), (dict(lr_scheduler_type='constant', warmup_steps=3), 'constant_with_warmup'),
    (dict(method='int8', use_dora=True), 'use_dora does not go with 8-bit'), (dict(loraplus_lr_ratio=float('inf')), 'finite'),
    (dict(lora_r=0), 'greater than or equal to 1'), (dict(adam_beta1=1.), 'less than 1'), (dict(optim='adamw_8bits'), 'did you mean adamw_8bit'),
    (dict(use_rs_lora=True), 'did you mean use_rslora'), (dict(gradient_checkpointing='sometimes'), 'boolean')], ids=str)
def test_impossible_settings(settings, words):
    with pytest.raises(ConfigError, match=words): make_config(**settings)


def test_allowed_neighbours_of_what_is_refused():
    for settings in (dict(packing=True, padding_free=True), dict(padding_free=False, cuda_graph=False), dict(padding_free=False), dict(lr_scheduler_type='constant')):
        validate_method(make_config(**settings), 'cpu')
    validate_method(make_config(cuda_graph=True, torch_compile=True, optim='paged_adamw_32bit'), 'cuda')
    assert 'use_rslora: false' in dump_config(make_config())
