"data.load: kinds of files that people have; bad rows are set aside with line, column and reason; nothing is lost or merged in silence."
import gzip, json, os, socket, time
from pathlib import Path

import pytest
from fuzz_load import fuzz
from hypothesis import given, settings, strategies as st

from homelab_ft.config import dump_config, load_config, make_config
from homelab_ft.core import DataError, HomelabError
from homelab_ft.data import files, load
from homelab_ft.data.files import BOMB_BYTES, LoadOptions
from homelab_ft.data.load import load_data, load_rows, source_fingerprint

ROWS = [{'text': f'text number {i}, é', 'label': 'ab'[i % 2]} for i in range(150)]
CASES = Path(__file__).resolve().parents[2] / 'shared' / 'cases' / 'data'
cases = pytest.mark.skipif(not CASES.is_dir(), reason='../shared/cases is not there')


def jsonl(rows): return '\n'.join(json.dumps(row) for row in rows)
def table(rows, sign=','): return '\n'.join(sign.join(map(str, row)) for row in rows) + '\n'


def save(path, content):
    "Write text or bytes, folders included; the path."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path, *words, **options):
    "The message of the error; it must hold every word."
    with pytest.raises(DataError) as e: load_rows(path, options=LoadOptions(**options))
    message = str(e.value)
    assert all(word in message for word in words) and 'next step' in message, message
    return message


def zstd(content):
    "The bytes packed with zstd."
    import pyarrow
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, 'zstd') as stream: stream.write(content)
    return out.getvalue().to_pybytes()


def excel(path, *sheets):
    "An Excel file with sheets of rows."
    import openpyxl
    book = openpyxl.Workbook()
    book.remove(book.active)
    for i, rows in enumerate(sheets, 1):
        sheet = book.create_sheet(f'Sheet{i}')
        for row in rows: sheet.append(row)
    book.save(path)
    return path


# ---------------------------------------------------------------- packed files

@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.jsonl.zst', 'a.jsonl'])
def test_packed_files_by_name_and_by_their_first_bytes(tmp_path, name):
    content = jsonl(ROWS).encode()
    for pack in (gzip.compress, zstd): assert load_rows(save(tmp_path / name, pack(content))) == ROWS
    parts = gzip.compress(content[:1000]) + gzip.compress(content[1000:])        # as written by bgzip and by appending
    assert load_rows(save(tmp_path / name, parts)) == ROWS
    refused(save(tmp_path / name, gzip.compress(content)[:-20]), 'cannot be unpacked')
    refused(save(tmp_path / name, zstd(content)[:-20]), 'cannot be unpacked')


@pytest.mark.parametrize('pack', [gzip.compress, zstd])
@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.csv.gz', 'a.json.gz'])
def test_decompression_bomb(tmp_path, monkeypatch, pack, name):
    monkeypatch.setattr(files, 'BOMB_BYTES', 10**6)
    refused(save(tmp_path / name, pack(b'{"a": 1}\n' * 200_000)), '200 times its size', 'unpack it yourself')
    refused(save(tmp_path / name, pack(b'[' + b' ' * 2_000_000)), '200 times its size')


def test_archive_of_excel_that_unpacks_to_far_too_much(tmp_path):
    import zipfile
    with zipfile.ZipFile(tmp_path / 'a.xlsx', 'w', zipfile.ZIP_DEFLATED) as archive: archive.writestr('xl/workbook.xml', b' ' * (2 * BOMB_BYTES))
    refused(tmp_path / 'a.xlsx', '200 times its size')
    with zipfile.ZipFile(tmp_path / 'b.csv', 'w') as archive: archive.writestr('train.csv', 'a,b')
    refused(tmp_path / 'b.csv', 'is an archive', 'train.csv', 'unpack it')


# ---------------------------------------------------------------- CSV

@pytest.mark.parametrize('sign', [',', ';', '\t', '|'])
def test_separators(tmp_path, sign):
    others = ''.join(s for s in ',;|' if s != sign)
    path = save(tmp_path / 'a.csv', table([('text', 'label'), *((f'one{others} two', 'x'), ('three', 'y')) * 9], sign))
    rows = load_rows(path)
    assert (rows[0], rows.report.delimiter, rows.report.header) == ({'text': f'one{others} two', 'label': 'x'}, sign, True)


