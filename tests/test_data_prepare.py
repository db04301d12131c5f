"data.prepare: reproducible, the manifest written last, torn files found, nothing overwritten, nothing shared between parts."
import csv, json, random, re, shlex
from functools import lru_cache
from pathlib import Path

import pytest

from homelab_ft.data import prepare as module, prepared as folder_module
from homelab_ft.core import ConfigError, DataError, HomelabError, ModelError
from homelab_ft.config import load_config, make_config
from homelab_ft.data.chat_template import encode, load_tokenizer, prompt_ids
from homelab_ft.data.prepare import PARTS, load_prepared, prepare
from homelab_ft.data.sample.tickets import write_tickets
from homelab_ft.data.tokenize import encode_text

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
    monkeypatch.setattr(module, 'build_prepared', lambda *_: pytest.fail('built again'))
    assert prepare(config, tok(), tmp_path / 'a').cached


@pytest.mark.parametrize('change', [dict(seed=1), dict(system_prompt='Be brief.')])
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

@pytest.mark.parametrize('file, fault', [
    ('train.safetensors', 'half'), ('validation.safetensors', 'gone'), ('test.safetensors', 'flipped'), ('test_examples.jsonl', 'flipped'),
])
def test_a_broken_file_is_found_and_written_again(tmp_path, file, fault):
    config, path = make_config(data=str(small(tmp_path))), tmp_path / 'a' / file
    before = fingerprints(prepare(config, tok(), tmp_path / 'a'))
    content = path.read_bytes()
    if fault == 'gone': path.unlink()
    else: path.write_bytes(content[:len(content) // 2] if fault == 'half' else content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(DataError): load_prepared(tmp_path / 'a')
    repaired = prepare(config, tok(), tmp_path / 'a')
    assert not repaired.cached and fingerprints(repaired) == before and path.read_bytes() == content
    assert load_prepared(tmp_path / 'a').cached


def test_a_swapped_cache_is_found(tmp_path):
    prepare(make_config(data=str(small(tmp_path))), tok(), tmp_path / 'a')
    train, test = tmp_path / 'a' / 'train.safetensors', tmp_path / 'a' / 'test.safetensors'
    train.write_bytes(test.read_bytes())
    with pytest.raises(DataError, match='altered'): load_prepared(tmp_path / 'a')


@pytest.mark.parametrize('calls', [0, 3, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4))])
def test_a_crash_at_any_write_leaves_no_manifest(tmp_path, monkeypatch, calls):
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


def test_a_crash_while_repairing_removes_the_old_manifest(tmp_path, monkeypatch):
    config = make_config(data=str(small(tmp_path)))
    prepare(config, tok(), tmp_path / 'a')
    (tmp_path / 'a' / 'test.safetensors').unlink()
    def crash(*_): raise KeyboardInterrupt
    monkeypatch.setattr(folder_module, 'save_cache', crash)
    with pytest.raises(KeyboardInterrupt): prepare(config, tok(), tmp_path / 'a')
    assert not (tmp_path / 'a' / 'data.json').exists()


def test_a_torn_manifest_counts_as_none(tmp_path):
    config = make_config(data=str(small(tmp_path)))
    prepare(config, tok(), tmp_path / 'a')
    (tmp_path / 'a' / 'data.json').write_text('{"fingerprint": "ab')
    with pytest.raises(DataError, match='no prepared data'): load_prepared(tmp_path / 'a')
    assert not prepare(config, tok(), tmp_path / 'a').cached


def test_folders_of_older_runs_are_read(tmp_path):
    config, path = make_config(data=str(small(tmp_path))), tmp_path / 'a' / 'data.json'
    new = prepare(config, tok(), tmp_path / 'a')
    manifest = json.loads(path.read_text())
    manifest['layout'], manifest['seal'] = manifest.pop('dataset_format'), manifest.pop('checksums')
    path.write_text(json.dumps(manifest))
    old = prepare(config, tok(), tmp_path / 'a')
    assert old.cached and (old.dataset_format, fingerprints(old)) == (new.dataset_format, fingerprints(new))


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


# -- plain text ---------------------------------------------------------------------------------------------------------------------------

PEOPLE = ['Ada', 'Ben', 'Cleo', 'Dan', 'Eve']
THINGS = ['boiler', 'pump', 'valve', 'fan', 'meter']
PLACES = ['cellar', 'attic', 'hall', 'yard', 'shed']


def sentence(rng):
    return f'{rng.choice(PEOPLE)} checks the {rng.choice(THINGS)} in the {rng.choice(PLACES)} at {rng.randrange(24)} and writes {rng.randrange(10**6)} into the book.'


