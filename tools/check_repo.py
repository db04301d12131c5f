"""Checks of the repository that no common tool makes: directives, hidden imports, documented parameters, site, dependencies, stray paths.

Every check is a pure function from text to a list of complaints; an empty list means "fine".
`python tools/check_repo.py` runs them on this repository; tests/test_repo.py also runs them on bad inputs.
"""
import ast, json, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from drop_bars import VIEW, is_picture, without_bars

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'homelab_ft'

# ---------------------------------------------------------------- notebooks


def notebooks(root):
    "All notebooks of the project, as paths relative to `nbs/`, the way nbdev finds them."
    nbs = Path(root) / 'nbs'
    found = (p.relative_to(nbs) for p in nbs.rglob('*.ipynb'))
    return sorted(p.as_posix() for p in found if not any(part[0] in '._' for part in p.parts))


def read_cells(path):
    "Cells of a notebook as `(type, source)` pairs."
    cells = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    return [(c['cell_type'], ''.join(c['source'])) for c in cells]


# ---------------------------------------------------------------- directives

PLAIN_DIRECTIVES = {'default_exp', 'export', 'exporti', 'hide', 'notest', 'gpu', 'slow'}
QUARTO_DIRECTIVES = {'echo': {'true', 'false'}, 'output': {'true', 'false', 'asis'}, 'code-fold': {'true', 'false', 'show'}}
SKIPPED = {'notest', 'gpu', 'slow'}
_directive = re.compile(r'^\s*#\s*\|\s*(.*)$')
_barless = re.compile(r'^#\s*(default_exp\s+[\w.]+|exporti?|hide|notest|gpu|slow)\s*$')


def cell_directives(source):
    "`(directives, body)` of a code cell: the leading `#|` lines without their mark, and all other lines."
    lines = source.splitlines()
    n = next((i for i, line in enumerate(lines) if line.strip() and not _directive.match(line)), len(lines))
    return [_directive.match(line)[1].strip() for line in lines[:n] if line.strip()], lines[n:]


def directive_name(text):
    "`'echo: false'` -> `'echo'`"
    return re.split(r'[:\s]', text, maxsplit=1)[0]


def _check_directive(text):
    "A complaint about one directive, or None."
    name, _, rest = re.match(r'([\w-]*)(:?)\s*(.*)', text).groups()
    if name in QUARTO_DIRECTIVES:
        return None if re.fullmatch(rf'{name}:\s*({"|".join(QUARTO_DIRECTIVES[name])})', text) else f'`#| {text}` has no known value'
    if name not in PLAIN_DIRECTIVES: return f'`#| {text}` is no directive of this project'
    wanted = r'default_exp [a-z][a-z0-9_.]*' if name == 'default_exp' else name
    return None if re.fullmatch(wanted, text) else f'`#| {text}` should read `#| {wanted}`'


_harmless = (ast.Import, ast.ImportFrom, ast.Assign)


def _has_import(tree): return any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree))


def _parse(lines):
    "Syntax tree of a cell; line magics and shell lines become `pass`."
    return ast.parse('\n'.join(re.sub(r'^(\s*)[%!].*', r'\1pass', line) for line in lines))


def check_directives(cells):
    """Complaints about the directives in the cells of one notebook.

    A misspelt directive is silently taken for a comment, so the cell runs or ships unnoticed. The documentation build
    runs every cell that holds an import, whatever else stands there, so imports stand in exported cells, alone, or beside assignments.
    """
    complaints = []
    for i, source in ((i, s) for i, (kind, s) in enumerate(cells) if kind == 'code'):
        directives, body = cell_directives(source)
        complaints += [f'cell {i}: {c}' for c in map(_check_directive, directives) if c]
        complaints += [f'cell {i}: `{line.strip()}` stands below code, where nbdev does not read it' for line in body if re.match(r'^\s*#\s*\|', line)]
        complaints += [f'cell {i}: `{line}` lacks its bar' for line in source.splitlines() if _barless.match(line)]
        names = {directive_name(d) for d in directives}
        tree = _parse(body)
        if names & SKIPPED and _has_import(tree): complaints.append(f'cell {i}: imports in a cell that tests skip; the docs build would run it')
        elif not names & {'export', 'exporti'} and _has_import(tree) and not all(isinstance(n, _harmless) for n in tree.body):
            complaints.append(f'cell {i}: imports beside code that does something; give the imports a cell of their own')
        if names & {'export', 'exporti'} and re.search(r'^\s*from\s+\S+\s+import\s+\*', '\n'.join(body), re.M):
            complaints.append(f'cell {i}: `import *` in an exported cell')
    return complaints


