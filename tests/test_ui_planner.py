"ui.planner, ui.svg: odd states, escaping, valid pictures, remedies, the map of length by batch."
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import GiB
from homelab_ft.config import load_config
from homelab_ft.plan.memory.estimate import METHODS, PART_COLORS, estimate, model_shape
from homelab_ft.plan.model_catalog import MIXTURES
from homelab_ft.ui import planner, svg
from homelab_ft.ui.planner import (
    CHOICES, PlannerState, map_html, planner_cost, planner_estimate, planner_html, planner_map, planner_svg, planner_widget, suggestions, suggestions_html)
from homelab_ft.ui.svg import bar_svg, heat_color, legend_html, map_svg, map_words

STATES = st.builds(PlannerState, **{name: st.sampled_from([o for o in options if o != 'embedded']) for name, options in CHOICES.items()})


def svg_of(page):
    "The first picture, parsed."
    return ET.fromstring(page[page.index('<svg'):page.index('</svg>') + 6])


@given(STATES)
@settings(max_examples=60, deadline=None)
def test_every_position_of_the_sliders(state):
    "Whatever the controls say, there is a page, and its picture is well-formed and inside its frame."
    page = planner_html(state)
    if '<svg' not in page:
        assert 'beyond what the model knows' in page
        return
    picture = svg_of(page)
    width = float(picture.get('viewBox').split()[2])
    for rect in picture.iter('rect'):
        assert float(rect.get('width')) >= 0 and float(rect.get('x')) + float(rect.get('width')) <= width
    assert ('Fits' in page) == planner_estimate(state).fits(state.limit)


@given(st.text(max_size=40))
@settings(max_examples=30, deadline=None)
def test_any_text_as_model(text):
    if text.count('/') == 1: text = text.replace('/', '')        # would ask the Hub
    for page in (planner_html(PlannerState(model=text + '<i>')), map_html(PlannerState(model=text + '<i>')), map_html(PlannerState(gpu=text + '<i>'))):
        assert '<i>' not in page and 'border-left' in page


def test_bars_add_up():
    est = planner_estimate(PlannerState())
    total = sum(float(r.get('width')) for r in ET.fromstring(bar_svg(est, 24 * GiB)).iter('rect'))
    assert total / svg.BAR_WIDTH == pytest.approx(sum(sum(p.values()) for p in est.phases.values()) / (24 * GiB), abs=0.01)


def test_model_folder_is_a_choice(tmp_path):
    widget = planner_widget(PlannerState(model=str(tmp_path)))
    assert str(tmp_path) in widget.controls['model'].options and 'Fits' not in widget.view.value


def test_each_control_redraws():
    for name in CHOICES:
        widget = planner_widget(PlannerState(model='Qwen3-0.6B', method='lora', batch_size=2, length=1024))
        before, control = widget.view.value, widget.controls[name]
        control.value = [v for v in control.options if v != control.value][-1]
        assert widget.view.value != before, name


@pytest.mark.parametrize('state', [PlannerState(), PlannerState(method='full', gpu='h200'), PlannerState(model='Qwen3-0.6B', method='lora', length=8192)], ids=lambda s: s.method)
def test_the_legend_has_the_order_of_the_bars(state):
    "Whatever colour is in a bar is in the legend, and comes in the same order."
    est = planner_estimate(state)
    legend = re.findall('background:(#[0-9A-F]{6})', legend_html(est))
    bars = {}
    for rect in ET.fromstring(bar_svg(est, state.limit)).iter('rect'): bars.setdefault(rect.get('y'), []).append(rect.get('fill'))
    assert all(row == [color for color in legend if color in row] for row in bars.values())
    assert {color for row in bars.values() for color in row} == {*legend} <= {*PART_COLORS.values()}


# ---------------------------------------------------------------- what would fit


@given(STATES)
@settings(max_examples=40, deadline=None)
def test_a_suggestion_is_what_the_controls_then_say(state):
    try: est, found = planner_estimate(state), suggestions(state)
    except Exception: return      # a state that cannot be, as above
    assert len(found) <= 3 and not (found and est.fits(state.limit))
    for remedy, applied in found:
        assert planner_estimate(applied) == remedy.memory and remedy.memory.fits(state.limit)
        assert f'{remedy.memory.peak / GiB:.2f}'[:-1] in suggestions_html(est, state)
        assert applied.batch_size * applied.gradient_accumulation_steps == state.batch_size * state.gradient_accumulation_steps


def test_a_suggestion_is_applied_by_its_button():
    widget = planner_widget(PlannerState(method='lora', batch_size=8, length=4096))
    shown = [button.layout.display != 'none' for button in widget.apply]
    assert 'Does not fit' in widget.view.value and shown == [i < len(widget.found) for i in range(3)] and shown[0]
    expected = widget.found[0][1]
    widget.apply[0].click()
    assert widget.state == expected and widget.view.value == planner_html(expected) and 'Fits' in widget.view.value
    assert all(button.layout.display == 'none' for button in widget.apply)


