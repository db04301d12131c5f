"plan.cost: the interval's properties."
import math

import pytest
from hypothesis import given, strategies as st

from homelab_ft.core import ConfigError
from homelab_ft.plan.cost import pilot_table, project, student_95, total_seconds

SECONDS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20)


@given(SECONDS, st.integers(0, 10**6))
def test_ordered(steps, total):
    low, middle, high = total_seconds(steps, total)
    assert 0 <= low <= middle + 1e-9 and middle <= high + 1e-9 and math.isfinite(high)


@given(SECONDS, st.integers(1, 1000), st.floats(0.1, 10))
def test_scales_with_the_clock(steps, total, factor):
    ours, scaled = total_seconds(steps, total), total_seconds([s * factor for s in steps], total)
    assert scaled == pytest.approx([v * factor for v in ours], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize('df, printed', [(1, 12.706), (5, 2.571), (10, 2.228), (12, 2.179), (15, 2.131), (20, 2.086), (40, 2.021), (120, 1.980), (10**6, 1.960)])
def test_student(df, printed): assert student_95(df) == pytest.approx(printed, abs=0.03)


def test_warm_up_dropped_only_with_others():
    one, two = (project(s, 100, 65, 'assumed 65 W', 0.3) for s in ([2.0], [9.0, 2.0]))
    assert one.seconds == two.seconds == 200 and one.pilot_steps == two.pilot_steps == 1


@pytest.mark.parametrize('steps', [[], [-1.0], [float('inf')], [1.0, float('nan')]])
def test_refused(steps):
    with pytest.raises(ConfigError, match='no usable steps'): project(steps, 10, 65, 'x', 0.3)


def test_source_is_shown_and_escaped():
    html = project([1.0, 1.0], 10, 65, '<b>meter</b>', 0.3)._repr_html_()
    assert '&lt;b&gt;meter' in html and '<b>meter' not in html
    assert 'assumed 65 W' in str(pilot_table(project([1.0, 1.0], 10, 65, 'assumed 65 W', 0.3)))
