"""The notebooks as the site shows them: python tools/site_notebooks.py

nbdev processes them into _proc/ (API documentation, links to names, hidden cells). Then signatures get a line per parameter
with its comment, without the Markdown links that nbdev leaves inside code, and links lose the links inside their text. Quarto and tools/docs_preview.py both render what
stands in _proc/ afterwards.
"""
import ast, importlib, inspect, io, json, os, re, shutil, textwrap, tokenize
from typing import Annotated, get_args, get_origin

from check_repo import PACKAGE, ROOT
from notebook_text import fence, join

_shown = re.compile(r'^show_doc\((\w+(?:\.\w+)*)\)', re.M)
_definition = re.compile(r'```python\n(?:async def|def|class) .*?\n```', re.S)
_module = re.compile(r'^#\| default_exp (\S+)', re.M)

# ---------------------------------------------------------------- signatures


def comments_of(obj):
    "`{parameter or 'return': comment}` of a function or class, from its source."
    try: source = textwrap.dedent(inspect.getsource(obj))
    except (OSError, TypeError): return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT}
    node = ast.parse(source).body[0]
    members = node.body if isinstance(node, ast.ClassDef) else []
    lines = {m.target.id: m.lineno for m in members if isinstance(m, ast.AnnAssign)}
    function = next((m for m in members if getattr(m, 'name', '') == '__init__'), None) if members else node
    if function is not None:
        a = function.args
        lines |= {p.arg: p.lineno for p in filter(None, [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg])}
        if function.returns: lines['return'] = function.returns.end_lineno
    return {name: comments[line] for name, line in lines.items() if line in comments}


def type_name(annotation):
    "A type as one writes it: without modules and validators."
    if get_origin(annotation) is Annotated: return type_name(get_args(annotation)[0])
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r'\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])', '', text)


def write_parameter(p):
    "`'rank: int = 16'`"
    stars = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
    typed = '' if p.annotation is p.empty else f': {type_name(p.annotation)}'
    if p.default is p.empty: return f'{stars}{p.name}{typed}'
    default = re.sub(r' at 0x\w+', '', repr(p.default))
    return f'{stars}{p.name}{typed} = {default}' if typed else f'{p.name}={default}'


def signature(obj, name):
    "The definition of a function or class as text, one parameter a line, each with its comment."
    is_class, comments = inspect.isclass(obj), comments_of(obj)
    fields = getattr(obj, 'model_fields', {})       # of a pydantic class
    try: made = inspect.signature(obj)
    except ValueError: return f'class {name}({", ".join(base.__name__ for base in obj.__bases__)})'      # such as a `dict`
    lines = []
    for p in made.parameters.values():
        starred = any(line.startswith(('    *,', '    *')) for line, _ in lines)
        if p.kind is p.KEYWORD_ONLY and not fields and not starred: lines.append(('    *,', ''))
        comment = comments.get(p.name) or getattr(fields.get(p.name), 'description', '') or ''
        lines.append((f'    {write_parameter(p)},', comment.replace('`', '')))
    result = '' if is_class or made.return_annotation is made.empty else f' -> {type_name(made.return_annotation)}'
    kind = 'class' if is_class else 'async def' if inspect.iscoroutinefunction(obj) else 'def'
    head, ending = f'{kind} {name}(', f'){result}'
    after = comments.get('return', '').replace('`', '')
    if not lines: return head + ending + (f'  # {after}' if after else '')
    lines.append((ending, after))
    column = min(max(len(code) for code, _ in lines), 40)
    return '\n'.join([head, *(f'{code:{column}}  # {comment}' if comment else code for code, comment in lines)])


def mend_signature(cell, module):
    "The cell of a `show_doc(...)` with the signature of this file."
    shown = _shown.search(join(cell['source']))
    for output in cell['outputs'] if shown else []:
        text = join(output.get('data', {}).get('text/markdown', ''))
        obj = importlib.import_module(module)
        for part in shown[1].split('.'): obj = getattr(obj, part)
        code = fence(signature(obj, shown[1]), 'python')
        if text: output['data']['text/markdown'] = _definition.sub(lambda m: code, text, count=1)


# ---------------------------------------------------------------- links

_inner = re.compile(r'\[(`[^`]+`)\]\([^()]*\)')
_outer = re.compile(rf'\[((?:[^\[\]]|{_inner.pattern})+)\](?=\()')


def mend_links(markdown):
    "Links whose text nbdev has made a link as well: the outer one, which the author wrote, stays."
    return _outer.sub(lambda m: f'[{_inner.sub(lambda inner: inner[1], m[1])}]', markdown)


# ---------------------------------------------------------------- all notebooks


def process_notebooks():
    "Everything into _proc/, from scratch; nbdev's warnings about cells that import and assign are not news."
    os.environ.update(PYTHONWARNINGS='ignore', MPLBACKEND='agg', HF_HUB_OFFLINE='1')
    os.chdir(ROOT)
    from nbdev.serve import proc_nbs
    shutil.rmtree(ROOT / '_proc', ignore_errors=True)
    proc = ROOT / proc_nbs()
    for path in sorted(proc.rglob('*.ipynb')):
        source = (ROOT / 'nbs' / path.relative_to(proc)).read_text(encoding='utf-8')
        modules = [m[1] for c in json.loads(source)['cells'] if (m := _module.search(join(c['source'])))]
        notebook = json.loads(path.read_text(encoding='utf-8'))
        for cell in notebook['cells']:
            if cell['cell_type'] == 'markdown': cell['source'] = mend_links(join(cell['source']))
            if cell['cell_type'] == 'code' and modules: mend_signature(cell, f'{PACKAGE}.{modules[0]}')
        path.write_text(json.dumps(notebook, ensure_ascii=False), encoding='utf-8')
    return proc


if __name__ == '__main__': print(process_notebooks())
