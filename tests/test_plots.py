"plots: any numbers give a picture."
import xml.etree.ElementTree as ET

from hypothesis import given, settings, strategies as st

from homelab_ft.plots import loss_svg, nice_ticks


@given(st.lists(st.tuples(st.integers(0, 10**6), st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.none())), max_size=30), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_any_curve_draws(points, total):
    "Any numbers, NaN and infinity among them, give well-formed SVG with finite coordinates."
    curves = {'train': [dict(step=s, loss=l) for s, l in points], 'eval': [dict(step=s, loss=l) for s, l in points[:3]]}
    texts = [text for node in ET.fromstring(loss_svg(curves, total)).iter() for text in node.attrib.values()]
    assert not any(word in text for text in texts for word in ('nan', 'inf'))


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
@settings(deadline=None)
def test_ticks_cover(low, span):
    ticks = nice_ticks(low, low + span)
    slack = 1e-6 * max(1.0, abs(low), span)
    assert 2 <= len(ticks) <= 8 and ticks[0] <= low + slack and ticks[-1] >= low + span - slack and ticks == sorted(ticks)


@given(st.lists(st.fixed_dictionaries({'event': st.sampled_from(['paused', 'checkpoint', 'learning_rate', 'other', None])},
                                      optional={'step': st.one_of(st.integers(-5, 10**6), st.none(), st.just('<3>')), 'value': st.one_of(st.floats(0, 1), st.none())})))
@settings(max_examples=100, deadline=None)
def test_any_events_draw(happened):
    "Events of old and of torn files give well-formed SVG, and every mark has its place inside the picture."
    curves = {'train': [dict(step=5, loss=2.0)], 'eval': []}
    nodes = list(ET.fromstring(loss_svg(curves, 10, happened)).iter())
    places = [float(node.attrib['transform'][10:].split()[0]) for node in nodes if 'transform' in node.attrib]
    assert all(0 <= x <= 640 for x in places)
