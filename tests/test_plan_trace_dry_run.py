"Dry runs: against real tensors on the CPU, a few layers against all of them, and what their options change."
import json, os, subprocess
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '99')
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from homelab_ft.core import embedded_model
from homelab_ft.config import make_config
from homelab_ft.plan.trace.dry_run import DryRunSpec, dry_run, make_context, serve
from homelab_ft.plan.trace.fake_model import model_config
from homelab_ft.plan.trace.layer_extrapolation import extrapolate_peaks, probe_configs
from homelab_ft.plan.trace.ledger import CATEGORIES, Ledger, peak_breakdown
from homelab_ft.plan.trace.memory_tracer import MemoryTracer
from homelab_ft.plan.trace.trace import COMMAND
from homelab_ft.train.base_model import load_base, weight_bytes
from homelab_ft.train.lora import attach
from homelab_ft.train.schedule import make_optimizer

CONFIGS = Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'configs'
TINY = dict(model_type='llama', hidden_size=64, num_hidden_layers=5, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=700, max_position_embeddings=512, tie_word_embeddings=True)
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def smol():
    "The configuration of SmolLM2-135M."
    path = CONFIGS / 'HuggingFaceTB--SmolLM2-135M.json'
    if not path.exists(): pytest.skip('the folder of model configurations is not here')
    return json.loads(path.read_text())


def total(peaks): return {key: sum(parts.values()) for key, parts in peaks.items()}


# ---------------------------------------------------------------- against real tensors


def real_bytes(config, spec):
    "What the second of two micro-batches takes on top of what is there, by PyTorch's profiler."
    dtype = torch.float32 if config.method == 'full' else torch.bfloat16
    plain = AutoModelForCausalLM.from_config(model_config(spec.hf_config, len(spec.policies)), dtype=dtype).requires_grad_(False)
    context = make_context(MemoryTracer('cpu'), attach(plain, config, 'bfloat16'), config, spec)
    for _ in range(2):
        context.model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            context.step.accumulate(context.train, [list(range(config.per_device_train_batch_size))])
    return max(accumulate(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]'))


def traced_bytes(config, spec):
    "The same from the ledger of the first step, without optimizer states."
    ledger = dry_run(config, spec)[0].ledger
    first, last = (next(s.event for s in ledger.phases if (s.step, s.name) == key) for key in ((1, 'forward'), (1, 'optimizer')))
    return max(accumulate(n for n, number in ledger.events[first:last] if ledger.categories.get(number) != 'optimizer'))


@pytest.mark.parametrize('policies, settings, given', [
    (['layer'] * 3, dict(), dict()),
    (['layer'] * 3, dict(method='full'), dict()),
    (['none', 'mlp', 'layer'], dict(padding_free=True, lora_r=64, target_modules=['q_proj', 'down_proj']), dict(bucket=(256, 128, 8))),
    (['offload'] * 3, dict(padding_free=True), dict(mlp_chunk=64)),
    (['none'] * 2, dict(use_dora=True), dict()),
    pytest.param(['none'] * 2, dict(method='full'), dict(), marks=pytest.mark.slow),
    pytest.param(['mlp'] * 3, dict(padding_free=True), dict(loss_chunk=128), marks=pytest.mark.slow),
    pytest.param(['layer'] * 3, dict(padding_free=True, label_smoothing_factor=0.1), dict(), marks=pytest.mark.slow),
    pytest.param(['layer'] * 3, dict(use_dora=True), dict(), marks=pytest.mark.slow),
], ids=['padded layer', 'full layer', 'packed mixed', 'packed offload', 'dora', 'full', 'packed mlp', 'packed layer', 'dora layer'])
def test_a_dry_run_takes_what_a_real_step_does(smol, monkeypatch, policies, settings, given):
    if 'offload' in policies: monkeypatch.setattr(MemoryTracer, 'in_ram', lambda self: nullcontext())   # on a CPU it is the same memory
    config = make_config(per_device_train_batch_size=2, max_length=128, **settings)
    spec = DryRunSpec(smol, policies, arch='cpu', gradients=False, **given)
    assert traced_bytes(config, spec) == pytest.approx(real_bytes(config, spec), rel=1e-3)


@pytest.mark.parametrize('method, kind, double', [('qlora', 'nf4', True), ('qlora', 'fp4', False), ('int8', 'nf4', True)])
def test_quantized_weights_are_as_large_as_real_ones(method, kind, double):
    hf_config = json.loads((embedded_model() / 'config.json').read_text())
    config = make_config(method=method, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, max_length=32, per_device_train_batch_size=1)
    tracer, _ = dry_run(config, DryRunSpec(hf_config, ['none'] * hf_config['num_hidden_layers'], arch='cpu'))
    loaded = load_base('embedded', method, 'bfloat16', 'cpu', kind, double)
    blocks = 512 * 8 * len(list(loaded.modules()))      # 512 bytes at most for each small tensor, and tables of 16 and 256 values
    assert 0 <= peak_breakdown(tracer.ledger)[1, 'forward']['weights'] - weight_bytes(loaded) < blocks


def state_bytes(optimizer):
    "Bytes of an optimizer's states, counters left out."
    return sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.dim())


