"Prepared folders: reproducible, sealed last, mended when torn, never overwritten, nothing shared between parts."
import csv, json
from functools import lru_cache
from pathlib import Path

import pytest

import homelab_ft.data.prepare as room
from homelab_ft.core import ConfigError, DataError, ModelError
from homelab_ft.config import make_config
from homelab_ft.data.chat_template import encode, load_tokenizer, prompt_ids
from homelab_ft.data.prepare import PARTS, load_prepared, prepare
from homelab_ft.data.sample.tickets import write_tickets
from homelab_ft.data.split import leaks

BANKING = Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'classify' / 'banking77' / 'train.csv'


@lru_cache
def tok(): return load_tokenizer('embedded')


@pytest.fixture(scope='module')
def tickets(tmp_path_factory): return write_tickets(tmp_path_factory.mktemp('tickets'))


def small(tmp_path, n=60, labels=('red', 'green'), name='small.csv', start=0):
    path = tmp_path / name
    nouns = 'apple leaf brick cloud river stone glass train paper candle'.split()
    verbs = 'seen lost found sold painted broken'.split()
    with open(path, 'w', newline='', encoding='utf-8') as f:
        out = csv.writer(f)
        out.writerow(['text', 'label'])
        for i in range(start, start + n): out.writerow([f'{nouns[i % 10]} number {i * 7919} was {verbs[i % 6]} at {i * 31} {nouns[(i * 3 + 1) % 10]} street', labels[i % len(labels)]])
    return path


def fingerprints(p): return [getattr(p, part).fingerprint for part in PARTS]


def test_sample_tickets(tickets, tmp_path):
    train_csv, test_csv = tickets
    p = prepare(make_config(data=str(train_csv), test_data=str(test_csv), overlong_rows='drop'), tok(), tmp_path / 'data')
    assert p.rows['test'] == len(p.test) == len(p.test_examples) == 200 and len(p.labels) == 8 and p.dataset_format.label_column == 'team'
    assert 0.10 < p.rows['validation'] / (p.rows['train'] + p.rows['validation']) < 0.20
    for i in (0, 57, 199):
        ids, mask = p.test.row(i)
        assert ids.tolist() == encode(p.test_examples[i].messages, tok()).input_ids
        assert ids[mask == 0].tolist() == prompt_ids(p.test_examples[i].messages[:-1], tok())
        assert tok().decode(ids[mask == 1]) == p.test_examples[i].label + '<|eot_id|>'
    report = (tmp_path / 'data' / 'data_report.md').read_text(encoding='utf-8')
    assert report == p.markdown() and '⟦' in report and 'near duplicate' in report


def test_the_same_input_gives_the_same_folder(tmp_path):
    config = make_config(data=str(small(tmp_path)))
    a, b = (prepare(config, tok(), tmp_path / name) for name in 'ab')
    assert not a.cached and not b.cached and fingerprints(a) == fingerprints(b) and a.fingerprint == b.fingerprint
    for file in (tmp_path / 'a').iterdir(): assert file.read_bytes() == (tmp_path / 'b' / file.name).read_bytes()


def test_reading_back_gives_the_same(tmp_path):
    a = prepare(make_config(data=str(small(tmp_path))), tok(), tmp_path / 'a')
    b = load_prepared(tmp_path / 'a')
    assert b.cached and fingerprints(a) == fingerprints(b)
    assert (a.test_examples, a.labels, a.dataset_format, a.rows, a.fingerprint) == (b.test_examples, b.labels, b.dataset_format, b.rows, b.fingerprint)
    assert a.markdown() == b.markdown() and str(a) == str(b)


def test_a_known_result_is_not_computed_again(tmp_path, monkeypatch):
    config = make_config(data=str(small(tmp_path)))
    prepare(config, tok(), tmp_path / 'a')
    monkeypatch.setattr(room, '_build', lambda *_: pytest.fail('built again'))
    assert prepare(config, tok(), tmp_path / 'a').cached


@pytest.mark.parametrize('change', [dict(seed=1), dict(eval_fraction=0.4), dict(max_length=256), dict(system_prompt='Be brief.')])
def test_other_settings_are_refused_not_overwritten(tmp_path, change):
    data = str(small(tmp_path))
    a = prepare(make_config(data=data), tok(), tmp_path / 'a')
    with pytest.raises(DataError, match='prepared from another file'): prepare(make_config(data=data, **change), tok(), tmp_path / 'a')
    assert fingerprints(load_prepared(tmp_path / 'a')) == fingerprints(a)


