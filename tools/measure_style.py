"""How the code reads, in numbers, against the project's aims: python tools/measure_style.py [FOLDER OR FILE ...]

Without arguments it measures everything and exits 1 where an aim is missed. With paths (`plan/memory`, `train/trainer`) it
measures those modules and notebooks only, and lists their longest lines and functions with many parameters.
"""
import ast, io, json, re, sys, tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'homelab_ft'
AIMS = {
    'lines over 120 characters, %': 2.0,
    'lines over 140 characters, %': 0.0,
    'tokens a line': 12.0,
    'private functions, %': 30.0,
    'exported cells without prose, %': 25.0,
}
CODE = (tokenize.NAME, tokenize.OP, tokenize.NUMBER)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Line:
    "One line of a function's body."
    path: Path
    number: int
    length: int


def body_lines(node):
    "Line numbers of a function's statements, its docstring left out."
    statements = node.body
    first = statements[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        statements = statements[1:]
    return range(statements[0].lineno, node.end_lineno + 1) if statements else range(0)


def read_tokens(text): return list(tokenize.generate_tokens(io.StringIO(text).readline))


def measure_module(path):
    "`(lines of function bodies, their tokens, functions, tokens of the module)`"
    text = path.read_text(encoding='utf-8')
    source, tokens = text.splitlines(), read_tokens(text)
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, FUNCTIONS)]
    numbers = {i for node in functions for i in body_lines(node)}
    numbers = {i for i in numbers if source[i - 1].strip() and not source[i - 1].strip().startswith('#')}
    lines = [Line(path, i, len(source[i - 1].rstrip())) for i in sorted(numbers)]
    inside = sum(t.type in (*CODE, tokenize.STRING) and t.start[0] in numbers for t in tokens)
    return lines, inside, functions, sum(t.type in CODE for t in tokens)


def count_bare_cells(path):
    "`(exported cells, those right after another exported cell)` of a notebook."
    exported, bare, last = 0, 0, ''
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        kind = 'export' if re.search(r'^#\s*\|\s*export', source, re.M) else cell['cell_type']
        exported += kind == 'export'
        bare += kind == last == 'export'
        if source.strip(): last = kind
    return exported, bare


def is_private(function): return function.name.startswith('_') and not function.name.startswith('__')


def share(part, whole): return 100 * part / max(1, whole)


def measure(modules, notebooks):
    "`(figures, lines)`: every figure of AIMS, and all lines of function bodies."
    lines, inside, functions, size = [], 0, [], 0
    for path in modules:
        some, tokens, defined, total = measure_module(path)
        lines += some
        inside += tokens
        functions += defined
        size += total
    cells = [count_bare_cells(path) for path in notebooks]
    figures = {
        'lines over 120 characters, %': share(sum(line.length > 120 for line in lines), len(lines)),
        'lines over 140 characters, %': share(sum(line.length > 140 for line in lines), len(lines)),
        'tokens a line': inside / max(1, len(lines)),
        'private functions, %': share(sum(map(is_private, functions)), len(functions)),
        'exported cells without prose, %': share(sum(bare for _, bare in cells), sum(n for n, _ in cells)),
        'tokens of the package': size,
    }
    return figures, lines


def name_of(path, root):
    "`nbs/data/01_load.ipynb` and `homelab_ft/data/load.py` are both `data/load`."
    return re.sub(r'(^|/)\d\d_', r'\1', path.relative_to(root).with_suffix('').as_posix())


def select(root, pattern, wanted):
    "Files below `root` whose name is, or lies in, one of `wanted`; all of them if `wanted` is empty."
    paths = [p for p in sorted(root.rglob(pattern)) if p.name != '_modidx.py' and '.ipynb_checkpoints' not in p.parts]
    return [p for p in paths if not wanted or any(f'{name_of(p, root)}/'.startswith(f'{w}/') for w in wanted)]


def main(arguments):
    "Print the figures; returns the exit status."
    wanted = [a.strip('/') for a in arguments]
    modules, notebooks = select(ROOT / PACKAGE, '*.py', wanted), select(ROOT / 'nbs', '*.ipynb', wanted)
    figures, lines = measure(modules, notebooks)
    for name, value in figures.items():
        aim = f'aim: at most {AIMS[name]:,.0f}' if name in AIMS else 'no aim: it grows with what the package does'
        print(f'{name:32} {value:10,.1f}   {aim}')
    longest = sorted(lines, key=lambda line: -line.length)[:20 if wanted else 5]
    for line in longest:
        if line.length > 120: print(f'  {line.path.relative_to(ROOT)}:{line.number} has {line.length} characters')
    missed = [name for name, aim in AIMS.items() if figures[name] > aim]
    if wanted: return 0
    print('aims missed: ' + (', '.join(missed) or 'none'))
    return int(bool(missed))


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
