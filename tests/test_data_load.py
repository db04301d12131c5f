"data.load: every kind of file round-trips, every kind of bad file gets one clear message."
import csv, io, json, os

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import DataError
from homelab_ft.data.load import load_rows

ROWS = [{'text': f'text, "{i}"\nsecond line é', 'label': 'ab'[i % 2]} for i in range(9)]
texts = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\r\x00'), max_size=30)


def refused(path, *words, **kwargs):
    "The message of the DataError that loading `path` raises; it must hold every word."
    with pytest.raises(DataError) as e: load_rows(path, **kwargs)
    message = str(e.value)
    assert all(w in message for w in words), message
    assert 'next step' in message
    return message


# ---------------------------------------------------------------- formats

@pytest.mark.parametrize('separator', [',', ';', '\t'])
@pytest.mark.parametrize('newline', ['\n', '\r\n'])
def test_csv_dialects(tmp_path, separator, newline):
    out = io.StringIO()
    writer = csv.DictWriter(out, ['text', 'label'], delimiter=separator, lineterminator=newline)
    writer.writeheader(); writer.writerows(ROWS)
    (tmp_path / 'a.csv').write_bytes(out.getvalue().encode('utf-8'))
    assert load_rows(tmp_path / 'a.csv') == ROWS


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries({'text': texts, 'label': texts}), min_size=1, max_size=8))
def test_csv_round_trip(tmp_path_factory, rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, ['text', 'label'], lineterminator='\n')
    writer.writeheader(); writer.writerows(rows)
    path = tmp_path_factory.mktemp('csv') / 'a.csv'
    path.write_bytes(out.getvalue().encode('utf-8'))
    expected = [r for r in rows if r['text'].strip() or r['label'].strip()]
    if expected: assert load_rows(path) == expected
    else: refused(path, 'no rows')


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=5), texts, min_size=1), min_size=1, max_size=6))
def test_json_round_trips(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp('json')
    for ascii in (True, False):
        (folder / 'a.jsonl').write_text('\n'.join(json.dumps(r, ensure_ascii=ascii) for r in rows), encoding='utf-8', newline='')
        (folder / 'a.json').write_text(json.dumps(rows, ensure_ascii=ascii), encoding='utf-8', newline='')
        assert load_rows(folder / 'a.jsonl') == rows
        assert load_rows(folder / 'a.json') == rows


def test_line_separators_inside_json_text(tmp_path):
    row = {'text': 'a\u2028b\x85c'}
    (tmp_path / 'a.jsonl').write_text(json.dumps(row, ensure_ascii=False) + '\n', encoding='utf-8', newline='')
    assert load_rows(tmp_path / 'a.jsonl') == [row]


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'cp1252'])
def test_encodings(tmp_path, encoding):
    (tmp_path / 'a.csv').write_bytes('text,label\nCafé,a\n'.encode(encoding))
    assert load_rows(tmp_path / 'a.csv', encoding='utf-8' if encoding == 'utf-8-sig' else encoding) == [{'text': 'Café', 'label': 'a'}]


def test_parquet_and_saved_folders(tmp_path):
    import datasets, pyarrow, pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / 'a.parquet')
    assert load_rows(tmp_path / 'a.parquet') == ROWS
    classes = datasets.Features({'text': datasets.Value('string'), 'label': datasets.ClassLabel(names=['a', 'b'])})
    saved = datasets.Dataset.from_list(ROWS, features=classes)
    saved.to_parquet(tmp_path / 'b.parquet')
    saved.save_to_disk(tmp_path / 'one')
    datasets.DatasetDict(train=saved, test=saved.select([0])).save_to_disk(tmp_path / 'parts')
    datasets.DatasetDict(x=saved, y=saved).save_to_disk(tmp_path / 'xy')
    for name in ('b.parquet', 'one', 'parts'): assert load_rows(tmp_path / name) == ROWS
    refused(tmp_path / 'xy', 'several parts', 'x, y')


# ---------------------------------------------------------------- bad files

def test_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / 'train.csv').write_text('a,b\n1,2\n')
    refused(tmp_path / 'trian.csv', 'no such file', 'did you mean train.csv?')
    refused(tmp_path / 'no' / 'where.csv', 'no such file')


