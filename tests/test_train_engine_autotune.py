"The packed step against the padded one: gradients, autotuning on a pretended GPU, whole runs, and what is refused."
import contextlib, json, sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from homelab_ft.core import ConfigError, HardwareError
from homelab_ft.config import make_config
from homelab_ft.data.tokenize import make_cache, save_cache
from homelab_ft.io import read_jsonl
from homelab_ft.train.engine import autotune as autotuning, memory_budget, packed, parity
from homelab_ft.train.engine.features import OUT_OF_MEMORY, Feature
from homelab_ft.train import trainer as training
from homelab_ft.train.engine.padded import PaddedStep
from homelab_ft.train.engine.autotune import GpuTuner, autotune, build_step, free_bytes, run_options
from homelab_ft.train.engine.memory_budget import StepOptions
from homelab_ft.train.lora import attach_lora
from homelab_ft.train.engine.ops import checkpointing
from homelab_ft.train.engine.ops.chunked_loss import chunk_size
from homelab_ft.train.base_model import load_base
from homelab_ft.train.engine.packed import PackedStep
from homelab_ft.train.run_folder import create_run, status

SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
MODELS = {'llama': lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), 'qwen3': lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
          'mistral, window of 8': lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
          'gemma3, windows of 8': lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=8, sliding_window_pattern=2))}


pytestmark = pytest.mark.usefixtures('one_thread')


def adapted(base, **settings):
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules='all-linear', task_type='CAUSAL_LM', **settings)).train()
    for name, p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=0.05)
    return model


def sequences(n=14, vocab=320, seed=0):
    draw = np.random.default_rng(seed)
    made = [(draw.integers(0, vocab, k).tolist(), [0] + draw.integers(0, 2, k - 2).tolist() + [1]) for k in draw.integers(3, 40, n)]
    return make_cache(made, range(n))


def llama_step(**options):
    torch.manual_seed(0)
    return autotune(adapted(MODELS['llama']()), StepOptions(**dict(max_seq_len=40, max_tokens_per_microbatch=90, bucket_size=16) | options))


def gradient(step, cache, micro): return parity.gradient(step.model, lambda: step.accumulate(cache, micro)[0])


def apart(a, b): return float((a[1] - b[1]).norm() / b[1].norm())


@pytest.mark.parametrize('smoothing', [0., 0.1])
@pytest.mark.parametrize('kind', MODELS)
def test_parity_of_a_step_with_the_plain_one(kind, smoothing):
    torch.manual_seed(0)
    model, cache, micro = adapted(MODELS[kind]()), sequences(), [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13]]
    plain = gradient(PaddedStep(model, 'plain', label_smoothing=smoothing), cache, micro)
    step = autotune(model, StepOptions(max_seq_len=40, max_tokens_per_microbatch=90, bucket_size=16, label_smoothing=smoothing))
    assert isinstance(step, PackedStep), step.features
    assert apart(gradient(step, cache, micro), plain) < 1e-5 and step.features.fused_lora.on
    for policies in (['layer'] * 3, ['mlp'] * 3, ['none', 'mlp', 'offload']):
        step.apply_policies(policies)
        assert apart(gradient(step, cache, micro), plain) < 1e-5
    step.restore()
    assert apart(gradient(PaddedStep(model, 'plain', label_smoothing=smoothing), cache, micro), plain) == 0


@pytest.mark.parametrize('settings', [dict(use_rslora=True), dict(use_dora=True), dict(lora_bias=True)], ids=str)
def test_parity_with_every_kind_of_adapter(settings):
    torch.manual_seed(0)
    model, cache, micro = adapted(MODELS['llama'](), **settings), sequences(), [list(range(14))]
    plain = gradient(PaddedStep(model, 'plain'), cache, micro)
    step = autotune(model, StepOptions(max_seq_len=40, max_tokens_per_microbatch=90, bucket_size=16))
    assert apart(gradient(step, cache, micro), plain) < 1e-5
    assert (step.features.fused_lora.on) == ('use_rslora' in settings)