def check_title(cells):
    "Complaints about the first cell: nbdev takes the page's title, its lead and the module's docstring from it."
    fine = cells and cells[0][0] == 'markdown' and re.match(r'# [^#\s].*\n\n> \S.*', cells[0][1])
    return [] if fine else ['the first cell is not a `# Title`, an empty line and a `> one-line quote`']


_reprs = re.compile(r'<Figure size|<matplotlib\.|\b[HV]Box\(|\bOutput\(\)')


def check_outputs(notebook):
    "Complaints about what an executed notebook has kept, as parsed JSON."
    complaints = []
    if without_bars(notebook) != notebook:
        complaints.append('progress bars or views of ended widgets among the outputs, or state that nothing shows: run tools/drop_bars.py on it')
    for i, output in ((i, o) for i, c in enumerate(notebook['cells']) for o in c.get('outputs', [])):
        data = output.get('data', {})
        text = ''.join(output.get('text') or data.get('text/plain', ''))
        if VIEW in data and not is_picture(data): complaints.append(f'cell {i}: a widget without a picture: make it a `PictureBox`')
        elif _reprs.search(text) and not is_picture(data): complaints.append(f'cell {i}: {text.strip()[:40]!r} where a picture should be')
    return complaints


# ---------------------------------------------------------------- modules

LAYERS = ['core', 'config', 'io', 'table', 'plots', 'hardware', 'data', 'train', 'plan', 'evaluate', 'deploy', 'ui', 'pipeline', 'api', 'cli']
MAX_LINES = 500
_functions = (ast.FunctionDef, ast.AsyncFunctionDef)


def module_sources(root):
    "`{'homelab_ft.plan.cost': text}` of every module that a notebook made; `_modidx` is nbdev's."
    package = Path(root) / PACKAGE
    def name(path): return '.'.join(path.relative_to(package.parent).with_suffix('').parts)
    return {name(p): p.read_text(encoding='utf-8') for p in sorted(package.rglob('*.py')) if p.name != '_modidx.py'}


def _rank(module): return LAYERS.index(module.split('.')[1]) if module.split('.')[1] in LAYERS else len(LAYERS)


def check_strings(sources):
    "Complaints about imports hidden in strings: code as text, and names of modules of a higher layer. import-linter sees all others."
    complaints = []
    for module, source in sources.items():
        if module.endswith('__init__'): continue
        texts = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        complaints += [f'{module}: a program in a string: {t[:60]!r}' for t in texts if re.search(rf'(^|[;\n])\s*(from|import) {PACKAGE}\b', t)]
        named = [t for t in texts if re.fullmatch(rf'{PACKAGE}(\.\w+)+', t)]
        complaints += [f'{module} names {t}, which stands above it' for t in named if _rank(t) > _rank(module)]
    return complaints


def check_sizes(sources):
    "Complaints about modules that are too long."
    sizes = {m: len(s.splitlines()) for m, s in sources.items()}
    return [f'{m}: {n} lines, {MAX_LINES} allowed: split it by subject' for m, n in sizes.items() if n > MAX_LINES]


def _called_name(call):
    "`('AutoConfig', 'from_pretrained')` of `AutoConfig.from_pretrained(...)`; an owner that is no plain name is ''."
    f = call.func
    if isinstance(f, ast.Name): return '', f.id
    if not isinstance(f, ast.Attribute): return '', ''
    return f.value.id if isinstance(f.value, ast.Name) else '', f.attr


def _is_true(call, name, value):
    "Whether the call passes `name=value`, literally."
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def check_loading(sources):
    """Complaints about calls that may run code from a model folder or read pickled weights.

    transformers asks on a terminal whether to run such code unless `trust_remote_code=False` is passed. peft has no such option."""
    complaints = []
    for module, source in sources.items():
        for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
            owner, name = _called_name(call)
            place = f'{module}: {owner}.{name}, line {call.lineno},'
            loads = name == 'from_pretrained' or name in ('load_dataset', 'pipeline') or name == 'from_config' and owner.startswith('Auto')
            if loads and owner != 'PeftModel' and not _is_true(call, 'trust_remote_code', False): complaints.append(f'{place} lacks trust_remote_code=False')
            is_model = name == 'from_pretrained' and owner not in ('PeftModel', 'AutoConfig', 'AutoTokenizer')
            if is_model and not _is_true(call, 'use_safetensors', True): complaints.append(f'{place} lacks use_safetensors=True')
            if (owner, name) == ('torch', 'load') and not _is_true(call, 'weights_only', True): complaints.append(f'{place} lacks weights_only=True')
            if owner in ('pickle', 'dill', 'joblib') and name in ('load', 'loads'): complaints.append(f'{place} reads a pickle')
    return complaints


