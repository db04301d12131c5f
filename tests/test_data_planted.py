"Faults planted in Banking77 and GSM8K are found, and little else; code, Markdown and tables pass unchanged."
import json, random, re, string, sysconfig, time
from dataclasses import replace
from pathlib import Path

import pytest

from homelab_ft.config import CleaningSettings
from homelab_ft.core import Example
from homelab_ft.data.clean import REPAIRS, clean, run_repair
from homelab_ft.data.dedup import copies_of, near_duplicate_groups, words, normalise, written_texts
from homelab_ft.data.formats import detect_format, to_examples
from homelab_ft.data.load import load_rows

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared' / 'data'
FILES = dict(banking77=SHARED / 'classify' / 'banking77' / 'train.csv', gsm8k=SHARED / 'instruct' / 'gsm8k' / 'train.jsonl')
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason='the shared data are not here')
SIZES = [1500, pytest.param(None, marks=pytest.mark.slow)]


def read(name, max_rows=None):
    rows = load_rows(FILES[name], max_rows=max_rows)
    return to_examples(rows, detect_format(rows))


def with_prompt(example, change):
    *before, prompt, answer = example.messages
    return replace(example, messages=[*before, prompt | dict(content=change(prompt['content'])), answer])


def with_answer(example, answer):
    return replace(example, messages=[*example.messages[:-1], example.messages[-1] | dict(content=answer)], label=example.label and answer)


