"train.base_model: 8-bit gradients, and what cannot be is refused before weights are loaded."
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from toy_runs import new_run
from homelab_ft.config import dump_config, make_config
from homelab_ft.core import ConfigError, HardwareError
from homelab_ft.train import trainer as training
from homelab_ft.train.base_model import load_base, validate_method
from homelab_ft.train.run_folder import status

pytestmark = pytest.mark.usefixtures('one_thread')


def test_parity_of_the_gradient_through_8_bit_weights_with_their_dense_values(toy_model):
    eight = load_base(toy_model, 'int8')
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
def test_what_needs_a_gpu_is_refused_without_one(tmp_path, toy_model, monkeypatch, settings):
    refused_before_weights(new_run(tmp_path, toy_model, 'no', **settings), monkeypatch, HardwareError, 'needs a GPU')


@pytest.mark.parametrize('settings', [dict(method='qlora'), dict(method='int8'), dict(optim='adamw_8bit')], ids=str)
def test_without_bitsandbytes_the_message_says_how_to_get_it(tmp_path, toy_model, monkeypatch, settings):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name == 'bitsandbytes' else real(name, *a))
    refused_before_weights(new_run(tmp_path, toy_model, 'no', **settings), monkeypatch, ConfigError, 'pip install bitsandbytes')
    if 'method' in settings:
        with pytest.raises(ConfigError, match='pip install bitsandbytes'): load_base(toy_model, settings['method'])


def test_unknown_layers_are_refused_before_weights(tmp_path, toy_model, monkeypatch):
    refused_before_weights(new_run(tmp_path, toy_model, 'no', target_modules='q_porj'), monkeypatch, ConfigError, 'did you mean q_proj')


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
