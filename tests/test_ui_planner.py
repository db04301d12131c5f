"ui.planner: odd wishes, escaping, valid pictures, remedies, the map of length by batch, speed."
import html, re, statistics, time
import xml.etree.ElementTree as ET
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import GiB
from homelab_ft.plan.remedies import explain
from homelab_ft.plan.model_catalog import MIXTURES
from homelab_ft.plan.limits import _frontier, length_batch_map
from homelab_ft.plan.memory.estimate import PARTS, METHODS, estimate, estimate_with_checkpointing, model_shape
from homelab_ft.ui import planner
from homelab_ft.ui.planner import CHOICES, PlannerState, bar_svg, card_bytes, heat_color, map_html, map_svg, map_words, planner_estimate, planner_html, planner_map, planner_widget, ways_html

STATES = st.builds(PlannerState, **{name: st.sampled_from([o for o in options if o != 'embedded']) for name, options in CHOICES.items()})


@given(STATES)
@settings(max_examples=150, deadline=None)
def test_every_position_of_the_sliders(state):
    "Whatever the controls say, there is a page, and its picture is well-formed and inside its frame."
    page = planner_html(state)
    if '<svg' not in page:
        assert 'beyond what the model knows' in page
        return
    svg = ET.fromstring(page[page.index('<svg'):page.index('</svg>') + 6])
    width = float(svg.get('viewBox').split()[2])
    for rect in svg.iter('rect'):
        assert float(rect.get('width')) >= 0 and float(rect.get('x')) + float(rect.get('width')) <= width
    assert ('Fits' in page) == planner_estimate(state).fits(card_bytes(state.card))