@pytest.mark.parametrize('checkpointing', ['none', 'all layers'])
def test_checkpointing_reaches_the_map(checkpointing):
    state = PlannerState(method='lora', batch_size=4, gradient_checkpointing=checkpointing)
    around = planner_map(state)
    for length, batch in ((2048, 4), (512, 1)):
        est = estimate(model_shape(state.model), state.spec, length=length, batch_size=batch, gradient_checkpointing=checkpointing == 'all layers')
        assert around.peaks[around.lengths.index(length), around.batches.index(batch)] == est.min_required


def test_a_suggestion_with_markup_is_escaped(monkeypatch):
    monkeypatch.setattr(planner, 'suggestions_table', lambda found: planner.Table(['<b>'], [['<script>']], '<i>'))
    page = planner_html(PlannerState(method='lora', batch_size=8, length=4096))
    assert '<script>' not in page and '&lt;script&gt;' in page and '<b>' not in page and '<i>' not in page


def test_where_nothing_fits_a_sentence_says_so():
    page = planner_html(PlannerState(model='Llama-3.1-70B', gpu='rtx-3060-12gb'))
    assert 'smaller model' in page and '<table' not in page and '<svg' in page


# ---------------------------------------------------------------- time, and the file


def test_time_and_cost_are_beside_the_memory():
    state = PlannerState(rows=2000, row_tokens=300, epochs=2)
    cost = planner_cost(state, planner_estimate(state))
    assert f'{cost.short}, for 2,000 rows × 300 tokens × 2 epochs' in planner_html(state) and cost.hours_low < cost.hours < cost.hours_high
    double = planner_cost(PlannerState(rows=4000, row_tokens=300, epochs=2), planner_estimate(state))
    assert double.hours == pytest.approx(2 * cost.hours) and double.cost == pytest.approx(2 * cost.cost)
    assert 'time not known' in planner_html(PlannerState(gpu='24 GiB'))


def test_the_file_is_what_the_controls_say_and_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    widget = planner_widget(PlannerState(lora_r=8, batch_size=2, gradient_checkpointing='all layers'))
    widget.save.click()
    config = load_config('plan.yaml')
    assert (config.lora_r, config.per_device_train_batch_size, config.gradient_checkpointing) == (8, 2, True)
    assert str(tmp_path / 'plan.yaml') in widget.message.value
    first = (tmp_path / 'plan.yaml').read_text()
    widget.controls['lora_r'].value = 32
    widget.save.click()
    assert (tmp_path / 'plan.yaml').read_text() == first and load_config('plan-2.yaml').lora_r == 32
    assert 'plan.yaml is there already and was kept' in widget.message.value
    widget.path.value = 'plan.yaml/<b>.yaml'
    widget.save.click()
    assert '<b>' not in widget.message.value and planner.COLORS['fails'] in widget.message.value
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ['plan-2.yaml', 'plan.yaml']


def test_the_picture_stands_alone():
    "Well-formed, everything inside its frame, and readable in both themes."
    state = PlannerState(method='lora', model='Llama-3.2-1B')
    picture = ET.fromstring(planner_svg(state))
    assert picture.tag == '{http://www.w3.org/2000/svg}svg'
    _, _, width, height = map(float, picture.get('viewBox').split())
    text = ' '.join(picture.itertext())
    assert 'Fits: peak' in text and 'checkpointing: none' in text and 'prefers-color-scheme: dark' in text
    for rect in picture.iter('{*}rect'): assert float(rect.get('x')) + float(rect.get('width')) <= width
    assert all(7 * len(t.text) < width for t in picture.iter('{*}text') if t.get('x') == '24')


# ---------------------------------------------------------------- the map


def test_the_map_shows_every_number_and_frames_the_settings():
    peaks = np.array([[1.24, 2], [3, 40]]) * GiB
    picture = ET.fromstring(map_svg(peaks, 8 * GiB, [256, 512], [1, 2], here=(512, 1)))
    assert {t.text for t in picture.iter('text')} == {'tokens per sequence', 'sequences per micro-batch', '256', '512', '1', '2', '1.2', '2.0', '3.0', '40.0'}
    assert [t.text for t in picture.iter('title')] == ['1 × 256 tokens: 1.24 GiB', '2 × 256 tokens: 2.00 GiB', '1 × 512 tokens: 3.00 GiB', '2 × 512 tokens: 40.00 GiB']
    cells = [r for r in picture.iter('rect') if len(r)]
    frame = [r for r in picture.iter('rect') if not len(r)][0]
    assert float(cells[2].get('x')) < float(frame.get('x')) < float(cells[3].get('x')) and float(frame.get('y')) == float(cells[2].get('y')) + 2
    assert float(cells[2].get('y')) < float(cells[0].get('y'))       # longer sequences are above
    assert [r.get('fill') for r in cells] == [heat_color(n / 16) for n in (1.24, 2, 3, 40)]