def texts(n, seed=0):
    rng = random.Random(seed)
    return [' '.join(sentence(rng) for _ in range(rng.randrange(1, 4))) for _ in range(n)]


def write(path, rows, column='text'):
    path.write_text(''.join(json.dumps({column: r}) + '\n' for r in rows), encoding='utf-8')
    return str(path)


def test_copies_go_and_near_copies_stay_together(tmp_path):
    rows = texts(80)
    similar = [r.replace('book.', 'large book.', 1) for r in rows[:20]]
    data = prepare(make_config(data=write(tmp_path / 'd.jsonl', rows + similar + rows[:5] + ['  ']), eval_fraction=0.3), tok(), tmp_path / 'p')
    assert data.rows['file'] == 106 and data.rows['cleaned'] == 100
    side = {row: part for part in ('train', 'validation', 'test') for row in getattr(data, part).rows.tolist()}
    assert all(side[i + 1] == side[80 + i + 1] for i in range(20))
    assert len(set(side.values())) == 3


def test_long_texts(tmp_path):
    path = write(tmp_path / 'd.jsonl', texts(40) + ['word ' * 600])
    with pytest.raises(DataError, match='1 of 41 rows are longer'): prepare(make_config(data=path), tok(), tmp_path / 'e')
    dropped, cut = (prepare(make_config(data=path, max_length=128, overlong_rows=how), tok(), tmp_path / how) for how in ('drop', 'truncate'))
    assert dropped.rows['tokenized'] == 40 and cut.rows['tokenized'] == 41
    parts = [(p, i) for p in (cut.train, cut.validation, cut.test) for i, row in enumerate(p.rows) if row == 41]
    ids, mask = parts[0][0].row(parts[0][1])
    assert ids.tolist() == encode_text([{'role': 'text', 'content': ('word ' * 600).strip()}], tok())[0][:128] and mask.all()


# -- bad input: one clear error, nothing written --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings, error, says', [
    (dict(), ConfigError, '--data FILE'),
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


# -- small files, files of near duplicates ------------------------------------------------------------------------------------------------

QUESTIONS = ['How do I reset my password?', 'Where is my parcel?', 'Can I pay by invoice?', 'What is the warranty on the pump?', 'Do you ship to Norway?',
             'My filter is broken.', 'The app crashes at start.', 'How long does delivery take?', 'Can I change my address?', 'Is the heater safe for children?',
             'Which hose fits the X200?', 'I want to return the shoes.', 'Do you have a shop in Bonn?', 'The light blinks red.', 'How do I descale it?',
             'Please cancel order 77.', 'Is there a student discount?', 'The manual is missing.', 'Who installs the boiler?']
WORDS = 'one two three four five six seven eight nine ten eleven twelve'.split()


def pairs(questions): return [dict(question=q, answer=f'Answer {i} to it.') for i, q in enumerate(questions)]
def classes(n): return [dict(text=q, label='ab'[i % 2]) for i, q in enumerate(QUESTIONS[:n])]
def from_one_sentence(n): return pairs([f'What is the capital of country number {WORDS[i % 12]}, and of its neighbour {i}?' for i in range(n)])


