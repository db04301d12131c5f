"hardware.gpu: GPUs that answer little, oddly, or not at all."
import os
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from homelab_ft.hardware import gpu


class Error(Exception): "What the imitated library raises."


FULL = dict(
    DeviceGetName='Example', DeviceGetMemoryInfo=SimpleNamespace(total=1000, free=300, reserved=50),
    DeviceGetPowerUsage=250_000, DeviceGetEnforcedPowerLimit=300_000, DeviceGetTemperature=70, DeviceGetClockInfo=1800, DeviceGetMaxClockInfo=2100,
    DeviceGetCurrentClocksEventReasons=0, DeviceGetComputeRunningProcesses=[SimpleNamespace(pid=2**30, usedGpuMemory=600)],
    DeviceGetGraphicsRunningProcesses=[])
FIELDS = dict(
    DeviceGetName='name', DeviceGetPowerUsage='power_watts', DeviceGetEnforcedPowerLimit='power_limit_watts', DeviceGetTemperature='temperature',
    DeviceGetClockInfo='clock_mhz', DeviceGetMaxClockInfo='max_clock_mhz', DeviceGetCurrentClocksEventReasons='slowed_by')


def nvml(**answers):
    "A library that gives these answers; an exception is raised, and a name that is missing is missing."
    def make(answer):
        def function(*args):
            if isinstance(answer, Exception): raise answer
            return answer(*args) if callable(answer) else answer
        return function
    return SimpleNamespace(NVMLError=Error, nvmlMemory_v2=1, **{f'nvml{name}': make(a) for name, a in answers.items()})


def status(**changes): return gpu.read_gpu_status(nvml(**FULL | changes), 'GPU')


def test_everything():
    live = status()
    assert (live.total_bytes, live.free_bytes, live.reserved_bytes, live.usable_bytes) == (1000, 300, 50, 950)
    assert (live.power_watts, live.power_limit_watts, live.slowed_by) == (250, 300, [])
    assert live.processes == [gpu.Process(2**30, None, 600)]      # nobody has that number
    assert 'slowed by' in str(live) and 'nothing' in str(live) and '250 W of 300 W' in str(live) and '<table' in live._repr_html_()


def test_one_answer_less():
    "Each figure fails alone, whether it is refused or the library lacks it."
    full = status()
    for name in FULL:
        without = {q: a for q, a in FULL.items() if q != name}
        for answers in (without, without | {name: Error('not supported')}):
            live = gpu.read_gpu_status(nvml(**answers), 'GPU')
            lost = {f for f in vars(full) if getattr(live, f) != getattr(full, f)}
            if name in FIELDS: assert lost == {FIELDS[name]} and getattr(live, FIELDS[name]) is None
            elif name == 'DeviceGetMemoryInfo': assert lost == {'total_bytes', 'free_bytes', 'reserved_bytes'} and live.usable_bytes is None
            assert str(live)


@given(st.sets(st.sampled_from(sorted(FULL))), st.sets(st.sampled_from(sorted(FULL))))
def test_any_silence_is_shown(missing, refused):
    "Whatever is not answered, there is a table without holes and without an exception."
    answers = {q: Error('unknown') if q in refused else a for q, a in FULL.items() if q not in missing}
    live = gpu.read_gpu_status(nvml(**answers), 'GPU')
    assert 'None' not in str(live) and all(all(row) for row in live.table().rows)


def test_old_driver():
    "No second version of the memory structure, the old name of the reasons."
    def memory(handle, version=None):
        if version: raise Error('function not found')
        return SimpleNamespace(total=1000, free=300)
    live = status(DeviceGetMemoryInfo=memory, DeviceGetCurrentClocksEventReasons=Error('missing'), DeviceGetCurrentClocksThrottleReasons=0x40)
    assert (live.total_bytes, live.reserved_bytes, live.usable_bytes) == (1000, None, None)
    assert live.slowed_by == ['heat, slowed by the hardware']


@given(st.integers(0, 2**64 - 1))
def test_every_bit_is_named(bits): assert len(gpu.slowdown_reasons(bits)) == bits.bit_count()


def test_reasons_are_those_of_the_library():
    pynvml = pytest.importorskip('pynvml')
    names = dict(GpuIdle='idle', SwPowerCap='power cap', HwSlowdown='hardware slowdown', SwThermalSlowdown='heat', HwThermalSlowdown='heat, slowed by the hardware')
    for name, words in names.items(): assert gpu.SLOWDOWN_REASONS[getattr(pynvml, f'nvmlClocksEventReason{name}')] == words
    assert (pynvml.NVML_TEMPERATURE_GPU, pynvml.NVML_CLOCK_SM) == (0, 1) and isinstance(pynvml.nvmlMemory_v2, int)
    for name in [*FULL, 'DeviceGetCurrentClocksThrottleReasons']: assert callable(getattr(pynvml, f'nvml{name}')), name


def programs(compute, graphics): return status(DeviceGetComputeRunningProcesses=compute, DeviceGetGraphicsRunningProcesses=graphics).processes


def test_programs_that_draw_and_compute_count_once():
    def use(pid, n): return SimpleNamespace(pid=pid, usedGpuMemory=n)
    found = programs([use(2**30, None), use(2**30 + 1, 700)], [use(2**30, 40), use(2**30 + 2, None)])
    assert [(p.pid - 2**30, p.n_bytes) for p in found] == [(1, 700), (0, 40), (2, None)]
    assert programs([], []) == [] and programs(Error('no'), []) == [] and programs(Error('no'), Error('no')) is None


def test_an_empty_gpu_is_not_the_same_as_not_known():
    empty = dict(DeviceGetComputeRunningProcesses=[], DeviceGetGraphicsRunningProcesses=[])
    assert ['on the GPU', 'none'] in status(**empty).table().rows
    assert 'on the GPU' not in str(status(**dict.fromkeys(empty, Error('no permission'))))


def test_this_process_is_named_by_the_operating_system():
    mine = programs([SimpleNamespace(pid=os.getpid(), usedGpuMemory=2**30)], [])
    assert mine[0].name and str(mine[0]).endswith('(this one)')


def test_markup_in_a_name(monkeypatch):
    monkeypatch.setattr(gpu, 'process_name', lambda pid: '<b>')
    live = status(DeviceGetName='<script>')
    assert '<script>' not in live._repr_html_() and '<b>' not in live._repr_html_()


def test_the_gpu_of_this_machine(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    assert gpu.live_gpu() is None
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setitem(sys.modules, 'pynvml', nvml(**FULL, Init=None, DeviceGetHandleByIndex='GPU'))
    assert gpu.live_gpu().temperature == 70
