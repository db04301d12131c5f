"The methods a person knows from transformers and peft: each setting changes what it says, and what cannot be is refused before weights are loaded."
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings as tries, strategies as st
from peft.optimizers import create_loraplus_optimizer
from transformers import (AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM, get_scheduler)

from homelab_ft.core import ConfigError, HardwareError
from homelab_ft.config import dump_config, make_config
from homelab_ft.data.tokenize import make_cache, save_cache
from homelab_ft.io import append_jsonl, read_jsonl
from homelab_ft.train import trainer as training
from homelab_ft.train.engine.padded import PaddedStep, mean_nll
from homelab_ft.train.engine.autotune import autotune
from homelab_ft.train.engine.memory_budget import StepOptions
from homelab_ft.train.engine.ops.cuda_graph import StepGraph
from homelab_ft.train.lora import attach_lora, load_adapter, save_adapter
from homelab_ft.train.engine.ops.neftune import add_neftune, sequence_lengths, neftune_off
from homelab_ft.train.engine.packing import collate_packed, bucket_shape
from homelab_ft.train.base_model import validate_method, load_base
from homelab_ft.train.engine.packed import PackedStep
from homelab_ft.train.schedule import make_optimizer, lr_multiplier, warmup_length
from homelab_ft.train.run_folder import create_run, status

SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
IDS = torch.arange(24).reshape(2, 12) + 20
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a card')


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


def losses(run): return [r['loss'] for r in read_jsonl(run.metrics_path)]


# ------------------------------------------------------------ schedules


@pytest.mark.parametrize('kind', ['linear', 'cosine', 'constant', 'constant_with_warmup', 'inverse_sqrt'])
@given(total=st.integers(1, 200), warmup=st.integers(0, 60))
@tries(max_examples=30, deadline=None)
def test_schedules_are_those_of_transformers_and_one_step_ahead_during_the_warm_up(kind, total, warmup):
    config = make_config(lr_scheduler_type=kind, warmup_steps=warmup if kind != 'constant' else 0, warmup_ratio=0)
    warmup = warmup_length(total, config)
    schedule = get_scheduler(kind, torch.optim.SGD([torch.zeros(1)], lr=1.), num_warmup_steps=warmup, num_training_steps=total).lr_lambdas[0]
    for step in range(total):
        theirs = 1. if step == warmup - 1 else schedule(step + (step < warmup))      # theirs is at its highest one step later, if there is one
        assert lr_multiplier(step, total, config) == pytest.approx(theirs, abs=1e-12)


def test_warmup_steps_stand_above_the_ratio():
    assert warmup_length(100, make_config(warmup_ratio=0.1)) == 10
    assert warmup_length(100, make_config(warmup_ratio=0.1, warmup_steps=25)) == 25
    assert warmup_length(100, make_config(warmup_ratio=0.1, lr_scheduler_type='constant')) == 0


# ------------------------------------------------------------ LoRA+, rsLoRA, DoRA


@pytest.mark.parametrize('dora', [False, True])
def test_the_groups_of_lora_plus_are_those_of_peft(folder, dora):
    model = attach_lora(load_base(folder), make_config(lora_r=4, use_dora=dora))
    ours = make_optimizer(model, make_config(loraplus_lr_ratio=16., learning_rate=1e-3))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.)
    rate = lambda optimizer, scale: {id(p): scale(g) for g in optimizer.param_groups for p in g['params']}
    assert rate(ours, lambda g: 1e-3 * g['lr_ratio']) == pytest.approx(rate(theirs, lambda g: g['lr']))
    assert {len(g['params']) for g in ours.param_groups} == {14, 28 if dora else 14}
    assert len(make_optimizer(model, make_config()).param_groups) == 1


def test_lora_plus_moves_b_sixteen_times_as_far(folder):
    def moved(ratio):
        model = attach_lora(load_base(folder), make_config(lora_r=4))
        optimizer = make_optimizer(model, make_config(loraplus_lr_ratio=ratio))
        for g in optimizer.param_groups: g['lr'] = 1e-3 * g['lr_ratio']
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        return max(p.abs().max().item() for n, p in model.named_parameters() if 'lora_B' in n)
    assert moved(16.) == pytest.approx(16 * moved(1.), rel=1e-3) and moved(1.) == pytest.approx(1e-3, rel=1e-2)


def test_a_checkpoint_from_before_lora_plus_can_be_continued(tmp_path, folder):
    run = new_run(tmp_path, folder, 'old')
    append_jsonl(run.control_path, {'command': 'stop', 'value': None})
    training.train(run)
    path = next(run.checkpoints_path.glob('step-*')) / 'optimizer.pt'
    state = torch.load(path, weights_only=True)
    for g in state['param_groups']: del g['lr_ratio']
    torch.save(state, path)
    assert training.train(run, resume=True).state == 'finished'