@given(st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_any_text_as_model(text):
    if text.count('/') == 1: text = text.replace('/', '')        # would ask the Hub
    for page in (planner_html(PlannerState(model=text + '<i>')), map_html(PlannerState(model=text + '<i>')), map_html(PlannerState(card=text + '<i>'))):
        assert '<i>' not in page and 'border-left' in page


def test_bars_add_up():
    est = planner_estimate(PlannerState())
    svg = ET.fromstring(bar_svg(est, 24 * GiB))
    total = sum(float(r.get('width')) for r in svg.iter('rect'))
    assert total / 480 == pytest.approx(sum(sum(p.values()) for p in est.phases.values()) / (24 * GiB), abs=0.01)
    assert {p for p in PARTS if est.parts[p]} <= set(PARTS)


def test_model_folder_is_a_choice(tmp_path):
    widget = planner_widget(PlannerState(model=str(tmp_path)))
    assert str(tmp_path) in widget.controls['model'].options and 'Fits' not in widget.view.value


@pytest.mark.parametrize('name', list(CHOICES))
def test_each_control_redraws(name):
    start = PlannerState(model='Qwen3-0.6B', method='lora', batch_size=2, length=1024)
    widget = planner_widget(start)
    before = widget.view.value
    control = widget.controls[name]
    control.value = [v for v in control.options if v != control.value][-1] if hasattr(control, 'options') else not control.value
    assert widget.view.value != before


# ---------------------------------------------------------------- ways to lower the peak


def svg_of(page):
    "The first picture, parsed."
    return ET.fromstring(page[page.index('<svg'):page.index('</svg>') + 6])


def test_the_table_is_what_explain_says():
    state = PlannerState(method='lora', batch_size=4)
    wishes = dict(method='lora', batch_size=4, optim='adamw_8bit')
    shape, limit = model_shape(state.model), card_bytes(state.card)
    rows = explain(estimate_with_checkpointing(shape, limit, **wishes), shape, limit, **wishes).rows
    page = planner_html(state)
    assert [[html.unescape(c) for c in re.findall('<td>(.*?)</td>', row)] for row in re.findall('<tr>(<td>.*?)</tr>', page)] == rows and len(rows) == 3


@pytest.mark.parametrize('asked', ['no', 'yes'])
def test_what_is_asked_of_checkpointing_reaches_the_table_and_the_map(asked):
    state = PlannerState(method='lora', batch_size=4, gradient_checkpointing=asked)
    lengths, batches, peaks = planner_map(state)
    for length, batch in ((2048, 4), (512, 1)):
        est = estimate(model_shape(state.model), method='lora', optim='adamw_8bit', length=length, batch_size=batch, gradient_checkpointing=asked == 'yes')
        assert peaks[lengths.index(length), batches.index(batch)] == est.min_required
    assert '<table' in ways_html(planner_estimate(state), state)


def test_a_remedy_with_markup_is_escaped(monkeypatch):
    monkeypatch.setattr(planner, 'explain', lambda *a, **k: planner.Table(['<b>'], [['<script>']], '<i>'))
    page = planner_html(PlannerState())
    assert '<script>' not in page and '&lt;script&gt;' in page and '<b>' not in page and '<i>' not in page


def test_no_remedies_make_a_sentence(monkeypatch):
    monkeypatch.setattr(planner, 'explain', lambda *a, **k: planner.Table(['way'], []))
    assert 'None of the usual ways' in planner_html(PlannerState()) and '<svg' in planner_html(PlannerState())


def test_an_error_of_explain_is_a_sentence_under_the_bars():
    state = PlannerState()
    page = ways_html(planner_estimate(PlannerState(lora_r=64)), state)
    assert 'No ways to lower the peak are known here' in page and '<table' not in page


# ---------------------------------------------------------------- the map


def test_the_map_shows_every_number_and_frames_the_settings():
    peaks = np.array([[1.24, 2], [3, 40]]) * GiB
    svg = ET.fromstring(map_svg(peaks, 8 * GiB, [256, 512], [1, 2], here=(512, 1)))
    assert {t.text for t in svg.iter('text')} == {'tokens per row', 'rows per batch', '256', '512', '1', '2', '1.2', '2.0', '3.0', '40.0'}
    assert [t.text for t in svg.iter('title')] == ['1 × 256 tokens: 1.24 GiB', '2 × 256 tokens: 2.00 GiB', '1 × 512 tokens: 3.00 GiB', '2 × 512 tokens: 40.00 GiB']
    cells = [r for r in svg.iter('rect') if len(r)]
    frame = [r for r in svg.iter('rect') if not len(r)][0]
    assert float(cells[2].get('x')) < float(frame.get('x')) < float(cells[3].get('x')) and float(frame.get('y')) == float(cells[2].get('y')) + 2
    assert float(cells[2].get('y')) < float(cells[0].get('y'))       # longer rows stand above
    assert [r.get('fill') for r in cells] == [heat_color(n / 16) for n in (1.24, 2, 3, 40)]


@given(st.integers(1, 6), st.integers(1, 6), st.data())
@settings(max_examples=40, deadline=None)
def test_the_line_parts_what_fits(rows, columns, data):
    "Every cell that fits lies below the line in its column, every other one above; the words say the same."
    counts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=columns, max_size=columns)), reverse=True)
    fits = np.arange(rows)[:, None] < np.array(counts)
    lengths, batches = [2**(7 + i) for i in range(rows)], [1 + i for i in range(columns)]
    svg = ET.fromstring(map_svg(np.where(fits, 1, 100) * GiB, 10 * GiB, lengths, batches))
    points = [tuple(map(float, p.split(','))) for p in svg.find('{*}polyline').get('points').split()]
    cells = [(float(r.get('x')), float(r.get('y'))) for r in svg.iter('rect')]
    assert len(points) == 2 * columns and len(cells) == rows * columns
    for (y, x), yes in np.ndenumerate(fits):
        left, top = cells[y * columns + x]
        (x0, at), (x1, same) = points[2 * x:2 * x + 2]
        assert (x0, x1, at) == (left, left + planner.CELL_WIDTH, same) and (at <= top) == yes and (yes or at >= top + planner.CELL_HEIGHT)
    assert svg.get('aria-label') == map_words(fits, lengths, batches)
    assert svg.get('aria-label').count('no length') == counts.count(0) and svg.get('role') == 'img'


def test_both_pictures_take_the_same_peaks():
    from matplotlib.figure import Figure
    from homelab_ft.plan.limits import plot_map
    lengths, batches, peaks = planner_map(PlannerState())
    ax = plot_map(peaks, card_bytes('rtx-4090'), lengths, batches, ax=Figure().subplots())
    shown = [t.text for t in svg_of(map_html(PlannerState())).iter('text')]
    assert [t.get_text() for t in ax.texts] == shown[1:1 + peaks.size]
    shape = model_shape('Llama-3.1-8B')
    direct = [[estimate_with_checkpointing(shape, card_bytes('rtx-4090'), optim='adamw_8bit', length=n, batch_size=b).min_required for b in batches] for n in lengths]
    assert (peaks == np.array(direct)).all()


@pytest.mark.parametrize('shape, wishes', [('Qwen3-0.6B', dict(method='lora', label_share=0.1)), ('gemma-2-2b', dict(method='qlora')),
                                           ('Qwen3-0.6B', dict(method='lora', padding_free=False))])