def _undocumented_parameters(node, lines):
    "Parameters of a function that have no comment on a line of their own; `lines` are those of the module."
    a = node.args
    parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    parameters = [p for p in parameters if p.arg not in ('self', 'cls')]
    numbers = [p.lineno for p in parameters]
    def is_documented(p): return numbers.count(p.lineno) == 1 and p.lineno != node.lineno and '#' in lines[p.lineno - 1]
    return [p.arg for p in parameters if not is_documented(p)]


def check_parameters(sources):
    "Complaints about public functions whose parameters have no comment of their own; interrogate looks at the docstrings."
    complaints = []
    for module, source in sources.items():
        lines = source.splitlines()
        for node in ast.parse(source).body:
            members = node.body if isinstance(node, ast.ClassDef) and node.name[0] != '_' else []
            inits = [n for n in members if isinstance(n, _functions) and n.name == '__init__']
            for function in [node] if isinstance(node, _functions) and node.name[0] != '_' else inits:
                complaints += [f'{module}.{node.name}: parameter {p} has no comment on its own line' for p in _undocumented_parameters(function, lines)]
    return complaints


# ---------------------------------------------------------------- site

# Keys from Quarto's reference (quarto.org/docs/reference/projects/websites.html and formats/html.html), as far as we use them.
QUARTO_KEYS = {
    '': {'project', 'format', 'website'},
    'project': {'type', 'output-dir', 'render', 'resources', 'pre-render', 'post-render', 'preview'},
    'format': {'html'},
    'format.html': {'theme', 'css', 'toc', 'toc-depth', 'code-overflow', 'code-fold', 'html-math-method', 'keep-md'},
    'website': {'title', 'description', 'favicon', 'site-url', 'repo-url', 'repo-branch', 'repo-actions', 'page-navigation', 'bread-crumbs',
                'open-graph', 'twitter-card', 'navbar', 'sidebar', 'search', 'page-footer', 'back-to-top-navigation'},
    'website.navbar': {'background', 'search', 'left', 'right', 'title', 'logo'},
    'website.sidebar': {'style', 'contents', 'title', 'search', 'collapse-level'},
}


def _check_keys(node, where=''):
    "Unknown keys at or below `where`; mappings that QUARTO_KEYS does not list are not entered."
    if not isinstance(node, dict) or where not in QUARTO_KEYS: return []
    join = lambda k: f'{where}.{k}'.lstrip('.')
    return [f'unknown Quarto key {join(k)}' for k in node if k not in QUARTO_KEYS[where]] + [c for k, v in node.items() for c in _check_keys(v, join(k))]


def sidebar(quarto_yml):
    "The sidebar as `(section or None, file)` pairs in order."
    pairs = []
    for entry in yaml.safe_load(quarto_yml)['website']['sidebar']['contents']:
        if isinstance(entry, str): pairs.append((None, entry))
        else: pairs += [(entry['section'], f) for f in entry['contents']]
    return pairs


def check_site(quarto_yml, files, settings):
    "Complaints about `_quarto.yml`: unknown keys, files missing on either side, values that contradict settings.ini."
    site = yaml.safe_load(quarto_yml)
    complaints = _check_keys(site)
    if site.get('project', {}).get('type') != 'website': complaints.append('project.type is not website')
    if site.get('project', {}).get('output-dir') != settings['doc_path']: complaints.append(f"project.output-dir is not {settings['doc_path']}, the doc_path of settings.ini")
    same = {'title': settings['title'], 'description': settings['description'], 'site-url': settings['doc_host'] + settings['doc_baseurl'],
            'repo-url': settings['git_url'], 'repo-branch': settings['branch']}
    complaints += [f'website.{k} is not {v!r}, as settings.ini has it' for k, v in same.items() if site.get('website', {}).get(k) != v]
    listed = [f for _, f in sidebar(quarto_yml)]
    complaints += [f'the sidebar lists {f}, which does not exist' for f in listed if f not in files]
    complaints += [f'{f} is not in the sidebar' for f in files if f not in listed]
    return complaints + [f'the sidebar lists {f} twice' for f in sorted(set(listed)) if listed.count(f) > 1]


