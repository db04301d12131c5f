"train.projection: the interval's properties."
import math

import pytest
from hypothesis import given, strategies as st

from homelab_ft.core import ConfigError
from homelab_ft.train.projection import project, total_seconds

SECONDS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20)


@given(SECONDS, st.integers(0, 10**6))
def test_ordered(steps, total):
    low, middle, high = total_seconds(steps, total)
    assert 0 <= low <= middle + 1e-9 and middle <= high + 1e-9 and math.isfinite(high)


@given(SECONDS, st.integers(1, 1000), st.floats(0.1, 10))
def test_scales_with_the_clock(steps, total, factor):
    expected = [v * factor for v in total_seconds(steps, total)]
    assert total_seconds([s * factor for s in steps], total) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize('n, printed', [(2, 12.706), (6, 2.571), (41, 2.021)])
def test_quantile_is_the_one_of_the_printed_table(n, printed):
    steps = [1.0, 3.0] * (n // 2) + [2.0] * (n % 2)
    mean = sum(steps) / n
    deviation = math.sqrt(sum((s - mean)**2 for s in steps) / (n - 1))
    low, middle, high = total_seconds(steps, 100)
    assert (high - middle) / (deviation * math.sqrt(100 + 100**2 / n)) == pytest.approx(printed, abs=1e-3)


def test_first_step_is_left_out_only_with_others():
    one, two = (project(s, 100, 65, 'assumed 65 W', 0.3) for s in ([2.0], [9.0, 2.0]))
    assert one.seconds == two.seconds == 200 and one.measured_steps == two.measured_steps == 1


@pytest.mark.parametrize('steps', [[], [-1.0], [float('inf')], [1.0, float('nan')]])
def test_refused(steps):
    with pytest.raises(ConfigError, match='no usable steps'): project(steps, 10, 65, 'x', 0.3)


def test_source_is_shown_and_escaped():
    html = project([1.0, 1.0], 10, 65, '<b>meter</b>', 0.3)._repr_html_()
    assert '&lt;b&gt;meter' in html and '<b>meter' not in html
