"plan.cards: the data file, a file of one's own, names and memory."
import os
import re
import subprocess
import sys
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
WANTED = '''3060 | rtx-3080-10gb | rtx-3080-12gb | 3090 | 4060 Ti | 4070 Super | 4080 | 4090 | 5070 Ti | 5080 | 5090 | RTX 6000 Ada | RTX PRO 4500 Blackwell
    | RTX PRO 6000 Blackwell | T4 | L4 | A10G | L40S | A100 40 GB SXM | A100 80 GB SXM | H100 80 GB SXM | H200 | B200'''.split('|')
FIGURES = ('compute_capability', 'memory_mib', 'cuda_mib', 'bandwidth_gbs', 'bf16_tflops', 'bf16_measured_tflops', 'board_power_w')


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    "No file of one's own, whoever runs this."
    monkeypatch.delenv('HOMELAB_FT_GPUS', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('USERPROFILE', str(tmp_path / 'home'))


ALL = C.read_gpus(os.devnull)


@pytest.mark.parametrize('name', [n.strip() for n in WANTED])
def test_wanted_cards(name): assert C.find_gpu(name, cards=ALL)


@pytest.mark.parametrize('card', RAW['cards'], ids=lambda c: c['id'])
def test_every_figure_has_a_source_and_is_sane(card):
    assert {'name', 'driver_names', 'architecture', 'memory_mib', 'bandwidth_gbs', 'board_power_w', 'compute_capability', 'source'} <= set(card)
    assert set(card['source']) == {f for f in FIGURES if f in card}
    cited = [k for keys in card['source'].values() for k in keys] + [p['source'] for p in card.get('prices', [])]
    assert cited and all(k in RAW['sources'] or re.fullmatch(r'https://\S+', k) for k in cited)
    assert 8192 <= card['memory_mib'] <= 200_000 and 200 <= card['bandwidth_gbs'] <= 8000 and 60 <= card['board_power_w'] <= 1000
    if 'cuda_mib' in card: assert 0.95 * card['memory_mib'] <= card['cuda_mib'][0] <= card['cuda_mib'][1] <= card['memory_mib']
    assert ('bf16_tflops' in card) == ('bf16_kind' in card)
    assert card['architecture'] != 'Turing' or 'bf16_tflops' not in card
    if 'bf16_tflops' in card and 'bf16_measured_tflops' in card: assert 0.5 < card['bf16_measured_tflops'] / card['bf16_tflops'] < 1.25
    for price in card.get('prices', []): assert price['high'] <= (50 if C.Price(**price).hourly else 100_000)


def test_sources_are_used_and_lead_somewhere():
    text = FILE.read_text(encoding='utf-8').split('\ncards:')[1]
    for key, source in RAW['sources'].items():
        assert re.search(rf'\b{re.escape(key)}\b', text), f'{key} is not cited'
        assert source.get('address', 'https://').startswith('https://') and source['title']
        assert 'address' in source or 'public repository' in source['title'] or key == 'runpod-list2', key
    assert not re.search(r'file:\d', FILE.read_text(encoding='utf-8'))


def test_no_two_cards_are_the_same():
    ids, names = [c['id'] for c in RAW['cards']], [c['name'] for c in RAW['cards']]
    assert len(set(ids)) == len(ids) >= 30 and len(set(names)) == len(names)
    for card in ALL.values():
        for name in [card.id, card.name]: assert C.find_gpu(name, C.memory_bytes(card), ALL).id == card.id
        for name in card.driver_names: assert C.gpu_name_of(SimpleNamespace(gpu_name=name, total_bytes=C.memory_bytes(card)), ALL).id == card.id


def test_ids_are_never_ambiguous():
    for i in ALL: assert C.find_gpu(i, cards=ALL).id == i


@given(st.sampled_from(sorted(ALL)), st.floats(-0.03, 0.03), st.sampled_from([str.lower, str.upper, str.title, lambda s: s.replace(' ', '-'), lambda s: f' {s} ']))
def test_however_a_name_is_written(i, off, how):
    "Drivers of other versions show a little more or less; cards of one name are far apart."
    card = ALL[i]
    for name in (card.name, *card.driver_names):
        assert C.find_gpu(how(name), C.memory_bytes(card) * (1 + off), ALL).id == i


@given(st.text(max_size=30))
def test_any_name_is_found_or_refused(name):
    try: assert C._key(name) in C._keys(C.find_gpu(name, cards=ALL))
    except ConfigError as e: assert e.allowed and e.next_step


@pytest.mark.parametrize('gib, found', [(8, None), (9.5, 'rtx-3080-10gb'), (10.4, 'rtx-3080-10gb'), (11.6, 'rtx-3080-12gb'), (12, 'rtx-3080-12gb'), (14, None), (20, None)])
def test_memory_decides_or_refuses(gib, found):
    card = C.gpu_name_of(SimpleNamespace(gpu_name='NVIDIA GeForce RTX 3080', total_bytes=gib * GiB), ALL)
    assert (card and card.id) == found


@pytest.mark.parametrize('name, memory', [('NVIDIA GeForce RTX 4060 Ti', 8 * GiB), ('NVIDIA GeForce RTX 4090', 49140 * MiB), ('NVIDIA GeForce RTX 4090 Laptop GPU', 16376 * MiB),
                                          ('NVIDIA A10', 23028 * MiB), ('Quadro RTX 6000', 24 * GiB), ('AMD Radeon', 24 * GiB), ('', 24 * GiB)])
def test_cards_that_look_alike_are_not_taken(name, memory): assert C.gpu_name_of(SimpleNamespace(gpu_name=name, total_bytes=memory), ALL) is None


@pytest.mark.parametrize('asked, near', [('RTX 4900', 'rtx-4090'), ('A100', 'a100-80gb-sxm'), ('RTX PRO 5000', 'rtx-pro-5000-blackwell-48gb'), ('3090ti super', 'rtx-3090-ti')])
def test_near_matches(asked, near):
    with pytest.raises(ConfigError) as e: C.find_gpu(asked, cards=ALL)
    assert near in e.value.allowed and 'did you mean' in e.value.next_step


def test_several_of_one_name_need_a_choice():
    with pytest.raises(ConfigError, match='several cards') as e: C.find_gpu('RTX 3080', cards=ALL)
    assert 'rtx-3080-10gb' in e.value.allowed and 'rtx-3080-12gb' in e.value.allowed


def test_not_known_is_said():
    text = str(C.card_table(ALL['rtx-4070-super']))
    assert re.search(r'of it for CUDA +not known', text) and re.search(r'price +not known', text) and 'None' not in text + str(C.gpus_table(ALL))
    assert C.limit_bytes(ALL['rtx-4070-super']) == C.memory_bytes(ALL['rtx-4070-super'])
    assert C.limit_bytes(ALL['rtx-4090']) == ALL['rtx-4090'].cuda_mib[0] * MiB < ALL['rtx-4090'].cuda_mib[1] * MiB < C.memory_bytes(ALL['rtx-4090'])


def test_usual_place_of_ones_own_file(tmp_path):
    assert C.own_file() is None
    folder = tmp_path / 'home' / '.config' / 'homelab_ft'
    folder.mkdir(parents=True)
    (folder / 'gpus.yaml').write_text('cards: [{id: mine, memory_mib: 12000}]\n')
    assert C.own_file() == folder / 'gpus.yaml' and C.find_gpu('mine').memory_mib == 12000


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.setattr(C.os.path, 'expanduser', lambda path: path)      # what it does where there is none
    assert C.own_file() is None and C.find_gpu('4090')


def test_environment_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv('HOMELAB_FT_GPUS', str(tmp_path / 'none.yaml'))
    with pytest.raises(ConfigError, match='none.yaml'): C.read_gpus()
    (tmp_path / 'none.yaml').write_text('cards: [{id: h200, prices: [{kind: on-demand, low: 2, high: 2, date: 2026-11-01, source: my cloud}]}]\n')
    assert str(C.card_price(C.find_gpu('H200'), hourly=True)) == '2 USD/h on-demand, 2026-11-01'
    assert C.find_gpu('H200').bandwidth_gbs == 4800


def write(folder, text):
    path = folder / 'own.yaml'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_new_figure_drops_the_old_source(tmp_path):
    cards = C.read_gpus(write(tmp_path, 'cards: [{id: rtx-4090, board_power_w: 300}]'))
    assert cards['rtx-4090'].board_power_w == 300 and 'board_power_w' not in cards['rtx-4090'].source and 'bandwidth_gbs' in cards['rtx-4090'].source
    assert cards.keys() == ALL.keys() and C.read_gpus(os.devnull)['rtx-4090'].board_power_w == 450      # nothing sticks


@pytest.mark.parametrize('text, said', [
    ('[1, 2]', 'own.yaml'), ('cards: 3', 'no list of cards'), ('cards: [4090]', 'no list of cards'), ('cards: [{memory_mib: 8192}]', 'no list of cards'),
    ('cards: [{id: 4090, memory_mib: 8192}]', 'no list of cards'), ('kards: []', 'no list of cards'), ('sources: [a]', 'no list of cards'),
    ('cards: [{id: a}]', 'memory_mib'), ('cards: [{id: a, memory_mib: 24}]', 'memory_mib'), ('cards: [{id: a, memory_mib: 24 GB}]', 'memory_mib'),
    ('cards: [{id: a, memory_mib: 8192}, {id: a, memory_mib: 9216}]', 'twice'), ('cards: [{id: A B, memory_mib: 8192}]', 'id'),
    ('cards: [{id: a, memory_mib: 8192, watts: 100}]', 'board_power_w'), ('cards: [{id: a, memory_mib: 8192, board_power_w: .nan}]', 'board_power_w'),
    ('cards: [{id: a, memory_mib: 8192, cuda_mib: [8000, 7000]}]', 'cuda_mib'), ('cards: [{id: a, memory_mib: 8192, source: [x]}]', 'source'),
    ('cards: [{id: a, memory_mib: 8192, prices: [{kind: stolen, low: 1, high: 1, source: x}]}]', 'prices.0.kind'),
    ('cards: [{id: a, memory_mib: 8192, prices: [{kind: used, low: 5, high: 1, source: x}]}]', 'low is above high'),
    ('cards: [{id: a, memory_mib: 8192, prices: [{kind: used, low: 1, high: 1, date: soon, source: x}]}]', 'date'),
    ('cards: [{id: a, memory_mib: 24000, driver_names: [NVIDIA GeForce RTX 4090]}]', 'cannot be told apart'),
    ('cards: [{id: rtx-4090, memory_mib: null}]', 'memory_mib'), ('cards: {', 'YAML'), (b'cards: [{id: \xff}]', 'YAML'),
    ('cards: !!python/object/apply:os.system [echo]', 'YAML')])
def test_bad_files_are_refused(tmp_path, text, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as e: C.read_gpus(write(tmp_path, text))
    assert 'own.yaml' in str(e.value) or said == 'cannot be told apart'


def test_the_file_comes_with_the_package():
    setup = (Path(__file__).parent.parent / 'setup.py').read_text()
    manifest = (Path(__file__).parent.parent / 'MANIFEST.in').read_text()
    assert "'plan/*.yaml'" in setup and 'homelab_ft/plan/*.yaml' in manifest


def test_light_to_import():
    code = 'import sys, homelab_ft.hardware.gpu_catalog as c; c.find_gpu("4090"); sys.exit(any(m in sys.modules for m in ("torch", "numpy", "transformers")))'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_nothing_shows_as_markup(tmp_path):
    card = C.read_gpus(write(tmp_path, 'cards: [{id: a, memory_mib: 8192, name: "<script>", notes: ["<b>"]}]'))['a']
    assert '<script>' not in card._repr_html_() and '<b>' not in card._repr_html_()