def test_separator_line_of_excel_and_the_setting(tmp_path):
    assert load_rows(save(tmp_path / 'a.csv', 'sep=;\r\ntext;label\r\na, b;x\r\n')) == [{'text': 'a, b', 'label': 'x'}]
    path = save(tmp_path / 'b.csv', 'a|b,c|d\n1|2,3|4\n')
    assert load_rows(path, options=LoadOptions(delimiter=',')) == [{'a|b': '1|2', 'c|d': '3|4'}]
    assert load_rows(path, options=LoadOptions(delimiter='|'))[0] == {'a': '1', 'b,c': '2,3', 'd': '4'}


def test_long_cells_and_lines_inside_quotes(tmp_path):
    long = 'x' * 500_000
    rows = load_rows(save(tmp_path / 'a.csv', f'text,label\n"{long}",a\n"one\n\ntwo, three",b\n'))
    assert rows == [{'text': long, 'label': 'a'}, {'text': 'one\n\ntwo, three', 'label': 'b'}] and rows.report.multiline == 1


@pytest.mark.parametrize('rows, header', [
    ([('text', 'label'), ('Hi', 'x'), ('Ho', 'y')], True),
    ([('Frage', 'Antwort'), ('Wie geht es dir heute, mein Freund?', 'Gut.')], True),
    ([('text', 'class'), ('text', 'class'), ('a', 'b')], True),                      # known names, even if they occur again
    ([('0', '1'), ('Hello there', 'x')], True),                                      # pandas, without names
    ([('How many clips did Natalia sell altogether in May?', 'x'), ('How much did she earn in all that time?', 'x')], False),
    ([('4711', '2024-05-01', 'My card was declined in the supermarket again today'), ('4712', '2024-05-02', 'Why is it so?')], False),
    ([('Bonjour', 'fr'), ('Hello', 'en'), ('Salut', 'fr')], None)])
def test_header(tmp_path, rows, header):
    path = save(tmp_path / 'a.csv', table(['"%s"' % '","'.join(row)] for row in rows))
    if header is None: refused(path, 'unclear whether the first row', 'csv_header=true', 'csv_header=false')
    else:
        loaded = load_rows(path)
        assert loaded.report.header == header and len(loaded) == len(rows) - header
    assert len(load_rows(path, options=LoadOptions(header=False))) == len(rows)
    assert list(load_rows(path, options=LoadOptions(header=True))[0].values()) == list(rows[1])


def test_no_header_is_said(tmp_path):
    path = save(tmp_path / 'a.csv', table([('How many clips did she sell altogether?', 'x'), ('Why should that be so?', 'x')]))
    assert load_rows(path).report.lines() == ['a.csv has no header: its columns are called column_1, column_2, ...']


def test_stray_quotes_merge_no_rows(tmp_path):
    lines = [f'sentence number {i} without any comma,{"abc"[i % 3]}' for i in range(120)]
    lines[4] = '"' + lines[4]
    lines[59] = lines[59].replace(',', '",')
    rows = load_rows(save(tmp_path / 'a.csv', 'text,label\n' + '\n'.join(lines)))
    [bad] = rows.report.bad_rows
    assert (len(rows), rows.report.rows_in, bad.where, bad.number) == (119, 120, 'line 6', 5) and 'up to line 61' in bad.reason
    assert rows[58] == {'text': lines[59][:-2], 'label': lines[59][-1]} and rows[58].number == 60        # the quote is part of the text


@settings(max_examples=100, deadline=None)
@given(st.integers(20, 40), st.integers(2, 4), st.lists(st.tuples(st.integers(0, 39), st.sampled_from(['start', 'end', 'middle'])), max_size=4))
def test_lines_with_stray_quotes_are_used_or_named(tmp_path_factory, n, width, strays):
    lines = [['word' + str(i)] + ['xy'[(i + j) % 2] for j in range(width - 1)] for i in range(n)]
    for i, where in strays:
        text = lines[i % n][0]
        lines[i % n][0] = '"' + text if where == 'start' else text + '"' if where == 'end' else text[:3] + '"' + text[3:]
    path = save(tmp_path_factory.mktemp('csv') / 'a.csv', table([['text', 'b', 'c', 'd'][:width], *lines]))
    try: rows = load_rows(path, options=LoadOptions(max_bad_rows=1000))
    except DataError as e: assert 'no rows' in str(e)
    else:
        assert rows.report.rows_in == n
        used = {row.number: row['text'] for row in rows}
        for i, line in enumerate(lines, 1):
            if i in used: assert used[i] == line[0] or line[0].startswith('"')
            else: assert any(bad.number == i and bad.line == i + 1 for bad in rows.report.bad_rows)


