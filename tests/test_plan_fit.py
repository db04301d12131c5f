"plan.speed, plan.fit, plan.reach, plan.explain: nothing is offered that does not fit, wishes stay as they are, and differences are differences."
import subprocess, sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import ConfigError, GiB, HomelabError, ModelError
from homelab_ft.config import make_config
from homelab_ft.hardware.gpu_catalog import find_gpu, read_gpus
from homelab_ft.plan.remedies import explain, remedies
from homelab_ft.plan.autoconfigure import OPEN, Choice, choices_table, fit, autoconfigure
from homelab_ft.plan.limits import _frontier, largest, length_batch_map, plot_map
from homelab_ft.plan.model_shape import known_shapes, model_shape
from homelab_ft.plan.throughput import COUNTED, MEASURED, hours, operations_per_token, pairs_per_token, pass_seconds, tokens_per_second, why_no_speed
from homelab_ft.plan.memory.estimate import METHODS, estimate, estimate_for, estimate_with_checkpointing

SHAPES = {name: known_shapes()[name] for name in ('SmolLM2-135M', 'Llama-3.2-1B', 'Qwen2.5-7B', 'Llama-3.1-8B', 'Phi-4')}
shapes, gibs = st.sampled_from(sorted(SHAPES)), st.floats(2, 140)
rows = st.lists(st.integers(16, 2000), min_size=1, max_size=12)
few = settings(max_examples=25, deadline=None)


# ---------------------------------------------------------------- speed

def test_pairs_are_those_of_the_rows():
    lengths = [1, 4, 9]
    assert pairs_per_token(lengths) == sum(k for n in lengths for k in range(1, n + 1)) / sum(lengths)


def test_operations_of_a_toy_by_hand():
    shape = model_shape(dict(model_type='llama', hidden_size=8, num_hidden_layers=3, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=32))
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    adapter = (8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16)
    found = operations_per_token(shape, 'lora', dict(none=1, mlp=1, layer=1), 5, 0.5, 4)
    forward = 4 * 3 * 8      # 3 pairs per token on average, 8 values of the query heads
    assert found == dict(layers=4 * 3 * layer, adapter=6 * 3 * 4 * adapter, attention=3.5 * 3 * forward, head=4 * 32 * 8 * 0.5, again=2 * 2 * 8 * 16 + 2 * layer + forward)


def test_fused_matrices_count_like_separate_ones():
    sizes = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=32)
    fused, apart = (operations_per_token(model_shape(dict(sizes, model_type=kind)), policies=dict(mlp=2), lora_r=1) for kind in ('phi3', 'llama'))
    assert all(fused[part] == apart[part] for part in ('layers', 'attention', 'head', 'again'))


def test_speed_is_known_only_where_it_was_measured():
    for card in read_gpus().values():
        for method in METHODS:
            speed = tokens_per_second(card, SHAPES['Llama-3.1-8B'], 4096, method)
            assert (speed is None) == bool(why_no_speed(card, method)) == (not card.bf16_tflops or method not in ('lora', 'qlora'))
    assert tokens_per_second(find_gpu('h200'), SHAPES['Llama-3.1-8B'], 4096, 'lora', 'padded') is None


@few
@given(shapes, st.sampled_from(METHODS), st.integers(1, 4000), st.integers(1, 256), st.floats(0.01, 1))
def test_more_is_more(name, method, length, rank, share):
    count = lambda **other: sum(operations_per_token(SHAPES[name], **dict(method=method, lengths=length, lora_r=rank, label_share=share) | other).values())
    n = SHAPES[name].num_hidden_layers
    assert count() < count(lengths=length + 1) and count(policies=dict(none=n)) == count() < count(policies=dict(mlp=n)) < count(policies=dict(layer=n))
    assert count(label_share=share / 2) < count() and (count(lora_r=rank + 1) > count() or method == 'full')
    assert count(method='full') > count(method='lora', lora_r=1)


@pytest.mark.parametrize('wrong', [0, -3, float('nan'), float('inf'), None, 'many', True])
def test_amounts_that_cannot_be(wrong):
    for call in (lambda: pass_seconds(wrong, 10), lambda: pass_seconds(10, wrong), lambda: pass_seconds(10, 10, wrong), lambda: hours(10, 5, wrong)):
        with pytest.raises(ConfigError): call()


