"plan.search, plan.autoconfigure: nothing is offered that does not fit, and given settings stay as they are."
import subprocess, sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import GiB, HomelabError
from homelab_ft.config import make_config
from homelab_ft.hardware.gpu_catalog import find_gpu
from homelab_ft.plan import search as search_module
from homelab_ft.plan.search import plan_target, settle_dtype
from homelab_ft.plan.autoconfigure import OPEN_SETTINGS, autoconfigure, choices_table, find_settings, make_search
from homelab_ft.plan.memory.estimate import METHODS, estimate, estimate_for
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.throughput import tokens_per_second

SHAPES = {name: model_shape(name) for name in ('SmolLM2-135M', 'Llama-3.2-1B', 'Qwen2.5-7B', 'Llama-3.1-8B', 'Phi-4')}
LLAMA = SHAPES['Llama-3.1-8B']
shapes, gibs = st.sampled_from(sorted(SHAPES)), st.floats(2, 140)
lengths_of = st.lists(st.integers(16, 2000), min_size=1, max_size=12)
few = settings(max_examples=15, deadline=None)


def find(*args, **given): return find_settings(make_search(*args, **given))


@few
@given(shapes, gibs, lengths_of, st.integers(1, 24))
def test_what_is_offered_fits(name, gib, lengths, batch):
    for c in find(gib * GiB, SHAPES[name], lengths, batch):
        assert c.memory.min_required <= gib * GiB * 0.95
        assert c.what_it_gives_up and make_config(**c.settings).method == c.spec.method
        assert c.memory.peak <= estimate(SHAPES[name], c.spec, policies=c.memory.policies).peak       # the loss may take fewer labels at a time
        assert c.shortened == sum(n > c.spec.length for n in lengths) and (c.packing or c.spec.batch_size * c.spec.gradient_accumulation_steps == batch)


@few
@given(shapes, gibs, st.floats(1, 60), lengths_of)
def test_a_larger_gpu_never_offers_less(name, gib, more, lengths):
    small, large = ({(c.spec.method, c.spec.optim): c.spec.length for c in find(size * GiB, SHAPES[name], lengths)} for size in (gib, gib + more))
    assert small.keys() <= large.keys() and all(length <= large[key] for key, length in small.items())


@few
@given(shapes, gibs, lengths_of, st.fixed_dictionaries({}, optional=dict(
    method=st.sampled_from(METHODS), optim=st.sampled_from(['adamw_torch', 'adamw_8bit', 'paged_adamw_32bit']), packing=st.booleans(),
    per_device_train_batch_size=st.integers(1, 8), gradient_accumulation_steps=st.integers(1, 8), max_length=st.integers(64, 2000), lora_r=st.integers(1, 128))))
def test_given_settings_stay(name, gib, lengths, given):
    for c in find(gib * GiB, SHAPES[name], lengths, **given):
        assert all(c.settings.get(k, c.spec.lora_r) == v for k, v in given.items()) and c.memory.fits(gib * GiB)


def test_policies_that_are_given():
    assert {str(c.memory.policies) for c in find(140 * GiB, LLAMA, 1024, gradient_checkpointing=True)} == {"{'layer': 32}"}
    both = dict(mlp=30, layer=2)
    assert [c.memory.policies for c in find(24 * GiB, LLAMA, 1024, method='qlora', optim='adamw_torch', policies=both)] == [both]
    methods = {c.spec.method for c in find(140 * GiB, LLAMA, 1024, policies=both)}
    assert {'lora', 'qlora'} <= methods and 'full' not in methods      # full fine-tuning knows no such policy


def test_the_order():
    found = find('h200', SHAPES['Llama-3.2-1B'], [300, 700, 2000])
    assert [(c.spec.method, c.spec.optim) for c in found] == [(m, o) for m in METHODS for o in ('adamw_torch', 'adamw_8bit')]
    given = dict(method='qlora', optim='adamw_torch')
    each = [find('rtx-4090', LLAMA, [300, 700, 2000], 4, per_device_train_batch_size=n, **given)[0].tokens_per_second for n in (1, 2, 4)]
    assert find('rtx-4090', LLAMA, [300, 700, 2000], 4, **given)[0].tokens_per_second >= max(each)