def test_texts_of_several_lines_are_whole(tmp_path):
    "Texts with as many commas a line as the file has columns, and sentences that could end as a row does."
    import csv
    rows = [{'subject': f'subject {i}', 'body': f'Hello, you\nby the way, {i}, I am fine, thanks' if i % 3 else f'Hi, {i}', 'team': 'ab'[i % 2]} for i in range(200)]
    poems = [{'prompt': f'Poem {i}', 'poem': f'roses, red {i}\nviolets, blue\nsugar, sweet\nand so, are you'} for i in range(50)]
    for name, some in (('a.csv', rows), ('b.csv', poems)):
        with open(tmp_path / name, 'w', newline='') as out:
            writer = csv.DictWriter(out, some[0])
            writer.writeheader()
            writer.writerows(some)
        assert load_rows(tmp_path / name) == some


def test_ragged_rows_are_named_with_their_lines(tmp_path):
    lines = [f'text {i},a' for i in range(300)]
    lines[9] += ',and more'
    lines[19] = 'alone'
    rows = load_rows(save(tmp_path / 'a.csv', 'text,label\n' + '\n'.join(lines)))
    assert [(bad.where, bad.reason) for bad in rows.report.bad_rows] == [('line 11', 'a row with 3 fields'), ('line 21', 'a row with 1 fields')]
    assert len(rows) == 298 and [row.number for row in rows[8:11]] == [9, 11, 12]


# ---------------------------------------------------------------- Excel

def test_excel(tmp_path):
    import datetime
    cells = [['text', 'label', 'when'], ['one', 1, datetime.date(2024, 5, 1)], [], ['two_x000D_', 2.5, None]]
    path = excel(tmp_path / 'a.xlsx', cells, [['a', 'b'], ['c', 'd']])
    rows = load_rows(path)
    assert rows == [{'text': 'one', 'label': 1, 'when': '2024-05-01T00:00:00'}, {'text': 'two\r', 'label': 2.5, 'when': None}]
    assert rows.report.sheet == 'Sheet1' and rows.report.notes == ['the sheet Sheet1 is read; not read: Sheet2 (--set excel_sheet=Sheet2)']
    assert load_rows(path, options=LoadOptions(sheet='Sheet2')) == [{'a': 'c', 'b': 'd'}]
    refused(path, 'no such sheet', 'Sheet1, Sheet2', sheet='Other')
    refused(excel(tmp_path / 'empty.xlsx', []), 'no rows')


def test_excel_under_another_name(tmp_path):
    path = excel(tmp_path / 'a.xlsx', [['text', 'label'], ['one', 'x']]).rename(tmp_path / 'a.csv')
    rows = load_rows(path)
    assert rows == [{'text': 'one', 'label': 'x'}] and 'in spite of its name: Excel' in rows.report.lines()[0]


# ---------------------------------------------------------------- Arrow, folders, patterns, text

def test_arrow_files_and_streams(tmp_path):
    import pyarrow, pyarrow.feather, pyarrow.ipc
    arrow = pyarrow.Table.from_pylist(ROWS)
    for compression in ('uncompressed', 'lz4', 'zstd'):
        pyarrow.feather.write_feather(arrow, tmp_path / 'a.feather', compression=compression, chunksize=40)
        assert load_rows(tmp_path / 'a.feather') == ROWS
    with pyarrow.ipc.new_stream(tmp_path / 'a.arrow', arrow.schema) as out: out.write_table(arrow, 40)
    assert load_rows(tmp_path / 'a.arrow') == ROWS
    save(tmp_path / 'a.arrow', (tmp_path / 'a.arrow').read_bytes()[:3000])
    refused(tmp_path / 'a.arrow', 'no readable Arrow file')


