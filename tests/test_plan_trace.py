"Memory without a card: the rehearsed step against real tensors on the processor, a few layers against all of them, and what is refused."
import json, os, subprocess, sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault('KINETO_LOG_LEVEL', '99')
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from homelab_ft.core import ConfigError, ModelError, RunError, embedded_model
from homelab_ft.config import make_config
from homelab_ft.plan.trace import trace as traces
from homelab_ft.plan.memory.caching_allocator import replay
from homelab_ft.plan.trace.ledger import PARTS, Ledger, peaks
from homelab_ft.plan.trace.trace import all_peaks, probe_configs, trace
from homelab_ft.train import trainer
from homelab_ft.plan.trace.fake_model import fill, meta_model, model_config
from homelab_ft.train.lora import attach
from homelab_ft.train.base_model import load_base, weight_bytes
from homelab_ft.plan.trace.dry_run import DryRunSpec, answer, make_job, rehearse
from homelab_ft.plan.trace.memory_tracer import MemoryTracer

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


def most(events):
    "The most bytes that exist at once."
    now = peak = 0
    for n in events: now += n; peak = max(peak, now)
    return peak


# ---------------------------------------------------------------- against real tensors


def really(config, scene):
    "What the second of two passes takes on top of what is there, by PyTorch's profiler."
    dtype = torch.float32 if config.method == 'full' else torch.bfloat16
    model = attach(AutoModelForCausalLM.from_config(model_config(scene.raw, len(scene.policies)), dtype=dtype).requires_grad_(False), config, 'bfloat16')
    job = make_job(MemoryTracer('cpu'), model, config, scene)
    for _ in range(2):
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: job.step.accumulate(job.train, [list(range(config.per_device_train_batch_size))])
    return most(e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == '[memory]')


def rehearsed(config, scene):
    "The same from the ledger of the first step, without states of the optimizer."
    book = rehearse(config, scene)[0].book
    begins, ends = (next(i for i, step, phase in book.marks if (step, phase) == key) for key in ((1, 'forward'), (1, 'optimizer')))
    return most(n for n, number in book.events[begins:ends] if book.kinds.get(number) != 'optimizer')


@pytest.mark.parametrize('policies, settings, given', [
    (['none'] * 2, dict(), dict()),
    (['layer'] * 3, dict(), dict()),
    (['none'] * 2, dict(method='full'), dict()),
    (['layer'] * 3, dict(method='full'), dict()),
    (['none'] * 2, dict(padding_free=True), dict()),
    (['mlp'] * 3, dict(padding_free=True), dict(chunk=128)),
    (['layer'] * 3, dict(padding_free=True, label_smoothing_factor=0.1), dict()),
    (['none', 'mlp', 'layer'], dict(padding_free=True, lora_r=64, target_modules=['q_proj', 'down_proj']), dict(shape=(256, 128, 8))),
    (['offload'] * 3, dict(padding_free=True), dict(tile=64)),
    (['none'] * 2, dict(use_dora=True), dict()),
    (['layer'] * 3, dict(use_dora=True), dict()),
], ids=['padded', 'padded layer', 'full', 'full layer', 'rows', 'rows mlp', 'rows layer', 'rows mixed', 'rows offload', 'dora', 'dora layer'])
def test_a_rehearsed_pass_takes_what_a_real_one_does(smol, monkeypatch, policies, settings, given):
    if 'offload' in policies: monkeypatch.setattr(MemoryTracer, 'in_host_memory', lambda self: nullcontext())   # on a processor host memory is the same memory
    config = make_config(per_device_train_batch_size=2, max_length=128, **settings)
    scene = DryRunSpec(smol, policies, card='cpu', gradients=False, **given)
    real = really(config, scene)
    assert rehearsed(config, scene) == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize('kind, double', [('nf4', True), ('nf4', False), ('fp4', True)])