@given(st.integers(1, 6), st.integers(1, 6), st.data())
@settings(max_examples=40, deadline=None)
def test_the_line_divides_what_fits(rows, columns, data):
    "Every cell that fits lies below the line in its column, every other one above; the words say the same."
    counts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=columns, max_size=columns)), reverse=True)
    fits = np.arange(rows)[:, None] < np.array(counts)
    lengths, batches = [2**(7 + i) for i in range(rows)], [1 + i for i in range(columns)]
    picture = ET.fromstring(map_svg(np.where(fits, 1, 100) * GiB, 10 * GiB, lengths, batches))
    points = [tuple(map(float, p.split(','))) for p in picture.find('{*}polyline').get('points').split()]
    cells = [(float(r.get('x')), float(r.get('y'))) for r in picture.iter('rect')]
    assert len(points) == 2 * columns and len(cells) == rows * columns
    for (y, x), yes in np.ndenumerate(fits):
        left, top = cells[y * columns + x]
        (x0, at), (x1, same) = points[2 * x:2 * x + 2]
        assert (x0, x1, at) == (left, left + svg.CELL_WIDTH, same) and (at <= top) == yes and (yes or at >= top + svg.CELL_HEIGHT)
    assert picture.get('aria-label') == map_words(fits, lengths, batches)


def test_colours_are_cividis():
    "As near as the page says; and lighter all the way, which is what makes them readable in grey."
    from matplotlib import colormaps
    ours = np.array([[int(heat_color(share)[i:i + 2], 16) for i in (1, 3, 5)] for share in np.linspace(0, 1, 65)])
    assert np.abs(ours / 255 - colormaps['cividis'](np.linspace(0, 1, 65))[:, :3]).max() < 0.1
    assert (np.diff(ours @ [0.2126, 0.7152, 0.0722]) > 0).all()


def test_numbers_can_be_read_on_their_colours():
    "Contrast of at least 4 to 1, by the formula of the Web Content Accessibility Guidelines."
    def linear(c): return c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
    def light(color): return sum(w * linear(int(color[i:i + 2], 16) / 255) for w, i in zip((0.2126, 0.7152, 0.0722), (1, 3, 5)))
    for n in range(1, 60):
        picture = ET.fromstring(map_svg(np.array([[n * GiB]]), 20 * GiB, [1], [1]))
        ground, ink = light(next(picture.iter('rect')).get('fill')), dict(white=1, black=0)[[t for t in picture.iter('text') if t.get('pointer-events')][0].get('fill')]
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) > 4


def test_what_the_model_does_not_know_is_not_on_the_map():
    for model in ('TinyLlama-1.1B', 'embedded'):
        around = planner_map(PlannerState(model=model, length=32768))
        assert around.lengths[-1] == model_shape(model).max_position_embeddings and around.peaks.shape[0] == len(around.lengths)
    assert len(list(svg_of(map_html(PlannerState(model='TinyLlama-1.1B', length=32768))).iter('rect'))) == 5 * 7       # no frame


# ---------------------------------------------------------------- all of it


def check_state(state):
    "A picture, and a map whose words are those of its numbers."
    assert '<svg' in planner_html(state)
    around = planner_map(state)
    label = svg_of(map_html(state)).get('aria-label')
    assert label == map_words(around.peaks <= 0.95 * state.limit, around.lengths, around.batches)


def test_some_models_and_gpus():
    for model, method, gpu in [('embedded', 'full', 'rtx-4090'), ('Phi-3-mini', 'int8', 't4'), ('gemma-2-9b', 'lora', 'h200')]:
        check_state(PlannerState(model=model, method=method, gpu=gpu, length=512, batch_size=2))


@pytest.mark.slow
def test_every_model_with_every_method_optimizer_and_gpu():
    gpus = iter(16 * len(CHOICES['model']) * CHOICES['gpu'])
    for model in CHOICES['model']:
        for method in METHODS:
            for optim in CHOICES['optim']: check_state(PlannerState(model=model, method=method, optim=optim, gpu=next(gpus), length=512, batch_size=2))


def test_mixtures_of_experts_get_a_sentence():
    for model in MIXTURES:
        page = planner_html(PlannerState(model=model, length=512))
        assert 'mixture of experts was not measured' in page and '±' in page and '<svg' in page


def test_a_folded_map_is_not_drawn(monkeypatch):
    calls, draw = [], planner.map_html
    monkeypatch.setattr(planner, 'map_html', lambda state: calls.append(state) or draw(state))
    widget = planner_widget(PlannerState(model='Qwen3-0.6B'))
    assert len(calls) == 1
    widget.fold.selected_index = None
    widget.controls['lora_r'].value = 64
    assert len(calls) == 1
    widget.fold.selected_index = 0
    assert len(calls) == 2 and calls[-1].lora_r == 64