def inside(mark):
    "Put a mark into the middle of a word in the middle of the text."
    def change(text):
        places = [m.start() + 1 for m in re.finditer('[A-Za-z]{3}', text)]
        i = places[len(places) // 2]
        return text[:i] + mark + text[i:]
    return change


def first(fault): return lambda text: f'{fault} {text}'


def random_text(rng): return ' '.join(''.join(rng.choice(string.ascii_lowercase) for _ in range(rng.randrange(3, 9))) for _ in range(rng.randrange(5, 12)))


def key(rng, n=32): return ''.join(rng.choice(string.ascii_letters + string.digits) for _ in range(n))


def luhn(rng):
    digits = '4' + ''.join(rng.choice(string.digits) for _ in range(14))
    from homelab_ft.data.personal_data import passes_luhn
    return next(f'{digits}{d}' for d in range(10) if passes_luhn(f'{digits}{d}'))


def iban(rng):
    account = ''.join(rng.choice(string.digits) for _ in range(18))
    return f'DE{98 - int(account + "131400") % 97:02d}{account}'


def planted(rng):
    "Kind -> how a prompt gets it."
    def digits(n): return ''.join(rng.choice('123456789') for _ in range(n))
    return dict(
        mojibake=lambda text: text + ' It’s for Zoë – thanks'.encode().decode('cp1252'),
        html=lambda text: rng.choice(['<p>{}</p>', '{}<br>', '<div class="x">{}</div>', '<b>Hi</b> {}', '{}&nbsp;', 'Tom &amp; Ann: {}']).format(text),
        control_characters=inside(rng.choice('\x00\x07\x1b\x8d')),
        zero_width=inside(rng.choice('\u200b\ufeff\u2060')),
        soft_hyphen=inside('\xad'),
        bidi_marks=inside(rng.choice('\u200e\u202e\u2066')),
        script_block=lambda text: text + '<script>track("x")</script>',
        broken_characters=inside('\ufffd'),
        homoglyphs=first('My \u0440\u0430ypal c\u0430rd.'),
        gibberish=lambda text: random_text(rng),
        email=first(f'I am {key(rng, 6)}@mail{digits(2)}.org.'),
        phone_number=first(rng.choice([f'Call +49 30 {digits(7)}.', f'Call ({digits(3)}) {digits(3)}-{digits(4)}.', f'Call 0{digits(3)} {digits(6)}.'])),
        iban=first(f'Pay to {iban(rng)}.'),
        card_number=first(f'Card {luhn(rng)} is gone.'),
        ip_address=first(f'I write from 10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(1, 255)} now.'),
        mac_address=first(':'.join(f'{rng.randrange(256):02x}' for _ in range(6)) + ' is mine.'),
        api_key=first(f'Use sk-{key(rng)} for it.'),
        github_token=first(f'Use ghp_{key(rng, 36)} for it.'),
        password=first(f'password: {key(rng, 14)}7a'),
        aws_key=first(f'AKIA{key(rng, 16).upper()} is it.'),
    )


SECRET_KINDS = ('api_key', 'github_token', 'password', 'aws_key')
PERSONAL_KINDS = ('email', 'phone_number', 'iban', 'card_number', 'ip_address', 'mac_address')


@needs_shared
@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('max_rows', SIZES)
def test_planted_faults_are_found(name, max_rows):
    examples, rng = read(name, max_rows), random.Random(1)
    originals, before = clean(examples)
    kinds = list(planted(rng))
    chosen = rng.sample(range(len(originals)), len(kinds) * max(12, len(originals) // 400))
    truth = {}
    dirty = list(originals)
    for place, i in enumerate(chosen):
        kind = kinds[place % len(kinds)]
        dirty[i] = with_prompt(originals[i], planted(rng)[kind])
        truth.setdefault(kind, set()).add(originals[i].row)
    for place, i in enumerate(rng.sample(sorted(set(range(len(originals))) - set(chosen)), 40)):
        kind = 'blank' if place % 2 else 'overlong'
        text = '' if place % 2 else f'{originals[i].prompt}\n' * 60
        dirty[i] = with_prompt(originals[i], lambda _: text)
        truth.setdefault(kind, set()).add(originals[i].row)
    if name == 'gsm8k':
        free = sorted({e.row for e in originals} - set().union(*truth.values()))
        position = {e.row: i for i, e in enumerate(dirty)}
        truth['empty_answer'] = set(rng.sample(free, 20))
        for row in truth['empty_answer']: dirty[position[row]] = with_answer(dirty[position[row]], rng.choice(['N/A', 'n/a.', 'None', 'TBD', '-', 'null']))
    _, report = clean(dirty, CleaningSettings(clean_blank='report'))
    named = {kind: report.rows('personal_data') if kind in PERSONAL_KINDS else report.rows('secret') if kind in SECRET_KINDS else report.rows(kind) for kind in truth}
    missed = {kind: len(rows - set(named[kind])) / len(rows) for kind, rows in truth.items()}
    assert all(share <= 0.01 for share in missed.values()), {k: v for k, v in missed.items() if v > 0.01}
    for record in report.to_records():
        if record['kind'] == 'secret': assert '…(' in record['before'] and len(re.findall(r'[A-Za-z0-9]{20,}', record['before'])) == 0


@needs_shared
@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('max_rows', SIZES)
def test_clean_originals_have_few_findings(name, max_rows):
    examples = read(name, max_rows)
    kept, report = clean(examples)
    named = {r['row'] for r in report.to_records() if r['kind'] not in ('near_duplicate', 'duplicate')}
    assert len(named) <= 0.01 * len(examples), {f.kind: f.count for f in report.findings}
    changed = {r['row'] for r in report.to_records() if r['action'] == 'changed'}
    assert changed == {e.row for e in examples if re.search('[\u200b\ufeff\xad]', e.prompt + e.answer)}      # one row of GSM8K


def change_word(text, rng, vocabulary):
    "One word of the text replaced."
    found = list(re.finditer(r"[A-Za-z']{2,}", text))
    old = rng.choice(found)
    new = rng.choice([w for w in rng.sample(vocabulary, 20) if w.lower() != old[0].lower()])
    return text[:old.start()] + new + text[old.end():]


@needs_shared
@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('max_rows', SIZES)
def test_near_duplicates(name, max_rows):
    examples, rng = read(name, max_rows), random.Random(2)
    texts = [e.messages[0]['content'].removesuffix('\n\nWhich category?').strip() for e in examples]
    frame = '\n\nWhich category?' if name == 'banking77' else ''
    vocabulary = sorted({w for t in texts for w in re.findall(r"[A-Za-z]{3,}", t)})
    changes = dict(
        word=lambda t: change_word(t, rng, vocabulary), punctuation=lambda t: re.sub(r'[.?!,](?!\d)', '', t) + '!!', case=str.upper, zero_width=inside('\u200b'),
        one_more=lambda t: re.sub(r'^(\S+)', r'\1 really', t))
    sources = rng.sample(range(len(texts)), 5 * 60 if max_rows else 5 * 400)
    copies = [(list(changes)[n % 5], i) for n, i in enumerate(sources)]
    copies = [(kind, i) for kind, i in copies if len(words(normalise(texts[i]))) >= 5]
    new = [changes[kind](texts[i]) for kind, i in copies]
    asked = [Example([dict(role='user', content=t + frame), dict(role='assistant', content='x')], row=i) for i, t in enumerate(texts + new, 1)]
    groups = near_duplicate_groups(written_texts(asked))
    found, total = {}, {}
    for n, (kind, i) in enumerate(copies):
        total[kind] = total.get(kind, 0) + 1
        found[kind] = found.get(kind, 0) + (groups[len(texts) + n] == groups[i])
    recall = {kind: found[kind] / total[kind] for kind in total}
    print(name, recall)
    assert all(share >= (0.95 if kind in ('word', 'one_more') else 0.99) for kind, share in recall.items()), recall
    across = copies_of([replace(e, row=n) for n, e in enumerate(asked[len(texts):])], asked[:len(texts)])
    leaks = {i + 1 for _, i in copies}
    assert len(leaks & set(across)) >= 0.97 * len(leaks)


# ---------------------------------------------------------------- nothing is damaged

def conversation(text, row): return Example([dict(role='user', content=text), dict(role='assistant', content=text)], row=row)


def python_texts(limit):
    "Files of the standard library and their functions, each a text."
    folder = Path(sysconfig.get_paths()['stdlib'])
    files = [p for p in sorted(folder.rglob('*.py')) if 'site-packages' not in p.parts]
    for path in files[::max(1, len(files) // limit)]:
        try: text = path.read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        yield text
        yield from (part for part in re.split(r'\n(?=(?:def|class|@)\b)', text) if part.strip())


def markdown_texts(limit):
    "The prose of this project's notebooks, by cell and by page."
    pages = sorted((ROOT / 'nbs').rglob('*.ipynb'))
    for path in pages[::max(1, len(pages) // limit)]:
        cells = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']
        yield from (cell for cell in cells if cell.strip())
        yield '\n\n'.join(cells)


def table_texts(limit):
    "Rows of Banking77 and of numbers as tables in Markdown, with tabs, with commas, and in HTML."
    rng = random.Random(3)
    cells = ['Tom &amp; Ann', 'a<br>b', 'x &lt; y', '**bold**', '$3', '  padded ', 'plain words', '12.50', 'R&D', '']
    for n in range(limit):
        rows = [[rng.choice(cells) for _ in range(3)] for _ in range(4)]
        yield '| a | b | c |\n|---|:-:|---|\n' + '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows) + '\n\nWhat is the sum?'
        yield 'a\tb\tc\n' + '\n'.join('\t'.join(row) for row in rows)
        yield '<table>\n' + ''.join('<tr>' + ''.join(f'<td>{c}</td>' for c in row) + '</tr>\n' for row in rows) + '</table>'
        yield 'a,b,c\n' + '\n'.join(f'{n},{i},{rng.random():.3f}' for i in range(4))


MIXED = [
    'for i in range(3):\n    if i &amp; 1:\n        print(i)', 'Intro.\n\n- one\n    - nested\n\n| a | b |\n|---|---|\n| x<br>y | z |\n\nEnd.',
    'Let $a &lt; b$ and \\(x &amp; y\\).', '1. First\n2. Second\n\n\n\tindented', 'x<sup>2</sup> + y<sub>i</sub>', 'Use `<b>` and `&nbsp;`.',
    '\\begin{matrix} 1 & 2 \\\\ 3 & 4 \\end{matrix}', '  leading and trailing  \n\n', 'a  b   c', '# Title\n\n<details>\n<p>more</p>\n</details>',
    'SELECT a FROM b WHERE c &lt; 3', 'if (a &lt; b) {\n  go();\n}', '| x | y |', '- <b>a</b>\n- b', 'f(x) = x &lt; 3 ? 1 : 0;']


@pytest.mark.parametrize('texts', [python_texts, markdown_texts, table_texts])
@pytest.mark.parametrize('limit', [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_layout_passes_byte_for_byte(texts, limit):
    unchanged = [conversation(text, row) for row, text in enumerate(texts(limit), 1)]
    for repair in REPAIRS:
        repaired, finding = run_repair(repair, unchanged, CleaningSettings(html_in='both'))
        assert repaired == unchanged, finding.example


@pytest.mark.parametrize('text', MIXED)
def test_small_layouts_pass(text):
    off = dict.fromkeys(('clean_blank', 'clean_duplicates'), 'off')
    assert clean([conversation(text, 1)], CleaningSettings(html_in='prompts', **off))[0][0].messages == conversation(text, 1).messages


# ---------------------------------------------------------------- linear

@pytest.mark.parametrize('labels', [1, 2, 40_000])
def test_forty_thousand_equal_prompts(labels):
    examples = [Example([dict(role='user', content='The same for all?'), dict(role='assistant', content=f'l{i % labels}')], f'l{i % labels}', i + 1) for i in range(40_000)]
    started = time.process_time()
    kept, report = clean([*examples, Example([dict(role='user', content='Another?'), dict(role='assistant', content='l0')], 'l0', 50_000)])
    assert time.process_time() - started < 8       # seconds; about 2 on an idle machine
    assert len(kept) == (2 if labels == 1 else 1)