def test_parity_in_bfloat16_is_no_further_from_float32_than_the_plain_step():
    torch.manual_seed(0)
    base, cache, micro = MODELS['llama'](), sequences(40), [list(range(40))]
    wide = adapted(base)
    state = {k: v.clone() for k, v in wide.state_dict().items()}
    exact = gradient(PaddedStep(wide, 'float32'), cache, micro)
    half = adapted(MODELS['llama']().to(torch.bfloat16))
    half.load_state_dict(state)
    for p in half.parameters():
        if p.requires_grad: p.data = p.data.float()
    plain = gradient(PaddedStep(half, 'plain'), cache, micro)
    step = autotune(half, StepOptions(max_seq_len=40, max_tokens_per_microbatch=400, bucket_size=16))
    assert step.features.fused_lora.on and apart(gradient(step, cache, micro), exact) <= 1.1 * apart(plain, exact)


def four_bits(folder, dtype, device='cpu'):
    "A model in 4 bits with an adapter that is not zero; the same numbers for any dtype."
    torch.manual_seed(1)
    model = attach_lora(load_base(str(folder), 'qlora', dtype, device), make_config(method='qlora'))
    for name, p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=0.05)
    return model


def test_parity_of_cached_merged_weights(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path)
    cache, micro = sequences(40), [list(range(40))]
    exact, model = gradient(PaddedStep(four_bits(tmp_path, 'float32'), 'exact'), cache, micro), four_bits(tmp_path, 'bfloat16')
    plain = gradient(PaddedStep(model, 'plain'), cache, micro)
    step = autotune(model, StepOptions(max_seq_len=40, max_tokens_per_microbatch=400, bucket_size=16))
    for room, layers in ((0, 0), (2**17, 1), (2**30, 3)):         # a layer takes 36,864 values of 2 bytes
        assert step.adapter_casts.cache_merged_weights(step.layers, room) == layers
        assert apart(gradient(step, cache, micro), exact) <= 1.1 * apart(plain, exact)
    before = gradient(step, cache, micro)
    with torch.no_grad():
        for p in step.parameters: p.mul_(1.5)
    changed = gradient(step, cache, micro)                      # a step updates the cache
    step.adapter_casts.cache_merged_weights(step.layers, 0)
    assert apart(changed, before) > 0.1 and apart(changed, gradient(step, cache, micro)) < 0.03
    step.restore()
    assert not any(hasattr(m, '_merged') for m in model.modules())


def test_a_loss_that_is_added_up_over_steps_starts_anew():
    torch.manual_seed(0)
    model, cache = adapted(MODELS['llama']()), sequences()
    step = autotune(model, StepOptions(max_seq_len=40, max_tokens_per_microbatch=90, bucket_size=16))
    first = step.accumulate(cache, [[0, 1]])
    again = step.accumulate(cache, [[0, 1]])
    assert float(first[0]) == float(again[0]) and first[1] == again[1] == sum(int(cache.row(i)[1][1:].sum()) for i in (0, 1))


def test_out_of_memory_with_everything_recomputed_is_raised(monkeypatch):
    torch.manual_seed(0)
    model, cache = adapted(MODELS['llama']()), sequences()
    step = autotune(model, StepOptions(max_seq_len=40, max_tokens_per_microbatch=90, bucket_size=16, checkpointing=True))
    def full(*_): raise torch.OutOfMemoryError('full')
    monkeypatch.setattr(step, 'run_microbatch', full)
    with pytest.raises(torch.OutOfMemoryError): step.accumulate(cache, [[0, 1]])


@pytest.mark.parametrize('gib, said', [((3, 2, 3, 0, 1), '90 tokens, 1.00 GiB at least'), ((0,) * 5, '90 tokens')], ids=['too large', 'full'])
def test_a_micro_batch_that_fits_in_no_way_is_refused_with_advice(monkeypatch, gib, said):
    step, tries = llama_step(), iter(gib)
    monkeypatch.setattr(memory_budget, 'memory_limit', lambda *_: 2**20)
    monkeypatch.setattr(memory_budget, 'peak_bytes', lambda once: next(tries) * 2**30)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda: 0)
    with pytest.raises(HardwareError, match='cannot hold one micro-batch') as e: GpuTuner(step).fit_policies()
    assert 'per_device_train_batch_size' in str(e.value) and e.value.value == said
    assert next(tries, None) is None and step.features.policies == {'offload': 3}       # two policies, the same without the table, then the last