@pytest.mark.parametrize('optim', ['adamw_torch', 'adamw_8bit'])
def test_states_are_those_of_the_real_optimizer(optim):
    config, spec = make_config(per_device_train_batch_size=1, max_length=32, optim=optim), DryRunSpec(TINY, ['none'] * 2, arch='cpu')
    tracer, context = dry_run(config, spec)
    model = attach(AutoModelForCausalLM.from_config(model_config(TINY, 2)).requires_grad_(False), config, 'float32')
    real = make_optimizer(model, config)
    for group in real.param_groups:
        for p in group['params']: p.grad = torch.ones_like(p)
    real.step()
    assert state_bytes(context.optimizer) == state_bytes(real)
    assert peak_breakdown(tracer.ledger)[2, 'optimizer']['optimizer'] >= state_bytes(real)


def test_paged_states_are_in_ram():
    wide = TINY | dict(hidden_size=512, intermediate_size=8192)     # 16 x 8192 values are paged, 16 x 512 are not
    config = make_config(per_device_train_batch_size=1, max_length=32)
    kept = [dry_run(config.model_copy(update=dict(optim=optim)), DryRunSpec(wide, ['none'] * 2, arch='cpu')) for optim in ('paged_adamw_32bit', 'adamw_torch')]
    paged, plain = (tracer for tracer, _ in kept)       # while its context exists, so do the states
    in_ram = sum(n for n, _ in paged.ram_ledger.events)
    assert in_ram == 2 * 4 * 2 * 3 * 16 * 8192          # two states, float32, two layers, three matrices with a side of 8192
    assert not plain.ram_ledger.events
    states = [peak_breakdown(tracer.ledger)[2, 'optimizer']['optimizer'] for tracer in (paged, plain)]
    assert states[1] - states[0] >= in_ram


# ---------------------------------------------------------------- a few layers for all


@pytest.mark.parametrize('counts, settings, given', [
    (dict(none=2, mlp=3), dict(), {}),
    (dict(mlp=3, layer=2), dict(method='qlora'), {}),
    (dict(offload=5), dict(), dict(mlp_chunk=128)),
    (dict(none=5), dict(padding_free=False), {}),
    (dict(layer=5), dict(method='full', optim='adamw_8bit'), {}),
    pytest.param(dict(none=5), dict(method='qlora', gradient_accumulation_steps=2), dict(loss_chunk=128), marks=pytest.mark.slow),
    pytest.param(dict(layer=5), dict(padding_free=False, method='qlora'), {}, marks=pytest.mark.slow),
    pytest.param(dict(none=5), dict(method='full'), {}, marks=pytest.mark.slow),
    pytest.param(dict(none=5), dict(method='int8'), {}, marks=pytest.mark.slow),
], ids=str)
def test_a_few_layers_give_the_peak_of_all_to_the_byte(counts, settings, given):
    config = make_config(per_device_train_batch_size=3, max_length=128, torch_compile=False, **settings)
    specs = [DryRunSpec(TINY, [policy for policy, n in c.items() for _ in range(n)], **given) for c in [*probe_configs(counts), counts]]
    kept = [dry_run(config, spec) for spec in specs]      # a context that nobody holds would be freed in its ledger
    *few, full = [tracer.ledger for tracer, _ in kept]
    extrapolated, exact = total(extrapolate_peaks(few, counts)), total(peak_breakdown(full))
    assert extrapolated.keys() == exact.keys()
    assert max(extrapolated.values()) == max(exact.values())
    for key, n in exact.items(): assert abs(extrapolated[key] - n) <= 8192, key


