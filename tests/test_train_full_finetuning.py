"Full fine-tuning from outside: the whole pipeline, killed and continued, and what is refused before any work."
import importlib.util, json, os, signal, subprocess, sys, time
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file

from homelab_ft.core import ConfigError, HardwareError
from homelab_ft.config import make_config
from homelab_ft.data.tokenize import load_cache
from homelab_ft.deploy.chat import load_chat
from homelab_ft.evaluate.compare import load_evaluation, load_evaluation_data
from homelab_ft.evaluate.likelihood import sequence_nll
from homelab_ft.pipeline import check_inputs, new_run, plan_run, quickstart_config, resume_pipeline, run_pipeline
from homelab_ft.train.checkpoint import checkpoints
from homelab_ft.train.engine.padded import PaddedStep, label_nll
from homelab_ft.train.engine.batching import collate
from homelab_ft.plan.trace.trace import trace
from homelab_ft.train.full_finetuning import copy_weights, load_full, save_model_folder
from homelab_ft.train.engine.ops.chunked_loss import chunk_size
from homelab_ft.train.lora import attach, load_adapter, set_adapter
from homelab_ft.train.base_model import load_base
from homelab_ft.train.engine.autotune import build_step
from homelab_ft.train.run_folder import history, status
from homelab_ft.train.engine.full import FullStep, full_step

SMALL = dict(method='full', learning_rate=5e-4, max_rows=100, max_steps=12, per_device_train_batch_size=4, save_steps=4, eval_steps=6,
             eval_max_rows=16, generate_max_rows=2, n_bootstrap=100, save_total_limit=1)
PARAMETERS = 5_180_672

def losses(run): return [(r['step'], r['loss']) for r in history(run)['train']]

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('full')
    return run_pipeline(quickstart_config(folder, **SMALL, run_name='whole', runs_dir=str(folder / 'runs')), log=lambda line: None)

def test_the_journey_leaves_a_whole_model(whole):
    assert status(whole).state == 'finished'
    assert {'config.json', 'model.safetensors', 'tokenizer.json', 'chat_template.jinja'} <= {p.name for p in whole.adapter_path.iterdir()}
    stored = load_file(whole.adapter_path / 'model.safetensors')
    assert 'lm_head.weight' not in stored and sum(t.numel() for t in stored.values()) == PARAMETERS          # the tied matrix once
    assert {t.dtype for t in stored.values()} == {torch.float32}
    entry = json.loads(whole.entry_path.read_text())
    assert entry['method'] == 'full' and entry['parity']['passed'] and entry['adapter']['bytes'] > 4 * PARAMETERS
    assert json.loads(whole.manifest_path.read_text())['trainable_parameters'] == PARAMETERS
    assert 'NLL per token' in whole.report_path.read_text()

def test_the_loss_falls(whole):
    first, last = losses(whole)[0][1], losses(whole)[-1][1]
    assert last < 0.8 * first
    seen = [e['loss'] for e in history(whole)['eval']]
    assert seen[-1] < seen[0]

def test_base_and_tuned_are_what_the_evaluation_says(whole):
    result, config = load_evaluation(whole), whole.config()
    cache = load_evaluation_data(whole, config).cache
    for model, said in ((load_base('embedded', 'full'), result['NLL per token'].base), (load_base(str(whole.adapter_path), 'full'), result['NLL per token'].fine_tuned)):
        nll, tokens = sequence_nll(model, cache, progress=False)
        assert abs(nll.sum() / tokens.sum() - said) < 1e-6
    assert result['NLL per token'].gain > 0.1 and result['accuracy'].n_examples == 16

def test_tied_weights_stay_tied(whole):
    tuned = load_adapter(load_base('embedded', 'full'), whole.adapter_path)
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight
    model = attach(load_base('embedded', 'full'), make_config(method='full'))
    set_adapter(model, load_file(checkpoints(whole.checkpoints_path)[-1] / 'adapter.safetensors'))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.model.embed_tokens.weight, load_base('embedded', 'full').model.embed_tokens.weight)      # it learned

def test_untied_weights_are_both_saved(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    small = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False))
    save_model_folder(tmp_path / 'm', small, copy_weights(small))
    with safe_open(tmp_path / 'm' / 'model.safetensors', 'pt') as f: assert 'lm_head.weight' in f.keys()
    again = load_full(small, tmp_path / 'm')
    assert again.lm_head.weight is not again.model.embed_tokens.weight and torch.equal(again.lm_head.weight, small.lm_head.weight)