def test_shorter_sequences_come_last():
    found = find(16 * GiB, LLAMA, [200] * 50 + [30_000])
    cut = [c.shortened > 0 for c in found]
    assert cut == sorted(cut) and any(cut)
    assert all('1 of 51 examples' in c.what_it_gives_up and c.settings['overlong_rows'] == 'truncate' for c in found if c.shortened)


def test_throughput_and_hours_are_those_of_the_page():
    gpu, lengths = find_gpu('rtx-4090'), [1000, 2000]
    c = find(gpu, LLAMA, lengths, 2, epochs=3, method='qlora', packing=False)[0]
    assert c.tokens_per_second == pytest.approx(tokens_per_second(gpu, LLAMA, 1500 * c.spec.batch_size, c.spec, c.memory.policies, lengths))
    assert c.hours == pytest.approx(3 * 3000 / c.tokens_per_second / 3600)
    assert all(c.tokens_per_second is None and c.hours is None for c in find(gpu.limit_bytes, LLAMA, lengths))
    assert find(gpu, LLAMA, 1500, method='qlora')[0].hours is None and find(gpu, LLAMA, 1500, tokens=1e6, method='qlora')[0].hours > 0


@pytest.mark.parametrize('args, given, message', [
    ((0, 512), {}, 'limit_bytes'), (('rtx-4091', 512), {}, 'no GPU'), ((GiB, 0), {}, 'sequences need tokens'), ((GiB, []), {}, 'sequences need tokens'),
    ((GiB, 'x'), {}, 'sequences need tokens'), ((GiB, 512, 1.5), {}, 'global_batch'), ((GiB, 512), dict(epochs=0), 'epochs'), ((GiB, 512), dict(tokens=-1), 'tokens'),
    ((GiB, 512), dict(margin=1), 'margin'), ((GiB, 512), dict(lora_r=0), 'lora_r'), ((GiB, 512), dict(lora_rank=8), 'did you mean lora_r'),
    ((GiB, 512), dict(method='half'), 'method'), ((GiB, 512), dict(per_device_train_batch_size=0), 'per_device_train_batch_size'), ((GiB, 10**9), {}, 'beyond'),
    ((GiB, 512), dict(target_modules='q_pro'), 'q_proj'), ((GiB, 512), dict(label_share=2), 'label_share')], ids=str)
def test_what_cannot_be_is_refused(args, given, message):
    where, *rest = args
    with pytest.raises(HomelabError, match=message): find(where, LLAMA, *rest, **given)


def test_a_mixture_of_experts_fits_with_all_its_experts_in_16_bits():
    assert not find(80 * GiB, model_shape('Mixtral-8x7B'), 512)
    assert find(140 * GiB, model_shape('Mixtral-8x7B'), 512)


def test_a_gpu_without_bfloat16_is_planned_in_float32():
    "As a run computes there: LoRA keeps 4 bytes for a weight, and batches are padded."
    turing, ampere = (find(name, SHAPES['Llama-3.2-1B'], 512, method='lora')[0] for name in ('T4', 'RTX 3090'))
    assert turing.spec.dtype == 'float32' and turing.memory.step == 'padded' and ampere.spec.dtype == 'bfloat16'
    assert turing.memory.weights == 2 * ampere.memory.weights and not turing.packing
    target = plan_target('T4')
    assert settle_dtype(make_config(), target).dtype == 'float32' and settle_dtype(make_config(), plan_target('L4')).dtype == 'auto'
    with pytest.raises(HomelabError, match='no bfloat16'): settle_dtype(make_config(dtype='bfloat16'), target)