def test_an_unknown_setting_is_not_passed_over():
    with pytest.raises(ConfigError, match='lora_r'): tokens_per_second(find_gpu('h200'), SHAPES['Llama-3.1-8B'], 4096, lora_rank=3)
    assert 'method' not in COUNTED and 'H200' in str(MEASURED)


# ---------------------------------------------------------------- fit

def check(choice, limit, margin=0.05):
    assert isinstance(choice, Choice) and choice.memory.min_required <= limit * (1 - margin)
    assert choice.what_it_gives_up and make_config(**choice.settings).method == choice.method


@few
@given(shapes, gibs, rows, st.integers(1, 24))
def test_what_is_offered_fits(name, gib, lengths, batch):
    for c in fit(gib * GiB, SHAPES[name], lengths, batch):
        check(c, gib * GiB)
        again = estimate(SHAPES[name], method=c.method, batch_size=c.per_device_train_batch_size, length=c.max_length, optim=c.optim, policies=c.policies,
                         gradient_accumulation_steps=c.gradient_accumulation_steps)
        assert c.memory.peak <= again.peak       # the loss may take fewer positions at a time
        assert c.shortened == sum(n > c.max_length for n in lengths) and (c.packing or c.per_device_train_batch_size * c.gradient_accumulation_steps == batch)


@few
@given(shapes, gibs, st.floats(1, 60), rows)
def test_a_larger_card_never_offers_less(name, gib, more, lengths):
    small, large = (fit(size * GiB, SHAPES[name], lengths) for size in (gib, gib + more))
    offered = lambda found: {(c.method, c.optim) for c in found}
    assert offered(small) <= offered(large)
    longest = {(c.method, c.optim): c.max_length for c in large}
    assert all(c.max_length <= longest[c.method, c.optim] for c in small)


@few
@given(shapes, gibs, rows, st.fixed_dictionaries({}, optional=dict(
    method=st.sampled_from(METHODS), optim=st.sampled_from(['adamw_torch', 'adamw_8bit', 'paged_adamw_32bit']), packing=st.booleans(),
    per_device_train_batch_size=st.integers(1, 8), gradient_accumulation_steps=st.integers(1, 8), max_length=st.integers(64, 2000), lora_r=st.integers(1, 128))))
def test_wishes_stay_as_they_are(name, gib, lengths, wishes):
    for c in fit(gib * GiB, SHAPES[name], lengths, **wishes):
        check(c, gib * GiB)
        assert all(getattr(c, k) == v for k, v in wishes.items() if k != 'lora_r')


def test_levels_that_are_wished_for():
    shape = SHAPES['Llama-3.1-8B']
    assert {str(c.policies) for c in fit(140 * GiB, shape, 1024, gradient_checkpointing=True)} == {"{'layer': 32}"}
    assert [c.policies for c in fit(24 * GiB, shape, 1024, method='qlora', optim='adamw_torch', policies=dict(mlp=30, layer=2))] == [dict(mlp=30, layer=2)]
    found = {c.method for c in fit(140 * GiB, shape, 1024, policies=dict(mlp=30, layer=2))}
    assert {'lora', 'qlora'} <= found and 'full' not in found      # where all weights learn there is no such policy


def test_the_order():
    found = fit('h200', SHAPES['Llama-3.2-1B'], [300, 700, 2000])
    assert [(c.method, c.optim) for c in found] == [(m, o) for m in METHODS for o in ('adamw_torch', 'adamw_8bit')]
    by_speed = [fit('rtx-4090', SHAPES['Llama-3.1-8B'], [300, 700, 2000], 4, method='qlora', optim='adamw_torch', per_device_train_batch_size=n)[0].tokens_per_second for n in (1, 2, 4)]
    assert fit('rtx-4090', SHAPES['Llama-3.1-8B'], [300, 700, 2000], 4, method='qlora', optim='adamw_torch')[0].tokens_per_second >= max(by_speed)


