"hardware.gpu_catalog: the data file, a file of one's own, names and memory."
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, strategies as st

import homelab_ft
from homelab_ft.core import ConfigError, GiB, MiB
from homelab_ft.hardware import gpu_catalog as C

FILE = Path(homelab_ft.__file__).parent / 'hardware' / 'gpus.yaml'
RAW = yaml.safe_load(FILE.read_text(encoding='utf-8'))
FIGURES = ('compute_capability', 'memory_mib', 'cuda_mib', 'bandwidth_gbs', 'bf16_tflops', 'bf16_measured_tflops', 'board_power_w')


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    "No file of one's own, whoever runs this."
    monkeypatch.delenv('HOMELAB_FT_GPUS', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('USERPROFILE', str(tmp_path / 'home'))


ALL = C.read_gpus(os.devnull)


def test_gpus_that_people_use_are_there():
    for name in ('3060 12 GB', '3090', '4060 Ti 16 GB', '4090', '5090', 'RTX 6000 Ada', 'T4', 'L4', 'A10G', 'L40S', 'A100 80 GB SXM', 'H100 80 GB SXM', 'H200', 'B200'):
        assert C.find_gpu(name, gpus=ALL)


def test_every_figure_has_a_source_and_is_sane():
    for gpu in RAW['gpus']:
        assert {'name', 'driver_names', 'architecture', 'memory_mib', 'bandwidth_gbs', 'board_power_w', 'compute_capability', 'source'} <= set(gpu)
        assert set(gpu['source']) == {f for f in FIGURES if f in gpu}, gpu['id']
        cited = [k for keys in gpu['source'].values() for k in keys] + [p['source'] for p in gpu.get('prices', [])]
        assert cited and all(k in RAW['sources'] or re.fullmatch(r'https://\S+', k) for k in cited), gpu['id']
        assert 4096 <= gpu['memory_mib'] <= 200_000 and 160 <= gpu['bandwidth_gbs'] <= 8000 and 60 <= gpu['board_power_w'] <= 1000
        assert 'bf16_tflops' not in gpu or float(gpu['compute_capability']) >= 8      # no card before Ampere has one
        if 'cuda_mib' in gpu: assert 0.95 * gpu['memory_mib'] <= gpu['cuda_mib'][0] <= gpu['cuda_mib'][1] <= gpu['memory_mib']
        assert ('bf16_tflops' in gpu) == ('bf16_kind' in gpu)
        if 'bf16_tflops' in gpu and 'bf16_measured_tflops' in gpu: assert 0.5 < gpu['bf16_measured_tflops'] / gpu['bf16_tflops'] < 1.25
        for price in gpu.get('prices', []): assert price['high'] <= (50 if C.Price(**price).hourly else 100_000)


def test_sources_are_used_and_lead_somewhere():
    text = FILE.read_text(encoding='utf-8').split('\ngpus:')[1]
    for key, source in RAW['sources'].items():
        assert re.search(rf'\b{re.escape(key)}\b', text), f'{key} is not cited'
        assert source.get('address', 'https://').startswith('https://') and source['title']
        assert 'address' in source or 'public repository' in source['title'] or key == 'runpod-list2', key


def test_no_two_gpus_are_the_same():
    assert len(ALL) == len({gpu.name for gpu in ALL.values()}) == len(RAW['gpus']) >= 30
    for gpu in ALL.values():
        assert C.find_gpu(gpu.id, gpus=ALL).id == gpu.id
        for name in (gpu.name, *gpu.driver_names): assert C.find_gpu(name, gpu.memory_bytes, ALL).id == gpu.id


WAYS = [str.lower, str.upper, str.title, lambda s: s.replace(' ', '-'), lambda s: f' {s} ']

@given(st.sampled_from(sorted(ALL)), st.floats(-0.03, 0.03), st.sampled_from(WAYS))
def test_however_a_name_is_written(i, off, write):
    "Drivers of other versions show a little more or less; GPUs of one name are far apart."
    gpu = ALL[i]
    for name in (gpu.name, *gpu.driver_names): assert C.find_gpu(write(name), gpu.memory_bytes * (1 + off), ALL).id == i


@given(st.text(max_size=30))
def test_any_name_is_found_or_refused(name):
    try: assert C.normalize_name(name) in C.find_gpu(name, gpus=ALL).keys
    except ConfigError as e: assert e.allowed and e.next_step


def detected(name, memory): return C.machine_gpu(SimpleNamespace(gpu_name=name, total_bytes=memory), ALL)


def test_memory_decides_or_refuses():
    for gib, expected in [(8, None), (9.5, 'rtx-3080-10gb'), (10.4, 'rtx-3080-10gb'), (11.6, 'rtx-3080-12gb'), (12, 'rtx-3080-12gb'), (14, None), (20, None)]:
        gpu = detected('NVIDIA GeForce RTX 3080', gib * GiB)
        assert (gpu and gpu.id) == expected


SMALL = ['RTX 3050', 'RTX 3060 Ti', 'RTX 3070', 'RTX 3070 Ti', 'RTX 4060', 'RTX 4060 Ti', 'RTX 5060', 'RTX 5060 Ti', 'RTX 3070 Laptop GPU',
         'RTX 4060 Laptop GPU', 'RTX 4070 Laptop GPU', 'RTX 5060 Laptop GPU', 'RTX 5070 Laptop GPU', 'RTX 2070', 'RTX 2080', 'GTX 1080']

@pytest.mark.parametrize('name', SMALL)
def test_gpus_of_8_gb_are_recognised(name):
    gpu = detected(f'NVIDIA GeForce {name}', 8188 * MiB)
    assert gpu and f'NVIDIA GeForce {name}' in gpu.driver_names and gpu.has_memory(8 * GiB)
    assert ('laptop' in gpu.id) == ('Laptop' in name) and gpu.has_bfloat16 == (name not in ('RTX 2070', 'RTX 2080', 'GTX 1080'))


def test_gpus_that_look_alike_are_not_taken():
    for name, memory in [('NVIDIA GeForce RTX 4060 Ti', 12 * GiB), ('NVIDIA GeForce RTX 4090', 49140 * MiB), ('NVIDIA GeForce RTX 4090 D', 24564 * MiB),
                         ('NVIDIA A10', 23028 * MiB), ('Quadro RTX 6000', 24 * GiB), ('AMD Radeon', 24 * GiB), ('', 24 * GiB)]:
        assert detected(name, memory) is None, name


@pytest.mark.parametrize('name, near', [('RTX 4900', 'rtx-4090'), ('A100', 'a100-80gb-sxm'), ('3090ti super', 'rtx-3090-ti')])
def test_near_matches(name, near):
    with pytest.raises(ConfigError) as e: C.find_gpu(name, gpus=ALL)
    assert near in e.value.allowed and 'did you mean' in e.value.next_step


def test_several_of_one_name_need_a_choice():
    with pytest.raises(ConfigError, match='several GPUs') as e: C.find_gpu('RTX 3080', gpus=ALL)
    assert 'rtx-3080-10gb' in e.value.allowed and 'rtx-3080-12gb' in e.value.allowed


def test_not_known_is_said():
    gpu = ALL['rtx-4070-super']
    assert gpu.row()['of it for CUDA'] == gpu.row()['price'] == 'not known' and 'None' not in f'{gpu}{C.gpus_table(ALL)}'
    assert gpu.limit_bytes == gpu.memory_bytes
    low, high = ALL['rtx-4090'].cuda_mib
    assert ALL['rtx-4090'].limit_bytes == low * MiB < high * MiB < ALL['rtx-4090'].memory_bytes


def test_usual_place_of_ones_own_file(tmp_path):
    assert C.own_file() is None
    folder = tmp_path / 'home' / '.config' / 'homelab_ft'
    folder.mkdir(parents=True)
    (folder / 'gpus.yaml').write_text('cards: [{id: mine, memory_mib: 12000}]\n')      # the older name of the list
    assert C.own_file() == folder / 'gpus.yaml' and C.find_gpu('mine').memory_mib == 12000


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.setattr(C.os.path, 'expanduser', lambda path: path)      # what it does where there is none
    assert C.own_file() is None and C.find_gpu('4090')


def test_environment_comes_first(tmp_path, monkeypatch):
    own = tmp_path / 'none.yaml'
    monkeypatch.setenv('HOMELAB_FT_GPUS', str(own))
    with pytest.raises(ConfigError, match='none.yaml'): C.read_gpus()
    own.write_text('gpus: [{id: h200, prices: [{kind: on-demand, low: 2, high: 2, date: 2026-11-01, source: my cloud}]}]\n')
    assert str(C.find_gpu('H200').price(hourly=True)) == '2 USD/h on-demand, 2026-11-01'
    assert C.find_gpu('H200').bandwidth_gbs == 4800


def write(folder, text):
    path = folder / 'own.yaml'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_new_figure_drops_the_old_source(tmp_path):
    gpus = C.read_gpus(write(tmp_path, 'gpus: [{id: rtx-4090, board_power_w: 300}]'))
    assert gpus['rtx-4090'].board_power_w == 300
    assert 'board_power_w' not in gpus['rtx-4090'].source and 'bandwidth_gbs' in gpus['rtx-4090'].source
    assert gpus.keys() == ALL.keys() and C.read_gpus(os.devnull)['rtx-4090'].board_power_w == 450      # nothing sticks


BAD = [('[1, 2]', 'own.yaml'), ('gpus: 3', 'no list of GPUs'), ('gpus: [{id: 4090, memory_mib: 8192}]', 'no list of GPUs'), ('kards: []', 'no list of GPUs'),
       ('sources: [a]', 'no list of GPUs'), ('gpus: [{id: a}]', 'memory_mib'), ('gpus: [{id: a, memory_mib: 24 GB}]', 'memory_mib'),
       ('gpus: [{id: a, memory_mib: 8192}, {id: a, memory_mib: 9216}]', 'twice'), ('gpus: [{id: A B, memory_mib: 8192}]', 'id'),
       ('gpus: [{id: a, memory_mib: 8192, watts: 100}]', 'board_power_w'), ('gpus: [{id: a, memory_mib: 8192, cuda_mib: [8000, 7000]}]', 'cuda_mib'),
       ('gpus: [{id: a, memory_mib: 8192, source: [x]}]', 'source'),
       ('gpus: [{id: a, memory_mib: 8192, prices: [{kind: stolen, low: 1, high: 1, source: x}]}]', 'prices.0.kind'),
       ('gpus: [{id: a, memory_mib: 8192, prices: [{kind: used, low: 1, high: 1, date: soon, source: x}]}]', 'date'),
       ('gpus: [{id: a, memory_mib: 24000, driver_names: [NVIDIA GeForce RTX 4090]}]', 'look the same'),
       ('gpus: [{id: rtx-4090, memory_mib: null}]', 'memory_mib'), ('gpus: {', 'YAML'), (b'gpus: [{id: \xff}]', 'YAML'),
       ('gpus: !!python/object/apply:os.system [echo]', 'YAML')]

def test_bad_files_are_refused(tmp_path):
    for text, message in BAD:
        with pytest.raises(ConfigError, match=re.escape(message)): C.read_gpus(write(tmp_path, text))


def test_nothing_shows_as_markup(tmp_path):
    gpu = C.read_gpus(write(tmp_path, 'gpus: [{id: a, memory_mib: 8192, name: "<script>", notes: ["<b>"]}]'))['a']
    assert '<script>' not in gpu._repr_html_() and '<b>' not in gpu._repr_html_()
