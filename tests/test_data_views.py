"data.views, data.stats, data.cleaned and their commands: nothing of a stranger reaches the terminal or the page, figures one can check, cleaned files that read the same."
import csv, html, io, json, random, re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.cli import main
from homelab_ft.config import make_config
from homelab_ft.data.chat_template import load_tokenizer
from homelab_ft.data.cleaned import clean_file, moved_span, save_cleaned
from homelab_ft.data.load import load_rows
from homelab_ft.data.sample.tickets import write_tickets
from homelab_ft.data.stats import bar, check_file, count_packed, describe_file, length_bins, open_data, padding_share, view_rows
from homelab_ft.data.views import GREEN, PLAIN, Part, RowView, char_width, mask_parts, parts_html, parts_lines, rows_page, show_controls, use_colour

TOK = load_tokenizer('embedded')
PARTS = st.lists(st.builds(Part, st.text(max_size=60).map(show_controls), st.booleans()), max_size=6)


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return str(path)


# ---------------------------------------------------------------- text of strangers


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_no_control_character_is_left(text):
    shown = show_controls(text)
    assert all(c == '\n' or c.isprintable() or c.isspace() and c not in '\r\t\x0b\x0c\x1c\x1d\x1e\x1f\x85' for c in shown)
    assert not re.search('[\u200b-\u200f\u202a-\u202e\u2066-\u2069\x00-\x09\x0b-\x1f\x7f-\x9f]', shown)


@given(PARTS)
@settings(max_examples=200, deadline=None)
def test_lines_fit_and_nothing_is_lost(parts):
    for colour in (False, True):
        lines = parts_lines(parts, colour)
        bare = [line.replace(GREEN, '').replace(PLAIN, '') for line in lines]
        assert all(sum(map(char_width, line)) <= 80 for line in bare)
        text = ''.join(p.text if colour or not p.has_loss else f'⟦{p.text}⟧' for p in parts)
        assert ''.join(''.join(bare).split()) == ''.join(text.split())
        assert all(line.count(GREEN) == line.count(PLAIN) for line in lines) and (colour or '\x1b' not in ''.join(lines))


@given(st.text(max_size=80), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_page_has_no_markup_of_the_data(text, has_loss):
    body = parts_html([Part(show_controls(text), has_loss)])
    inside = body.removeprefix('<mark>').removesuffix('</mark>') if has_loss else body
    assert html.unescape(inside) == show_controls(text) and '<' not in inside
    page = rows_page([RowView(1, [text], [(text, [Part(text, True)])], 1, 1, source=text)], text)
    assert set(re.findall(r'</?(\w+)', page)) <= set('html head meta title style body h1 h3 ul li p pre mark doctype'.split())


@pytest.mark.parametrize('terminal, env, expected', [(True, {}, True), (False, {}, False), (True, {'NO_COLOR': '1'}, False), (True, {'TERM': 'dumb'}, False)])
def test_colour_only_in_a_terminal(monkeypatch, terminal, env, expected):
    for name in ('NO_COLOR', 'TERM'): monkeypatch.delenv(name, raising=False)
    for name, value in env.items(): monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    assert bool(use_colour(stream)) == expected


def test_the_mask_is_that_of_the_cache(tmp_path):
    rows = [dict(prompt=f'What is {i} plus 1?', completion=f'It is {i + 1}.') for i in range(30)]
    [opened] = open_data(make_config(data=write(tmp_path / 'a.jsonl', rows)))
    [view] = view_rows(opened, [7])
    ids, mask = opened.source.tokenized.caches[0].row(6)
    assert (view.tokens, view.loss_tokens) == (len(ids), mask.sum())
    assert ''.join(p.text for p in view.sequences[0][1] if p.has_loss) == 'It is 7.<|eot_id|>'
    assert mask_parts(ids, mask, TOK) == view.sequences[0][1]


# ---------------------------------------------------------------- figures


@given(st.lists(st.integers(1, 64), min_size=1, max_size=80))
@settings(max_examples=100, deadline=None)
def test_packing_holds_everything(lengths):
    n = count_packed(lengths, 64)
    least = -(-sum(lengths) // 64)
    assert least <= n <= max(1, 1.5 * least + 1)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=80))
