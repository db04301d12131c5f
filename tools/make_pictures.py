"""The picture of the planner in README.md and on the site: python tools/make_pictures.py

It is what the widget shows, made by its own functions, inside an SVG: text, and the same bytes for the same code. A test
compares it with the committed file.
"""
import re
from pathlib import Path

from check_repo import ROOT

PLANNER = ROOT / 'nbs' / 'images' / 'planner.svg'
WIDTH, HEIGHT = 780, 600     # pixels
STATE = dict(model='Llama-3.1-8B', gpu='rtx-3060-12gb', length=2048)


def as_xml(html):
    "HTML of widgets as XML: namespaces, no named entities, every empty element closed."
    html = re.sub(r'<(br|hr|img|col)\b([^>]*?)/?>', r'<\1\2/>', html)
    html = re.sub(r'<svg (?!xmlns)', '<svg xmlns="http://www.w3.org/2000/svg" ', html)
    return html.replace('&nbsp;', '&#160;')


def frame(html, label, width=WIDTH, height=HEIGHT):
    "HTML as an SVG with a light background, which pages of any colour can show."
    box = f'x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="#ffffff" stroke="#d0d7de"'
    style = 'font:13px/1.5 sans-serif;color:#1f2328;padding:14px 18px'
    page = f'<div xmlns="http://www.w3.org/1999/xhtml" style="{style}">{as_xml(html)}</div>'
    content = f'<foreignObject width="{width}" height="{height}">{page}</foreignObject>'
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect {box}/>{content}</svg>\n'


def planner_picture():
    "The planner with the 8B on a GPU of 12 GB, its map folded."
    from homelab_ft.ui.picture_box import widget_html
    from homelab_ft.ui.planner import PlannerState, planner_widget
    widget = planner_widget(PlannerState(**STATE))
    widget.fold.selected_index = None
    return frame(widget_html(widget), 'The planner: Llama 3.1 8B with QLoRA on an RTX 3060 of 12 GB')


if __name__ == '__main__':
    PLANNER.parent.mkdir(exist_ok=True)
    PLANNER.write_text(planner_picture(), encoding='utf-8')
    print(PLANNER.relative_to(Path.cwd()) if PLANNER.is_relative_to(Path.cwd()) else PLANNER, f'{PLANNER.stat().st_size:,} bytes')