def test_packed_weights_are_as_large_as_real_ones(kind, double):
    config = make_config(method='qlora', bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    raw = json.loads((embedded_model() / 'config.json').read_text())
    witness, _ = rehearse(config.model_copy(update=dict(max_length=32, per_device_train_batch_size=1)), DryRunSpec(raw, ['none'] * raw['num_hidden_layers'], card='cpu'))
    loaded = load_base('embedded', 'qlora', 'bfloat16', 'cpu', kind, double)
    blocks = 512 * 8 * len(list(loaded.modules()))      # 512 bytes at most for each small tensor, and tables of 16 and 256 values
    assert 0 <= peaks(witness.book)[1, 'forward']['weights'] - weight_bytes(loaded) < blocks


def test_8_bit_weights_are_as_large_as_real_ones():
    raw = json.loads((embedded_model() / 'config.json').read_text())
    witness, job = rehearse(make_config(method='int8', max_length=32, per_device_train_batch_size=1), DryRunSpec(raw, ['none'] * raw['num_hidden_layers'], card='cpu'))
    loaded = load_base('embedded', 'int8', 'bfloat16', 'cpu')
    assert 0 <= peaks(witness.book)[1, 'forward']['weights'] - weight_bytes(loaded) < 512 * 4 * len(list(loaded.modules()))


def state_bytes(optimizer): return sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.dim())


@pytest.mark.parametrize('optim', ['adamw_torch', 'adamw_8bit'])
def test_states_are_those_of_the_real_optimizer(optim):
    config, scene = make_config(per_device_train_batch_size=1, max_length=32, optim=optim), DryRunSpec(TINY | dict(num_hidden_layers=2), ['none'] * 2, card='cpu')
    witness, job = rehearse(config, scene)
    model = attach(AutoModelForCausalLM.from_config(model_config(TINY, 2)).requires_grad_(False), config, 'float32')
    made = trainer.make_optimizer(model, config)
    for p in job.parameters: assert p.numel() < 10**5
    for g in made.param_groups:
        for p in g['params']: p.grad = torch.ones_like(p)
    made.step()
    assert state_bytes(job.optimizer) == state_bytes(made)
    assert peaks(witness.book)[2, 'optimizer']['optimizer'] >= state_bytes(made)


def test_paged_states_are_in_host_memory():
    wide = TINY | dict(hidden_size=512, intermediate_size=8192, num_hidden_layers=2)     # 16 x 8192 values are paged, 16 x 512 are not
    given = dict(per_device_train_batch_size=1, max_length=32)
    made = [rehearse(make_config(optim=optim, **given), DryRunSpec(wide, ['none'] * 2, card='cpu')) for optim in ('paged_adamw_32bit', 'adamw_torch')]
    paged, plain = (witness for witness, _ in made)       # while its job exists, so do the states
    waiting = sum(n for n, _ in paged.host.events)
    assert waiting == 2 * 4 * 2 * 3 * 16 * 8192          # two states, float32, two layers, three matrices with a side of 8192
    assert not plain.host.events
    assert peaks(plain.book)[2, 'optimizer']['optimizer'] - peaks(paged.book)[2, 'optimizer']['optimizer'] >= waiting


# ---------------------------------------------------------------- a few layers for all


@pytest.mark.parametrize('counts, settings, given', [
    (dict(none=5), dict(), {}), (dict(mlp=5), dict(), {}), (dict(layer=5), dict(), {}), (dict(none=2, mlp=3), dict(), {}),
    (dict(mlp=3, layer=2), dict(method='qlora'), {}), (dict(offload=5), dict(), dict(tile=128)), (dict(none=5), dict(method='qlora', gradient_accumulation_steps=2), dict(chunk=128)),
    (dict(none=5), dict(padding_free=False), {}), (dict(layer=5), dict(padding_free=False, method='qlora'), {}), (dict(none=5), dict(method='full'), {}),
    (dict(layer=5), dict(method='full', optim='adamw_8bit'), {}), (dict(none=5), dict(method='int8'), {}),
], ids=str)
def test_a_few_layers_give_the_peak_of_all_to_the_byte(counts, settings, given):
    config = make_config(per_device_train_batch_size=3, max_length=128, torch_compile=False, **settings)
    policies = lambda c: [k for k, n in c.items() for _ in range(n)]
    done = [rehearse(config, DryRunSpec(TINY, policies(c), **given)) for c in [*probe_configs(counts), counts]]      # a job that nobody holds would die in its ledger
    *books, whole = [witness.book for witness, _ in done]
    total = lambda found: {key: sum(parts.values()) for key, parts in found.items()}
    few, all_of_them = total(all_peaks(books, counts)), total(peaks(whole))
    assert few.keys() == all_of_them.keys()
    assert max(few.values()) == max(all_of_them.values())
    for key, n in all_of_them.items(): assert abs(few[key] - n) <= 8192, key


