"The repository itself: what the checks in tools/ find, and that each of them can fail."
import io, json, os, re, shutil, subprocess, sys, time
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import check_repo as repo
import docs_preview, drop_bars, make_pictures, make_readme, measure_style, phone, site_notebooks
from notebook_text import fence, merge_streams, read_directives

ROOT = repo.ROOT


def code(*sources): return [('code', s) for s in sources]


def complains(complaints, *words):
    assert complaints, 'nothing was found'
    assert any(all(w in c for w in words) for c in complaints), complaints


# ---------------------------------------------------------------- this repository


@pytest.fixture(scope='module')
def results(): return repo.check_all(ROOT)


@pytest.mark.parametrize('check', ['directives', 'titles', 'outputs', 'imports', 'loading', 'parameters', 'sizes', 'site', 'overviews', 'dependencies', 'stray'])
def test_repo_is_in_order(results, check):
    assert not results[check], '\n' + '\n'.join(results[check])


# ---------------------------------------------------------------- directives


@pytest.mark.parametrize('source, word', [
    ('#| exprot\nx = 1', 'no directive'), ('#| eval: false\nx = 1', 'no directive'), ('#| hide_input\nx = 1', 'no directive'), ('#|\nx = 1', 'no directive'),
    ('#| echo: no', 'no known value'), ('#| echo', 'no known value'), ('#| export core', 'should read'), ('#| hide:\nx = 1', 'should read'),
    ('#| default_exp', 'should read'), ('x = 1\n#| export', 'below code'), ('#export\nx = 1', 'lacks its bar'), ('# hide\nx = 1', 'lacks its bar'),
    ('#| gpu\nimport torch', 'tests skip'), ('#| slow\ndef f():\n    import torch', 'tests skip'),
    ('import torch\nprint(torch)', 'imports beside code'), ('#| hide\nimport os\nos.mkdir("x")', 'imports beside code'),
    ('#| export\nfrom os import *', 'import *')])
def test_bad_directives_are_found(source, word): complains(repo.check_directives(code(source)), word)


def test_good_directives_pass():
    good = ['#| default_exp plan.vram', '#| export\nimport os\nx = os.sep', '#|export\nx = 1', '#| hide\nimport os\ntmp = os.sep', '#| gpu\nprint(1)',
            '#| echo: false\n#| code-fold: true\nprint(1)', '# a comment about export\nx = 1', '%matplotlib inline', '!ls', '']
    assert repo.check_directives(code(*good) + [('markdown', '#| exprot')]) == []


@pytest.mark.parametrize('first', ['# # Core\n\n> Units.', '# Core', '## Core\n\n> Units.', '# Core\n> Units'])
def test_bad_titles_are_found(first): complains(repo.check_title([('markdown', first)]), 'first cell')


def test_good_titles_pass(): assert repo.check_title([('markdown', '# Core\n\n> Units, errors.')]) == []


def test_progress_bars_are_found_and_dropped():
    view = lambda name, text: {'output_type': 'display_data', 'data': {drop_bars.VIEW: {'model_id': name}, 'text/plain': [text]}}
    state = {'bar': {'state': {'children': ['IPY_MODEL_part']}}, 'part': {}, 'slider': {'state': {'layout': 'IPY_MODEL_space'}}, 'space': {}}
    notebook = {'cells': [{'outputs': [view('bar', 'loading:  50%|## | 1/2 [00:03<00:03]'), view('slider', 'IntSlider(value=3)')]}, {'source': ''}],
                'metadata': {'widgets': {drop_bars.STATE: {'state': state}}}}
    complains(repo.check_outputs(notebook), 'drop_bars')
    clean = drop_bars.without_bars(notebook)
    assert not any('drop_bars' in c for c in repo.check_outputs(clean))
    assert set(clean['metadata']['widgets'][drop_bars.STATE]['state']) == {'slider', 'space'}
    del notebook['cells'][0]['outputs'][1]
    assert drop_bars.without_bars(notebook)['metadata'] == {}


