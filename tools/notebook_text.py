"""Notebooks as Markdown: cells and outputs, for README.md and for the documentation preview."""
import base64, re
from pathlib import Path

from check_repo import cell_directives, directive_name


def fence(text, info=''):
    "`text` in a code fence that is longer than any inside it."
    ticks = '`' * max([3, *(len(m) + 1 for m in re.findall(r'`{3,}', text))])
    return f'{ticks}{info}\n{text.rstrip()}\n{ticks}'


def join(source): return ''.join(source)


def read_directives(source):
    "`({'echo': 'false', ...}, code without the directive lines)`"
    directives, body = cell_directives(source)
    values = {directive_name(d): d.partition(':')[2].strip() for d in directives}
    return values, '\n'.join(body).strip('\n')


def output_text(output):
    "Plain text of an output, or None if it has none."
    if output['output_type'] == 'stream': return join(output['text'])
    if output['output_type'] == 'error': return f"{output['ename']}: {output['evalue']}"
    data = output.get('data', {})
    return join(data['text/plain']) if 'text/plain' in data else None


def save_picture(data, target):
    "Write the picture of an output's `data` beside `target`; returns its path, or None without a picture."
    for kind, suffix in (('image/svg+xml', '.svg'), ('image/png', '.png'), ('image/jpeg', '.jpg')):
        if kind not in data: continue
        content = join(data[kind])
        path = Path(f'{target}{suffix}')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode('utf-8') if suffix == '.svg' else base64.b64decode(content))
        return path


def merge_streams(outputs):
    "The outputs with neighbouring texts on the same stream made one."
    merged = []
    for o in outputs:
        same = merged and o['output_type'] == merged[-1]['output_type'] == 'stream' and o['name'] == merged[-1]['name']
        if same: merged[-1] = {**o, 'text': join(merged[-1]['text']) + join(o['text'])}
        else: merged.append(o)
    return merged
