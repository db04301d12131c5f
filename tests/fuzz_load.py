"""Damaged data files by the thousand: python tests/fuzz_load.py [FIRST SEED] [HOW MANY]

A seed makes a small file of some kind, damages it in one to three ways, and loads it. Then only a `HomelabError` or rows are right,
within ten seconds, and every row that stands in the file must be used or reported: they are counted from its bytes, by other means.
"""
import contextlib, csv, gzip, io, json, random, re, shutil, signal, sys, tempfile, time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow, pyarrow.ipc, pyarrow.parquet

from homelab_ft.core import HomelabError
from homelab_ft.data.files import LoadOptions
from homelab_ft.data.load import load_rows

SECONDS = 10
WORDS = 'the cat läuft über straße 东京 emoji😀 a,b x;y 1|2 "quoted" it\'s <b>tag</b> {json} [list] tab\there 3.14 -7 naïve'.split(' ')
KINDS = ('csv', 'tsv', 'json', 'jsonl', 'parquet', 'arrow', 'stream', 'xlsx', 'folder', 'text')


@dataclass
class Case:
    "A file to load, and how it came about."
    path: Path
    content: bytes
    kind: str
    done: list = field(default_factory=list)     # names of the mutations
    options: LoadOptions = None


def sentence(r, n=8): return ' '.join(r.choices(WORDS, k=r.randint(1, n)))


def make_rows(r):
    "Some rows of two or three columns."
    more = r.random() < 0.3
    return [dict(text=sentence(r), label=r.choice('abc'), **(dict(note=sentence(r, 3)) if more else {})) for _ in range(r.randint(1, 60))]


def csv_bytes(r, rows, delimiter):
    "CSV as some program would write it."
    out = io.StringIO()
    quoting = r.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    writer = csv.DictWriter(out, rows[0], delimiter=delimiter, quoting=quoting, lineterminator=r.choice(('\n', '\r\n')))
    if r.random() < 0.8: writer.writeheader()
    for row in rows:
        if r.random() < 0.1: row = row | {'text': row['text'] + '\nsecond line'}
        writer.writerow(row)
    return out.getvalue().encode()


def json_bytes(r, rows, is_list):
    "JSON, or JSON lines."
    lines = [json.dumps(row, ensure_ascii=r.random() < 0.5) for row in rows]
    if not is_list: return '\n'.join(lines).encode()
    text = '[' + r.choice((',', ',\n', ' ,\n\t')).join(lines) + ']'
    return (text if r.random() < 0.7 else '{"version": 1, "data": ' + text + '}').encode()


def arrow_bytes(r, rows, kind):
    "Parquet, an Arrow file or an Arrow stream."
    table, out = pyarrow.Table.from_pylist(rows), io.BytesIO()
    if kind == 'parquet': pyarrow.parquet.write_table(table, out, compression=r.choice(('none', 'snappy', 'zstd')), row_group_size=r.choice((5, 100)))
    else:
        options = pyarrow.ipc.IpcWriteOptions(compression=r.choice((None, 'lz4', 'zstd')))
        with (pyarrow.ipc.new_file if kind == 'arrow' else pyarrow.ipc.new_stream)(out, table.schema, options=options) as writer: writer.write_table(table)
    return out.getvalue()


def xlsx_bytes(r, rows):
    "An Excel file."
    import openpyxl
    book = openpyxl.Workbook()
    for cells in ([*rows[0]], *(row.values() for row in rows)): book.active.append(list(cells))
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def make_content(r, kind):
    "The bytes of a good file."
    rows = make_rows(r)
    if kind == 'csv': return csv_bytes(r, rows, r.choice(',;|'))
    if kind == 'tsv': return csv_bytes(r, rows, '\t')
    if kind in ('json', 'jsonl'): return json_bytes(r, rows, kind == 'json')
    if kind in ('parquet', 'arrow', 'stream'): return arrow_bytes(r, rows, kind)
    if kind == 'xlsx': return xlsx_bytes(r, rows)
    return '\n\n'.join(row['text'] for row in rows).encode()