def test_compilation_that_fails_or_lies_is_left_out(monkeypatch):
    step = llama_step()
    tuner, fits = GpuTuner(step), []
    monkeypatch.setattr(torch, 'compile', lambda function: function)
    monkeypatch.setattr(memory_budget, 'memory_limit', lambda *_: 2**40)
    monkeypatch.setattr(tuner, 'fit_policies', lambda: (fits.append(step.compiled_forward), step.apply_policies(['none'] * 3), tuner.run()))
    monkeypatch.setattr(checkpointing, 'compile_forward', lambda layers: lambda layer, h, *a, **k: type(layer).forward(layer, h * 0.5, *a, **k))
    tuner.compile()
    assert 'away from the plain one' in step.features.compile.reason and step.compiled_forward is None and len(fits) == 2
    def unsupported(*_, **__): raise torch._dynamo.exc.Unsupported('no such thing\nmore')
    monkeypatch.setattr(checkpointing, 'compile_forward', lambda layers: unsupported)
    tuner.compile()
    assert step.features.compile == Feature(False, 'no such thing') and step.compiled_forward is None


def pretend_gpu(monkeypatch, peak=2**20):
    "As if the step ran on a GPU with 8 GiB free."
    for name in ('synchronize', 'empty_cache', 'reset_peak_memory_stats'): monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ('memory_allocated', 'memory_reserved'): monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda: peak)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (2**33, 2**33))
    monkeypatch.setattr(torch.cuda, 'get_per_process_memory_fraction', lambda: 1., raising=False)
    monkeypatch.setattr(torch, 'compile', lambda function: function)
    monkeypatch.setattr(checkpointing, 'compile_forward', lambda layers: type(layers[0]).forward)


class Graph:
    "A CUDA graph that runs the micro-batch."
    def __init__(self, loss, batch, stream, after, warm_ups): self.loss, self.after = loss, after
    def __call__(self, batch):
        loss = self.loss(batch)
        loss.backward()
        if self.after: self.after()
        return loss.detach()


@pytest.mark.parametrize('options', [{}, dict(compile=False, graph=False, checkpointing=True), dict(graph=True, lora_dropout=0.1)], ids=str)
def test_tuning_on_a_pretended_gpu(monkeypatch, options):
    "All parts in their order: what is switched on, and that the gradient stays."
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(packed, 'CaptureStream', lambda: SimpleNamespace(broken=False, active=contextlib.nullcontext))
    monkeypatch.setattr(packed, 'StepGraph', Graph)
    torch.manual_seed(0)
    model = adapted(MODELS['llama'](), lora_dropout=options.pop('lora_dropout', 0.))
    step = autotune(model, StepOptions(max_seq_len=40, max_tokens_per_microbatch=90, bucket_size=16, **options))
    plain = None if step.model.peft_config['default'].lora_dropout else gradient(step, sequences(), [[0, 1]])
    GpuTuner(step).tune()
    features = step.features
    if not options: assert features.compile.on and features.cuda_graph.on and features.policies == {'none': 3} and step.graphs
    elif plain is None: assert 'dropout' in features.compile.reason and 'dropout' in features.cuda_graph.reason
    else: assert features.compile == features.cuda_graph == Feature(False, 'switched off') and features.policies == {'layer': 3}
    assert features.peak_bytes == 2**20
    if plain: assert apart(gradient(step, sequences(), [[0, 1]]), plain) < 1e-5


def test_a_cuda_graph_that_lies_or_cannot_be_captured_is_given_up(monkeypatch):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(packed, 'CaptureStream', lambda: SimpleNamespace(broken=False, active=contextlib.nullcontext))
    class Lying(Graph):
        def __init__(self, loss, *rest): super().__init__(lambda batch: 2 * loss(batch), *rest)
    def failing(*_): raise RuntimeError('operation not permitted\nmore')
    def full(*_): raise torch.OutOfMemoryError('full')
    for graph, reason in ((Lying, 'away from the plain one'), (failing, 'operation not permitted'), (full, OUT_OF_MEMORY)):
        monkeypatch.setattr(packed, 'StepGraph', graph)
        step = llama_step()
        GpuTuner(step).capture()
        assert reason in step.features.cuda_graph.reason and not step.graphs and step.capture_stream is None
        assert all(p.grad is None for p in step.parameters)