def test_a_few_compiled_layers_miss_it_by_some_kilobytes(smol):
    config, counts = make_config(per_device_train_batch_size=2, max_length=512), dict(none=6)
    kept = [dry_run(config, DryRunSpec(smol, ['none'] * c['none'])) for c in [*probe_configs(counts), counts]]
    *few, full = [tracer.ledger for tracer, _ in kept]
    extrapolated, exact = total(extrapolate_peaks(few, counts)), total(peak_breakdown(full))
    assert max(extrapolated.values()) == pytest.approx(max(exact.values()), abs=64 * 1024)


# ---------------------------------------------------------------- options


def peaks_of(**given):
    "Categories at the peaks of the tiny model, with a large vocabulary."
    config = make_config(per_device_train_batch_size=2, max_length=256, torch_compile=False)
    return peak_breakdown(dry_run(config, DryRunSpec(TINY | dict(vocab_size=50_000), ['none'] * 2, **given))[0].ledger)


def test_options_change_what_they_name():
    usual, no_gradients = peaks_of()[1, 'loss'], peaks_of(gradients=False)[1, 'loss']
    assert usual['gradients'] - no_gradients['gradients'] == 4 * 2 * 16 * (2 * 128 + 2 * 96 + 3 * 224)
    assert all(usual[c] == no_gradients[c] for c in CATEGORIES if c != 'gradients')
    assert peaks_of(loss_chunk=128)[1, 'loss']['loss'] < usual['loss'] / 2
    workspaces = [peaks_of(arch=arch)[0, 'load']['workspaces'] for arch in ('hopper', 'ampere', 'cpu')]
    assert workspaces[0] > workspaces[1] > workspaces[2]


def test_activations_and_the_embedding_can_be_in_ram():
    untied = TINY | dict(tie_word_embeddings=False)
    config = make_config(per_device_train_batch_size=2, max_length=256, torch_compile=False)
    offloaded, context = dry_run(config, DryRunSpec(untied, ['offload'] * 5, mlp_chunk=128, embedding_offloaded=True))
    usual, _ = dry_run(config, DryRunSpec(untied, ['layer'] * 5))
    assert max(accumulate(n for n, _ in offloaded.ram_ledger.events)) == 2 * 700 * 64 + 5 * 2 * 512 * 64
    weights = [peak_breakdown(tracer.ledger)[1, 'forward']['weights'] for tracer in (usual, offloaded)]
    assert weights[0] - weights[1] == 2 * 700 * 64 - 512      # a zero stays
    assert context.step.features.embedding_offload.on


# ---------------------------------------------------------------- the process


def test_errors_of_the_process_arrive_as_they_were():
    spec = dict(hf_config=TINY, policies=['none'] * 5)
    served = serve(dict(config=dict(method='full', packing=True), specs=[spec, spec]))
    assert served['error']['kind'] == 'ConfigError' and 'cannot be packed' in served['error']['what']
    assert serve(dict(config=dict(lora_r=0), specs=[spec]))['error']['kind'] == 'ConfigError'


def test_dry_runs_side_by_side_give_what_they_give_one_by_one():
    specs = [dict(hf_config=TINY, policies=['none'] * n) for n in (1, 2, 3)]
    request = dict(config=dict(max_length=64, per_device_train_batch_size=2), specs=specs)
    done = subprocess.run([*COMMAND[:1], *COMMAND[2:]], input=json.dumps(request), capture_output=True, text=True)      # without -P: this checkout
    apart, together = json.loads(done.stdout.splitlines()[-1])['results'], json.loads(json.dumps(serve(request)))['results']
    for a, b in zip(apart, together, strict=True):
        assert a['features'] == b['features']
        peaks = [total(peak_breakdown(Ledger.from_json(r['ledger']))) for r in (a, b)]
        assert peaks[0] == pytest.approx(peaks[1], abs=1024)     # a number may live a little longer