def test_pairs_of_as_many_tokens_are_computed_once_where_only_tokens_count(shape, wishes):
    shape, lengths, batches = model_shape(shape), [96, 256, 768, 1024], [1, 3, 8]
    peaks = length_batch_map(8 * GiB, shape, lengths, batches, **wishes)
    assert all(peaks[i, j] == estimate_with_checkpointing(shape, 8 * GiB, length=n, batch_size=b, **wishes).min_required for (i, n), (j, b) in product(enumerate(lengths), enumerate(batches)))


def test_colours_are_cividis():
    "As near as the page says; and lighter all the way, which is what makes them readable in grey."
    from matplotlib import colormaps
    ours = np.array([[int(heat_color(share)[i:i + 2], 16) for i in (1, 3, 5)] for share in np.linspace(0, 1, 65)])
    assert np.abs(ours / 255 - colormaps['cividis'](np.linspace(0, 1, 65))[:, :3]).max() < 0.1
    assert (np.diff(ours @ [0.2126, 0.7152, 0.0722]) > 0).all()


def test_numbers_can_be_read_on_their_colours():
    "Contrast of at least 4 to 1, by the formula of the Web Content Accessibility Guidelines."
    linear = lambda c: c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
    light = lambda color: sum(w * linear(int(color[i:i + 2], 16) / 255) for w, i in zip((0.2126, 0.7152, 0.0722), (1, 3, 5)))
    for n in range(1, 60):
        svg = ET.fromstring(map_svg(np.array([[n * GiB]]), 20 * GiB, [1], [1]))
        ground, ink = light(next(svg.iter('rect')).get('fill')), dict(white=1, black=0)[[t for t in svg.iter('text') if t.get('pointer-events')][0].get('fill')]
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) > 4


def test_what_the_model_does_not_know_is_not_on_the_map():
    for model in ('TinyLlama-1.1B', 'embedded'):
        lengths, _, peaks = planner_map(PlannerState(model=model, length=32768))
        assert lengths[-1] == model_shape(model).max_position_embeddings and peaks.shape[0] == len(lengths)
    assert len(list(svg_of(map_html(PlannerState(model='TinyLlama-1.1B', length=32768))).iter('rect'))) == 5 * 7       # no frame


# ---------------------------------------------------------------- all of it


@pytest.mark.parametrize('model', CHOICES['model'])
def test_every_model_with_every_method_and_optimizer(model):
    "A table and a map for all of them; cards take turns."
    cards = iter(3 * CHOICES['card'])
    for method, optim in product(METHODS, CHOICES['optim']):
        state = PlannerState(model=model, method=method, optim=optim, card=next(cards), length=512, batch_size=2)
        assert '<table' in planner_html(state) and svg_of(map_html(state)) is not None


@pytest.mark.parametrize('card', CHOICES['card'])
def test_every_card(card):
    state = PlannerState(model='Qwen2.5-7B', card=card)
    lengths, batches, peaks = planner_map(state)
    label = svg_of(map_html(state)).get('aria-label')
    assert label == map_words(peaks <= 0.95 * card_bytes(card), lengths, batches) and '<table' in planner_html(state)
    assert list(_frontier(peaks <= 0.95 * card_bytes(card))[1][::2] + 0.5) == (peaks <= 0.95 * card_bytes(card)).sum(axis=0).tolist()


@pytest.mark.parametrize('model', MIXTURES)
def test_mixtures_of_experts_get_a_sentence(model):
    for page in (planner_html(PlannerState(model=model, length=512)), map_html(PlannerState(model=model, length=512))):
        assert 'mixture of experts' in page and '<svg' not in page and '<table' not in page


def test_a_folded_map_is_not_drawn(monkeypatch):
    calls, whole = [], planner.map_html
    monkeypatch.setattr(planner, 'map_html', lambda state: calls.append(state) or whole(state))
    widget = planner_widget(PlannerState(model='Qwen3-0.6B'))
    assert len(calls) == 1
    widget.fold.selected_index = None
    widget.controls['lora_r'].value = 64
    assert len(calls) == 1
    widget.fold.selected_index = 0
    assert len(calls) == 2 and calls[-1].lora_r == 64


def test_redraw_is_fast():
    "50 ms on a quiet machine; a busy one may take three times as long. Run with -s to see the medians."
    widget, took = planner_widget(PlannerState()), {}
    for name, index in (('folded', None), ('unfolded', 0)):
        widget.fold.selected_index, times = index, []
        for i in range(30):
            start = time.perf_counter()
            widget.controls['lora_r'].value = (8, 32)[i % 2]
            times.append(1000 * (time.perf_counter() - start))
        took[name] = statistics.median(times)
    print({name: f'{ms:.1f} ms' for name, ms in took.items()})
    assert max(took.values()) < 150