def test_nothing_of_this_loads_torch():
    code = ('import sys, homelab_ft.plan.autoconfigure, homelab_ft.plan.limits, homelab_ft.plan.remedies, homelab_ft.plan.summary; '
            'print([m for m in ("torch", "transformers", "matplotlib") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_the_table_has_a_row_per_choice():
    found = find('rtx-4090', LLAMA, [300, 2000])
    assert len(choices_table(found).rows) == len(found) and 'unknown' in str(choices_table(found))
    assert max(map(len, str(choices_table(found)).splitlines())) <= 80


# ---------------------------------------------------------------- what a run takes from it

@few
@given(shapes, gibs, lengths_of, st.fixed_dictionaries({}, optional=dict(
    method=st.sampled_from(METHODS), optim=st.sampled_from(['adamw_torch', 'adamw_8bit']), packing=st.booleans(),
    per_device_train_batch_size=st.integers(1, 6), gradient_accumulation_steps=st.integers(1, 4), gradient_checkpointing=st.sampled_from(['auto', True, False]))))
def test_a_run_keeps_what_was_set_and_fits_the_rest(name, gib, lengths, given):
    config = make_config(model=name, max_length=2048, **given)
    chosen, choice = autoconfigure(config, lengths, gib * GiB)
    assert all(v == 'auto' or getattr(chosen, k) == v for k, v in given.items())
    assert {k for k, v in chosen.model_dump().items() if v != getattr(config, k)} <= {*OPEN_SETTINGS} | ({'max_length'} if chosen.packing else set())
    if choice is None: return
    assert choice.memory.fits(gib * GiB) and not choice.shortened and choice.spec.method != 'full' or given.get('method') == 'full'
    assert (chosen.method, chosen.optim, chosen.packing) == (choice.spec.method, choice.spec.optim, choice.packing)
    bounded = chosen.model_copy(update=dict(max_length=max(lengths), device='cuda'))
    assert estimate_for(bounded, SHAPES[name], limit_bytes=gib * GiB).fits(gib * GiB)


def test_nothing_fits_and_the_least_is_left():
    least, choice = autoconfigure(make_config(model='Llama-3.1-8B', max_length=2048), [2048], 3 * GiB)
    assert choice is None and (least.method, least.per_device_train_batch_size, least.gradient_accumulation_steps) == ('qlora', 1, 8)
    given, choice = autoconfigure(make_config(model='Llama-3.1-8B', max_length=2048, method='lora', per_device_train_batch_size=4), [2048], 3 * GiB)
    assert choice is None and (given.method, given.per_device_train_batch_size, given.gradient_accumulation_steps) == ('lora', 4, 1)


def test_dpo_and_cpu_keep_their_settings():
    for other in (dict(objective='dpo'), dict(device='cpu')):
        config = make_config(model='Llama-3.1-8B', **other)
        assert autoconfigure(config, [2048], 24 * GiB) == (config, None)


def test_the_gpu_of_this_machine_is_used(monkeypatch, tmp_path):
    config = make_config(model='Llama-3.1-8B', max_length=2048)
    probes = tmp_path / 'probes.json'
    monkeypatch.setenv('HOMELAB_FT_PROBES', str(probes))
    def machine(device, gib, name): return lambda: SimpleNamespace(device=device, total_bytes=gib * GiB, free_bytes=gib * GiB, gpu_name=name, cpu_name='Example CPU', has_bfloat16=True)
    monkeypatch.setattr(search_module, 'detect_machine', machine('cpu', 64, None))
    monkeypatch.setattr(search_module, 'live_gpu', lambda: None)
    assert autoconfigure(config, [2048]) == (config, None)
    monkeypatch.setattr(search_module, 'detect_machine', machine('cuda', 24, 'Example'))
    assert autoconfigure(config, [2048]) == autoconfigure(config, [2048], 24 * GiB)
    monkeypatch.setattr(search_module, 'live_gpu', lambda: SimpleNamespace(usable_bytes=12 * GiB))       # somebody else has the rest
    assert autoconfigure(config, [2048]) == autoconfigure(config, [2048], 12 * GiB)
    probes.write_text('{"Example": {"overhead_offset": 300000000}, "Another": {"overhead_offset": 7}}')      # and its context is larger than elsewhere
    here, chosen = autoconfigure(config, [2048])
    assert autoconfigure(config, [2048], 12 * GiB, 300_000_000) == (here, chosen)
    assert estimate_for(here, LLAMA, overhead_offset=300_000_000).peak - estimate_for(here, LLAMA).peak == 300_000_000