def test_values_of_parquet_that_json_lacks(tmp_path):
    import datetime, decimal, pyarrow, pyarrow.parquet
    row = {'when': datetime.date(2024, 5, 1), 'price': decimal.Decimal('1.50'), 'tags': [{'day': datetime.date(2024, 5, 2)}], 'n': 2**60}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / 'a.parquet')
    assert load_rows(tmp_path / 'a.parquet') == [{'when': '2024-05-01', 'price': '1.50', 'tags': [{'day': '2024-05-02'}], 'n': 2**60}]


def test_folders_and_patterns(tmp_path):
    for i in range(3): save(tmp_path / 'shards' / f'part-{i}.jsonl', jsonl(ROWS[i * 50:i * 50 + 50]))
    for path in (tmp_path / 'shards', tmp_path / 'shards' / '*.jsonl', tmp_path / '*' / 'part-?.jsonl'):
        rows = load_rows(path)
        assert rows == ROWS and rows[149].number == 150 and rows.report.n_files == 3
        source_fingerprint(path)
    save(tmp_path / 'shards' / 'README.md', '# About')
    assert load_rows(tmp_path / 'shards').report.notes == ['left out of the folder: README.md']
    before = source_fingerprint(tmp_path / 'shards' / '*.jsonl')
    save(tmp_path / 'shards' / 'part-3.jsonl', '{"text": "new", "label": "a"}\n{"text": ')
    assert before != source_fingerprint(tmp_path / 'shards' / '*.jsonl')
    rows = load_rows(tmp_path / 'shards')
    assert [(bad.where, bad.number) for bad in rows.report.bad_rows] == [('part-3.jsonl, line 2', 152)]
    save(tmp_path / 'shards' / 'more.csv', 'text,label\na,b\n')
    refused(tmp_path / 'shards', 'several kinds', 'CSV, JSON lines', '*.csv"')
    refused(tmp_path / 'shards' / '*.parquet', 'no file has such a name')


def test_a_folder_with_a_test_file_is_no_training_data(tmp_path):
    for part in ('train-00000-of-00001', 'test-00000-of-00001'): save(tmp_path / 'set' / f'{part}.jsonl', jsonl(ROWS))
    refused(tmp_path / 'set', '--data', 'train-00000', 'test_data=', 'test-00000')
    assert len(load_rows(tmp_path / 'set' / 'train*')) == 150
    for name in ('latest', 'contest', 'evaluate_me', 'training'): save(tmp_path / 'other' / f'{name}.jsonl', jsonl(ROWS[:2]))
    assert len(load_rows(tmp_path / 'other')) == 8          # words that only contain those


def test_folders_of_plain_text(tmp_path):
    for i in range(120): save(tmp_path / 'texts' / f'{i:03d}.{"md" if i % 2 else "txt"}', f'\ufeff# Title {i}\r\n\r\nA paragraph.\n')
    save(tmp_path / 'texts' / '999.txt', b'caf\xe9')
    rows = load_rows(tmp_path / 'texts')
    assert len(rows) == 120 and rows[7] == {'text': '# Title 7\n\nA paragraph.\n'}
    assert [(bad.file, bad.reason) for bad in rows.report.bad_rows] == [('999.txt', 'not utf-8 text: byte 0xe9 at character 4')]
    refused(tmp_path / 'texts' / '000.txt', 'a single text file', 'JSON lines')


def test_a_name_of_the_hub(tmp_path, monkeypatch):
    message = refused('nobody-here/nothing', 'cannot be loaded from the Hugging Face Hub', 'hf download nobody-here/nothing')
    assert 'file' in message
    import datasets
    asked = []
    def from_hub(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, 'load_dataset', from_hub)
    rows = load_rows('somebody/something')
    assert rows == ROWS and rows.report.kinds == ['dataset of the Hub']
    assert asked == [('somebody/something', {'split': 'train', 'trust_remote_code': False})]
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    refused('data/train', 'no such file')
    refused('data/train.csv', 'no such file')


# ---------------------------------------------------------------- bad rows