def test_outputs_are_pictures_where_a_widget_or_a_figure_was_shown():
    def notebook(**data): return {'cells': [{'source': '', 'outputs': [{'output_type': 'display_data', 'data': data}]}], 'metadata': {}}
    widget = {drop_bars.VIEW: {'model_id': 'x'}, 'text/plain': ['VBox(children=(HTML(),))']}
    complains(repo.check_outputs(notebook(**widget)), 'a widget without a picture')
    complains(repo.check_outputs(notebook(**{'text/plain': ['<Figure size 640x480 with 1 Axes>']})), '<Figure size')
    complains(repo.check_outputs({'cells': [{'outputs': [{'output_type': 'stream', 'text': ['<Figure size 6x4>']}]}], 'metadata': {}}), '<Figure size')
    assert repo.check_outputs(notebook(**{'image/png': '', 'text/plain': ['<Figure size 640x480 with 1 Axes>']})) == []
    pictured = notebook(**widget, **{'text/html': '<p>fits</p>'})
    complains(repo.check_outputs(pictured), 'drop_bars')
    assert repo.check_outputs(drop_bars.without_bars(pictured)) == []


# ---------------------------------------------------------------- modules


def test_hidden_imports_are_found():
    program = {'homelab_ft.plan.trace.trace': 'BEGIN = "import gc; from homelab_ft.plan import x"'}
    complains(repo.check_strings(program), 'a program in a string')
    upwards = {'homelab_ft.train.launcher': 'command = ["python", "-m", "homelab_ft.plan.probe"]'}
    complains(repo.check_strings(upwards), 'stands above it')
    downwards = {'homelab_ft.cli': 'command = ["python", "-m", "homelab_ft.plan.probe"]'}
    assert repo.check_strings(downwards) == []


@pytest.mark.parametrize('source, words', [
    ('AutoTokenizer.from_pretrained(p)', 'AutoTokenizer.from_pretrained, line 1, lacks trust_remote_code=False'),
    ('AutoConfig.from_pretrained(p, trust_remote_code=True)', 'lacks trust_remote_code=False'),
    ('AutoConfig.from_pretrained(p, **options)', 'lacks trust_remote_code=False'),
    ('type(m).from_pretrained(p, trust_remote_code=False)', 'lacks use_safetensors=True'),
    ('AutoModelForCausalLM.from_config(c)', 'lacks trust_remote_code=False'), ('load_dataset(p)', 'lacks trust_remote_code=False'),
    ('torch.load(p)', 'lacks weights_only=True'), ('pickle.load(f)', 'reads a pickle')])
def test_loading_that_could_run_code_is_found(source, words):
    complains(repo.check_loading({'homelab_ft.train.lora': source}), words)


def test_loading_that_is_safe():
    safe = """AutoTokenizer.from_pretrained(p, trust_remote_code=False)
PeftModel.from_pretrained(m, p)
EstimateSpec.from_config(c)
M.from_pretrained(p, trust_remote_code=False, use_safetensors=True)
torch.load(p, weights_only=True)"""
    assert repo.check_loading({'homelab_ft.train.lora': safe}) == []


@pytest.mark.parametrize('source, word', [
    ('def f(a):\n    "Does."', 'parameter a'),
    ('def f(\n    a, b,  # both\n):\n    "Does."', 'parameter b'),
    ('def f(\n    *,\n    a,\n):\n    "Does."', 'parameter a'),
    ('class A:\n    "An A."\n    def __init__(self, a): self.a = a', 'parameter a'),
])
def test_undocumented_parameters_are_found(source, word): complains(repo.check_parameters({'homelab_ft.m': source}), word)


def test_documented_parameters_pass():
    good = 'def f(\n    a,  # the thing\n):\n    "Does."\ndef _g(b): pass'
    assert repo.check_parameters({'homelab_ft.m': good}) == []


def test_long_modules_are_found():
    complains(repo.check_sizes({'m': 'x\n' * 501}), '501 lines')
    assert repo.check_sizes({'m': 'x\n' * 500}) == []


def test_style_is_measured(tmp_path):
    module, notebook = tmp_path / 'homelab_ft' / 'a.py', tmp_path / 'nbs' / '01_a.ipynb'
    for path in (module, notebook): path.parent.mkdir()
    module.write_text(f'def f():\n    "Does."\n    return 1\n\n\ndef _g():\n    return "{"x" * 130}"\n')
    cells = [dict(cell_type='code', source=['#| export\n', 'x = 1']), dict(cell_type='code', source=['#| export\n', 'y = 1'])]
    notebook.write_text(json.dumps(dict(cells=cells)))
    figures, lines = measure_style.measure([module], [notebook])
    assert [line.length for line in lines] == [12, 143]
    assert figures['lines over 120 characters, %'] == figures['lines over 140 characters, %'] == 50
    assert figures['private functions, %'] == 50 and figures['exported cells without prose, %'] == 50
    assert figures['tokens a line'] == 2 and figures['tokens of the package'] == 13
    assert measure_style.name_of(notebook, tmp_path / 'nbs') == measure_style.name_of(module, tmp_path / 'homelab_ft') == 'a'