def test_shorter_rows_come_last():
    lengths = [200] * 50 + [30_000]
    found = fit(16 * GiB, SHAPES['Llama-3.1-8B'], lengths)
    cut = [c.shortened > 0 for c in found]
    assert cut == sorted(cut) and any(cut)
    assert all('1 of 51 rows' in c.what_it_gives_up and c.settings['overlong_rows'] == 'truncate' for c in found if c.shortened)


def test_speed_and_hours_are_those_of_the_page():
    card, shape, lengths = find_gpu('rtx-4090'), SHAPES['Llama-3.1-8B'], [1000, 2000]
    c = fit(card, shape, lengths, 2, epochs=3, method='qlora', packing=False)[0]
    assert c.tokens_per_second == pytest.approx(tokens_per_second(card, shape, 1500 * c.per_device_train_batch_size, 'qlora', policies=c.policies, lengths=lengths))
    assert c.hours == pytest.approx(3 * 3000 / c.tokens_per_second / 3600)
    assert all(c.tokens_per_second is None and c.hours is None for c in fit(card.limit_bytes, shape, lengths))
    assert fit(card, shape, 1500, method='qlora')[0].hours is None and fit(card, shape, 1500, tokens=1e6, method='qlora')[0].hours > 0


@pytest.mark.parametrize('call, said', [
    (lambda s: fit(0, s, 512), 'limit_bytes'), (lambda s: fit(-GiB, s, 512), 'limit_bytes'), (lambda s: fit('rtx-4091', s, 512), 'no card'),
    (lambda s: fit(GiB, s, 0), 'rows need tokens'), (lambda s: fit(GiB, s, []), 'rows need tokens'), (lambda s: fit(GiB, s, 'x'), 'rows need tokens'),
    (lambda s: fit(GiB, s, 512, 0), 'global_batch'), (lambda s: fit(GiB, s, 512, 1.5), 'global_batch'), (lambda s: fit(GiB, s, 512, epochs=0), 'epochs'),
    (lambda s: fit(GiB, s, 512, tokens=-1), 'tokens'), (lambda s: fit(GiB, s, 512, margin=1), 'margin'), (lambda s: fit(GiB, s, 512, lora_r=0), 'lora_r'),
    (lambda s: fit(GiB, s, 512, lora_rank=8), 'did you mean lora_r'), (lambda s: fit(GiB, s, 512, method='half'), 'method'), (lambda s: fit(GiB, s, 512, optim='sgd'), 'optim'),
    (lambda s: fit(GiB, s, 512, per_device_train_batch_size=0), 'per_device_train_batch_size'), (lambda s: fit(GiB, s, 10**9), 'beyond'),
    (lambda s: fit(GiB, s, 512, target_modules='q_pro'), 'q_proj'), (lambda s: fit(GiB, s, 512, label_share=2), 'label_share'),
    (lambda s: largest(0, s), 'limit_bytes'), (lambda s: largest(GiB, s, 'batch'), 'unknown what'), (lambda s: largest(GiB, s, 'lora'), 'did you mean lora_r'),
    (lambda s: largest(GiB, s, 'lora_r', lora_r=8), 'unknown wish'), (lambda s: largest(GiB, s, margin=-1), 'margin'), (lambda s: largest(GiB, ['Lama-3.1-8B'], 'model'), 'Llama-3.1-8B'),
    (lambda s: length_batch_map(GiB, s, [0], [1]), 'length'), (lambda s: length_batch_map(GiB, s, [8], [0]), 'batch_size'), (lambda s: length_batch_map(0, s, [8], [1]), 'limit_bytes'),
    (lambda s: explain(estimate(s), s, 0), 'limit_bytes'), (lambda s: explain(estimate(s), s, GiB, rank=3), 'unknown wish'), (lambda s: explain(estimate(s), s, GiB, lora_r=8), 'other arguments'),
])
def test_what_cannot_be_is_refused(call, said):
    with pytest.raises(HomelabError, match=said): call(SHAPES['Llama-3.1-8B'])


def test_a_mixture_of_experts_is_refused():
    with pytest.raises(ModelError): fit(80 * GiB, model_shape('Mixtral-8x7B'), 512)