LINES = {                # a line of JSON -> words of the reason
    '{"text": "\\ud83d", "label": "a"}': 'lone surrogate',
    '{"text": ' + '1' * 5000 + '}': 'a number of 5,000 digits',
    '{"text": ' + '[' * 100_000 + ']' * 100_000 + '}': 'nested deeper',
    '{"text": ' + '[' * 200 + ']' * 200 + '}': 'nested deeper',
    '{"a":' * 3000: 'nested deeper',
    '{"text": "a", "text": "b"}': '"text" occurs twice',
    '{"text": {"b": 1, "b": 2}}': '"b" occurs twice',
    '{"text": "a"} {"text": "b"}': 'more text',
    '{"text": "a"': 'broken JSON',
    '{"text": "a\x00b"}': 'NUL',
    '[1, 2]': 'no JSON object',
    'null': 'no JSON object',
    '{}': 'without any column'}


@pytest.mark.parametrize('line', LINES, ids=range(len(LINES)))
def test_a_bad_line_costs_one_row(tmp_path, line):
    good = [json.dumps(row) for row in ROWS]
    path = save(tmp_path / 'a.jsonl', '\n'.join([*good[:70], line, '', *good[70:]]))
    rows = load_rows(path)
    [bad] = rows.report.bad_rows
    assert rows == ROWS and (bad.line, bad.number, rows.report.rows_in) == (71, 71, 151) and LINES[line] in bad.reason
    assert rows[70].number == 72
    refused(save(tmp_path / 'b.jsonl', '\n'.join([*good[:10], line])), 'line 11', LINES[line], 'max_bad_rows=1')
    assert load_rows(tmp_path / 'b.jsonl', options=LoadOptions(max_bad_rows=1)) == ROWS[:10]


@pytest.mark.parametrize('line', [line for line in LINES if line not in ('{}', '{"text": "a"', 'null', '[1, 2]') and LINES[line] not in ('more text', 'nested deeper')])
def test_a_bad_element_of_a_list_costs_one_row(tmp_path, line):
    good = [json.dumps(row) for row in ROWS]
    if 'NUL' in LINES[line]: line = line.replace('\x00', '\\ud800')
    path = save(tmp_path / 'a.json', '[' + ',\n'.join([*good[:70], line, *good[70:]]) + ']')
    rows = load_rows(path)
    assert rows == ROWS and [bad.where for bad in rows.report.bad_rows] == ['row 71']


def test_a_list_larger_than_a_piece_of_the_file(tmp_path):
    many = [{'text': f'{i} ' + 'word ' * 60, 'n': i} for i in range(9000)]
    assert load_rows(save(tmp_path / 'a.json', json.dumps(many))) == many
    assert load_rows(save(tmp_path / 'b.json', json.dumps([{'text': 'x' * 3_000_000}] * 3))) == [{'text': 'x' * 3_000_000}] * 3
    broken = save(tmp_path / 'c.json', json.dumps(many, indent=0).replace('"n": 8000', '"n" 8000'))
    line = broken.read_text().split('"n" 8000')[0].count('\n') + 1
    refused(broken, f'line {line}: broken JSON')


def test_what_stands_beside_the_rows_is_named(tmp_path):
    rows = load_rows(save(tmp_path / 'a.json', json.dumps({'version': 1, 'data': ROWS})))
    assert rows == ROWS and rows.report.notes == ['the rows are the list data; left out beside it: version']
    one = {'messages': [{'role': 'user', 'content': 'a'}], 'id': 1}
    assert load_rows(save(tmp_path / 'b.json', json.dumps(one))) == [one]


def test_bytes_that_are_no_text_cost_their_rows(tmp_path):
    lines = [f'text {i},a'.encode() for i in range(300)]
    lines[100], lines[200] = b'caf\xe9,a', b'with \x00 NUL,b'
    rows = load_rows(save(tmp_path / 'a.csv', b'text,label\n' + b'\n'.join(lines)))
    assert len(rows) == 298
    assert [(bad.where, bad.reason) for bad in rows.report.bad_rows] == [
        ('line 102, column text', 'not utf-8 text: byte 0xe9 at character 4'), ('line 202, column text', 'a NUL character, as in binary files')]