# ---------------------------------------------------------------- import time


def run_python(program): return subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_import_is_quick():
    def seconds():
        start = time.perf_counter()
        run_python('import homelab_ft')
        return time.perf_counter() - start
    best = min(seconds() for _ in range(5))
    assert best < 0.3, f'python -c "import homelab_ft" takes {best:.2f} s at best'


LIGHT = ('core', 'config', 'io', 'table', 'hardware', 'data', 'plan', 'api', '__init__')
TRACERS = ('probe', 'ledger', 'fake_model', 'memory_tracer', 'inductor_memory', 'dry_run', 'torch_internals')     # run in a process of their own


def test_light_packages_import_nothing_heavy():
    light = [m for m in repo.module_sources(ROOT) if m.split('.')[1] in LIGHT and m.split('.')[-1] not in TRACERS]
    heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'peft', 'bitsandbytes', 'accelerate', 'matplotlib', 'ipywidgets', 'scipy', 'sklearn'}
    program = 'import importlib, sys\nfor m in {}: importlib.import_module(m.removesuffix(".__init__")); print(m, sorted({} & set(sys.modules)))'
    found = [line for line in run_python(program.format(light, heavy)).splitlines() if not line.endswith('[]')]
    assert not found, found[0]
    assert 'pyarrow' in run_python(program.format(['pyarrow'], heavy))


# ---------------------------------------------------------------- round trip


def round_trip(target):
    "A copy of notebooks and package in `target`, cleaned and exported from nothing."
    for name in ('nbs', 'homelab_ft'): shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns('__pycache__', '.*', 'assets'))
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT / name, target)
    for p in (target / 'homelab_ft').rglob('*.py'):
        if p != target / 'homelab_ft' / '__init__.py': p.unlink()      # the one module that no notebook makes
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


def run_cells(notebook, folder):
    "`(committed output, what the cell gives now)` of every code cell that shows something; the cells run in `folder`."
    import ast
    names, pairs, here = {}, [], os.getcwd()
    os.chdir(folder)
    try:
        for cell in (c for c in notebook['cells'] if c['cell_type'] == 'code'):
            *body, last = ast.parse(''.join(cell['source'])).body
            is_value = isinstance(last, ast.Expr)
            exec(compile(ast.Module(body if is_value else [*body, last], []), 'cell', 'exec'), names)
            if not is_value: continue
            with redirect_stdout(io.StringIO()) as printed: value = eval(compile(ast.Expression(last.value), 'cell', 'eval'), names)
            pairs.append((cell['outputs'], printed.getvalue() if value is None else value))
    finally: os.chdir(here)
    return pairs


def test_readme_shows_what_was_measured_and_which_models_are_known():
    pairs = run_cells(json.loads((ROOT / 'nbs' / 'index.ipynb').read_text(encoding='utf-8')), ROOT / 'nbs')
    assert len(pairs) == 3
    for outputs, now in pairs:
        committed, now = (outputs[0]['text'], now) if isinstance(now, str) else (outputs[0]['data']['text/markdown'], now._repr_markdown_())
        assert ''.join(committed) == now, 'run nbs/index.ipynb, then tools/make_readme.py'
    from homelab_ft.plan.model_catalog import CATALOG
    models = pairs[2][1]
    assert sorted(', '.join(row[1] for row in models.rows).split(', ')) == sorted(CATALOG)


def test_the_picture_of_the_planner_is_fresh():
    assert make_pictures.PLANNER.read_text(encoding='utf-8') == make_pictures.planner_picture(), 'python tools/make_pictures.py'


@pytest.mark.skipif(phone.find_browser() is None, reason='there is no chromium')
def test_the_picture_of_the_planner_is_whole():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        page = play.chromium.launch(executable_path=phone.find_browser(), args=['--no-sandbox']).new_page()
        page.goto(make_pictures.PLANNER.as_uri())
        height = page.evaluate('document.querySelector("foreignObject > *").scrollHeight')
        assert make_pictures.HEIGHT - 60 < height <= make_pictures.HEIGHT
        assert page.evaluate('document.querySelectorAll("foreignObject svg rect").length') > 10