def test_a_few_compiled_layers_miss_it_by_some_kilobytes(smol):
    config, counts = make_config(per_device_train_batch_size=2, max_length=512), dict(none=6)
    done = [rehearse(config, DryRunSpec(smol, ['none'] * c['none'])) for c in [*probe_configs(counts), counts]]
    *books, all_of_them = [witness.book for witness, _ in done]
    few, whole = all_peaks(books, counts), peaks(all_of_them)
    assert max(sum(p.values()) for p in few.values()) == pytest.approx(max(sum(p.values()) for p in whole.values()), abs=64 * 1024)


# ---------------------------------------------------------------- switches


def first_pass(**given):
    "Parts at the loss of the first step, of the tiny model."
    config = make_config(per_device_train_batch_size=2, max_length=256, torch_compile=False)
    return peaks(rehearse(config, DryRunSpec(TINY | dict(num_hidden_layers=2, vocab_size=50_000), ['none'] * 2, **given))[0].book)


def test_gradients_of_an_earlier_pass_are_counted_once():
    without, held = first_pass(gradients=False)[1, 'loss'], first_pass()[1, 'loss']
    assert held['gradients'] - without['gradients'] == 4 * 2 * 16 * (2 * 128 + 2 * 96 + 3 * 224)
    assert {k: held[k] - without[k] for k in PARTS if k != 'gradients'} == dict.fromkeys((k for k in PARTS if k != 'gradients'), 0)


def test_a_smaller_chunk_of_the_loss_takes_less():
    whole, parts = first_pass()[1, 'loss']['loss'], first_pass(chunk=128)[1, 'loss']['loss']
    assert parts < whole / 2


def test_workspaces_depend_on_the_card():
    load = {card: first_pass(card=card)[0, 'load']['workspaces'] for card in ('hopper', 'ampere', 'cpu')}
    assert load['hopper'] > load['ampere'] > load['cpu']


def test_inputs_and_the_table_can_wait_in_host_memory():
    untied = TINY | dict(tie_word_embeddings=False)
    config = make_config(per_device_train_batch_size=2, max_length=256, torch_compile=False)
    witness, job = rehearse(config, DryRunSpec(untied, ['offload'] * 5, tile=128, table_away=True))
    kept, _ = rehearse(config, DryRunSpec(untied, ['layer'] * 5))
    assert most(n for n, _ in witness.host.events) == 2 * 700 * 64 + 5 * 2 * 512 * 64
    assert peaks(kept.book)[1, 'forward']['weights'] - peaks(witness.book)[1, 'forward']['weights'] == 2 * 700 * 64 - 512      # a zero stays
    assert job.step.features.embedding_offload.on


def test_replacements_are_undone():
    from homelab_ft.train.engine.ops.device import DevicePort
    from homelab_ft.train.engine.ops import checkpointing as recompute
    before = DevicePort.send, recompute.is_prenorm_block, trainer.read_losses
    rehearse(make_config(per_device_train_batch_size=1, max_length=32), DryRunSpec(TINY | dict(num_hidden_layers=2), ['none'] * 2, card='cpu'))
    assert before == (DevicePort.send, recompute.is_prenorm_block, trainer.read_losses)


# ---------------------------------------------------------------- the process


def test_planning_imports_no_torch():
    code = 'import sys, homelab_ft.plan.trace.trace, homelab_ft.plan.memory.caching_allocator; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_a_70b_from_its_name_and_a_whole_small_model():
    large = trace(make_config(model='Llama-3.1-70B', method='qlora', max_length=4096, per_device_train_batch_size=1), policies=dict(none=10, layer=70))
    assert 40 * 2**30 < large.allocated < 60 * 2**30 and large.layers == [4, 5, 5] and large.allocated < large.reserved < large.process
    small = trace(make_config(max_length=64, per_device_train_batch_size=2, torch_compile=False), whole=True)
    assert sum(small.parts.values()) == small.allocated == max(sum(p.values()) for p in small.phases.values())
    apart = replay(small.events)
    assert small.recorded and apart.peak_reserved < small.reserved < small.process and apart.peak_allocated >= small.allocated
    assert 'peak' in str(small) and small.phase in str(small)


