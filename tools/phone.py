"""Whether every page of the site fits a phone, opened in chromium, 390 pixels wide; tools/docs_preview.py asks.

A page fits when only what is inside its own box scrolls sideways.
"""
import shutil
from pathlib import Path

WIDTH = 390     # pixels
TOO_WIDE = """(width) => [...document.querySelectorAll('main *')]
    .filter(e => e.getBoundingClientRect().right > width + 1 || e.clientWidth && e.scrollWidth > e.clientWidth + 1)
    .filter(e => !e.closest('pre, table, math, .cell-output'))
    .map(e => e.outerHTML.slice(0, 60))[0] || 'something outside the text'"""


def find_browser():
    "The path of chromium, or None."
    return shutil.which('chromium') or shutil.which('chromium-browser')


def check_width(site, browser, width=WIDTH):
    "Complaints about the pages of a folder that are wider than the window, and about errors that they log."
    from playwright.sync_api import sync_playwright
    complaints = []
    with sync_playwright() as play:
        window = play.chromium.launch(executable_path=browser, args=['--no-sandbox'])
        page = window.new_page(viewport={'width': width, 'height': 844})
        page.on('console', lambda m: complaints.append(f'{page.url}: {m.text}') if m.type == 'error' else None)
        for path in sorted(Path(site).resolve().rglob('*.html')):
            page.goto(path.as_uri())
            wide = page.evaluate('document.documentElement.scrollWidth')
            if wide > width: complaints.append(f'{path.relative_to(Path(site).resolve())}: {wide} pixels wide: {page.evaluate(TOO_WIDE, width)}')
        window.close()
    return complaints