def test_readme_links_lead_somewhere():
    targets = re.findall(r'\]\((?![a-z]+:|#)([^)#\s]+)', (ROOT / 'README.md').read_text(encoding='utf-8'))
    assert any(t.endswith('.svg') for t in targets)
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
    assert '[a](nbs/cli.ipynb) [b](LICENSE) [c](https://x.y/z) [d](#e)' in made
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


# ---------------------------------------------------------------- site

SETTINGS = {'doc_path': '_docs', 'title': 'T', 'description': 'D', 'doc_host': 'https://a.b', 'doc_baseurl': '/c', 'git_url': 'https://g', 'branch': 'main'}
SITE = '''project: {type: website, output-dir: _docs}
website: {title: T, description: D, site-url: https://a.b/c, repo-url: https://g, repo-branch: main, sidebar: {contents: [index.ipynb, {section: Plan, contents: [plan/cost.ipynb]}]}}'''
FILES = ['index.ipynb', 'plan/cost.ipynb']


def test_good_site_passes(): assert repo.check_site(SITE, FILES, SETTINGS) == []


def test_bad_sites_are_found():
    complains(repo.check_site(SITE.replace('title: T', 'titel: T'), FILES, SETTINGS), 'website.titel')
    complains(repo.check_site(SITE.replace('output-dir', 'output_dir'), FILES, SETTINGS), 'project.output_dir')
    complains(repo.check_site(SITE.replace('type: website', 'type: book'), FILES, SETTINGS), 'project.type')
    complains(repo.check_site(SITE.replace('title: T', 'title: U'), FILES, SETTINGS), 'website.title')
    complains(repo.check_site(SITE, FILES[:1], SETTINGS), 'plan/cost.ipynb, which does not exist')
    complains(repo.check_site(SITE, FILES + ['cli.ipynb'], SETTINGS), 'cli.ipynb is not in the sidebar')
    complains(repo.check_site(SITE.replace('[plan/cost.ipynb]', '[plan/cost.ipynb, index.ipynb]'), FILES, SETTINGS), 'twice')


def test_pages_that_no_overview_links_to_are_found():
    cells = {'plan/00_overview.ipynb': [('markdown', '| [a](01_a.ipynb) |')], 'plan/01_a.ipynb': [], 'index.ipynb': []}
    assert repo.check_overviews(cells) == []
    complains(repo.check_overviews(cells | {'plan/memory/02_b.ipynb': []}), 'does not link to memory/02_b.ipynb')


def test_nbs_includes_the_site():
    import yaml
    assert yaml.safe_load((ROOT / 'nbs' / '_quarto.yml').read_text(encoding='utf-8')) == {'metadata-files': ['../_quarto.yml']}


# ---------------------------------------------------------------- dependencies, stray paths, constraints


def test_dependencies_need_reasons():
    settings, rows = {'requirements': 'torch>=2 x-y', 'dev_requirements': 'nbdev==2'}, '| `torch` | it makes tensors | a |\n| `x-y` | | b |\n| `old` | was here once | c |'
    complaints = repo.check_dependencies(settings, rows)
    assert [c.split()[0] for c in complaints] == ['nbdev', 'x-y', 'the'] and 'old' in complaints[-1]


@pytest.mark.parametrize('line', ['see /' + 'root/x', '/' + 'home/me', '/' + 'work/main', 'file' + ':///x', '/' + 'tmp/tmpab12', 'https://py' + 'pi.org/simple', '--extra' + '-index-url'])
def test_stray_paths_are_found(line): assert repo.check_stray({'a.md': f'fine\n{line}'})[0].startswith('a.md:2: ')


def test_ordinary_paths_pass(): assert repo.check_stray({'a.md': 'homework/main /tmp/x ~/runs https://github.com/homelab-ft'}) == []


