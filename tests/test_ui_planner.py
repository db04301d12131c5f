"ui.planner: odd wishes, escaping, valid pictures, speed."
import time
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import GiB
from homelab_ft.plan.vram import PARTS
from homelab_ft.ui.planner import CHOICES, PlannerState, bar_svg, card_bytes, planner_estimate, planner_html, planner_widget

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
    page = planner_html(PlannerState(model=text + '<i>'))
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


def test_redraw_is_fast():
    widget = planner_widget(PlannerState())
    start = time.perf_counter()
    for i in range(40): widget.controls['lora_r'].value = (8, 32)[i % 2]
    assert (time.perf_counter() - start) / 40 < 0.05