@settings(max_examples=100, deadline=None)
def test_every_row_is_in_one_bin(lengths):
    bins = length_bins(lengths)
    assert sum(b.rows for b in bins) == len(lengths) and len(bins) <= 13
    assert all(a.high < b.low for a, b in zip(bins, bins[1:]))
    assert bins[-1].high >= max(lengths) and bins[0].low <= min(lengths)
    assert all(len(bar(b.rows / len(lengths), 40)) <= 40 for b in bins)


def test_padding_by_hand():
    assert padding_share([4, 4, 8, 8], 4) == 1 - 24 / 32
    assert padding_share(np.arange(1, 100), 1) == 0


def test_stats_of_a_small_file(tmp_path):
    rows = [dict(text=f'Where is parcel {i * 31}?', label='post') for i in range(60)]
    rows += [dict(text=f'My code {i * 17} is lost', label='desk') for i in range(4)]
    [opened] = open_data(make_config(data=write(tmp_path / 'a.jsonl', rows), max_length=16))
    stats = describe_file(opened)
    assert stats.labels == dict(post=60, desk=4) and 'out of balance: post has 60 rows, desk 4' in stats.imbalance and '94%' in stats.imbalance
    lengths = opened.source.tokenized.caches[0].lengths
    assert (stats.shortest, stats.longest, stats.tokens) == (lengths.min(), lengths.max(), lengths.sum())
    assert stats.over_max_length == (lengths > 16).sum() > 0
    assert json.loads(json.dumps(stats.to_dict()))['labels'] == stats.labels
    check = check_file(opened)
    assert 'a run would refuse' in str(check) and '--max-length' in str(check)


def test_languages_are_counted(tmp_path):
    rows = [dict(prompt=f'Where is the parcel number {i * 37}, please?', completion=f'In room {i}.') for i in range(30)]
    rows += [dict(prompt=f'Где находится посылка номер {i * 41}?', completion=f'Там {i}.') for i in range(5)]
    [opened] = open_data(make_config(data=write(tmp_path / 'a.jsonl', rows)))
    stats = describe_file(opened)
    assert list(stats.languages.values())[:2] == [30, 5] and 'languages or scripts' in str(stats)


@pytest.mark.parametrize('overlong, word', [('error', 'refuse'), ('drop', 'left out'), ('truncate', 'lose their end')])
def test_the_check_says_what_a_run_does(tmp_path, overlong, word):
    rows = [dict(prompt=f'Question {i * 7}', completion='word ' * (200 if i < 5 else 3) + str(i)) for i in range(60)]
    [opened] = open_data(make_config(data=write(tmp_path / 'a.jsonl', rows), max_length=64, overlong_rows=overlong))
    assert word in ' '.join(str(check_file(opened)).split())


# ---------------------------------------------------------------- cleaned files


@given(st.text('ab &', max_size=20), st.text('ab ', min_size=1, max_size=20), st.text('ab', max_size=20), st.text('xy', max_size=10))
@settings(max_examples=200, deadline=None)
def test_a_cell_finds_its_place_again(before, cell, after, repaired):
    "A change outside the cell leaves it; a cell that is changed alone is the change."
    old = f'subject: {before}\nbody: {cell}\n{after}'
    start = len(f'subject: {before}\nbody: ')
    assert moved_span(old, old, start, start + len(cell)) == cell
    assert moved_span(old, f'subject: {repaired}\nbody: {cell}\n{after}', start, start + len(cell)) == cell
    if not set(repaired) & set(old): assert moved_span(old, old[:start] + repaired + old[start + len(cell):], start, start + len(cell)) == repaired


