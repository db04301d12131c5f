"plan.live: cards that answer little, oddly, or not at all."
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from homelab_ft.hardware import gpu as L


class Error(Exception): "What the stand-in raises."


FULL = dict(DeviceGetName='Card', DeviceGetMemoryInfo=SimpleNamespace(total=1000, free=300, reserved=50), DeviceGetPowerUsage=250_000, DeviceGetEnforcedPowerLimit=300_000,
            DeviceGetTemperature=70, DeviceGetClockInfo=1800, DeviceGetMaxClockInfo=2100, DeviceGetCurrentClocksEventReasons=0,
            DeviceGetComputeRunningProcesses=[SimpleNamespace(pid=2**30, usedGpuMemory=600)], DeviceGetGraphicsRunningProcesses=[], SystemGetProcessName='python')
FIELDS = dict(DeviceGetName='name', DeviceGetPowerUsage='power_watts', DeviceGetEnforcedPowerLimit='power_limit_watts', DeviceGetTemperature='temperature',
              DeviceGetClockInfo='clock_mhz', DeviceGetMaxClockInfo='max_clock_mhz', DeviceGetCurrentClocksEventReasons='slowed_by')


def nvml(**answers):
    "A stand-in that gives these answers; an exception is raised, and a name that is missing is missing."
    def say(answer):
        def function(*args):
            if isinstance(answer, Exception): raise answer
            return answer(*args) if callable(answer) else answer
        return function
    return SimpleNamespace(NVMLError=Error, nvmlMemory_v2=1, **{f'nvml{name}': say(a) for name, a in answers.items()})


def test_everything():
    live = L.read_gpu_status(nvml(**FULL), 'card')
    assert (live.total_bytes, live.free_bytes, live.reserved_bytes, live.usable_bytes) == (1000, 300, 50, 950)
    assert (live.power_watts, live.power_limit_watts, live.slowed_by) == (250, 300, [])
    assert live.processes == [L.Process(2**30, 'python', 600)]
    assert 'slowed by' in str(live) and 'nothing' in str(live) and '250 W of 300 W' in str(live) and '<table' in live._repr_html_()


@pytest.mark.parametrize('question', FULL)
@pytest.mark.parametrize('how', ['refused', 'missing'])
def test_one_answer_less(question, how):
    "Each figure fails alone."
    answers = {q: a for q, a in FULL.items() if q != question} | ({question: Error('not supported')} if how == 'refused' else {})
    live, whole = L.read_gpu_status(nvml(**answers), 'card'), L.read_gpu_status(nvml(**FULL), 'card')
    lost = {f for f in vars(whole) if getattr(live, f) != getattr(whole, f)}
    if question in FIELDS: assert lost == {FIELDS[question]} and getattr(live, FIELDS[question]) is None
    elif question == 'DeviceGetMemoryInfo': assert lost == {'total_bytes', 'free_bytes', 'reserved_bytes'} and live.usable_bytes is None
    elif question == 'SystemGetProcessName': assert live.processes == [L.Process(2**30, None, 600)]
    assert str(live)


@given(st.sets(st.sampled_from(sorted(FULL))), st.sets(st.sampled_from(sorted(FULL))))
def test_any_silence_is_shown(missing, refused):
    "Whatever is not said, there is a table without holes and without an exception."
    answers = {q: Error('unknown') if q in refused else a for q, a in FULL.items() if q not in missing}
    live = L.read_gpu_status(nvml(**answers), 'card')
    assert 'None' not in str(live) and all(all(row) for row in L.live_table(live).rows)


def test_old_driver():
    "No second version of the memory structure, the old name of the reasons, text in bytes."
    def memory(card, version=None):
        if version: raise Error('function not found')
        return SimpleNamespace(total=1000, free=300)
    answers = {k: v for k, v in FULL.items() if k != 'DeviceGetCurrentClocksEventReasons'}
    live = L.read_gpu_status(nvml(**answers | dict(DeviceGetMemoryInfo=memory, DeviceGetName=b'Old', DeviceGetCurrentClocksThrottleReasons=0x40)), 'card')
    assert (live.name, live.total_bytes, live.reserved_bytes, live.usable_bytes) == ('Old', 1000, None, None)
    assert live.slowed_by == ['heat, slowed by the hardware']