VARIANTS = {'lora': {}, 'rslora': dict(use_rslora=True), 'dora': dict(use_dora=True), 'lora plus': dict(loraplus_lr_ratio=16.), 'noise': dict(neftune_noise_alpha=5.),
            'int8': dict(method='int8'), 'dora in 4 bits': dict(method='qlora', use_dora=True),
            'schedule': dict(lr_scheduler_type='inverse_sqrt', warmup_steps=4), 'adam': dict(adam_beta2=0.9)}


def test_every_variant_trains_to_something_else_and_can_be_continued(tmp_path, folder):
    found = {}
    for name, settings in VARIANTS.items():
        whole, part = (new_run(tmp_path, folder, f'{name}-{half}'.replace(' ', '-'), lora_dropout=0.1, **settings) for half in ('whole', 'part'))
        assert training.train(whole).state == 'finished'
        append_jsonl(part.control_path, {'command': 'stop', 'value': None})
        assert training.train(part).state == 'stopped' and training.train(part, resume=True).state == 'finished'
        np.testing.assert_allclose(losses(part), losses(whole), atol=1e-6)
        found[name] = losses(whole)
        assert found[name][-1] < found[name][0], name
    numbers = [tuple(np.round(v, 7)) for v in found.values()]
    assert len(set(numbers)) == len(VARIANTS)


@pytest.mark.parametrize('settings', [dict(use_dora=True), dict(use_rslora=True), dict(use_dora=True, method='qlora'), dict(method='int8')], ids=str)
def test_variants_are_saved_and_loaded_whole(tmp_path, folder, settings):
    config = make_config(lora_r=4, **settings)
    model = attach_lora(load_base(folder, config.method), config)
    for n, p in model.named_parameters():
        if p.requires_grad: p.data += 0.05 * torch.randn_like(p)
    wanted = model.eval()(IDS).logits
    saved = save_adapter(model, tmp_path / 'adapter')
    torch.testing.assert_close(load_adapter(load_base(folder, config.method), saved)(IDS).logits, wanted)


# ------------------------------------------------------------ 8 bits


def test_parity_of_the_gradient_through_8_bit_weights_with_their_dense_values(folder):
    eight = load_base(folder, 'int8')
    layer = eight.model.layers[0].mlp.down_proj
    x, dy = torch.randn(50, layer.in_features, requires_grad=True), torch.randn(50, layer.out_features)
    y = layer(x)
    y.backward(dy)
    dense = layer.weight.data.float() * layer.state.SCB[:, None] / 127
    assert (x.grad - dy @ dense).norm() / (dy @ dense).norm() < 2e-3            # through 16 bits
    assert (y - x @ dense.t()).norm() / y.norm() < 2e-2                         # inputs are rounded to 8 bits


# ------------------------------------------------------------ noise


MODELS = {'llama': lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), 'qwen3': lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
          'gemma2': lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)), 'gemma3': lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=8))}


@pytest.mark.parametrize('kind', MODELS)
def test_noise_reaches_training_and_never_validation(kind):
    torch.manual_seed(0)
    base, cache = MODELS[kind](), rows()
    before = mean_nll(base, cache)
    model = attach_lora(base, make_config(lora_r=4, neftune_noise_alpha=15.))
    step = PaddedStep(model, 'plain')
    def loss(seed):
        torch.manual_seed(seed)
        return float(step.accumulate(cache, [[0, 1, 2], [3, 4]])[0])
    assert mean_nll(model, cache) == pytest.approx(before, abs=1e-6)
    assert loss(1) == loss(1) != loss(2)
    with neftune_off(model): assert loss(1) == loss(2)
    assert loss(1) != loss(2)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 4))
@tries(max_examples=50, deadline=None)
def test_lengths_are_the_same_in_both_layouts(lengths, empty):
    padded = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for i, n in enumerate(lengths): padded[i, :n] = 7
    cuts = torch.tensor(np.cumsum([0, *lengths]).tolist() + [sum(lengths)] * empty, dtype=torch.int32)
    flat = sequence_lengths(torch.full((1, sum(lengths)), 7), cuts)
    assert sequence_lengths(padded).flatten().tolist() == lengths
    assert flat.flatten().tolist() == [n for n in lengths for _ in range(n)]


