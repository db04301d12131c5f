"""The documentation without Quarto: python tools/docs_preview.py [--links-only]

tools/site_notebooks.py processes the notebooks into _proc/ exactly as for Quarto, then pandoc makes one page each in _docs/,
with the navigation of _quarto.yml. Leaves with exit code 1 when a link or a picture is dead, or a page wider than a phone.
"""
import json, os, re, shutil, sys, time
from concurrent.futures import ThreadPoolExecutor
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pypandoc, yaml

import phone
from check_repo import read_settings, sidebar
from notebook_text import fence, join, merge_streams, output_text, read_directives, save_picture
from site_notebooks import process_notebooks

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
PANDOC = 'markdown-implicit_figures+autolink_bare_uris+lists_without_preceding_blankline'

# ---------------------------------------------------------------- one notebook -> one page


def page_name(notebook):
    "Where nbdev puts the page of a notebook: `'00_core.ipynb'` -> `'core.html'`, folders kept."
    p = Path(notebook)
    return p.with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.name.lower())).with_suffix('.html').as_posix()


def render_output(output, picture):
    "One output as Markdown; pictures are written beside the page, as `picture` plus their suffix."
    data = output.get('data', {})
    saved = save_picture(data, picture)
    if saved: return f'![]({picture.parent.name}/{saved.name})'
    if 'text/html' in data: return fence(join(data['text/html']), '{=html}')
    if 'text/markdown' in data: return join(data['text/markdown'])
    text = output_text(output)
    return fence(text, '{.output}') if text and text.strip() else ''


def render_code(cell, picture):
    "A code cell and its outputs; `picture` is the start of the names of its pictures."
    directives, code = read_directives(join(cell['source']))
    shown = [fence(code, 'python')] if code and directives.get('echo') != 'false' else []
    outputs = [] if directives.get('output') == 'false' else merge_streams(cell.get('outputs', []))
    rendered = [r for r in (render_output(o, picture.with_name(f'{picture.name}-{i}')) for i, o in enumerate(outputs)) if r]
    if directives.get('output') == 'asis': return '\n\n'.join(shown + rendered)
    return '\n\n'.join(['::: cell', *shown, *(f'::: cell-output\n{r}\n:::' for r in rendered), ':::']) if shown or rendered else ''


def render_notebook(notebook, page):
    "`(front matter, Markdown)` of a notebook that nbdev has processed; its pictures go beside `page`."
    head, *cells = notebook['cells']
    front = yaml.safe_load(join(head['source']).strip().strip('-')) if head['cell_type'] == 'raw' else {}
    if head['cell_type'] != 'raw': cells = [head, *cells]
    picture = lambda i: page.with_name(f'{page.stem}_files') / f'cell-{i}'
    texts = [render_code(c, picture(i)) if c['cell_type'] == 'code' else join(c['source']) for i, c in enumerate(cells) if c['cell_type'] != 'raw']
    return front or {}, '\n\n'.join(filter(None, texts)) + '\n'


# ---------------------------------------------------------------- links

_attribute = re.compile(r'(<(?:a|img|source)\b[^>]*?\s(?:href|src)=")([^"]*)(")', re.S)


def relative(target, page):
    "The path of `target` as seen from `page`, both relative to the site."
    return Path(os.path.relpath(target, Path(page).parent)).as_posix()


def relink(html, page, site_url):
    "Links to notebooks become links to their pages; links to the published site stay inside the preview."
    def one(m):
        url, anchor = (m[2].split('#', 1) + [''])[:2]
        tail = f'#{anchor}' if anchor else ''
        if url.startswith(site_url): return m[1] + relative(url[len(site_url):].strip('/') or 'index.html', page) + tail + m[3]
        if url.endswith('.ipynb') and '://' not in url: return m[1] + page_name(url) + tail + m[3]
        return m[0]
    return _attribute.sub(one, html)


class _Page(HTMLParser):
    "Collects the `ids`, the link targets, the picture sources and the texts of a page."
    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.pictures = set(), [], []
        self.prose, self.code, self.depth = [], [], 0       # texts outside and inside of `<pre>`
        self.feed(html)

    def handle_data(self, data): (self.code if self.depth else self.prose).append(data)

    def handle_endtag(self, tag): self.depth -= tag == 'pre'

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.depth += tag == 'pre'
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag in ('img', 'source') and attrs.get('src'): self.pictures.append(attrs['src'])


def check_links(site):
    "Complaints about every internal link, anchor and picture of a folder of pages that leads nowhere."
    site = Path(site).resolve()
    pages = {p: _Page(p.read_text(encoding='utf-8')) for p in sorted(site.rglob('*.html'))}
    complaints = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        for url in page.links + page.pictures:
            if re.match(r'[a-z][a-z0-9+.-]*:|//', url): continue
            file, _, anchor = unquote(url).partition('#')
            target = (path.parent / file).resolve() if file else path
            if not target.is_file() or not target.is_relative_to(site): complaints.append(f'{name}: {url} does not exist')
            elif anchor and target in pages and anchor not in pages[target].ids and not _is_undocumented(anchor, pages[target].ids):
                complaints.append(f'{name}: {url} has no such anchor')
    return complaints