@pytest.mark.parametrize('vocab', [1000, 15_000])
def test_the_loss_takes_fewer_positions_where_memory_is_short(monkeypatch, vocab):
    step, chunks = llama_step(), []
    step.head = torch.nn.Linear(8, vocab, bias=False)
    gradients = sum(p.numel() * 4 for p in step.parameters)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda: 0)
    for gib in (-1, 0.01, 0.6, 4, 20):
        monkeypatch.setattr(memory_budget, 'memory_limit', lambda *_: int(gib * 2**30) + gradients)
        step.fit_loss_chunk(free_bytes(step))
        chunks.append(step.loss_chunk)
        assert step.loss_chunk == 128 or step.loss_chunk * vocab * 16 <= gib * 2**30 / 4
    assert chunks == sorted(chunks) and chunks[0] == 128 < chunks[2] < chunks[-1] == chunk_size(vocab)


def test_the_embedding_is_offloaded_before_the_inputs_of_layers(monkeypatch):
    torch.manual_seed(0)
    model, cache = adapted(MODELS['llama']()), sequences()
    step = autotune(model, StepOptions(max_seq_len=40, max_tokens_per_microbatch=90, bucket_size=16))
    weight, plain = step.model.get_input_embeddings().weight, gradient(step, cache, [[0, 1]])
    table, taken = weight.detach().clone(), []
    def peak(once):
        once()
        taken.append((dict(step.features.policies), weight.untyped_storage().nbytes()))
        return 2**20 - (step.offloaded_embedding is not None)
    monkeypatch.setattr(memory_budget, 'memory_limit', lambda *_: 2**20 - 1)
    monkeypatch.setattr(memory_budget, 'peak_bytes', peak)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda: 0)
    GpuTuner(step).fit_policies()
    assert step.features.embedding_offload.on and step.features.peak_bytes == 2**20 - 1
    assert [t[0] for t in taken] == [{'none': 3}, {'layer': 3}, {'none': 3}] and taken[1][1] == table.nbytes and taken[2][1] == 4
    assert apart(gradient(step, cache, [[0, 1]]), plain) < 1e-6
    step.restore()
    assert torch.equal(weight, table)


def half_step():
    "A bfloat16 model, whose fused adapters are cast."
    torch.manual_seed(0)
    model = adapted(MODELS['llama']().to(torch.bfloat16))
    for p in model.parameters():
        if p.requires_grad: p.data = p.data.float()
    return autotune(model, StepOptions(max_seq_len=40, max_tokens_per_microbatch=90, bucket_size=16))


def test_a_micro_batch_that_breaks_off_leaves_no_gradient_anywhere(monkeypatch):
    step, cache = half_step(), sequences()
    step.accumulate(cache, [[0, 1]])
    assert all(p.grad is not None for p in step.parameters)
    def full():
        assert any(t.grad is not None for t in step.adapter_casts.casts)
        raise torch.OutOfMemoryError('full')
    monkeypatch.setattr(step.adapter_casts, 'unscale_into_master_grads', full)
    with pytest.raises(torch.OutOfMemoryError): step.backward(*next(step.microbatches(cache, [0, 1])))
    assert all(x.grad is None for x in step.parameters + step.adapter_casts.casts)


def test_a_step_is_taken_again_when_the_error_holds_on_to_nothing(monkeypatch):
    step, cache, seen = llama_step(), sequences(), []
    whole, downgrade_after_oom = step.run_microbatch, step.downgrade_after_oom
    def full(*_): raise torch.OutOfMemoryError('full')
    def note():
        seen.append(sys.exc_info()[0])
        step.run_microbatch = whole
        return downgrade_after_oom()
    step.run_microbatch, step.downgrade_after_oom = full, note
    plain = parity.gradient(step.model, lambda: PaddedStep.accumulate(PaddedStep(step.model, 'plain'), cache, [[0, 1]])[0])
    assert apart(gradient(step, cache, [[0, 1]]), plain) < 1e-5
    assert seen == [None]