# ---------------------------------------------------------------- largest, map

@few
@given(shapes, gibs, st.floats(0.1, 60), st.sampled_from(['length', 'lora_r', 'per_device_train_batch_size']), st.sampled_from(METHODS))
def test_the_largest_fits_and_grows_with_the_card(name, gib, more, what, method):
    shape = SHAPES[name]
    (small, est), (large, _) = (largest(size * GiB, shape, what, method=method, **({} if what == 'length' else dict(length=1024))) for size in (gib, gib + more))
    assert small <= large and (small == 0 or est.fits(gib * GiB)) and large <= dict(length=shape.max_position_embeddings).get(what, 4096)
    if small == 0: assert not est.fits(gib * GiB)


@few
@given(gibs, st.floats(0.1, 60))
def test_the_largest_model_grows_with_the_card(gib, more):
    (a, est), (b, _) = (largest(size * GiB, list(SHAPES), 'model', method='qlora', length=512) for size in (gib, gib + more))
    assert a is None or est.fits(gib * GiB) and SHAPES[a].n_params <= SHAPES[b].n_params


def test_the_map_holds_the_same_numbers_and_its_line_parts_them():
    shape, limit, lengths, batches = SHAPES['Llama-3.1-8B'], 16 * GiB, [512, 2048, 8192, 32768], [1, 2, 4]
    peaks = length_batch_map(limit, shape, lengths, batches, method='qlora')
    assert all(peaks[i, j] == estimate_with_checkpointing(shape, limit, method='qlora', length=n, batch_size=b).min_required for i, n in enumerate(lengths) for j, b in enumerate(batches))
    fits = peaks <= 0.95 * limit
    x, y = _frontier(fits)
    assert list(y[::2] + 0.5) == fits.sum(axis=0).tolist() and x[0] == -0.5 and x[-1] == len(batches) - 0.5
    for column in fits.T: assert sorted(column, reverse=True) == list(column)      # the line is the whole truth


def test_the_picture_shows_the_numbers():
    from matplotlib.figure import Figure
    peaks = np.array([[1, 2], [3, 40]]) * GiB
    ax = plot_map(peaks, 8 * GiB, [256, 512], [1, 2], ax=Figure().subplots())
    assert (ax.images[0].get_array() == peaks / GiB).all() and {t.get_text() for t in ax.texts} == {'1.0', '2.0', '3.0', '40.0'}
    assert [t.get_text() for t in ax.get_xticklabels()] == ['1', '2'] and list(ax.lines[0].get_ydata()) == [1.5, 1.5, 0.5, 0.5]


# ---------------------------------------------------------------- explain

@few
@given(shapes, st.sampled_from(METHODS), st.integers(1, 8), st.integers(16, 2000), gibs, st.booleans())
def test_savings_are_differences_of_two_estimates(name, method, batch, length, gib, fit_policies):
    shape, wishes = SHAPES[name], dict(method=method, batch_size=batch, length=length)
    est = estimate_with_checkpointing(shape, gib * GiB, **wishes) if fit_policies else estimate(shape, **wishes)
    found = remedies(est, shape, gib * GiB, **wishes)
    for r in found:
        assert r.saved == est.peak - r.memory.peak > 0
        if not fit_policies: assert r.memory.peak == estimate(shape, **wishes | r.changes).peak
    assert [bool(r.what_changes) for r in found] == sorted(bool(r.what_changes) for r in found)
    free = [max(0, r.more_time) / r.saved for r in found if not r.what_changes]
    assert free == sorted(free)
    said = explain(est, shape, gib * GiB, **wishes)
    assert [row[0] for row in said.rows] == [r.name for r in found[:3]] and est.phase in said.title


def test_nothing_of_this_loads_torch():
    code = 'import sys, homelab_ft.plan.autoconfigure, homelab_ft.plan.limits, homelab_ft.plan.remedies; print([m for m in ("torch", "transformers", "matplotlib") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_the_table_has_a_row_per_choice():
    found = fit('rtx-4090', SHAPES['Llama-3.1-8B'], [300, 2000])
    assert len(choices_table(found).rows) == len(found) and 'not known' in str(choices_table(found))