# ---------------------------------------------------------------- damage

def place(r, content): return r.randrange(len(content) + 1)


def truncate(r, c): return c[:place(r, c)]


def flip_bits(r, c):
    c = bytearray(c)
    for _ in range(r.choice((1, 1, 3, 30))):
        if c: c[r.randrange(len(c))] ^= 1 << r.randrange(8)
    return bytes(c)


def cut(r, c):
    a = place(r, c)
    return c[:a] + c[a + r.choice((1, 1, 5, 200)):]


def repeat(r, c):
    a = place(r, c)
    return c[:a] + c[max(0, a - r.choice((1, 20, 500))):]


def insert(pieces):
    "A mutation that puts one of the pieces somewhere."
    def mutate(r, c):
        a = place(r, c)
        return c[:a] + r.choice(pieces) + c[a:]
    return mutate


def at_line(pieces):
    "A mutation that puts one of the pieces into a line of its own."
    def mutate(r, c):
        lines = c.split(b'\n')
        lines.insert(r.randrange(len(lines) + 1), r.choice(pieces))
        return b'\n'.join(lines)
    return mutate


def swap(pairs):
    "A mutation that replaces some bytes, everywhere or once."
    def mutate(r, c):
        a, b = r.choice(pairs)
        return c.replace(a, b, r.choice((-1, 1)))
    return mutate


def recode(r, c):
    try: text = c.decode()
    except UnicodeDecodeError: return c
    return text.encode(r.choice(('utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-le', 'utf-8-sig', 'cp1252', 'utf-7')), 'replace')


def odd_byte(r, c): return recode(r, c)[:-1]


def line_ends(r, c): return c.replace(b'\n', r.choice((b'\r', b'\r\n', b'\n\n', b'\n\r', b'\x0b', '\u2028'.encode())))


def drop_line(r, c):
    lines = c.split(b'\n')
    del lines[r.choice((0, -1))]
    return b'\n'.join(lines)


def shuffle_bytes(r, c): return bytes(r.randbytes(r.choice((1, 50, 3000))))


def huge_cell(r, c):
    a = place(r, c)
    return c[:a] + b'x' * r.choice((150_000, 150_000, 1_000_000, 11_000_000)) + c[a:]


def deep(n): return b'{"text": ' + b'[' * n + b']' * n + b', "label": "a"}'


MUTATIONS = {
    'truncate': truncate, 'flip bits': flip_bits, 'cut': cut, 'repeat': repeat, 'recode': recode, 'odd byte': odd_byte,
    'line ends': line_ends, 'drop a line': drop_line, 'noise': shuffle_bytes, 'huge cell': huge_cell,
    'quote': insert([b'"', b'""', b"'", b'"x"', b'\\"', b'\\', b'","', b'"\n']),
    'bytes': insert([b'\x00', b'\xff', b'\xe9', b'\xed\xa0\x80', b'\xf0\x9f', b'\x1a', '\ufeff'.encode(), '\u2028'.encode(), b'\x00' * 100]),
    'separators': insert([b',', b',,,', b';', b'\t', b'|', b'\n', b'\r', b'\r\n\r\n', b',\n,\n']),
    'a JSON line': at_line([
        b'{"text": "\\ud83d", "label": "a"}', b'{"text": 1' + b'1' * 5000 + b'}', b'{"text": "a", "text": "b"}', deep(70), deep(900), deep(100_000),
        b'7', b'null', b'[1, 2]', b'{}', b'{"": ""}', b'{"text": NaN}', b'{"text": Infinity, "label": 1e999}', b'"', b'{"text": {"role": ["a"]}}',
        b'{"text": "a"} {"text": "b"}', b'[' * 2000, b'{"a":' * 2000, b'\xef\xbb\xbf{"text": "bom"}', b'{"text": "a",}', b"{'text': 'a'}"]),
    'a CSV line': at_line([
        b'sep=;', b'text,label', b',', b',,,,,,,', b'"', b'"never closed,a', b'a,"b"c,d', b'"a""b","c"', b'one', b'"x\ny\nz",a', b';;', b'\t\t',
        b'="formula",a', b'#comment', b'\x00,\x00', b'caf\xe9,a']),
    'swap': swap([
        (b'"', b"'"), (b'"', b'\xe2\x80\x9c'), (b'"', b''), (b',', b';'), (b',', b'\t'), (b'{', b'['), (b'}', b''), (b':', b'='), (b'[', b''), (b']', b''),
        (b'text', b'label'), (b'\n', b''), (b'\n', b' ')]),
}
ENDINGS = ('.csv', '.tsv', '.json', '.jsonl', '.parquet', '.arrow', '.xlsx', '.txt', '', '.csv.gz', '.jsonl.zst', '.gz', '.json.gz')