def test_the_merged_folder_is_the_tuned_model_rounded_once(whole):
    merged, tuned = load_file(whole.merged_path / 'model.safetensors'), load_file(whole.adapter_path / 'model.safetensors')
    assert {t.dtype for t in merged.values()} == {torch.bfloat16} and merged.keys() == tuned.keys()
    assert all(torch.equal(merged[k], tuned[k].bfloat16()) for k in tuned)
    parity = json.loads((whole.path / 'parity.json').read_text())
    assert parity['passed'] and 0 < parity['mean_distance']             # it was measured: rounding shows

def test_one_can_talk_to_it(whole):
    run, merged = load_chat(whole.path), load_chat(whole.merged_path)
    assert run.generate('Which team?', 4) == merged.generate('Which team?', 4)
    assert torch.equal(run.model.model.norm.weight, load_file(whole.adapter_path / 'model.safetensors')['model.norm.weight'])

@pytest.mark.slow
def test_killed_and_continued_with_the_same_numbers(whole, tmp_path):
    config = quickstart_config(tmp_path, **SMALL, run_name='killed', runs_dir=str(tmp_path / 'runs'))
    run = new_run(config, log=lambda line: None)
    process = subprocess.Popen([sys.executable, '-P', '-m', 'homelab_ft.train.trainer', str(run.path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(losses(run)) < 6 and time.monotonic() < end: time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 6 <= len(losses(run)) < 12 and checkpoints(run.checkpoints_path)
    resume_pipeline(run, log=lambda line: None)
    assert losses(run) == losses(whole)
    ours, theirs = (load_file(r.adapter_path / 'model.safetensors') for r in (run, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)

def test_bfloat16_rounds_the_multiplications_and_not_the_weights(whole):
    config, cache = make_config(method='full', dtype='bfloat16'), load_cache(whole.data_path / 'train.safetensors')
    model = attach(load_base('embedded', 'full'), config, 'bfloat16')
    exact = attach(load_base('embedded', 'full'), config, 'float32')
    batch = collate(cache, [0, 1, 2], 0)
    rounded, plain = (label_nll(m, batch)[0] for m in (model, exact))
    assert rounded.dtype == torch.float32 and 0 < (rounded - plain).abs().mean() < 0.05
    rounded.mean().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32} == {p.dtype for p in model.parameters()}

def test_a_gpu_takes_the_padded_step_too():
    config = make_config(method='full', dtype='bfloat16', label_smoothing_factor=0.1)
    engine = build_step(attach(load_base('embedded', 'full'), config, 'bfloat16'), config, None, 'cuda', 'bfloat16')       # as on a GPU; nothing is computed here
    assert isinstance(engine, PaddedStep) and (engine.features.packed.reason, engine.features.chunked_loss.on, engine.label_smoothing) == ('all weights learn', True, 0.1)
    assert type(engine) is FullStep and type(build_step(engine.model, config, None, 'cpu', 'bfloat16')) is PaddedStep

def full_gradient(model, cache, chunked, **how):
    "Loss and gradient of all weights over two passes, in float32."
    model.zero_grad()
    step = full_step(model, **how, chunked_loss=chunked)
    total, n = step.accumulate(cache, [[0, 1], [2, 3, 4]])
    if chunked: step.hook.remove()
    return total.item(), n, torch.cat([p.grad.float().flatten() for p in model.parameters()])

@pytest.mark.parametrize('tied, how', [(True, {}), (False, dict(label_smoothing=0.1)), (True, dict(checkpointing=True))], ids=str)
def test_parity_of_the_loss_in_chunks_where_all_weights_learn(whole, tied, how, monkeypatch):
    monkeypatch.setattr('homelab_ft.train.engine.ops.chunked_loss.INPLACE_LOGITS', 1)      # the smallest chunks there are
    cache, model = load_cache(whole.data_path / 'train.safetensors'), attach(load_base('embedded', 'full'), make_config(method='full'))
    if not tied: model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.1)
    (loss, n, wanted), (chunked, m, found) = (full_gradient(model, cache, chunked, **how) for chunked in (False, True))
    assert n == m > 128 or n == m and chunk_size(len(model.lm_head.weight), 1) == 128
    assert abs(loss - chunked) < 1e-5 * loss and (found - wanted).norm() <= 1e-5 * wanted.norm() and len(found) == PARAMETERS + (not tied) * model.lm_head.weight.numel()

def test_parity_of_the_loss_in_chunks_in_bfloat16(whole):
    "At most 1.1 times as far from the float32 gradient as full logits are."
    cache = load_cache(whole.data_path / 'train.safetensors')
    exact = full_gradient(attach(load_base('embedded', 'full'), make_config(method='full')), cache, False)[2]
    half = attach(load_base('embedded', 'full'), make_config(method='full', dtype='bfloat16'), 'bfloat16')
    plain, chunked = (full_gradient(half, cache, chunked)[2] for chunked in (False, True))
    assert 0 < (chunked - exact).norm() <= 1.1 * (plain - exact).norm() and {p.grad.dtype for p in half.parameters()} == {torch.float32}

def test_an_odd_head_keeps_full_logits():
    model = attach(load_base('embedded', 'full'), make_config(method='full'))
    model.config.logit_scale = 2.
    step = full_step(model)
    assert type(step) is PaddedStep and not step.features.chunked_loss.on

@pytest.mark.slow
def test_full_fine_tuning_has_no_full_logits_on_a_gpu():
    "Traced without one: three quarters of what the logits of all positions took are gone."
    config = make_config(model='SmolLM2-135M', method='full', max_length=2048, per_device_train_batch_size=1)
    found = trace(config)
    logits = 10 * 2048 * 49152
    assert found.features['chunked_loss']['on'] and found.phases['loss']['loss'] < logits and not trace(config, arch='cpu').features['chunked_loss']['on']

def test_recomputed_layers_give_the_same_gradient(whole):
    cache, found = load_cache(whole.data_path / 'train.safetensors'), []
    for checkpointing in (False, True):
        model = attach(load_base('embedded', 'full'), make_config(method='full'))
        step = build_step(model, make_config(method='full', gradient_checkpointing=checkpointing), cache, 'cpu', 'float32')
        step.accumulate(cache, [[0, 1], [2, 3]])
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert step.features.policies == {'layer': 6} and (found[0] - found[1]).norm() < 1e-5 * found[0].norm()

def test_noise_is_for_training_only():
    model = attach(load_base('embedded', 'full'), make_config(method='full', neftune_noise_alpha=5))
    ids = torch.arange(12)[None] + 300
    with torch.no_grad(): assert not torch.equal(model(ids).logits, model(ids).logits) and torch.equal(model.eval()(ids).logits, load_base('embedded', 'full')(ids).logits)

def test_the_plan_counts_every_weight(tmp_path):
    config = quickstart_config(tmp_path, **SMALL)
    full, lora = (plan_run(config.model_copy(update={'method': m}))[0] for m in ('full', 'lora'))
    assert (full.optimizer, full.adapter) == (8 * PARAMETERS, 0) and lora.optimizer < PARAMETERS        # both of AdamW's averages, of every weight
    assert full.weights == 4 * PARAMETERS and full.peak > lora.peak + 8 * PARAMETERS

@pytest.mark.parametrize('settings, word', [
    (dict(lora_r=8), 'lora_r is a setting of adapters'), (dict(lora_alpha=8), 'lora_alpha is'), (dict(lora_dropout=0.1), 'lora_dropout is'),
    (dict(target_modules='q_proj'), 'target_modules is'), (dict(loraplus_lr_ratio=4), 'loraplus_lr_ratio is'),
    (dict(packing=True), 'packing needs a frozen base'), (dict(padding_free=True), 'padding_free needs'), (dict(use_dora=True), 'use_dora needs an adapter'),
], ids=str)
def test_what_does_not_go_together_is_refused_before_any_work(tmp_path, settings, word):
    with pytest.raises(ConfigError, match=word):
        config = quickstart_config(tmp_path, **SMALL | settings, runs_dir=str(tmp_path / 'runs'))
        new_run(config, log=lambda line: None)
    assert not (tmp_path / 'runs').exists()

# ---------------------------------------------------------------- what this machine cannot do, said before the data is read

def test_a_missing_package_is_said_before_the_data_is_read(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name == 'bitsandbytes' else found(name, *a))
    config = quickstart_config(tmp_path, runs_dir=str(tmp_path / 'runs'), method='qlora')
    with pytest.raises(ConfigError, match='needs the package bitsandbytes'): new_run(config)
    assert not (tmp_path / 'runs').exists()
    check_inputs(config.model_copy(update={'method': 'lora'}))

@pytest.mark.parametrize('settings', [dict(cuda_graph=True), dict(torch_compile=True), dict(optim='paged_adamw_8bit')], ids=str)
def test_settings_for_a_card_are_refused_before_the_data_is_read(tmp_path, settings):
    config = quickstart_config(tmp_path, runs_dir=str(tmp_path / 'runs'), device='cpu', **settings)
    with pytest.raises(HardwareError, match='needs a GPU'): new_run(config)
    assert not (tmp_path / 'runs').exists()