def test_out_of_memory_costs_cuda_graphs_first_and_checkpointing_only_then(monkeypatch):
    step, cache, seen = llama_step(), sequences(), []
    plain = gradient(step, cache, [[0, 1]])
    step.capture_stream, step.graphs = 'a stream', {'a shape': 'a graph'}
    whole = step.run_microbatch
    def full_twice(*given):
        seen.append((step.capture_stream, dict(step.features.policies)))
        if len(seen) < 3: raise torch.OutOfMemoryError('full')
        return whole(*given)
    monkeypatch.setattr(step, 'run_microbatch', full_twice)
    monkeypatch.setattr(step, 'on_capture_stream', contextlib.nullcontext)
    total, _ = step.accumulate(cache, [[0, 1]])
    assert seen[:3] == [('a stream', {'none': 3}), (None, {'none': 3}), (None, {'layer': 3})] and not step.graphs
    assert float(total) == pytest.approx(plain[0], abs=1e-6)
    seen.clear()
    with pytest.raises(torch.OutOfMemoryError, match='full'): step.accumulate(cache, [[0, 1]])


def test_a_cuda_graph_that_leaves_too_little_memory_is_given_up(monkeypatch):
    step = llama_step(reserved_bytes=500)
    trained = sum(p.numel() * p.element_size() for p in step.parameters)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda: 10_000)
    monkeypatch.setattr(memory_budget, 'memory_limit', lambda margin, reserved: 10_000 + trained + 500 + more - reserved)
    for more in (-1, 0): assert GpuTuner(step).is_crowded() == (more < 0)


@pytest.mark.parametrize('limit, tried', [(2**40, ['layer', 'offload']), (1000, ['offload'])], ids=['out of memory', 'the inputs alone are too much'])
def test_a_micro_batch_too_long_for_the_comparison_is_replaced_by_a_short_one(monkeypatch, limit, tried):
    step, policies, lengths = llama_step(max_seq_len=4000, max_tokens_per_microbatch=4000), [], []
    tuner = GpuTuner(step)
    monkeypatch.setattr(memory_budget, 'memory_limit', lambda *_: limit)
    whole, backward = step.apply_policies, step.backward
    monkeypatch.setattr(step, 'apply_policies', lambda chosen, chunk=0: (policies.append(chosen[0]), whole(chosen, chunk)))
    monkeypatch.setattr(step, 'backward', lambda batch, even: (lengths.append(batch['input_ids'].shape[1]), backward(batch, even))[1])
    def full(): raise torch.OutOfMemoryError('full')
    tuner.run = full
    check, (total, found) = tuner.reference()
    assert policies == tried and lengths == [2560] and np.isfinite(total) and found.norm() > 0
    assert apart(parity.gradient(step.model, check), (total, found)) == 0 and lengths == [2560] * 2
    monkeypatch.setattr(memory_budget, 'memory_limit', lambda *_: 2**40)
    tuner.run = lambda: step.accumulate(sequences(), [[0, 1]])[0]
    assert tuner.reference()[0] is tuner.run


def test_cpu_ram_for_attention_is_what_the_inputs_leave(monkeypatch):
    monkeypatch.setattr(autotuning, 'cpu_ram', lambda: (64 * 2**30, 40 * 2**30))
    cache, config = sequences(), make_config(per_device_train_batch_size=2)
    budget = 2 * int(cache.lengths.max())
    assert run_options(config, cache, 0).host_bytes == 20 * 2**30
    assert run_options(config, cache, 0, 2**20).host_bytes == 20 * 2**30 - budget * 2**19
    assert run_options(config, cache, 0, 2**30).host_bytes == 0
    step = build_step(adapted(MODELS['llama']()), make_config(padding_free=True, per_device_train_batch_size=2), cache, 'cpu', 'float32')
    assert step.options.host_bytes == (40 * 2**30 - budget * 3 * 64 * 4) // 2


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('model')
    MODELS['llama']().save_pretrained(path)
    return str(path)


def run_with(tmp_path, folder, name, **settings):
    config = make_config(**dict(model=folder, run_name=name, device='cpu', lora_r=4, learning_rate=1e-2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                                max_length=64, max_steps=12, eval_steps=6, save_steps=5) | settings)
    run = create_run(config, tmp_path)
    run.data_path.mkdir()
    save_cache(sequences(60), run.data_path / 'train.safetensors')
    save_cache(sequences(10, seed=1), run.data_path / 'validation.safetensors')
    training.train(run)
    return [r['loss'] for r in read_jsonl(run.metrics_path)], json.loads(run.manifest_path.read_text())['engine'], run