def jsonl(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    return str(path)


@pytest.mark.parametrize('rows, cause', [
    (pairs(QUESTIONS[:3]), 'too few rows'), (pairs(QUESTIONS[:5]), 'too few rows'), (classes(5), 'too few rows'), (from_one_sentence(5), 'near duplicates'),
    (from_one_sentence(12), 'near duplicates'), (from_one_sentence(19), 'near duplicates'), (pairs(QUESTIONS[:3] * 70), 'too few rows'),
], ids=str)
def test_the_advice_for_few_or_similar_rows_works_as_it_is_pasted(tmp_path, rows, cause):
    data = jsonl(tmp_path / 'a.jsonl', rows)
    with pytest.raises(DataError, match=cause) as e: prepare(make_config(data=data), tok(), tmp_path / 'a')
    options = [shlex.split(line)[1::2] for line in e.value.next_step.splitlines() if line.startswith('    --set')]
    assert options, str(e.value)
    for i, option in enumerate(options):
        made = prepare(load_config(overrides=option, data=data), tok(), tmp_path / f'b{i}')
        assert all(made.rows[part] for part in PARTS)
        prompts = [{tok().decode(ids[:-1]) for ids in [c.row(k)[0] for k in range(len(c))]} for c in (made.train, made.validation, made.test)]
        assert not prompts[0] & prompts[2] and not prompts[0] & prompts[1] and not prompts[1] & prompts[2]


@pytest.mark.parametrize('rows, cause, words', [
    (pairs(['Why?']) * 200, 'the rows ask the same', ['199 more rows are copies']),
    ([dict(question='Why?', answer=f'So {i}.') for i in range(200)], 'the rows ask the same', ['200 examples', '1 different questions']),
    ([dict(question=QUESTIONS[i % 2], answer=f'So {i}.') for i in range(200)], 'the rows ask the same', ['2 different questions']),
])
def test_no_setting_is_advised_where_none_helps(tmp_path, rows, cause, words):
    with pytest.raises(DataError, match=cause) as e: prepare(make_config(data=jsonl(tmp_path / 'a.jsonl', rows)), tok(), tmp_path / 'a')
    assert '--set' not in str(e.value) and 'add rows' in e.value.next_step
    for word in words: assert word in str(e.value)


def test_near_copies_beside_a_few_others(tmp_path):
    rows = from_one_sentence(195) + pairs(QUESTIONS[:5])
    made = prepare(make_config(data=jsonl(tmp_path / 'a.jsonl', rows)), tok(), tmp_path / 'a')
    assert all(made.rows[part] for part in PARTS)


@pytest.mark.parametrize('n', [12, 19])
def test_few_rows_are_used_and_the_report_says_what_they_cannot_show(tmp_path, n):
    for name, rows in dict(a=pairs(QUESTIONS[:n]), b=classes(n)).items():
        made = prepare(make_config(data=jsonl(tmp_path / f'{name}.jsonl', rows)), tok(), tmp_path / name)
        assert sum(made.rows[part] for part in PARTS) == n and 'too few to show a difference' in str(made.report[0])


def test_labels_that_are_answers(tmp_path):
    rows = [dict(text=q, label=f'Answer number {i}') for i, q in enumerate(QUESTIONS)]
    with pytest.raises(DataError, match='every label occurs only once') as e: prepare(make_config(data=jsonl(tmp_path / 'a.jsonl', rows)), tok(), tmp_path / 'a')
    assert 'rare_labels' not in str(e.value) and 'completion_column' in e.value.next_step


def test_near_duplicates_apart_keep_equal_questions_together(tmp_path):
    rows = from_one_sentence(30)
    rows += [dict(row, answer='Another answer.') for row in rows[:10]]
    made = prepare(make_config(data=jsonl(tmp_path / 'a.jsonl', rows), near_duplicates='apart', eval_fraction=0.4), tok(), tmp_path / 'a')
    side = {row: part for part in PARTS for row in getattr(made, part).rows.tolist()}
    assert all(side[i] == side[30 + i] for i in range(1, 11)) and len(set(side.values())) == 3


def test_cells_without_a_value_are_counted(tmp_path):
    rows = [dict(question=q, context=None if i % 3 else 'Our shop.', answer=float('nan') if i == 4 else 'So.') for i, q in enumerate(QUESTIONS)]
    made = prepare(make_config(data=jsonl(tmp_path / 'a.jsonl', rows)), tok(), tmp_path / 'a')
    assert ['without a value in context', 12, ''] in made.report[0].rows and ['without a value in answer', 1, ''] in made.report[0].rows
    learned = ' '.join(tok().decode(c.input_ids) for c in (made.train, made.validation, made.test)).lower()
    assert 'nan' not in learned and 'none' not in learned and made.rows['cleaned'] == 18


def test_judged_answers_left_out_are_counted(tmp_path):
    rows = [dict(prompt=q, completion=f'So {i}.', label=i % 4 > 0) for i, q in enumerate(QUESTIONS)]
    data = jsonl(tmp_path / 'a.jsonl', rows)
    with pytest.raises(DataError, match='KTO'): prepare(make_config(data=data), tok(), tmp_path / 'a')
    made = prepare(make_config(data=data, dataset_format='kto'), tok(), tmp_path / 'b')
    assert ['dropped: judged not good, or not judged', 5, ''] in made.report[0].rows and made.rows['cleaned'] == 14
    assert load_prepared(tmp_path / 'b').dataset_format.kind == 'kto'


# -- what is said first -------------------------------------------------------------------------------------------------------------------

def said(config):
    "What is said before the error, and the error."
    from homelab_ft.data.prepare import read_preview
    lines, error = [], None
    try: prepare(config, read_preview(config, lines.append).load_tokenizer(lines.append), '/nonexistent/folder')
    except HomelabError as e: error = e
    return '\n'.join(lines), error


@pytest.mark.parametrize('settings, error', [
    (dict(max_length=16), 'longer than max_length'), (dict(model='./nowhere'), 'no such model folder'), (dict(objective='dpo'), 'pairs of answers'),
    (dict(chat_template='/no/file.jinja'), 'chat_template'), (dict(max_rows=10, eval_fraction=0.01), 'no example can be held out'),
])
def test_what_is_learned_is_said_before_anything_fails(tmp_path, settings, error):
    rows = [dict(customer_message=q + ' Please tell me soon.' * 40, agent_reply=f'It is {i}.', category='ab'[i % 2], url=f'https://a.org/{i}') for i, q in enumerate(QUESTIONS)]
    settings = dict(max_length=1024) | settings
    text, e = said(make_config(data=jsonl(tmp_path / 'a.jsonl', rows), **settings))
    assert error in str(e)
    assert 'learns    `agent_reply` from `customer_message`' in text and 'left out  category, url' in text
    assert re.search('⟦It is 0.', text) and 'characters …]' in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize('objective, shown', [('sft', 'not learned from\n    Perhaps.'), ('dpo', '⟦Perhaps.')])
def test_both_answers_of_a_preference_are_shown(tmp_path, objective, shown):
    rows = [dict(prompt=q, chosen='Certainly.', rejected='Perhaps.') for q in QUESTIONS]
    from homelab_ft.data.prepare import read_preview
    lines = []
    read_preview(make_config(data=jsonl(tmp_path / 'a.jsonl', rows), objective=objective), lines.append).load_tokenizer(lines.append)
    text = '\n'.join(lines)
    assert '⟦Certainly.' in text and shown in text
    assert ('prefer `chosen` to `rejected`' if objective == 'dpo' else '`rejected` is not learned from') in text.replace('\n          ', ' ')


def test_what_a_person_chose_becomes_a_setting(tmp_path):
    from homelab_ft.data.prepare import read_preview
    data = jsonl(tmp_path / 'a.jsonl', [dict(english=q, german=q[::-1]) for q in QUESTIONS])
    preview = read_preview(make_config(data=data), lambda line: None, choose=lambda readings: readings[1])
    assert (preview.config.prompt_column, preview.config.completion_column) == ('german', 'english')
    made = prepare(preview.config, tok(), tmp_path / 'a', preview)
    assert made.fingerprint == prepare(make_config(data=data, prompt_column='german', completion_column='english'), tok(), tmp_path / 'b').fingerprint


@pytest.mark.parametrize('typed, chosen', [(['2'], 2), (['x', '9', '0', '1'], 1), ([''], None), ([], None)])
def test_a_person_at_a_terminal_is_asked(monkeypatch, capsys, typed, chosen):
    from homelab_ft.data.formats import DatasetFormat
    readings = [DatasetFormat('prompt_completion', prompt_column=a, completion_column=b) for a, b in ('xy', 'yx')]
    answers = iter(typed)
    def typing(prompt):
        "The next answer; the end of the input after the last."
        try: return next(answers)
        except StopIteration: raise EOFError from None
    monkeypatch.setattr('builtins.input', typing)
    assert module.ask_reading(readings) == (readings[chosen - 1] if chosen else None)
    out = capsys.readouterr().out
    assert '  1  learns `y` from `x`' in out
    if chosen == 2: assert '--set prompt_column=y --set completion_column=x' in out


@pytest.mark.parametrize('terminal', [(True, False), (False, True), (False, False)])
def test_nobody_is_asked_elsewhere(monkeypatch, terminal):
    import sys
    from types import SimpleNamespace
    for name, is_terminal in zip(('stdin', 'stdout'), terminal):
        monkeypatch.setattr(sys, name, SimpleNamespace(isatty=lambda is_terminal=is_terminal: is_terminal, write=lambda text: None, flush=lambda: None))
    assert module.person_to_ask() is None


# -- what keeps rows together --------------------------------------------------------------------------------------------------------------

TALK = 'How do I {} the {} before {}?'
VERBS, NOUNS, TIMES = 'clean repair open close paint sell'.split(), 'boiler pump valve fan meter'.split(), 'winter noon sunday'.split()


def questions(n): return [TALK.format(VERBS[i % 6], NOUNS[i // 6 % 5], TIMES[i // 30]) + f' {chr(97 + i % 26) * 9}{i * 7919}' for i in range(n)]


def test_three_system_prompts_are_no_families(tmp_path):
    systems = ['You are a careful clerk of a large shop, and you answer every question in one polite sentence without any list.',
               'Answer as a pirate who has sailed all the seven seas would, with many words about ships and about the weather.',
               'Return JSON only, and never write any text outside of the object that the program on the other side will parse.']
    rows = [dict(messages=[dict(role='system', content=systems[i % 3]), dict(role='user', content=q), dict(role='assistant', content=f'{i}.')])
            for i, q in enumerate(questions(60))]
    p = prepare(make_config(data=jsonl(tmp_path / 'a.jsonl', rows), max_length=2048), tok(), tmp_path / 'p')
    assert p.rows['validation'] + p.rows['test'] == 9


def test_a_shared_context_ties_nothing_but_a_group_column_does(tmp_path):
    contexts = [f'{t} The {VERBS[k]} manual of {k * 7919} has many pages, and on each of them a picture of a {NOUNS[k % 5]} in winter.' for k, t in enumerate('ABCDEF')]
    rows = [dict(question=q, context=contexts[i % 6], answer=f'It is {i}.', document=f'manual {i % 6}') for i, q in enumerate(questions(60))]
    path = jsonl(tmp_path / 'a.jsonl', rows)
    columns = dict(prompt_column='question', context_column='context', completion_column='answer', max_length=2048)
    free = prepare(make_config(data=path, **columns), tok(), tmp_path / 'free')
    tied = prepare(make_config(data=path, **columns, group_column='document', eval_fraction=0.4), tok(), tmp_path / 'tied')
    assert free.rows['validation'] + free.rows['test'] == 9 and free.fingerprint != tied.fingerprint
    documents = {part: {(row - 1) % 6 for row in getattr(tied, part).rows.tolist()} for part in PARTS}
    assert all(documents.values()) and sum(map(len, documents.values())) == 6


def test_a_group_of_the_test_file_leaves_training(tmp_path):
    rows = [dict(prompt=q, completion=f'It is {i}.', user=f'user {i % 15}') for i, q in enumerate(questions(60))]
    train, test = jsonl(tmp_path / 'a.jsonl', rows), jsonl(tmp_path / 'b.jsonl', [dict(prompt='Who is it?', completion='Me.', user='User 3')])
    p = prepare(make_config(data=train, test_data=test, group_column='user', max_length=2048), tok(), tmp_path / 'p')
    assert ['dropped: their group is in test_data', 4, ''] in p.report[0].rows
    assert not {row for part in ('train', 'validation') for row in getattr(p, part).rows.tolist() if (row - 1) % 15 == 3}


def test_an_unknown_group_column(tmp_path):
    with pytest.raises(DataError, match='group_column is not in the file'):
        prepare(make_config(data=jsonl(tmp_path / 'a.jsonl', [dict(prompt='a', completion='b')] * 20), group_column='customer'), tok(), tmp_path / 'p')


@pytest.mark.skipif(not BANKING.exists(), reason='needs the shared cases')
def test_repunctuated_copies_leave_training(tmp_path):
    cases = BANKING.parents[3] / 'cases' / 'data'
    config = make_config(data=str(cases / 'leak_train.csv'), test_data=str(cases / 'leak_test_punct.csv'))
    p = prepare(config, tok(), tmp_path / 'p')
    words = lambda row: re.findall('[a-z0-9]+', row['text'].lower())
    tested = {tuple(words(row)) for row in csv.DictReader(open(config.test_data, encoding='utf-8'))}
    train = list(csv.DictReader(open(config.data, encoding='utf-8')))
    left = {row for part in ('train', 'validation') for row in getattr(p, part).rows.tolist()}
    copies = {i for i, row in enumerate(train, 1) if tuple(words(row)) in tested}
    assert len(copies) >= 300 and not copies & left
    assert any(row[0] == 'dropped: almost the same in test_data' and row[1] >= 300 for row in p.report[0].rows)
    assert any('an accuracy of 80 % is certain to ± 5 points' in row[0] for row in p.report[0].rows)


def test_cleaning_settings_and_fingerprints(tmp_path):
    data = str(small(tmp_path))
    key = lambda **changes: module.input_fingerprint(make_config(data=data, **changes), tok())
    assert key() == key(clean_html='repair', html_in='prompts', clean_blank='drop')
    assert len({key(), key(clean_html='report'), key(html_in='both'), key(clean_duplicates='off'), key(group_column='label')}) == 5


def test_one_spelling_of_labels_in_both_files(tmp_path):
    train, test = small(tmp_path, 60, ('red', 'green')), small(tmp_path, 6, ('Red ', 'Green'), 'test.csv', 200)
    with open(train, 'a') as f: f.write('a lone word about nothing in particular,RED\n')
    p = prepare(make_config(data=str(train), test_data=str(test), clean_labels='repair'), tok(), tmp_path / 'p')
    assert p.labels == ['green', 'red']