def pack(r, content, packed):
    "The content as gzip or zstd, now and then damaged."
    if packed == 'gz': content = gzip.compress(content, mtime=0)
    else:
        out = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(out, 'zstd') as stream: stream.write(content)
        content = out.getvalue().to_pybytes()
    return r.choice((truncate, flip_bits))(r, content) if r.random() < 0.3 else content


def make_case(seed, folder):
    "The case of a seed, written into the folder."
    r = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    content, done = make_content(r, kind), []
    binary = kind in ('parquet', 'arrow', 'stream', 'xlsx')
    for _ in range(r.choice((0, 1, 1, 1, 2, 3))):
        name = r.choice(('truncate', 'flip bits', 'cut', 'repeat', 'bytes', 'noise') if binary and r.random() < 0.9 else list(MUTATIONS))
        content = MUTATIONS[name](r, content)
        done.append(name)
    ending = {'stream': '.arrow', 'folder': '.md', 'text': '.txt'}.get(kind, f'.{kind}')
    if r.random() < 0.07:
        ending = r.choice(ENDINGS)
        done.append(f'named {ending}')
    elif r.random() < 0.12:
        packed = r.choice(('gz', 'zst'))
        content, ending = pack(r, content, packed), f'{ending}.{packed}'
        done.append(packed)
    options = LoadOptions(
        delimiter=r.choice(('auto',) * 9 + (';', 'tab')), header=r.choice(('auto',) * 8 + (True, False)), max_bad_rows=r.choice((0.01, 0.5, 1000, 1000, 1000)))
    path = folder / f'case{ending}'
    if kind == 'folder':
        path = folder / 'case'
        path.mkdir()
        for i, piece in enumerate(content.split(b'\n\n')): (path / f'{i:03d}{ending}').write_bytes(piece)
    else: path.write_bytes(content)
    return Case(path, content, kind, done, options)


# ---------------------------------------------------------------- every row accounted for

def count_rows(case, rows):
    "The rows in a file by other means than the loader's; None where they cannot be counted."
    c, kinds, encoding = case.content, rows.report.kinds, rows.report.encoding or ''
    if case.path.suffix in ('.gz', '.zst'): return None
    if kinds == ['JSON lines'] and encoding.startswith('utf-8'): return sum(bool(line.strip(b' \t\r\x0b\x0c')) for line in c.removeprefix(b'\xef\xbb\xbf').split(b'\n'))
    if kinds == ['Parquet']: return pyarrow.parquet.ParquetFile(case.path).metadata.num_rows
    if kinds == ['Arrow']:
        is_file = c.startswith(b'ARROW1')
        return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(c).read_all().num_rows
    if kinds == ['text']: return len(list(case.path.iterdir()))
    if kinds == ['Excel']:
        import openpyxl
        cells = list(openpyxl.load_workbook(io.BytesIO(c)).active.values)
        return sum(any(cell not in (None, '') for cell in row) for row in cells) - bool(rows.report.header)
    if kinds == ['JSON'] and encoding.startswith('utf-8'):
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(c.decode(encoding))
            return len(content) if isinstance(content, list) else len(content['data']) if isinstance(content.get('data'), list) else 1
    if kinds == ['CSV'] and b'"' not in c and encoding.startswith('utf-8'):
        lines = [line for line in c.decode(encoding, 'replace').replace('\r\n', '\n').replace('\r', '\n').split('\n') if line.strip(rows.report.delimiter + ' \t\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2028')]
        return len(lines) - bool(rows.report.header) - bool(lines and lines[0].startswith('sep=') and len(lines[0].strip()) == 5)


