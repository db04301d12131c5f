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