# ---------------------------------------------------------------- what a run takes from it

@few
@given(shapes, gibs, rows, st.fixed_dictionaries({}, optional=dict(
    method=st.sampled_from(METHODS), optim=st.sampled_from(['adamw_torch', 'adamw_8bit']), packing=st.booleans(),
    per_device_train_batch_size=st.integers(1, 6), gradient_accumulation_steps=st.integers(1, 4), gradient_checkpointing=st.sampled_from(['auto', True, False]))))
def test_a_run_keeps_what_was_set_and_fits_the_rest(name, gib, lengths, given):
    config = make_config(model=name, max_length=2048, **given)
    settled, choice = autoconfigure(config, lengths, gib * GiB)
    assert all(getattr(settled, k) == v for k, v in given.items())
    assert {k for k, v in settled.model_dump().items() if v != getattr(config, k)} <= {*OPEN} | ({'max_length'} if settled.packing else set())
    if choice is None: return
    assert choice.memory.fits(gib * GiB) and not choice.shortened and choice.method != 'full' or given.get('method') == 'full'
    assert (settled.method, settled.optim, settled.packing) == (choice.method, choice.optim, choice.packing)
    bounded = settled.model_copy(update=dict(max_length=max(lengths), device='cuda'))
    assert estimate_for(bounded, SHAPES[name], limit_bytes=gib * GiB).fits(gib * GiB)


def test_nothing_fits_and_the_least_is_left():
    config = make_config(model='Llama-3.1-8B', max_length=2048)
    settled, choice = autoconfigure(config, [2048], 3 * GiB)
    assert choice is None and (settled.method, settled.per_device_train_batch_size, settled.gradient_accumulation_steps) == ('qlora', 1, 8)
    kept, choice = autoconfigure(make_config(model='Llama-3.1-8B', max_length=2048, method='lora', per_device_train_batch_size=4), [2048], 3 * GiB)
    assert choice is None and (kept.method, kept.per_device_train_batch_size, kept.gradient_accumulation_steps) == ('lora', 4, 1)


def test_pairs_and_processors_keep_their_settings():
    for other in (dict(objective='dpo'), dict(device='cpu')):
        config = make_config(model='Llama-3.1-8B', **other)
        assert autoconfigure(config, [2048], 24 * GiB) == (config, None)


def test_a_card_of_this_machine_is_used(monkeypatch, tmp_path):
    from homelab_ft.plan import autoconfigure as page
    from types import SimpleNamespace
    config = make_config(model='Llama-3.1-8B', max_length=2048)
    monkeypatch.setenv('HOMELAB_FT_PROBES', str(tmp_path / 'probes.json'))
    monkeypatch.setattr(page, 'detect_machine', lambda: SimpleNamespace(device='cpu', total_bytes=64 * GiB, gpu_name=None))
    monkeypatch.setattr(page, 'live_gpu', lambda: None)
    assert autoconfigure(config, [2048]) == (config, None)
    monkeypatch.setattr(page, 'detect_machine', lambda: SimpleNamespace(device='cuda', total_bytes=24 * GiB, gpu_name='A card'))
    assert autoconfigure(config, [2048]) == autoconfigure(config, [2048], 24 * GiB)
    monkeypatch.setattr(page, 'live_gpu', lambda: SimpleNamespace(usable_bytes=12 * GiB))       # somebody else has the rest
    assert autoconfigure(config, [2048]) == autoconfigure(config, [2048], 12 * GiB)
    (tmp_path / 'probes.json').write_text('{"A card": {"correction": 300000000}, "Another": {"correction": 7}}')      # and its context is larger than elsewhere
    (here, chosen), (there, usual) = autoconfigure(config, [2048]), autoconfigure(config, [2048], 12 * GiB)
    assert autoconfigure(config, [2048], 12 * GiB, 300_000_000) == (here, chosen) and here == there
    assert estimate_for(here, SHAPES['Llama-3.1-8B'], overhead_offset=300_000_000).peak - estimate_for(here, SHAPES['Llama-3.1-8B']).peak == 300_000_000