def check_markup(site, site_url):
    "Complaints about links that a page shows as Markdown: any in its prose, those to the site itself in its code."
    complaints = []
    for path in sorted(Path(site).rglob('*.html')):
        page = _Page(path.read_text(encoding='utf-8'))
        found = re.findall(r'\]\([\w.:/#-]+\)', ''.join(page.prose)) + re.findall(rf'\]\({re.escape(site_url)}[^)]*\)', ''.join(page.code))
        complaints += [f'{path.relative_to(site).as_posix()}: a link as Markdown: {text}' for text in found]
    return complaints


def _is_undocumented(anchor, ids):
    "nbdev links private names and methods too, but gives neither an anchor; such a link leads to the right page, at its top."
    return anchor.startswith('_') or '.' in anchor and anchor.split('.')[0] in ids


# ---------------------------------------------------------------- the site


def navigation(entries, titles, page):
    "The sidebar as HTML, seen from `page`; the first section is open, and the one that holds it."
    link = lambda f: f'<li><a href="{relative(page_name(f), page)}"{" aria-current=page" if page_name(f) == page else ""}>{escape(titles[f])}</a></li>'
    sections = {}
    for section, f in entries: sections.setdefault(section, []).append(f)
    blocks = []
    for i, (section, files) in enumerate(sections.items()):
        items = f'<ul>{"".join(map(link, files))}</ul>'
        is_open = ' open' if i == 0 or page in map(page_name, files) else ''
        blocks.append(items if section is None else f'<details{is_open}><summary>{escape(section)}</summary>{items}</details>')
    return ''.join(blocks)


def neighbours(entries, titles, page):
    "Links to the page before and the page after, in the order of the sidebar."
    files = [f for _, f in entries]
    i = [page_name(f) for f in files].index(page)
    link = lambda f, rel, text: f'<a rel="{rel}" href="{relative(page_name(f), page)}">{text}</a>'
    before = link(files[i - 1], 'prev', f'&larr; {escape(titles[files[i - 1]])}') if i else '<span></span>'
    return before + (link(files[i + 1], 'next', f'{escape(titles[files[i + 1]])} &rarr;') if i + 1 < len(files) else '')


def to_html(markdown, variables):
    "Markdown to a whole page with tools/preview.html."
    arguments = ['--standalone', '--toc', '--toc-depth=3', '--mathml', '--wrap=none', '--columns=9999', f'--template={HERE / "preview.html"}']
    arguments += [a for k, v in variables.items() for a in ('--variable', f'{k}={v}')]
    return pypandoc.convert_text(markdown, 'html5', format=PANDOC, extra_args=arguments)


def build(proc, out):
    "Pages for all notebooks of the sidebar, from `proc` into `out`, which is emptied first."
    settings = read_settings(ROOT)
    entries = sidebar((ROOT / '_quarto.yml').read_text(encoding='utf-8'))
    shutil.rmtree(out, ignore_errors=True)
    for p in (p for p in proc.rglob('*') if p.is_file() and p.suffix not in ('.ipynb', '.yml')):
        (out / p.relative_to(proc)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(p, out / p.relative_to(proc))
    shutil.copy2(HERE / 'preview.css', out / 'preview.css')
    rendered = {f: render_notebook(json.loads((proc / f).read_text(encoding='utf-8')), out / page_name(f)) for _, f in entries}
    titles = {f: front.get('title', Path(f).stem) for f, (front, _) in rendered.items()}
    site_url = settings['doc_host'] + settings['doc_baseurl']

    def write(f):
        page, (front, markdown) = page_name(f), rendered[f]
        variables = {'pagetitle': titles[f], 'title': titles[f], 'lead': escape(front.get('description', '')), 'site': settings['title'],
                     'root': relative('.', page), 'repo': settings['git_url'], 'nav': navigation(entries, titles, page), 'around': neighbours(entries, titles, page)}
        target = out / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(relink(to_html(markdown, variables), page, site_url), encoding='utf-8')

    with ThreadPoolExecutor(os.cpu_count()) as pool: list(pool.map(write, rendered))
    return out


def main():
    settings = read_settings(ROOT)
    start, out = time.monotonic(), ROOT / settings['doc_path']
    if sys.argv[1:] != ['--links-only']: build(process_notebooks(), out)
    complaints, browser = check_links(out), phone.find_browser()
    print(f'{len(list(out.rglob("*.html")))} pages in {out.name}/ after {time.monotonic() - start:.0f} s; dead links and pictures: {len(complaints)}')
    raw = check_markup(out, settings['doc_host'] + settings['doc_baseurl'])
    print(f'links shown as Markdown: {len(raw)}')
    too_wide = phone.check_width(out, browser) if browser else []
    print(f'pages wider than a phone: {len(too_wide) if browser else "not checked, there is no chromium"}')
    complaints += raw + too_wide
    for c in complaints: print('  ', c)
    return bool(complaints)


if __name__ == '__main__': sys.exit(main())