def test_noise_is_as_strong_in_rows_end_to_end():
    torch.manual_seed(0)
    model, cache, part = attach_lora(MODELS['llama'](), make_config(lora_r=4, neftune_noise_alpha=8.)), rows(6), [0, 1, 2, 3]
    table, seen = model.get_input_embeddings(), []
    model.get_base_model().model.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach().clone()))
    longest = int(cache.lengths.max())
    step = PackedStep(model, StepOptions(max_seq_len=longest, max_tokens_per_microbatch=100, bucket_size=16))
    batch = {k: torch.from_numpy(v) for k, v in collate_packed(cache, part, bucket_shape(cache.lengths, cache.lengths, part, 16, longest), longest, 10).items()}
    seen.clear()
    step.backward(batch, False)
    noise, begin = (seen[0] - table(batch['input_ids'])).abs().detach()[0], 0
    for r in part:
        n = int(cache.lengths[r])
        bound = 8 / (n * 64)**0.5
        assert 0.97 * bound < noise[begin:begin + n].max() <= bound * 1.0001 and float(noise[begin:begin + n].mean()) == pytest.approx(bound / 2, rel=0.1)
        begin += n


def test_parity_of_the_fast_step_is_found_while_noise_is_silenced():
    torch.manual_seed(0)
    model = attach_lora(MODELS['llama'](), make_config(lora_r=4, neftune_noise_alpha=15.))
    with neftune_off(model): step = autotune(model, StepOptions(max_seq_len=40, max_tokens_per_microbatch=90, bucket_size=16))
    assert isinstance(step, PackedStep), step.features
    once = lambda: float(step.accumulate(rows(), [[0, 1, 2]])[0])
    assert once() != once()


# ------------------------------------------------------------ refusals


def refused_before_weights(run, monkeypatch, error, words):
    def loaded(*_, **__): raise AssertionError('weights were loaded')
    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', loaded)
    with pytest.raises(error, match=words): training.train(run)
    assert status(run).state == 'failed'


@pytest.mark.parametrize('settings', [dict(cuda_graph=True), dict(torch_compile=True), dict(optim='paged_adamw_32bit'), dict(optim='paged_adamw_8bit')], ids=str)
def test_what_needs_a_card_is_refused_without_one(tmp_path, folder, monkeypatch, settings):
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
    (dict(packing=True, padding_free=False), 'packing=true needs rows'), (dict(torch_compile=True, padding_free=False), 'torch_compile=true needs rows'),
    (dict(cuda_graph=True, padding_free=False), 'cuda_graph=true needs rows'), (dict(lr_scheduler_type='constant', warmup_steps=3), 'constant_with_warmup'),
    (dict(method='int8', use_dora=True), 'use_dora does not go with 8-bit'), (dict(loraplus_lr_ratio=0.5), 'greater than or equal to 1'), (dict(loraplus_lr_ratio=float('inf')), 'finite'), (dict(lora_r=0), 'greater than or equal to 1'),
    (dict(lora_r=-4), 'greater than or equal to 1'), (dict(neftune_noise_alpha=-1), 'greater than or equal to 0'), (dict(adam_beta1=1.), 'less than 1'),
    (dict(adam_epsilon=0), 'greater than 0'), (dict(method='int4'), 'did you mean int8'), (dict(optim='adamw_8bits'), 'did you mean adamw_8bit'),
    (dict(lr_scheduler_type='constant_with_warm_up'), 'did you mean constant_with_warmup'), (dict(use_rs_lora=True), 'did you mean use_rslora'),
    (dict(gradient_checkpointing='sometimes'), 'boolean')], ids=str)
def test_impossible_settings(settings, words):
    with pytest.raises(ConfigError, match=words): make_config(**settings)


def test_allowed_neighbours_of_what_is_refused():
    for settings in (dict(packing=True, padding_free=True), dict(padding_free=False, cuda_graph=False), dict(padding_free=False), dict(lr_scheduler_type='constant')):
        validate_method(make_config(**settings), 'cpu')
    validate_method(make_config(cuda_graph=True, torch_compile=True, optim='paged_adamw_32bit'), 'cuda')
    assert 'use_rslora: false' in dump_config(make_config())


# ------------------------------------------------------------ on a card


@needs_card
def test_noise_in_a_recorded_step_follows_the_seed():
    torch.manual_seed(0)
    model = MODELS['llama']().cuda()
    add_neftune(model, 15.)
    batch = {'ids': (IDS).cuda()}
    recorded = StepGraph(lambda b: model(input_ids=b['ids'], labels=b['ids']).loss, batch)
    def loss(seed):
        torch.manual_seed(seed)
        return float(recorded(batch))
    assert loss(1) == loss(1) != loss(2)
    with neftune_off(model): assert loss(1) == loss(2) == pytest.approx(float(model.eval()(**{'input_ids': batch['ids'], 'labels': batch['ids']}).loss), rel=1e-5)


@needs_card
@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_trains_on_a_card(tmp_path, folder, name):
    run = new_run(tmp_path, folder, 'card', device='auto', optim='paged_adamw_32bit', **VARIANTS[name])
    assert training.train(run).state == 'finished' and losses(run)[-1] < losses(run)[0]
