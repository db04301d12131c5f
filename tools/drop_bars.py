"""Drop what widgets leave in executed notebooks: progress bars, which say nothing, and views of widgets that ended with their
kernel, where an output has a picture of them (`homelab_ft.ui.picture_box`).

python tools/drop_bars.py NOTEBOOK ...   (state of other widgets stays as long as an output shows it)"""
import json, re, sys
from copy import deepcopy
from pathlib import Path

VIEW, STATE = 'application/vnd.jupyter.widget-view+json', 'application/vnd.jupyter.widget-state+json'


def is_bar(output):
    "Whether an output is a progress bar: a widget whose text has a time such as `[00:03`."
    data = output.get('data', {})
    return VIEW in data and bool(re.search(r'\[\d\d:\d\d', ''.join(data.get('text/plain', ''))))


def is_picture(data):
    "Whether an output's `data` has something that a page can show: HTML or an image."
    return any(kind == 'text/html' or kind.startswith('image/') for kind in data)


def shown(notebook):
    "Ids of the widgets that outputs show, and of their parts."
    state = notebook['metadata']['widgets'][STATE]['state']
    todo = [o['data'][VIEW]['model_id'] for c in notebook['cells'] for o in c.get('outputs', []) if VIEW in o.get('data', {})]
    found = set()
    while todo:
        one = todo.pop()
        if one in found or one not in state: continue
        found.add(one)
        todo += re.findall(r'IPY_MODEL_(\w+)', json.dumps(state[one]))
    return found


def without_bars(notebook):
    "The notebook without bars, without views of widgets beside a picture, and without widget state that nothing shows."
    notebook = deepcopy(notebook)
    for c in notebook['cells']:
        if 'outputs' in c: c['outputs'] = [o for o in c['outputs'] if not is_bar(o)]
        for data in (o['data'] for o in c.get('outputs', []) if 'data' in o):
            if is_picture(data): data.pop(VIEW, None)
    if STATE not in notebook['metadata'].get('widgets', {}): return notebook
    kept, widgets = shown(notebook), notebook['metadata']['widgets'][STATE]
    widgets['state'] = {k: v for k, v in widgets['state'].items() if k in kept}
    if not kept: del notebook['metadata']['widgets']
    return notebook


if __name__ == '__main__':
    for path in map(Path, sys.argv[1:]):
        path.write_text(json.dumps(without_bars(json.loads(path.read_text(encoding='utf-8'))), indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
