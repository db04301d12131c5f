"The house itself: what tools/check_house.py and tools/make_readme.py check, and that each check can fail."
import json, os, re, shutil, subprocess, sys, time
from pathlib import Path

import pytest

import check_house as house
import drop_bars as house_bars
import docs_preview, make_readme
from notebook_text import fence, merge_streams, read_directives

ROOT = house.ROOT


def code(*sources): return [('code', s) for s in sources]


def complains(complaints, *words):
    assert complaints, 'nothing was found'
    assert any(all(w in c for w in words) for c in complaints), complaints


# ---------------------------------------------------------------- this repository


@pytest.fixture(scope='module')
def results(): return house.check_all(ROOT)


@pytest.mark.parametrize('check', ['directives', 'titles', 'outputs', 'imports', 'style', 'site', 'dependencies', 'stray'])
def test_house_is_in_order(results, check):
    assert not results[check], '\n' + '\n'.join(results[check])


# ---------------------------------------------------------------- directives


@pytest.mark.parametrize('source, word', [
    ('#| exprot\nx = 1', 'no directive'), ('#| eval: false\nx = 1', 'no directive'), ('#| hide_input\nx = 1', 'no directive'), ('#|\nx = 1', 'no directive'),
    ('#| echo: no', 'no known value'), ('#| echo', 'no known value'), ('#| export core', 'should read'), ('#| hide:\nx = 1', 'should read'),
    ('#| default_exp', 'should read'), ('x = 1\n#| export', 'below code'), ('#export\nx = 1', 'lacks its bar'), ('# hide\nx = 1', 'lacks its bar'),
    ('#| gpu\nimport torch', 'tests skip'), ('#| slow\ndef f():\n    import torch', 'tests skip'),
    ('import torch\nprint(torch)', 'imports beside code'), ('#| hide\nimport os\nos.mkdir("x")', 'imports beside code'),
    ('#| export\nfrom os import *', 'import *')])
def test_bad_directives_are_found(source, word): complains(house.check_directives(code(source)), word)


def test_good_directives_pass():
    good = ['#| default_exp plan.vram', '#| export\nimport os\nx = os.sep', '#|export\nx = 1', '#| hide\nimport os\ntmp = os.sep', '#| gpu\nprint(1)',
            '#| echo: false\n#| code-fold: true\nprint(1)', '# a comment about export\nx = 1', '%matplotlib inline', '!ls', '']
    assert house.check_directives(code(*good) + [('markdown', '#| exprot')]) == []


@pytest.mark.parametrize('first', ['# # Core\n\n> Units.', '# Core', '## Core\n\n> Units.', '# Core\n> Units'])
def test_bad_titles_are_found(first): complains(house.check_title([('markdown', first)]), 'first cell')


def test_good_titles_pass(): assert house.check_title([('markdown', '# Core\n\n> Units, errors.')]) == []


def test_progress_bars_are_found_and_dropped():
    view = lambda name, text: {'output_type': 'display_data', 'data': {house_bars.VIEW: {'model_id': name}, 'text/plain': [text]}}
    state = {'bar': {'state': {'children': ['IPY_MODEL_part']}}, 'part': {}, 'slider': {'state': {'layout': 'IPY_MODEL_space'}}, 'space': {}}
    notebook = {'cells': [{'outputs': [view('bar', 'loading:  50%|## | 1/2 [00:03<00:03]'), view('slider', 'IntSlider(value=3)')]}, {'source': ''}],
                'metadata': {'widgets': {house_bars.STATE: {'state': state}}}}
    complains(house.check_outputs(notebook), 'drop_bars')
    clean = house_bars.without_bars(notebook)
    assert house.check_outputs(clean) == [] and set(clean['metadata']['widgets'][house_bars.STATE]['state']) == {'slider', 'space'}
    del notebook['cells'][0]['outputs'][1]
    assert house_bars.without_bars(notebook)['metadata'] == {}


# ---------------------------------------------------------------- import graph