def test_bad_text_in_parquet_and_arrow_costs_its_rows(tmp_path):
    import pyarrow, pyarrow.ipc, pyarrow.parquet
    values = [f'text {i}'.encode() for i in range(3000)]
    values[1500] = b'caf\xe9'
    text = pyarrow.array(values)
    strange = pyarrow.StringArray.from_buffers(3000, *text.buffers()[1:])
    arrow = pyarrow.table({'text': strange, 'n': pyarrow.array(range(3000))})
    pyarrow.parquet.write_table(arrow, tmp_path / 'a.parquet')
    with pyarrow.ipc.new_file(tmp_path / 'a.arrow', arrow.schema) as out: out.write_table(arrow)
    for name in ('a.parquet', 'a.arrow'):
        rows = load_rows(tmp_path / name)
        assert len(rows) == 2999 and rows[1500]['n'] == 1501
        assert [(bad.where, bad.number) for bad in rows.report.bad_rows] == [('row 1501, column text', 1501)]


def test_a_line_of_20_mb_is_reported_at_once(tmp_path):
    good = jsonl(ROWS)
    path = save(tmp_path / 'a.jsonl', f'{good}\n{{"text": "{"x" * 20_000_000}"}}\n')
    started = time.perf_counter()
    rows = load_rows(path)
    assert time.perf_counter() - started < 2
    assert rows == ROWS and rows.report.bad_rows[0].reason.startswith('a row of 20,000,013 characters')
    save(tmp_path / 'a.json', path.read_bytes().replace(b'\n', b',').replace(b'{"text"', b'[{"text"', 1))
    started = time.perf_counter()
    refused(tmp_path / 'a.json', '10,000,000 characters')
    assert time.perf_counter() - started < 4


def test_reading_stops_where_nothing_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(load, 'HOPELESS', 100)
    message = refused(save(tmp_path / 'a.jsonl', 'no JSON\n' * 5000))
    assert '100 more of 101 rows' in message


# ---------------------------------------------------------------- things that are no files

def test_pipes_sockets_and_devices(tmp_path):
    os.mkfifo(tmp_path / 'pipe.csv')
    refused(tmp_path / 'pipe.csv', 'no file', 'a named pipe')
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)          # the name of a socket is short
        server.bind('s.csv')
        refused(tmp_path / 's.csv', 'no file', 'a socket')
    refused('/dev/null', 'no file', 'a device')
    (tmp_path / 'loop.csv').symlink_to('loop.csv')
    with pytest.raises(HomelabError): load_rows(tmp_path / 'loop.csv')
    with pytest.raises(HomelabError): load_rows('a\x00b.csv')
    with pytest.raises(HomelabError): load_rows('x' * 5000)


@pytest.mark.parametrize('content, words', [
    (b'%PDF-1.7 ...', 'a PDF'), (b'<!DOCTYPE html><html>', 'a web page'), (b'\xd0\xcf\x11\xe0\xa1', 'old Excel'),
    (b'version https://git-lfs.github.com/spec/v1\noid', 'Git LFS'), (b'7z\xbc\xaf\x27', 'archive'), (b'PK\x03\x04', 'no readable Excel')])
def test_other_things_named_csv(tmp_path, content, words): refused(save(tmp_path / 'a.csv', content), words)


# ---------------------------------------------------------------- in a run

def test_settings(tmp_path):
    config = make_config(csv_delimiter='tab', csv_header=False, excel_sheet='S', max_bad_rows=3)
    save(tmp_path / 'c.yaml', dump_config(config))
    assert load_config(tmp_path / 'c.yaml') == config
    path = save(tmp_path / 'a.csv', 'x,1\ty\n' * 12)
    rows = load_data(make_config(data=str(path), csv_delimiter='tab', csv_header=False))
    assert rows[0] == {'column_1': 'x,1', 'column_2': 'y'} and len(rows) == 12
    assert load_config(overrides=['csv_header=false', 'csv_delimiter=;', 'max_bad_rows=2']).csv_delimiter == ';'