def test_other_bytes_are_refused(tmp_path):
    config = make_config(data=str(small(tmp_path)))
    prepare(config, tok(), tmp_path / 'a')
    small(tmp_path, n=61)
    with pytest.raises(DataError, match='prepared from another file'): prepare(config, tok(), tmp_path / 'a')


# -- faults -------------------------------------------------------------------------------------------------------------------------------

FILES = ['train.safetensors', 'validation.safetensors', 'test.safetensors', 'test_examples.jsonl']


@pytest.mark.parametrize('file', FILES)
@pytest.mark.parametrize('fault', ['half', 'gone', 'flipped'])
def test_a_broken_file_is_found_and_mended(tmp_path, file, fault):
    config, path = make_config(data=str(small(tmp_path))), tmp_path / 'a' / file
    before = fingerprints(prepare(config, tok(), tmp_path / 'a'))
    whole = path.read_bytes()
    if fault == 'gone': path.unlink()
    else: path.write_bytes(whole[:len(whole) // 2] if fault == 'half' else whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(DataError): load_prepared(tmp_path / 'a')
    mended = prepare(config, tok(), tmp_path / 'a')
    assert not mended.cached and fingerprints(mended) == before and path.read_bytes() == whole
    assert load_prepared(tmp_path / 'a').cached


def test_a_swapped_cache_is_found(tmp_path):
    prepare(make_config(data=str(small(tmp_path))), tok(), tmp_path / 'a')
    train, test = tmp_path / 'a' / 'train.safetensors', tmp_path / 'a' / 'test.safetensors'
    train.write_bytes(test.read_bytes())
    with pytest.raises(DataError, match='altered'): load_prepared(tmp_path / 'a')


@pytest.mark.parametrize('calls', range(6))
def test_a_crash_at_any_write_leaves_no_seal(tmp_path, monkeypatch, calls):
    import homelab_ft.io as files
    config, done, replace = make_config(data=str(small(tmp_path))), [], files.os.replace
    def crash(a, b):
        if len(done) == calls: raise KeyboardInterrupt
        done.append(b)
        replace(a, b)
    monkeypatch.setattr(files.os, 'replace', crash)
    with pytest.raises(KeyboardInterrupt): prepare(config, tok(), tmp_path / 'a')
    monkeypatch.undo()
    assert not (tmp_path / 'a' / 'data.json').exists() and not list((tmp_path / 'a').glob('.*'))
    with pytest.raises(DataError, match='no prepared data'): load_prepared(tmp_path / 'a')
    assert not prepare(config, tok(), tmp_path / 'a').cached
    assert load_prepared(tmp_path / 'a').cached


def test_a_crash_while_mending_removes_the_old_seal(tmp_path, monkeypatch):
    config = make_config(data=str(small(tmp_path)))
    prepare(config, tok(), tmp_path / 'a')
    (tmp_path / 'a' / 'test.safetensors').unlink()
    def crash(*_): raise KeyboardInterrupt
    monkeypatch.setattr(room, 'save_cache', crash)
    with pytest.raises(KeyboardInterrupt): prepare(config, tok(), tmp_path / 'a')
    assert not (tmp_path / 'a' / 'data.json').exists()


def test_a_torn_seal_counts_as_none(tmp_path):
    config = make_config(data=str(small(tmp_path)))
    prepare(config, tok(), tmp_path / 'a')
    (tmp_path / 'a' / 'data.json').write_text('{"fingerprint": "ab')
    with pytest.raises(DataError, match='no prepared data'): load_prepared(tmp_path / 'a')
    assert not prepare(config, tok(), tmp_path / 'a').cached


# -- parts --------------------------------------------------------------------------------------------------------------------------------

def parts_of(config, folder):
    "The messages behind every cache, by row number."
    p = prepare(config, tok(), folder)
    return p, {part: set(getattr(p, part).rows.tolist()) for part in PARTS}


def test_parts_share_nothing(tickets, tmp_path):
    p, rows = parts_of(make_config(data=str(tickets[0]), overlong_rows='drop'), tmp_path / 'a')
    assert not rows['train'] & rows['validation'] and not rows['train'] & rows['test'] and not rows['validation'] & rows['test']
    texts = {part: {tuple(getattr(p, part).row(i)[0].tolist()) for i in range(len(getattr(p, part)))} for part in PARTS}
    assert not texts['train'] & texts['test'] and not texts['train'] & texts['validation'] and not texts['validation'] & texts['test']


def test_rows_that_are_also_in_the_test_leave_training(tmp_path):
    data, test = small(tmp_path, 60), small(tmp_path, 20, name='test.csv', start=50)
    p = prepare(make_config(data=str(data), test_data=str(test)), tok(), tmp_path / 'a')
    assert p.rows['test'] == 20 and p.rows['train'] + p.rows['validation'] == 50
    assert max(p.train.rows.max(), p.validation.rows.max()) <= 50
    assert ['dropped: also in test_data', 10, ''] in p.report[0].rows


def test_a_test_that_is_the_training_file(tmp_path):
    data = str(small(tmp_path))
    with pytest.raises(DataError, match='every row of data is also in test_data'): prepare(make_config(data=data, test_data=data), tok(), tmp_path / 'a')


def test_conversations_have_no_labels(tmp_path):
    lines = [{'messages': [{'role': 'user', 'content': f'What is {i} squared?'}, {'role': 'assistant', 'content': f'{i} times {i} is {i * i}.'}]} for i in range(40)]
    (tmp_path / 'talk.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    p = prepare(make_config(data=str(tmp_path / 'talk.jsonl'), eval_fraction=0.4), tok(), tmp_path / 'a')
    assert p.labels is None and p.dataset_format.kind == 'conversational' and load_prepared(tmp_path / 'a').labels is None


def test_rare_labels(tmp_path):
    data = small(tmp_path)
    with open(data, 'a') as f: f.write('a very rare thing happened here,blue\n')
    with pytest.raises(DataError, match='only once'): prepare(make_config(data=str(data)), tok(), tmp_path / 'a')
    p = prepare(make_config(data=str(data), rare_labels='drop'), tok(), tmp_path / 'a')
    assert p.labels == ['green', 'red'] and ['dropped: a label that occurs once', 1, ''] in p.report[0].rows


# -- bad input: one clear error, nothing written --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings, error, says', [
    (dict(), ConfigError, 'set data=FILE'),
    (dict(data='none.csv'), DataError, 'no such file'),
    (dict(data='small.csv', test_data='none.csv'), DataError, 'no such file'),
    (dict(data='empty.csv'), DataError, 'empty'),
    (dict(data='small.csv', label_column='lable'), DataError, 'did you mean label'),
    (dict(data='small.csv', test_data='other.csv'), DataError, 'test_data: columns of data are missing'),
    (dict(data='small.csv', max_length=16), DataError, 'longer than max_length'),
    (dict(data='small.csv', max_length=16, overlong_rows='drop'), DataError, 'no row is left'),
    (dict(data='small.csv', test_data='long.csv', max_length=128), DataError, 'test_data: 1 of'),
])
def test_bad_input(tmp_path, monkeypatch, settings, error, says):
    monkeypatch.chdir(tmp_path)
    small(tmp_path)
    Path('empty.csv').write_text('')
    Path('other.csv').write_text('question,answer\na,b\n')
    Path('long.csv').write_text('text,label\n' + 'again ' * 500 + ',red\n')
    with pytest.raises(error, match=says): prepare(make_config(**settings), tok(), tmp_path / 'a')
    assert not (tmp_path / 'a').exists()


def test_a_bad_template_is_found_before_the_data_is_read(tmp_path):
    (tmp_path / 'open.jinja').write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(ModelError, match='does not close'):
        prepare(make_config(data=str(small(tmp_path))), load_tokenizer('embedded', tmp_path / 'open.jinja'), tmp_path / 'a')


@pytest.mark.skipif(not BANKING.exists(), reason='needs banking77 in ../shared/data')
def test_banking77(tmp_path):
    p = prepare(make_config(data=str(BANKING), max_rows=1500), tok(), tmp_path / 'a')
    assert p.dataset_format.label_column == 'category' and p.rows['file'] == 1500 and len(p.labels) == 77