@pytest.mark.parametrize('ending', ['.csv', '.jsonl', '.json', '.tsv', '.parquet'])
def test_a_cleaned_file_reads_as_the_clean_rows(tmp_path, ending):
    "Rows in = rows kept + rows removed; reading the new file gives the examples that cleaning left, and nothing more to repair."
    tickets, _ = write_tickets(tmp_path)
    config = make_config(data=str(tickets), max_rows=300)
    [opened] = open_data(config)
    out = tmp_path / f'clean{ending}'
    cleaned = save_cleaned(opened, out)
    removed = [json.loads(line) for line in (tmp_path / 'clean.removed.jsonl').read_text().splitlines()]
    rows = load_rows(out)
    assert len(rows) + len(removed) == 300 and len(rows) == len(cleaned.rows) and not cleaned.unwritten
    assert all(record['reasons'] and record['data'] for record in removed)
    [again] = open_data(config.model_copy(update=dict(data=str(out), max_rows=None)))
    words = lambda examples: [(' '.join(e.prompt.split()), e.answer) for e in examples]
    assert words(again.source.examples) == words(opened.source.examples)
    assert [clean_file(again).changed, clean_file(again).removed] == [[], []]


@pytest.mark.parametrize('as_text', [False, True])
def test_conversations_keep_their_form(tmp_path, as_text):
    talk = lambda text: [{'from': 'human', 'value': text}, {'from': 'gpt', 'value': 'Yes.'}]
    rows = [dict(id=i, conversations=talk(f'Is shelf {i * 37} &amp; box {i} full?' if i == 5 else f'Is shelf {i * 37} full?')) for i in range(30)]
    if as_text: rows = [dict(row, conversations=json.dumps(row['conversations'])) for row in rows]
    [opened] = open_data(make_config(data=write(tmp_path / 'a.jsonl', rows)))
    cleaned = clean_file(opened)
    mended = cleaned.rows[5]['conversations']
    assert (json.loads(mended) if as_text else mended) == talk('Is shelf 185 & box 5 full?')
    assert [row for row in cleaned.rows if row['id'] != 5] == [row for row in rows if row['id'] != 5] and cleaned.changed == [6]


# ---------------------------------------------------------------- commands


def test_commands_refuse_with_a_next_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [dict(prompt=f'What is {i * 3}?', completion=f'It is {i}.') for i in range(40)]
    write(tmp_path / 'a.jsonl', rows)
    for argv, words in [
        (['data', 'show', 'a.jsonl', '--rows', '0'], '--rows 1,5,8-10'),
        (['data', 'show', 'a.jsonl', '--rows', '41'], '1 to 40'),
        (['data', 'clean', 'a.jsonl', '--out', 'b.pdf'], '--out b.jsonl'),
        (['data', 'clean', 'a.jsonl', 'a.jsonl', '--out', 'b.csv'], 'one file'),
        (['data', 'check', 'nothing.csv'], 'no such file'),
        (['data', 'stats'], '--data FILE'),
    ]:
        assert main(argv) == 2, argv
        assert words in capsys.readouterr().err, argv
    assert main(['data', 'show', 'a.jsonl', '--html', 'a.html', '--random', '2']) == 0
    assert (tmp_path / 'a.html').read_text().count('<pre>') == 2
    assert main(['data', 'show', 'a.jsonl', '--html', 'a.html']) == 2


def test_a_file_that_a_run_would_refuse_ends_with_2(tmp_path, capsys):
    same = write(tmp_path / 'same.jsonl', [dict(prompt='Where?', completion=f'In room {i}.') for i in range(20)])
    assert main(['data', 'check', same]) == 2
    assert 'problem' in capsys.readouterr().out
    assert main(['data', 'check', same, '--json']) == 2
    assert json.loads(capsys.readouterr().out)['usable'] is False


def test_json_of_several_files(tmp_path, capsys):
    files = [write(tmp_path / f'{name}.jsonl', [dict(prompt=f'{name} {i * 3}?', completion=f'It is {i}.') for i in range(40)]) for name in 'ab']
    assert main(['data', 'stats', *files, '--json']) == 0
    assert [record['name'] for record in json.loads(capsys.readouterr().out)] == ['a.jsonl', 'b.jsonl']


def test_rows_of_a_csv_are_shown_by_their_number(tmp_path, capsys):
    path, rng = tmp_path / 'a.csv', random.Random(0)
    with open(path, 'w', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(['question', 'answer'])
        for i in range(40): rows.writerow([f'Case {i} of {rng.random()}?', f'Desk {i}.'])
    assert main(['data', 'show', str(path), '--rows', '3,40']) == 0
    shown = capsys.readouterr().out
    assert 'row 3:' in shown and 'Desk 2.' in shown and 'Desk 39.' in shown and '\x1b' not in shown