@pytest.mark.parametrize('name', ['a.csv', 'a.tsv', 'a.json', 'a.jsonl', 'a.parquet'])
def test_empty_files(tmp_path, name):
    (tmp_path / name).write_bytes(b'')
    refused(tmp_path / name, 'is empty')
    if name != 'a.parquet':
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf \n\n')
        refused(tmp_path / name, 'is empty')


@pytest.mark.parametrize('name, content', [('a.csv', 'text,label\n'), ('a.json', '[]'), ('a.json', '{"data": []}')])
def test_no_rows(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, 'no rows')


def test_wrong_encoding_names_byte_line_and_setting(tmp_path):
    (tmp_path / 'a.csv').write_bytes('text,label\nok,a\nCafé,b\n'.encode('cp1252'))
    refused(tmp_path / 'a.csv', 'line 3, column text', 'byte 0xe9 at character 4', '--set encoding=cp1252')
    refused(tmp_path / 'a.csv', 'unknown encoding', encoding='utf-99')
    refused(tmp_path / 'a.csv', 'unknown encoding', encoding='hex')
    refused(tmp_path / 'a.csv', 'utf-16', encoding='utf-16')


@pytest.mark.parametrize('encoding, read', [
    ('utf-16', True), ('utf-32', True), ('utf-16-le', False), ('utf-16-be', False), ('utf-32-le', False), ('utf-32-be', False)])
def test_utf_16_and_32(tmp_path, encoding, read):
    (tmp_path / 'a.csv').write_bytes('text,label\nCafé,a\n'.encode(encoding))
    (tmp_path / 'a.jsonl').write_bytes('{"text": "Café"}\n'.encode(encoding))
    if read:
        rows = load_rows(tmp_path / 'a.csv')
        assert rows == [{'text': 'Café', 'label': 'a'}] and rows.report.encoding == encoding
        assert load_rows(tmp_path / 'a.jsonl') == [{'text': 'Café'}]
    else:
        refused(tmp_path / 'a.csv', f'--set encoding={encoding}')
        refused(tmp_path / 'a.jsonl', f'--set encoding={encoding}')
    assert load_rows(tmp_path / 'a.csv', encoding) == [{'text': 'Café', 'label': 'a'}]


@pytest.mark.parametrize('content, words', [
    ('text,label\nok,a\none,two,three\n', ['line 3', '3 fields', '2 fields']),
    ('text,label\n"two\nlines",a\nshort\n', ['line 4', '1 fields']),
    ('text,label,text\na,b,c\n', ['same name', 'text']),
    ('text,label\n"never closed,a\nb,c\n', ['broken CSV', 'quote']),
    ('text,label\n"a"b,c\n', ['line 2', 'broken CSV']),
    ('text,label\n"' + 'x' * 10_000_001 + '",a\n', ['line 2', '10,000,006 characters', 'at most 10,000,000'])])
def test_bad_csv(tmp_path, content, words):
    (tmp_path / 'a.csv').write_text(content)
    refused(tmp_path / 'a.csv', *words)


@pytest.mark.parametrize('name, content, words', [
    ('a.jsonl', '{"a": 1}\n\n{"a": \n', ['line 3', 'broken JSON']),
    ('a.jsonl', '{"a": 1}\n[1]\n', ['line 2', 'no JSON object']),
    ('a.json', '[{"a": 1},\n{"a" 2}]', ['line 2', 'broken JSON']),
    ('a.json', '{"a": 1}\n{"a" 2}', ['line 2', 'broken JSON']),
    ('a.json', '[1, 2]', ['no rows', 'list of objects']),
    ('a.json', '"text"', ['list of objects'])])
def test_bad_json(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, *words)