def test_constraints_are_exact_and_cover_what_is_required():
    lines = (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
    pins = [line for line in lines if line and not line.startswith('#')]
    assert not [p for p in pins if not re.fullmatch(r'[\w.-]+==[\w.]+', p)]
    settings, normal = repo.read_settings(ROOT), lambda name: re.sub(r'[-_.]+', '-', name).lower()
    pinned = {normal(p.split('==')[0]) for p in pins}
    needed = repo.required_names({k: settings[k] for k in ('requirements', 'dev_requirements')})
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


def for_a_page(
    path: Path,         # a file of `forms`
    *names,             # more of them
    limit: float = 0.5, # GiB
    is_open=None,
) -> list:              # as many
    "Does `nothing`."


def test_signatures_have_a_line_per_parameter_and_no_markup():
    assert site_notebooks.signature(for_a_page, 'for_a_page') == """\
def for_a_page(
    path: Path,          # a file of forms
    *names,              # more of them
    limit: float = 0.5,  # GiB
    is_open=None,
) -> list                # as many"""
    link = '[`form`](https://s.io/b/data/form.html#form)'
    shown = f'### fence\n\n```python\ndef fence(\n    text, info:str=\'\', # {link}\n):\n```\n\n*A code fence, see {link}.*'
    cell = {'source': '#| echo: false\nshow_doc(fence)', 'outputs': [{'data': {'text/markdown': [shown]}}]}
    site_notebooks.mend_signature(cell, 'notebook_text')
    made = cell['outputs'][0]['data']['text/markdown']
    assert "```python\ndef fence(\n    text,\n    info='',\n)\n```\n\n*A code" in made and made.count(link) == 1


async def waits_for_a_page(
    process=None,       # from `start`
): "Does nothing."


def test_a_coroutine_has_its_signature_too():
    assert site_notebooks.signature(waits_for_a_page, 'wait') == "async def wait(\n    process=None,  # from start\n)"
    shown = "```python\nasync def wait(\n    process:NoneType=None, # from [`start`](https://s.io/b/a.html#start)\n):\n```"
    cell = {'source': 'show_doc(wait)', 'outputs': [{'data': {'text/markdown': [shown]}}]}
    site_notebooks.mend_signature(cell, 'homelab_ft.train.launcher')
    made = cell['outputs'][0]['data']['text/markdown']
    assert 'async def wait(' in made and '](' not in made and "the run's state decides" in made


def test_links_inside_links_are_mended():
    url = 'https://s.io/b/a.html#a'
    assert site_notebooks.mend_links(f'see [[`a`]({url})](01_a.ipynb) and [the [`b`]({url}) of [`c`]({url})](x.ipynb), [`d`]({url})') == \
        f'see [`a`](01_a.ipynb) and [the `b` of `c`](x.ipynb), [`d`]({url})'


def test_links_shown_as_markdown_are_found(tmp_path):
    (tmp_path / 'a.html').write_text('<p><a href="b">[<code>f</code>](https://s.io/b#f)</a></p><pre>def f(a) # [g](https://s.io/b#g)\nx = "[y](z)"</pre><p>f[0](x)</p>')
    found = docs_preview.check_markup(tmp_path, 'https://s.io')
    assert [c.rsplit(' ', 1)[1] for c in found] == ['](https://s.io/b#f)', '](x)', '](https://s.io/b#g)']


def test_every_public_name_has_a_signature():
    import importlib, inspect
    for name in sorted(repo.module_sources(ROOT)):
        module = importlib.import_module(name.removesuffix('.__init__'))
        for public in getattr(module, '__all__', []):
            obj = getattr(module, public)
            if not (inspect.isfunction(obj) or inspect.isclass(obj)): continue
            text = site_notebooks.signature(obj, public)
            assert text.startswith((f'def {public}(', f'async def {public}(', f'class {public}(')) and '](' not in text, text


def test_links_to_undocumented_names_lead_to_their_page(tmp_path):
    (tmp_path / 'a.html').write_text('<h3 id="run">Run</h3><a href="#run.stop">a</a> <a href="#_pick">b</a> <a href="#walk.stop">c</a>')
    assert docs_preview.check_links(tmp_path) == ['a.html: #walk.stop has no such anchor']


@pytest.mark.skipif(phone.find_browser() is None, reason='there is no chromium')
def test_pages_wider_than_a_phone_are_found(tmp_path):
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    (tmp_path / 'fits.html').write_text(head + '<main><pre style="overflow-x:auto">' + 'x' * 200 + '</pre></main>')
    (tmp_path / 'wide.html').write_text(head + '<main><p id="long">' + 'x' * 200 + '</p></main>')
    found = phone.check_width(tmp_path, phone.find_browser())
    assert len(found) == 1 and found[0].startswith('wide.html: ') and 'id="long"' in found[0]
