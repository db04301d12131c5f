"plan.hardware: odd drivers, counters that wrap or vanish, folders that refuse."
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from homelab_ft.core import HardwareError
from homelab_ft.hardware import machine as hardware


class NVML:
    NVMLError = RuntimeError
    def __init__(self, **answers): self.answers = answers
    def nvmlInit(self): self._say('init', None)
    def _say(self, name, default):
        answer = self.answers.get(name, default)
        if isinstance(answer, Exception): raise answer
        return answer
    def nvmlDeviceGetHandleByIndex(self, i): return self._say('handle', f'card {i}')
    def nvmlDeviceGetHandleByUUID(self, uuid): return self._say('handle', uuid)
    def nvmlDeviceGetName(self, card): return self._say('name', 'Card')
    def nvmlDeviceGetMemoryInfo(self, card): return self._say('memory', SimpleNamespace(total=100, free=60))
    def nvmlSystemGetDriverVersion(self): return '1'
    def nvmlDeviceGetTotalEnergyConsumption(self, card): return self._say('energy', 5)


@pytest.fixture
def plug(monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    return lambda nvml: monkeypatch.setitem(sys.modules, 'pynvml', nvml)


def test_card(plug):
    plug(NVML())
    machine = hardware.detect_machine()
    assert (machine.device, machine.gpu_name, machine.total_bytes, machine.free_bytes) == ('cuda', 'Card', 100, 60)
    assert '<table' in machine._repr_html_()


def test_name_is_escaped(plug):
    plug(NVML(name='<script>'))
    assert '<script>' not in hardware.detect_machine()._repr_html_()


@pytest.mark.parametrize('answers', [dict(init=RuntimeError('no library')), dict(handle=RuntimeError('no card'))])
def test_no_driver_no_card(plug, answers):
    plug(NVML(**answers))
    machine = hardware.detect_machine()
    assert machine.device == 'cpu' and machine.total_bytes == machine.ram_bytes


def test_module_missing(plug):
    plug(None)                                   # `import pynvml` raises ImportError
    assert hardware.detect_machine().device == 'cpu'


def test_chip_that_shares_host_memory(plug):
    plug(NVML(memory=RuntimeError('not supported')))
    machine = hardware.detect_machine()
    assert machine.device == 'cuda' and machine.total_bytes == machine.ram_bytes


@pytest.mark.parametrize('visible, handle', [('1', 'card 1'), ('GPU-abc', 'GPU-abc'), ('MIG-abc', 'MIG-abc'), ('-1', None), ('', None)])
def test_visible_devices(monkeypatch, visible, handle):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert hardware._open_card(NVML()) == handle


def test_meter_prefers_the_card(plug):
    nvml = NVML(energy=1000)
    plug(nvml)
    meter = hardware.EnergyMeter()
    nvml.answers['energy'] = 3500
    assert meter.source == 'NVML total energy counter' and meter.joules() == pytest.approx(2.5)


def test_old_card_without_counter(plug, tmp_path):
    plug(NVML(energy=RuntimeError('not supported')))
    assert hardware.EnergyMeter(rapl_root=tmp_path).source == 'assumed 65 W'


def _package(root, number, energy, size=1000):
    folder = root / f'intel-rapl:{number}'
    folder.mkdir(exist_ok=True)
    (folder / 'energy_uj').write_text(str(energy))
    (folder / 'max_energy_range_uj').write_text(str(size))
    return folder


def test_two_packages_and_no_subdomain(plug, tmp_path):
    plug(None)
    _package(tmp_path, 0, 10), _package(tmp_path, 1, 20)
    core = tmp_path / 'intel-rapl:0:0'           # a part of package 0, already counted there
    core.mkdir()
    (core / 'energy_uj').write_text('5')
    meter = hardware.EnergyMeter(rapl_root=tmp_path)
    _package(tmp_path, 0, 110), _package(tmp_path, 1, 220)
    assert meter.joules() == pytest.approx(300e-6)


def test_counter_vanishes_midway(plug, tmp_path):
    plug(None)
    folder = _package(tmp_path, 0, 10)
    meter = hardware.EnergyMeter(rapl_root=tmp_path)
    _package(tmp_path, 0, 60)
    assert meter.joules() == pytest.approx(50e-6)
    (folder / 'energy_uj').unlink()
    assert meter.joules() == pytest.approx(50e-6)
    _package(tmp_path, 0, 80)
    assert meter.joules() == pytest.approx(70e-6)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=30))
def test_wrapping_adds_up(uses):
    "Any sequence of uses below one full turn is counted exactly, however often the counter wraps."
    total = [0]
    meter = hardware.EnergyMeter(rapl_root='/nowhere')
    meter._read = lambda: [(total[0] % 1000, 1000)]
    meter.start()
    for use in uses:
        total[0] += use
        seen = meter.joules()
    assert seen == pytest.approx(sum(uses) / 1e6)


def test_refused_folder(monkeypatch, tmp_path):
    def refuse(dir): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(hardware.tempfile, 'TemporaryFile', refuse)
    with pytest.raises(HardwareError, match='Permission denied') as e: hardware.check_writable(tmp_path / 'deep' / 'er')
    assert str(tmp_path) in str(e.value) and e.value.next_step


def test_nothing_left_behind(tmp_path):
    hardware.check_writable(tmp_path / 'a' / 'b')
    assert list(tmp_path.iterdir()) == []


def test_no_torch():
    import subprocess
    code = 'import sys, homelab_ft.hardware.machine as h; h.detect_machine(); sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