GOOD_MODULES = {'homelab_ft.core': '', 'homelab_ft.plan.memory.estimate': 'from ..core import fmt_gib', 'homelab_ft.__init__': '__version__ = "1"'}


def test_good_imports_pass(): assert house.check_imports(GOOD_MODULES) == []


@pytest.mark.parametrize('statement', ['from ..core import x', 'from homelab_ft.core import x', 'from homelab_ft import core', 'from .. import core',
                                       'import homelab_ft.core', 'def f():\n    from ..core import x', 'try: import homelab_ft.core as c\nexcept ImportError: pass'])
def test_every_kind_of_import_is_seen(statement):
    graph = house.import_graph({'homelab_ft.core': '', 'homelab_ft.plan.memory.estimate': statement})
    assert graph == {'homelab_ft.core': set(), 'homelab_ft.plan.memory.estimate': {'homelab_ft.core'}}


def test_bad_imports_are_found():
    complains(house.check_imports({**GOOD_MODULES, 'homelab_ft.core': 'from .files import x', 'homelab_ft.io': 'def f(): from .core import y'}), 'cycle', 'homelab_ft.core ->')
    complains(house.check_imports({**GOOD_MODULES, 'homelab_ft.core': 'def f(): from homelab_ft.plan import vram'}), 'cycle')
    complains(house.check_imports({'homelab_ft.plan.cost': 'from ..train.run import x', 'homelab_ft.train.trainer': ''}), 'homelab_ft.plan.cost imports homelab_ft.train.trainer')
    complains(house.check_imports({**GOOD_MODULES, 'homelab_ft.extra.x': ''}), 'extra', 'no room')
    complains(house.check_imports({**GOOD_MODULES, 'homelab_ft.plan.__init__': 'from . import vram'}), '__init__')
    chain = {f'homelab_ft.plan.m{i}': f'from .m{i + 1} import x' for i in range(5)} | {'homelab_ft.plan.m5': ''}
    complains(house.check_imports(chain), '5 deep', 'm0 -> homelab_ft.plan.m1')
    del chain['homelab_ft.plan.m0']
    assert house.check_imports(chain) == []


# ---------------------------------------------------------------- import time


def run_python(program): return subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_import_is_quick():
    def seconds():
        start = time.perf_counter()
        run_python('import homelab_ft')
        return time.perf_counter() - start
    best = min(seconds() for _ in range(5))
    assert best < 0.3, f'python -c "import homelab_ft" takes {best:.2f} s at best'


def test_light_rooms_import_nothing_heavy():
    light = [m for m in house.module_sources(ROOT) if m.split('.')[1] in ('core', 'files', 'plan', 'data', '__init__')]
    heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'peft', 'bitsandbytes', 'accelerate', 'matplotlib', 'ipywidgets'}
    program = 'import importlib, sys\nfor m in {}: importlib.import_module(m.removesuffix(".__init__")); print(m, sorted({} & set(sys.modules)))'
    found = [line for line in run_python(program.format(light, heavy)).splitlines() if not line.endswith('[]')]
    assert not found, found[0]
    assert 'pyarrow' in run_python(program.format(['pyarrow'], heavy))


# ---------------------------------------------------------------- round trip


def round_trip(target):
    "A copy of notebooks and package in `target`, cleaned and exported from nothing."
    for name in ('nbs', 'homelab_ft'): shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns('__pycache__', '.*', 'assets'))
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT / name, target)
    for p in (target / 'homelab_ft').rglob('*.py'): p.unlink()
    environment = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    for command in ('nbdev_clean', 'nbdev_export'):
        program = f'from nbdev.cli import *; from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; {command}()'
        subprocess.run([sys.executable, '-c', program], cwd=target, check=True, capture_output=True, text=True, env=environment)


def contents(root):
    "`{path: text}` of everything the round trip makes."
    paths = [*(root / 'nbs').rglob('*.ipynb'), *(root / 'homelab_ft').rglob('*.py'), root / 'pyproject.toml']
    relative = {p: p.relative_to(root) for p in paths}
    return {r.as_posix(): p.read_text(encoding='utf-8') for p, r in relative.items() if not any(part.startswith('.') for part in r.parts)}