@pytest.mark.parametrize('settings, given, error, words', [
    (dict(model='no-such-model'), {}, ModelError, 'no such model'),
    (dict(model='Mixtral-8x7B'), {}, ModelError, 'mixture of experts'),
    (dict(model='SmolLM2-135M', max_length=8193), {}, ConfigError, 'length'),
    (dict(), dict(policies=dict(none=2)), ConfigError, 'do not add up'),
    (dict(), dict(policies=dict(none=7, mlp=-1)), ConfigError, 'do not add up'),
    (dict(), dict(policies=dict(everything=6)), ConfigError, 'unknown policy'),
    (dict(), dict(shape=(10, 20, 1)), ConfigError, 'no shape of a pass'),
    (dict(), dict(shape=(10, 5)), ConfigError, 'no shape of a pass'),
    (dict(), dict(tile=1.5), ConfigError, 'tile'),
    (dict(), dict(chunk=-1), ConfigError, 'chunk'),
    (dict(method='full'), dict(policies=dict(offload=6)), ConfigError, 'padded rows'),
    (dict(objective='dpo'), {}, ConfigError, 'dpo'),
], ids=str)
def test_what_cannot_be_is_refused_before_the_process_starts(monkeypatch, settings, given, error, words):
    monkeypatch.setattr(traces.subprocess, 'run', lambda *a, **k: pytest.fail('a process was started'))
    with pytest.raises(error, match=words): trace(make_config(**settings), **given)


def test_an_unsupported_architecture_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(traces.subprocess, 'run', lambda *a, **k: pytest.fail('a process was started'))
    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='mamba', architectures=['MambaForCausalLM'])))
    with pytest.raises(ModelError, match='MambaForCausalLM'): trace(make_config(model=str(tmp_path)))


@pytest.mark.parametrize('out', ['', 'Traceback', 'null\n{"half'])
def test_a_rehearsal_that_breaks_off_is_an_error_with_its_last_words(monkeypatch, out):
    monkeypatch.setattr(traces.subprocess, 'run', lambda *a, **k: SimpleNamespace(stdout=out, stderr='first\nMemoryError: all gone\n', returncode=1))
    with pytest.raises(RunError, match='all gone'): trace(make_config())


def test_errors_of_the_process_arrive_as_they_were():
    scene = dict(raw=TINY, policies=['none'] * 5)
    said = answer(dict(config=dict(method='full', packing=True), scenes=[scene, scene]))
    assert said['error']['kind'] == 'ConfigError' and 'end to end' in said['error']['what']
    assert answer(dict(config=dict(lora_r=0), scenes=[scene]))['error']['kind'] == 'ConfigError'


def test_rehearsals_side_by_side_say_what_they_say_one_by_one():
    request = dict(config=dict(max_length=64, per_device_train_batch_size=2), scenes=[dict(raw=TINY, policies=['none'] * n) for n in (1, 2, 3)])
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', traces._BEGIN], input=json.dumps(request), capture_output=True, text=True)
    apart, together = json.loads(done.stdout.splitlines()[-1])['found'], json.loads(json.dumps(answer(request)))['found']
    for a, b in zip(apart, together, strict=True):
        born = lambda said: [n for n, _ in said['book']['events'] if n > 0]
        assert a['features'] == b['features'] and (len(a['book']['events']), sum(born(a))) == pytest.approx((len(b["book"]["events"]), sum(born(b))), rel=5e-3)
        at, there = (traces.all_peaks([Ledger(s['book']['events'], s['book']['marks'], {int(k): v for k, v in s['book']['kinds'].items()})], dict(none=1)) for s in (a, b))
        assert at.keys() == there.keys() and all(abs(sum(at[k].values()) - sum(there[k].values())) <= 1024 for k in at)     # a number may live a little longer