@given(st.integers(0, 2**64 - 1))
def test_every_bit_is_told(bits): assert len(L.plain_reasons(bits)) == bits.bit_count()


def test_reasons_are_those_of_the_library():
    pynvml = pytest.importorskip('pynvml')
    names = dict(GpuIdle='idle', ApplicationsClocksSetting='clock set by a program', SwPowerCap='power cap', HwSlowdown='hardware slowdown', SwThermalSlowdown='heat',
                 SyncBoost='held to the clock of another card', HwThermalSlowdown='heat, slowed by the hardware',
                 HwPowerBrakeSlowdown='power brake: the supply asked for less', DisplayClockSetting='clock set for the display')
    assert L.REASONS == {getattr(pynvml, f'nvmlClocksEventReason{name}'): words for name, words in names.items()}
    assert (pynvml.NVML_TEMPERATURE_GPU, pynvml.NVML_CLOCK_SM) == (0, 1) and isinstance(pynvml.nvmlMemory_v2, int)
    for name in [*FULL, 'DeviceGetCurrentClocksThrottleReasons']: assert callable(getattr(pynvml, f'nvml{name}')), name


def programs(compute, graphics, **more):
    lists = dict(DeviceGetComputeRunningProcesses=compute, DeviceGetGraphicsRunningProcesses=graphics)
    return L.read_gpu_status(nvml(**FULL | lists | more), 'card').processes


def test_programs_that_draw_and_compute_count_once():
    held = lambda pid, n: SimpleNamespace(pid=pid, usedGpuMemory=n)
    found = programs([held(2**30, None), held(2**30 + 1, 700)], [held(2**30, 40), held(2**30 + 2, None)])
    assert [(p.pid - 2**30, p.n_bytes) for p in found] == [(1, 700), (0, 40), (2, None)]
    assert programs([], []) == [] and programs(Error('no'), []) == [] and programs(Error('no'), Error('no')) is None


def test_nobody_on_the_card_is_not_the_same_as_not_known():
    empty = dict(DeviceGetComputeRunningProcesses=[], DeviceGetGraphicsRunningProcesses=[])
    assert ['on the card', 'none'] in L.live_table(L.read_gpu_status(nvml(**FULL | empty), 'card')).rows
    hidden = dict.fromkeys(empty, Error('no permission'))
    assert 'on the card' not in str(L.read_gpu_status(nvml(**FULL | hidden), 'card'))


@pytest.mark.parametrize('said, name', [(b'/usr/bin/python3 -m train', 'python3'), ('C:\\Games\\game.exe', 'game.exe'), (b'\xff', '\ufffd')])
def test_names(said, name): assert programs([SimpleNamespace(pid=2**30, usedGpuMemory=1)], [], SystemGetProcessName=said)[0].name == name


@pytest.mark.skipif(not os.path.exists('/proc/self/comm'), reason='needs /proc')
def test_this_process_is_named_by_the_kernel():
    mine = programs([SimpleNamespace(pid=os.getpid(), usedGpuMemory=2**30)], [], SystemGetProcessName=Error('not found'))
    assert mine[0].name and L._process_line(mine[0]).endswith('(this one)')


def test_markup_in_a_name():
    live = L.read_gpu_status(nvml(**FULL | dict(DeviceGetName='<script>', SystemGetProcessName='<b>')), 'card')
    assert '<script>' not in live._repr_html_() and '<b>' not in live._repr_html_()


def test_without_a_card(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    assert L.live_gpu() is None


def test_with_a_card(monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setitem(sys.modules, 'pynvml', nvml(**FULL, Init=None, DeviceGetHandleByIndex='card'))
    assert L.live_gpu().temperature == 70


def test_no_torch():
    code = 'import sys, homelab_ft.hardware.gpu as l; l.live_gpu(); sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