def lost_text(case, rows):
    "A word of a CSV file that is neither in a row nor in a report."
    if rows.report.kinds != ['CSV'] or not (rows.report.encoding or '').startswith('utf-8') or case.path.suffix in ('.gz', '.zst'): return None
    there = '\n'.join([*(str(value) for row in rows for pair in row.items() for value in pair), *(bad.content for bad in rows.report.bad_rows)])
    if any('holds no rows' in note for note in rows.report.notes): return None      # files with a header alone
    if any(len(bad.content) > 9000 or 'at most' in bad.reason for bad in rows.report.bad_rows): return None     # only a part is kept
    there = re.sub(r'\\udc\w\w', ' ', there)
    words = ''.join(ch if ch.isalnum() else ' ' for ch in case.content.decode('utf-8', 'replace')).split()
    known = set(''.join(ch if ch.isalnum() else ' ' for ch in there).split())
    return next((word for word in words if word not in known and word != 'sep' and word.isascii()), None)


def check_case(case):
    "What became of a case (refused, loaded, counted), and None or what is wrong."
    started = time.perf_counter()
    try: rows = load_rows(case.path, options=case.options)
    except HomelabError as error:
        str(error).encode()
        rows = None
    took = time.perf_counter() - started
    if took > SECONDS: return 'slow', f'took {took:.1f} s'
    return ('refused', None) if rows is None else check_rows(case, rows)


def check_rows(case, rows):
    "As `check_case`, of what was loaded."
    report = rows.report
    if len(rows) + len(report.bad_rows) != report.rows_in: return 'loaded', f'{len(rows)} used and {len(report.bad_rows)} set aside of {report.rows_in}'
    numbers = sorted([*rows.numbers, *(bad.number for bad in report.bad_rows)])
    if numbers != list(range(1, report.rows_in + 1)): return 'loaded', 'the numbers of the rows have gaps'
    for row in rows: json.dumps(row, ensure_ascii=False, default=str).encode()
    for bad in report.bad_rows: json.dumps(bad.record(), ensure_ascii=False).encode()
    '\n'.join(report.lines()).encode()
    counted = count_rows(case, rows)
    if counted is not None and counted != report.rows_in: return 'counted', f'{counted} rows in the file, {report.rows_in} by the loader'
    word = lost_text(case, rows)
    return 'loaded' if counted is None else 'counted', word and f'the word {word!r} is neither used nor reported'


@contextlib.contextmanager
def time_limit():
    "An error in place of an endless loop."
    def stop(*_): raise TimeoutError
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS + 5)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(seeds):
    "Check many seeds; (the faults, how often each outcome came, the seconds of the slowest)."
    faults, outcomes, slowest = [], Counter(), (0.0, 0)
    for seed in seeds:
        folder = Path(tempfile.mkdtemp(prefix='fuzz-'))
        case = make_case(seed, folder)
        started = time.perf_counter()
        try:
            with time_limit(): outcome, fault = check_case(case)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt): raise
            outcome, fault = 'crashed', f'{type(error).__name__}: {str(error)[:200]}'
        slowest = max(slowest, (time.perf_counter() - started, seed))
        outcomes[outcome] += 1
        if fault: faults.append((seed, case.kind, case.done, fault))
        shutil.rmtree(folder)
    return faults, outcomes, slowest


if __name__ == '__main__':
    first, n = (int(a) for a in (sys.argv[1:] + ['0', '5000'])[:2]) if len(sys.argv) != 2 else (int(sys.argv[1]), 1)
    started = time.perf_counter()
    faults, outcomes, slowest = fuzz(range(first, first + n))
    for fault in faults: print(*fault)
    print(f'{n} files: {dict(outcomes)}, {len(faults)} faults, {time.perf_counter() - started:.0f} s, the slowest {slowest[0]:.1f} s (seed {slowest[1]})')
    sys.exit(bool(faults))