def test_round_trip(tmp_path):
    round_trip(tmp_path)
    committed, made = contents(ROOT), contents(tmp_path)
    assert sorted(committed) == sorted(made), 'modules without a notebook, or notebooks whose module is not committed'
    assert not [name for name in made if made[name] != committed[name]], 'run nbdev_clean and nbdev_export, and commit what they change'


# ---------------------------------------------------------------- README


def test_readme_is_fresh():
    made = make_readme.render(json.loads((ROOT / 'nbs' / 'index.ipynb').read_text(encoding='utf-8')))
    assert (ROOT / 'README.md').read_text(encoding='utf-8') == made, 'python tools/make_readme.py'


def test_readme_links_lead_somewhere():
    targets = re.findall(r'\]\((?![a-z]+:|#)([^)#\s]+)', (ROOT / 'README.md').read_text(encoding='utf-8'))
    assert not [t for t in targets if not (ROOT / t).exists()]


def test_ci_runs_the_command_of_the_readme():
    command = re.search(r"^TEST_COMMAND='(.+)'", (ROOT / '.ci' / 'run').read_text(encoding='utf-8'), re.M)[1]
    assert command in (ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
    assert os.access(ROOT / '.ci' / 'run', os.X_OK)


def test_readme_rendering():
    cell = lambda source, *outputs, kind='code': {'cell_type': kind, 'source': source, 'outputs': list(outputs)}
    stream = lambda text: {'output_type': 'stream', 'name': 'stdout', 'text': text}
    picture = {'output_type': 'display_data', 'data': {'image/png': '', 'text/plain': '<Figure>'}}
    made = make_readme.render({'cells': [cell('# T\n\n[a](cli.ipynb) [b](../LICENSE) [c](https://x.y/z) [d](#e)', kind='markdown'), cell('#| hide\nsecret = 1'),
                                         cell('#| echo: false\nunseen()', stream('seen')), cell(['print(1)\n', 'print(2)'], stream(['1 \n']), stream('2'))]})
    assert '[a](nbs/06_cli.ipynb) [b](LICENSE) [c](https://x.y/z) [d](#e)' in made
    assert 'secret' not in made and 'unseen' not in made and 'seen' in made
    assert made.endswith('```python\nprint(1)\nprint(2)\n```\n\n```text\n1\n2\n```\n')
    with pytest.raises(ValueError): make_readme.render({'cells': [cell('plot()', picture)]})


def test_fence_is_longer_than_what_it_holds():
    assert fence('a') == '```\na\n```'
    assert fence('```\na\n```', 'md') == '````md\n```\na\n```\n````'


def test_streams_are_merged_only_with_their_kind():
    a, b = ({'output_type': 'stream', 'name': n, 'text': n} for n in ('stdout', 'stderr'))
    assert [o['text'] for o in merge_streams([a, a, b, a])] == ['stdoutstdout', 'stderr', 'stdout']
    assert read_directives('#| echo: false\nx = 1') == ({'echo': 'false'}, 'x = 1')


# ---------------------------------------------------------------- style

GOOD_FUNCTION = '#| export\ndef f(\n    a,  # the thing\n):\n    "Does."\n    return a'


def test_good_style_passes(): assert house.check_style(code(GOOD_FUNCTION, 'assert f(1)\ntest_eq(f(2), 2)')) == []


@pytest.mark.parametrize('source, word', [
    ('#| export\ndef f(a):\n    "Does."', 'parameter a'), ('#| export\ndef f(\n    a, b,  # both\n):\n    "Does."', 'parameter b'),
    ('#| export\ndef f(\n    a,\n):\n    "Does."', 'parameter a'), ('#| export\ndef f(\n    *,\n    a,\n):\n    "Does."', 'parameter a'),
    ('#| export\ndef f(): return 1', 'f has no docstring'), ('#| export\nclass A: x = 1', 'A has no docstring'),
    ('#| export\nclass A:\n    "An A."\n    def f(self): return 1', 'A.f has no docstring'), ('#| export\nclass A:\n    "An A."\n    def __init__(self, a): self.a = a', 'parameter a'),
    ('#| export\n' + 'x = 1\n' * 41, '41 lines'), ('#| export\ndef _f():\n' + '    x = 1\n' * 11, '12 lines'.replace('12 lines', 'median')), (GOOD_FUNCTION, '0 assertions')])
def test_bad_style_is_found(source, word): complains(house.check_style(code(source)), word)


def test_sizes():
    complains(house.check_style(code(*['x'] * 81)), '81 cells')
    complains(house.check_sizes({'m': 'x\n' * 301}), '301 lines')
    assert house.check_sizes({'m': 'x\n' * 300}) == []


# ---------------------------------------------------------------- site

SETTINGS = {'doc_path': '_docs', 'title': 'T', 'description': 'D', 'doc_host': 'https://a.b', 'doc_baseurl': '/c', 'git_url': 'https://g', 'branch': 'main'}
SITE = '''project: {type: website, output-dir: _docs}
website: {title: T, description: D, site-url: https://a.b/c, repo-url: https://g, repo-branch: main, sidebar: {contents: [index.ipynb, {section: Plan, contents: [plan/vram.ipynb]}]}}'''
FILES = ['index.ipynb', 'plan/memory/07_estimate.ipynb']


def test_good_site_passes(): assert house.check_site(SITE, FILES, SETTINGS) == []


def test_bad_sites_are_found():
    complains(house.check_site(SITE.replace('title: T', 'titel: T'), FILES, SETTINGS), 'website.titel')
    complains(house.check_site(SITE.replace('output-dir', 'output_dir'), FILES, SETTINGS), 'project.output_dir')
    complains(house.check_site(SITE.replace('type: website', 'type: book'), FILES, SETTINGS), 'project.type')
    complains(house.check_site(SITE.replace('title: T', 'title: U'), FILES, SETTINGS), 'website.title')
    complains(house.check_site(SITE, FILES[:1], SETTINGS), 'plan/vram.ipynb, which does not exist')
    complains(house.check_site(SITE, FILES + ['06_cli.ipynb'], SETTINGS), 'cli.ipynb is not in the sidebar')
    complains(house.check_site(SITE.replace('[plan/vram.ipynb]', '[plan/vram.ipynb, index.ipynb]'), FILES, SETTINGS), 'twice')


def test_nbs_includes_the_site():
    import yaml
    assert yaml.safe_load((ROOT / 'nbs' / '_quarto.yml').read_text(encoding='utf-8')) == {'metadata-files': ['../_quarto.yml']}


# ---------------------------------------------------------------- dependencies, stray paths, constraints


def test_dependencies_need_reasons():
    settings, rows = {'requirements': 'torch>=2 x-y', 'dev_requirements': 'nbdev==2'}, '| `torch` | it makes tensors | a |\n| `x-y` | | b |\n| `old` | was here once | c |'
    complaints = house.check_dependencies(settings, rows)
    assert [c.split()[0] for c in complaints] == ['nbdev', 'x-y', 'the'] and 'old' in complaints[-1]


@pytest.mark.parametrize('line', ['see /' + 'root/x', '/' + 'home/me', '/' + 'work/main', 'file' + ':///x', '/' + 'tmp/tmpab12', 'https://py' + 'pi.org/simple', '--extra' + '-index-url'])
def test_stray_paths_are_found(line): assert house.check_stray({'a.md': f'fine\n{line}'})[0].startswith('a.md:2: ')


def test_ordinary_paths_pass(): assert house.check_stray({'a.md': 'homework/main /tmp/x ~/runs https://github.com/homelab-ft'}) == []


def test_constraints_are_exact_and_cover_what_is_required():
    lines = (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
    pins = [line for line in lines if line and not line.startswith('#')]
    assert not [p for p in pins if not re.fullmatch(r'[\w.-]+==[\w.]+', p)]
    settings, normal = house.read_settings(ROOT), lambda name: re.sub(r'[-_.]+', '-', name).lower()
    pinned = {normal(p.split('==')[0]) for p in pins}
    needed = house.required_names({k: settings[k] for k in ('requirements', 'dev_requirements')})
    assert not [n for n in needed if normal(n) not in pinned]


# ---------------------------------------------------------------- documentation preview


def test_page_names_are_those_of_nbdev():
    from nbdev.doclinks import _nbpath2html
    for name in ('00_core.ipynb', 'plan/memory/07_estimate.ipynb', 'tutorials/First.ipynb'): assert docs_preview.page_name(name) == _nbpath2html(Path(name)).as_posix()


def test_links_are_rewritten():
    html = '<a href="../00_core.ipynb#units">a</a> <a class="x" href="https://s.io/b/plan/vram.html#fit">b</a> <img src="p.png"/> <a href="https://x.y/n.ipynb">c</a>'
    made = docs_preview.relink(html, 'plan/cost.html', 'https://s.io/b')
    assert made == '<a href="../core.html#units">a</a> <a class="x" href="vram.html#fit">b</a> <img src="p.png"/> <a href="https://x.y/n.ipynb">c</a>'


def test_dead_links_are_found(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'a.html').write_text('<h2 id="x">X</h2><a href="sub/b.html#y">b</a> <a href="#x">x</a> <a href="https://gone.example/">out</a> <img src="p.png">')
    (tmp_path / 'sub' / 'b.html').write_text('<h2 id="y">Y</h2><a href="../a.html">a</a>')
    assert docs_preview.check_links(tmp_path) == ['a.html: p.png does not exist']
    (tmp_path / 'p.png').write_bytes(b'')
    assert docs_preview.check_links(tmp_path) == []
    (tmp_path / 'sub' / 'b.html').write_text('<a href="../c.html">c</a> <a href="../a.html#z">z</a> <a href="../../out.html">out</a>')
    assert docs_preview.check_links(tmp_path) == ['a.html: sub/b.html#y has no such anchor', 'sub/b.html: ../c.html does not exist',
                                                  'sub/b.html: ../a.html#z has no such anchor', 'sub/b.html: ../../out.html does not exist']


def test_one_page(tmp_path):
    png = {'output_type': 'display_data', 'data': {'image/png': 'aGk=', 'text/plain': '<Figure>'}}
    table = {'output_type': 'execute_result', 'data': {'text/html': '<table><tr><td>1</td></tr></table>', 'text/plain': '1'}}
    cells = [{'cell_type': 'raw', 'source': '---\ntitle: A & B\noutput-file: a.html\n---\n\n'}, {'cell_type': 'markdown', 'source': '## Part\n\n$a^2$ [x](x.ipynb)'},
             {'cell_type': 'code', 'source': '#| echo: false\nplot()', 'outputs': [png]}, {'cell_type': 'code', 'source': 'f(1)', 'outputs': [table]}]
    front, markdown = docs_preview.render_notebook({'cells': cells}, tmp_path / 'a.html')
    html = docs_preview.to_html(markdown, {'title': 'A', 'pagetitle': 'A', 'root': '.', 'site': 's', 'nav': '<ul></ul>'})
    assert front['title'] == 'A & B' and (tmp_path / 'a_files' / 'cell-1-0.png').read_bytes() == b'hi'
    assert 'plot()' not in html and 'src="a_files/cell-1-0.png"' in html and '<td>1</td>' in html and 'id="part"' in html and '<math' in html


def test_links_to_undocumented_names_lead_to_their_page(tmp_path):
    (tmp_path / 'a.html').write_text('<h3 id="run">Run</h3><a href="#run.stop">a</a> <a href="#_pick">b</a> <a href="#walk.stop">c</a>')
    assert docs_preview.check_links(tmp_path) == ['a.html: #walk.stop has no such anchor']