def test_a_run_reports_bad_rows_and_writes_them_aside(tmp_path):
    from homelab_ft.data.chat_template import load_tokenizer
    from homelab_ft.data.prepare import input_fingerprint, prepare, read_preview
    lines = [json.dumps({'prompt': f'Say the number {i} in words and in figures.', 'completion': f'It is {i}.'}) for i in range(200)]
    lines[20] = '{"prompt": "broken'
    path = save(tmp_path / 'a.jsonl', '\n'.join(lines))
    config, said = make_config(data=str(path)), []
    preview = read_preview(config, said.append)
    assert said[0].split('\n')[0] == 'reading   1 of 200 rows cannot be read and are set aside' and 'line 21' in said[0]
    tok = load_tokenizer('embedded')
    prepared = prepare(config, tok, tmp_path / 'data', preview)
    table = {name: n for name, n, _ in prepared.report[0].rows}
    assert (table['in the file'], table['cannot be read: set aside'], table['after cleaning']) == (200, 1, 199)
    [bad] = [json.loads(line) for line in (tmp_path / 'data' / 'bad_rows.jsonl').read_text().splitlines()]
    assert (bad['line'], bad['number'], bad['content'], bad['data']) == (21, 21, lines[20], str(path)) and 'Unterminated' in bad['reason']
    assert 'line 21' in (tmp_path / 'data' / 'data_report.md').read_text()
    assert input_fingerprint(config, tok) != input_fingerprint(config.model_copy(update=dict(csv_header=False)), tok)
    drawn = prepare(make_config(data=str(path), max_rows=100), tok, tmp_path / 'drawn')
    assert drawn.report[0].rows[:3] == [['in the file', 200, ''], ['cannot be read: set aside', 1, ''], ['drawn by max_rows', 100, '']]


def test_rows_in_python_with_half_a_character(tmp_path):
    from homelab_ft.api import save_rows
    rows = load_rows(save_rows([*ROWS, {'text': '\ud83d', 'label': 'a'}], tmp_path))
    assert rows == ROWS and 'lone surrogate' in rows.report.bad_rows[0].reason
    deep = []
    for _ in range(100_000): deep = [deep]
    with pytest.raises(DataError): save_rows([{'text': deep}], tmp_path)
    pandas = pytest.importorskip('pandas')
    with pytest.raises(DataError, match='same name'): save_rows(pandas.DataFrame([['a', 'b']], columns=['x', 'x']), tmp_path)


# ---------------------------------------------------------------- packed rows

values = st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from('abc'), values, min_size=1), min_size=1, max_size=30), st.integers(2, 7))
def test_rows_are_a_list(rows, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, 'BLOCK', block)
        packed = load.Rows()
        for i, row in enumerate(rows): packed.add(dict(row), i + 1)
        packed.close()
        expected = load.fill_missing([dict(row) for row in rows])
        assert list(packed) == expected and packed == expected and [packed[i] for i in range(len(rows))] == expected
        assert packed[-1] == expected[-1] and packed[1:4] == expected[1:4] and [row.number for row in packed] == list(range(1, len(rows) + 1))
        with pytest.raises(IndexError): packed[len(rows)]


# ---------------------------------------------------------------- the files that failed

@cases
@pytest.mark.parametrize('name, used, bad', [
    ('stray_quotes.csv', 119, ['line 6']), ('no_header.csv', None, []), ('deep_nest.jsonl', 150, []), ('lone_surrogate.jsonl', 149, ['line 6']),
    ('part_text_list.jsonl', 1, [])])
def test_cases_that_are_read(name, used, bad):
    rows = load_rows(CASES / name)
    if used: assert len(rows) == used
    assert len(bad) == len(rows.report.bad_rows) and all(row.where.startswith(where) for row, where in zip(rows.report.bad_rows, bad))
    if name == 'no_header.csv': assert rows.report.header is False and rows[0]['column_1'].startswith('Natalia sold')


@cases
@pytest.mark.parametrize('name, words', [
    ('only_separators.csv', ['no rows']), ('bad_utf8.parquet', ['row', 'column', 'not utf-8 text']), ('bigint.json', ['row 1', '5,000 digits'])])
def test_cases_that_are_refused(name, words): refused(CASES / name, *words)


# ---------------------------------------------------------------- damage by the hundred

@pytest.mark.parametrize('first', [0, 100])
def test_damaged_files(first):
    faults, outcomes, slowest = fuzz(range(first, first + 100))
    assert not faults and slowest[0] < 10, faults
    assert outcomes['refused'] > 20 and outcomes['counted'] > 10


@pytest.mark.slow
def test_5000_damaged_files():
    faults, outcomes, slowest = fuzz(range(5000))
    assert not faults and slowest[0] < 10, faults
