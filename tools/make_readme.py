"""README.md from nbs/index.ipynb, always the same bytes for the same notebook: python tools/make_readme.py

nbdev makes its README with Quarto; this does it with nothing but the notebook, so that a test can compare contents anywhere.
Hidden cells are left out, code and text outputs are fenced, and relative links point into nbs/, where GitHub shows the notebooks.
"""
import json, re, sys
from pathlib import Path

from notebook_text import fence, join, merge_streams, output_text, read_directives

ROOT = Path(__file__).resolve().parent.parent
WARNING = '<!-- Made from nbs/index.ipynb by tools/make_readme.py; edit the notebook. -->'
HIDDEN = {'hide', 'export', 'exporti', 'default_exp'}


def relink(markdown):
    "Relative link and picture targets of `nbs/index.ipynb`, as seen from the folder above."
    return re.sub(r'(\]\()(?![a-z]+:|#|/)([^)\s]+)', lambda m: m[1] + (m[2][3:] if m[2].startswith('../') else f'nbs/{m[2]}'), markdown)


def render_output(output):
    "One output: Markdown as it is, anything else as text; a picture alone is refused."
    data = output.get('data', {})
    if 'text/markdown' in data: return join(data['text/markdown'])
    if any(k.startswith('image/') for k in data): raise ValueError('a picture in README.md must be a linked file, not a cell output')
    text = output_text(output)
    return fence('\n'.join(line.rstrip() for line in text.splitlines()), 'text') if text else ''


def render_cell(cell):
    "One cell with its outputs."
    source = join(cell['source'])
    if cell['cell_type'] == 'markdown': return relink(source)
    if cell['cell_type'] != 'code': return ''
    directives, code = read_directives(source)
    if HIDDEN & directives.keys(): return ''
    shown = [fence(code, 'python')] if code and directives.get('echo') != 'false' else []
    if directives.get('output') != 'false': shown += [render_output(o) for o in merge_streams(cell.get('outputs', []))]
    return '\n\n'.join(filter(None, shown))


def render(notebook):
    "The whole README."
    return '\n\n'.join(filter(None, [WARNING, *map(render_cell, notebook['cells'])])) + '\n'


if __name__ == '__main__':
    readme = render(json.loads((ROOT / 'nbs' / 'index.ipynb').read_text(encoding='utf-8')))
    if sys.argv[1:] == ['--check']: sys.exit(readme != (ROOT / 'README.md').read_text(encoding='utf-8') and 'README.md is stale: python tools/make_readme.py')
    (ROOT / 'README.md').write_text(readme, encoding='utf-8')