def test_other_bad_things(tmp_path):
    for name in ('a.doc', 'noending'):
        (tmp_path / name).write_bytes(b'PK')
        refused(tmp_path / name, 'this kind of file', '.jsonl')
    for name, words in {'a.parquet': 'no readable Parquet', 'a.xlsx': 'no readable Excel', 'a.csv.gz': 'not packed with gzip', 'a.arrow': 'no readable Arrow'}.items():
        (tmp_path / name).write_bytes(b'PAR1 no' if name == 'a.parquet' else b'no')
        refused(tmp_path / name, words)
    (tmp_path / 'empty').mkdir()
    refused(tmp_path / 'empty', 'no data files', 'save_to_disk')
    refused(tmp_path, 'several kinds', 'Parquet', 'give a pattern')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_no_permission(tmp_path):
    (tmp_path / 'a.csv').write_text('a,b\n1,2\n')
    (tmp_path / 'a.csv').chmod(0)
    refused(tmp_path / 'a.csv', 'Permission denied')


def test_failing_disk(tmp_path, monkeypatch):
    (tmp_path / 'a.csv').write_text('a,b\n1,2\n')
    def fails(*_, **__): raise OSError(5, 'Input/output error')
    monkeypatch.setattr('builtins.open', fails)
    refused(tmp_path / 'a.csv', 'Input/output error')


# ---------------------------------------------------------------- drawing rows

@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 60), k=st.integers(1, 80), seed=st.integers(0, 1000))
def test_draw(tmp_path_factory, n, k, seed):
    path = tmp_path_factory.mktemp('draw') / 'a.jsonl'
    path.write_text('\n'.join(json.dumps({'i': i}) for i in range(1, n + 1)))
    rows = load_rows(path, max_rows=k, seed=seed)
    numbers = [r.number for r in rows]
    assert len(rows) == min(n, k) and numbers == sorted(set(numbers)) == [r['i'] for r in rows]
    assert rows == load_rows(path, max_rows=k, seed=seed)


# ---------------------------------------------------------------- cells without a value

GAPS = [{'text': 'nan', 'label': 2, 'share': 0.5}, {'text': None, 'label': None, 'share': None}, {'text': 'NA', 'label': 1, 'share': 1.0}]


@pytest.mark.parametrize('kind', ['csv', 'json', 'jsonl', 'parquet', 'saved', 'frame', 'rows'])
def test_a_missing_cell_is_no_word_and_a_word_is_no_missing_cell(tmp_path, kind):
    pandas = pytest.importorskip('pandas')
    frame = pandas.DataFrame(GAPS).assign(text=['nan', pandas.NA, 'NA'], id=['a', 'b', 'c'])
    assert str(frame.label[1]) == 'nan' and frame.label[0] == 2.0        # pandas makes fractions of whole numbers
    path = tmp_path / f'a.{kind}'
    if kind == 'csv': frame.to_csv(path, index=False)
    elif kind == 'json': path.write_text(json.dumps([dict(text='nan', label=2.0, share=0.5), dict(text=float('nan'), label=float('nan'), share=float('nan')), GAPS[2]]))
    elif kind == 'jsonl': frame.to_json(path, orient='records', lines=True)
    elif kind == 'parquet': frame.to_parquet(path)
    else:
        import datasets
        from homelab_ft.api import save_rows
        if kind == 'saved': datasets.Dataset.from_pandas(frame).save_to_disk(path)
        else: path = save_rows(frame if kind == 'frame' else frame.to_dict('records'), tmp_path)
    rows = load_rows(path)
    empty = '' if kind == 'csv' else None
    assert [row['text'] for row in rows] == ['nan', empty, 'NA']
    if kind == 'csv': assert [row['label'] for row in rows] == ['2.0', '', '1.0']        # as the file says
    else: assert [row['label'] for row in rows] == [2, None, 1] and [type(row['label']) for row in rows] == [int, type(None), int]
    assert rows[1]['share'] in ('', None) and float(rows[0]['share']) == 0.5


def test_dates_and_numpy_numbers_of_a_frame_are_written(tmp_path):
    pandas, numpy = pytest.importorskip('pandas'), pytest.importorskip('numpy')
    from homelab_ft.api import save_rows
    frame = pandas.DataFrame(dict(text=['a', 'b'], n=numpy.float32([1, 2.5]), day=[pandas.Timestamp('2024-05-01'), pandas.NaT], tags=[numpy.array([1, 2]), None]))
    assert load_rows(save_rows(frame, tmp_path)) == [dict(text='a', n=1.0, day='2024-05-01T00:00:00', tags=[1, 2]), dict(text='b', n=2.5, day=None, tags=None)]
