"hardware.machine, hardware.energy: odd drivers, counters that wrap or vanish, folders that refuse."
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from homelab_ft.core import HardwareError
from homelab_ft.hardware import energy, machine


class NVML:
    "Imitates `pynvml`; an answer that is an exception is raised."
    NVMLError = RuntimeError
    def __init__(self, **answers): self.answers = answers
    def answer(self, name, default):
        answer = self.answers.get(name, default)
        if isinstance(answer, Exception): raise answer
        return answer
    def nvmlInit(self): self.answer('init', None)
    def nvmlDeviceGetHandleByIndex(self, i): return self.answer('handle', f'GPU {i}')
    def nvmlDeviceGetHandleByUUID(self, uuid): return self.answer('handle', uuid)
    def nvmlDeviceGetName(self, handle): return self.answer('name', 'Example')
    def nvmlDeviceGetMemoryInfo(self, handle): return self.answer('memory', SimpleNamespace(total=100, free=60))
    def nvmlSystemGetDriverVersion(self): return '1'
    def nvmlDeviceGetTotalEnergyConsumption(self, handle): return self.answer('energy', 5)


@pytest.fixture
def plug(monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    return lambda nvml: monkeypatch.setitem(sys.modules, 'pynvml', nvml)


def test_gpu(plug):
    plug(NVML(name='<script>'))
    found = machine.detect_machine()
    assert (found.device, found.gpu_name, found.total_bytes, found.free_bytes) == ('cuda', '<script>', 100, 60)
    assert '<table' in found._repr_html_() and '<script>' not in found._repr_html_()


@pytest.mark.parametrize('nvml', [NVML(init=RuntimeError('no library')), NVML(handle=RuntimeError('no GPU')), None], ids=['library', 'GPU', 'module'])
def test_no_driver_no_gpu(plug, nvml):
    plug(nvml)                                   # with None, `import pynvml` raises ImportError
    found = machine.detect_machine()
    assert found.device == 'cpu' and found.total_bytes == found.ram_bytes


def test_chip_that_shares_cpu_ram(plug):
    plug(NVML(memory=RuntimeError('not supported')))
    found = machine.detect_machine()
    assert found.device == 'cuda' and found.total_bytes == found.ram_bytes


@pytest.mark.parametrize('visible, handle', [('1', 'GPU 1'), ('GPU-abc', 'GPU-abc'), ('MIG-abc', 'MIG-abc'), ('-1', None), ('', None)])
def test_visible_devices(plug, monkeypatch, visible, handle):
    plug(NVML())
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert machine.open_gpu()[1] == handle


def test_container_limit(monkeypatch):
    monkeypatch.setattr(machine.psutil, 'virtual_memory', lambda: SimpleNamespace(total=1000, available=800))
    for group, expected in [((None, 0), (1000, 800)), ((500, 100), (500, 400)), ((500, 600), (500, 0)), ((2000, 100), (1000, 800))]:
        monkeypatch.setattr(machine, 'cgroup_memory', lambda: group)
        assert machine.cpu_ram() == expected


def test_meter_prefers_the_gpu(plug):
    nvml = NVML(energy=1000)
    plug(nvml)
    meter = energy.EnergyMeter()
    nvml.answers['energy'] = 3500
    assert meter.source == 'NVML total energy counter' and meter.joules() == pytest.approx(2.5)


def test_old_gpu_without_counter(plug, tmp_path):
    plug(NVML(energy=RuntimeError('not supported')))
    assert energy.EnergyMeter(rapl_root=tmp_path).source == 'assumed 65 W'


def make_package(root, number, energy, size=1000):
    folder = root / f'intel-rapl:{number}'
    folder.mkdir(exist_ok=True)
    (folder / 'energy_uj').write_text(str(energy))
    (folder / 'max_energy_range_uj').write_text(str(size))
    return folder


def test_two_packages_and_no_subdomain(plug, tmp_path):
    plug(None)
    make_package(tmp_path, 0, 10), make_package(tmp_path, 1, 20)
    core = tmp_path / 'intel-rapl:0:0'           # a part of package 0, already counted there
    core.mkdir()
    (core / 'energy_uj').write_text('5')
    meter = energy.EnergyMeter(rapl_root=tmp_path)
    make_package(tmp_path, 0, 110), make_package(tmp_path, 1, 220)
    assert meter.joules() == pytest.approx(300e-6)


def test_counter_vanishes_midway(plug, tmp_path):
    plug(None)
    folder = make_package(tmp_path, 0, 10)
    meter = energy.EnergyMeter(rapl_root=tmp_path)
    make_package(tmp_path, 0, 60)
    assert meter.joules() == pytest.approx(50e-6)
    (folder / 'energy_uj').unlink()
    assert meter.joules() == pytest.approx(50e-6)
    make_package(tmp_path, 0, 80)
    assert meter.joules() == pytest.approx(70e-6)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=30))
def test_wrapping_adds_up(uses):
    "Any sequence of uses below one full turn is counted exactly, however often the counter wraps."
    total = [0]
    meter = energy.EnergyMeter(rapl_root='/nowhere')
    meter.read = lambda: [(total[0] % 1000, 1000)]
    meter.start()
    for use in uses:
        total[0] += use
        joules = meter.joules()
    assert joules == pytest.approx(sum(uses) / 1e6)


def test_refused_folder(monkeypatch, tmp_path):
    def refuse(dir): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(machine.tempfile, 'TemporaryFile', refuse)
    with pytest.raises(HardwareError, match='Permission denied') as e: machine.check_writable(tmp_path / 'deep' / 'er')
    assert str(tmp_path) in str(e.value) and e.value.next_step


def test_nothing_left_behind(tmp_path):
    machine.check_writable(tmp_path / 'a' / 'b')
    assert list(tmp_path.iterdir()) == []


def test_light_to_import():
    "The whole package: no PyTorch for a question about the machine."
    code = ('import sys; from homelab_ft.hardware import energy, gpu, gpu_catalog, machine; machine.detect_machine(); gpu.live_gpu(); '
            'gpu_catalog.find_gpu("4090"); energy.EnergyMeter(); print([m for m in ("torch", "numpy", "transformers") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