def test_parity_of_whole_runs_packed_and_padded(tmp_path, folder):
    plain, features, _ = run_with(tmp_path, folder, 'plain')
    assert features['packed'] == dict(on=False, reason='float32 on cpu')
    quick, features, _ = run_with(tmp_path, folder, 'fast', padding_free=True)
    assert [features[k]['on'] for k in ('packed', 'fused_lora', 'compile')] == [True, True, False] and features['compile']['reason'] == 'no GPU'
    assert np.abs(np.array(plain) - quick).max() < 1e-4 and len(plain) == 14
    again, features, _ = run_with(tmp_path, folder, 'recomputed', padding_free=True, gradient_checkpointing=True)
    assert features['policies'] == {'layer': 3} and np.abs(np.array(plain) - again).max() < 1e-4


def test_packed_runs_count_packed_sequences(tmp_path, folder):
    losses, features, run = run_with(tmp_path, folder, 'packed', packing=True, max_steps=0, num_train_epochs=2)
    n = -(-status(run).total_steps // 2)
    assert features['packed']['on'] and status(run).state == 'finished' and n * 8 * 64 >= sequences(60).lengths.sum() > (n - 1) * 8 * 64 * 0.8
    assert np.isfinite(losses).all()


def test_packing_is_refused_where_sequences_would_see_their_neighbours(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**SIZES)).save_pretrained(tmp_path / 'gemma2')
    with pytest.raises(ConfigError, match='cannot train on packed sequences'): run_with(tmp_path, str(tmp_path / 'gemma2'), 'no', packing=True)
    losses, features, _ = run_with(tmp_path, str(tmp_path / 'gemma2'), 'yes')
    assert np.isfinite(losses).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('method', ['lora', 'qlora'])
def test_parity_on_a_gpu_with_everything_on(method, tmp_path):
    torch.manual_seed(0)
    big = SIZES | dict(hidden_size=512, intermediate_size=1024, head_dim=64, num_attention_heads=8)
    LlamaForCausalLM(LlamaConfig(**big)).to(torch.bfloat16).save_pretrained(tmp_path)
    def loaded(dtype):
        torch.manual_seed(1)
        model = attach_lora(load_base(str(tmp_path), method, dtype, 'cuda'), make_config(method=method))
        for name, p in model.named_parameters():
            if 'lora_B' in name: torch.nn.init.normal_(p, std=0.02)
        return model
    cache, micro = sequences(40), [list(range(20)), list(range(20, 40))]
    exact, model = gradient(PaddedStep(loaded('float32'), 'exact'), cache, micro), loaded('bfloat16')
    plain = gradient(PaddedStep(model, 'plain'), cache, micro)
    step = autotune(model, StepOptions(max_seq_len=40, max_tokens_per_microbatch=256, bucket_size=64))
    assert all(getattr(step.features, k).on for k in ('packed', 'fused_lora', 'chunked_loss', 'compile', 'cuda_graph'))
    step.zero_grad()
    total, _ = step.accumulate(cache, micro)
    found = float(total), torch.cat([p.grad.reshape(-1) for p in step.parameters]).cpu()
    assert apart(found, plain) < 0.06 and apart(found, exact) <= 1.1 * apart(plain, exact)
    assert (step.features.merged_layers == len(step.layers)) == (method == 'qlora')      # so small a model fits


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('settings', [dict(), dict(cuda_graph=False)], ids=str)
def test_the_cpu_does_not_wait_for_the_gpu_within_a_step(tmp_path, settings):
    torch.manual_seed(0)
    model, cache = adapted(MODELS['llama']().to('cuda', torch.bfloat16)), sequences(40)
    for p in model.parameters():
        if p.requires_grad: p.data = p.data.float()
    config = make_config(run_name='r', per_device_train_batch_size=2, max_length=64, packing=True, torch_compile=False, **settings)
    engine = build_step(model, config, cache, 'cuda', 'bfloat16')
    job = training.TrainerContext(create_run(config, tmp_path), config, model, engine, training.make_optimizer(model, config), cache, None, training.TrainState(total_steps=20, peak_lr=1e-3), None)
    for _ in range(4): training.train_step(job)          # AdamW's states come into being
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3): training.train_step(job)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert len(job.pending) == 1 and engine.features.cuda_graph == (Feature(False, 'switched off') if settings else Feature(True))
    training.read_losses(job, 0)
    losses = [r['loss'] for r in read_jsonl(job.run.metrics_path)]
    assert len(losses) == 7 and all(0 < x < 10 for x in losses)