def check_overviews(cells):
    "Complaints about pages of a package that its `00_overview.ipynb` does not link to; `cells` of `{file: cells}`."
    complaints = []
    for overview in (f for f in cells if f.endswith('/00_overview.ipynb')):
        folder = overview.removesuffix('00_overview.ipynb')
        links = {link for _, source in cells[overview] for link in re.findall(r'\]\(([^)#]+)', source)}
        pages = [f.removeprefix(folder) for f in cells if f.startswith(folder) and f != overview]
        complaints += [f'{overview} does not link to {page}' for page in pages if page not in links]
    return complaints


# ---------------------------------------------------------------- dependencies, stray paths


def read_settings(root):
    "The settings of settings.ini as a mapping."
    parser = ConfigParser(delimiters=['='])
    parser.read_string((Path(root) / 'settings.ini').read_text(encoding='utf-8'))
    return parser['DEFAULT']


def required_names(settings):
    "Names of all packages in any `*requirements` of settings.ini."
    lines = (v for k, v in settings.items() if k.endswith('requirements'))
    return sorted({re.match(r'[\w.-]+', word)[0] for line in lines for word in line.split()})


def check_dependencies(settings, markdown):
    "Packages that have no table row with a reason in the text of the dependencies notebook."
    rows = [[c.strip() for c in line.strip().strip('|').split('|')] for line in markdown.splitlines() if line.strip().startswith('|')]
    reasons = {name: row[1] for row in rows if len(row) > 1 for name in re.findall(r'`([\w.-]+)`', row[0])}
    names = required_names(settings)
    complaints = [f'{n} has no reason in the dependencies notebook' for n in names if len(reasons.get(n, '').split()) < 3]
    return complaints + [f'the dependencies notebook explains {n}, which settings.ini does not require' for n in sorted(reasons) if n not in names]


# Written so that this file does not match itself.
STRAY = re.compile(r'/[w]ork/\w|/[r]oot/|/[h]ome/\w|/[U]sers/\w|/[o]pt/(pypi|wheels)|[f]ile:///|/[t]mp/tmp\w|[p]ypi\.org|[p]ythonhosted\.org|[e]xtra-index-url')


def check_stray(files):
    "Lines of `{name: text}` that carry a path of somebody's machine or the address of a package registry."
    hits = ((name, n, STRAY.search(line)) for name, text in files.items() for n, line in enumerate(text.splitlines(), 1))
    return [f'{name}:{n}: {hit[0]}' for name, n, hit in hits if hit]


def tracked_texts(root):
    "Texts of all files that git tracks or would track, the package's assets aside."
    command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z']
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split('\0')
    paths = [Path(root) / n for n in names if n and not n.startswith(f'{PACKAGE}/assets/')]
    texts = {}
    for p in paths:
        try: texts[p.relative_to(root).as_posix()] = p.read_text(encoding='utf-8')
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError): continue   # pictures; files deleted but not yet committed
    return texts


# ---------------------------------------------------------------- all of it


def check_all(root=ROOT):
    "`{check: complaints}` for the repository."
    files, sources, settings = notebooks(root), module_sources(root), read_settings(root)
    cells = {f: read_cells(Path(root) / 'nbs' / f) for f in files}
    executed = {f: json.loads((Path(root) / 'nbs' / f).read_text(encoding='utf-8')) for f in files}
    def per_notebook(check): return [f'{f}: {c}' for f in files for c in check(cells[f])]
    reasons = '\n'.join(s for kind, s in cells.get('explanations/dependencies.ipynb', []) if kind == 'markdown')
    return {'directives': per_notebook(check_directives), 'titles': per_notebook(check_title), 'outputs': [f'{f}: {c}' for f in files for c in check_outputs(executed[f])],
            'imports': check_strings(sources), 'loading': check_loading(sources), 'parameters': check_parameters(sources), 'sizes': check_sizes(sources),
            'site': check_site((Path(root) / '_quarto.yml').read_text(encoding='utf-8'), files, settings), 'overviews': check_overviews(cells),
            'dependencies': check_dependencies(settings, reasons), 'stray': check_stray(tracked_texts(root))}


if __name__ == '__main__':
    results = check_all()
    for check, complaints in results.items():
        print(f'{check}: {len(complaints) or "fine"}')
        for c in complaints: print('  ', c)
    sys.exit(any(results.values()))
