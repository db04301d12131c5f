"data.decisions, data.browse and ui.dataset_browser: what a person decides is what a run does, for the rows it was decided on and no others."
import json
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.config import RunConfig, make_config
from homelab_ft.core import ConfigError, DataError, Example
from homelab_ft.data.browse import mark_changes
from homelab_ft.data.chat_template import load_tokenizer
from homelab_ft.data.clean import clean
from homelab_ft.data.decisions import Decision, clean_as_decided, load_decisions, row_key, save_decisions
from homelab_ft.data.prepare import input_fingerprint, prepare
from homelab_ft.data.stats import open_data
from homelab_ft.ui.dataset_browser import dataset_browser

TOK = load_tokenizer('embedded')


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return str(path)


@pytest.fixture
def messy(tmp_path):
    "Rows with a tag, a copy, a near copy, a blank answer and an e-mail address."
    rows = [dict(prompt=f'Where is parcel {i * 37}, which I sent on day {i}?', completion=f'In room {i}.') for i in range(1, 40)]
    rows[4]['prompt'] = 'The lamp in our kitchen flickers whenever the kettle boils water; is the fuse too weak for both of them?'
    rows += [
        dict(prompt='Is &lt;p&gt; a tag, and <i>this</i> &amp; that one too?', completion='Yes.'),      # 40
        dict(rows[0]),                                                                                    # 41
        dict(prompt='Anything else?', completion=''),                                                     # 42
        dict(prompt='My address is ada@example.org, is it right?', completion='It is.'),                  # 43
        dict(prompt=rows[4]['prompt'].replace('kettle', 'toaster'), completion='In room 5.'),   # 44
    ]
    return write(tmp_path / 'messy.jsonl', rows)


def examples_of(path, decisions=None):
    "What training would see, by row."
    [opened] = open_data(make_config(data=path, decisions=decisions and str(decisions)))
    return {e.row: e for e in opened.source.examples}


def decided(path, folder, *choices):
    "A file of decisions, made with the widget: (kind, row, button)."
    browser = dataset_browser(path, folder / 'decisions.yaml')
    for kind, row, button in choices:
        browser.kind.value = kind
        browser.go([change.row for change in browser.changes].index(row))
        browser.buttons[button].click()
    return browser, folder / 'decisions.yaml'


# ---------------------------------------------------------------- decisions


def test_without_decisions_nothing_is_different(messy, tmp_path):
    _, path = decided(messy, tmp_path, ('html', 40, 'accept'), ('html', 40, 'undo'))
    assert load_decisions(path) == []
    assert examples_of(messy, path) == examples_of(messy)


@pytest.mark.parametrize('kind, row, button, check', [
    ('html', 40, 'reject', lambda e: '<i>this</i> &amp; that' in e[40].prompt),
    ('html', 40, 'accept', lambda e: 'this & that' in e[40].prompt),
    ('duplicate', 41, 'reject', lambda e: 41 in e),
    ('duplicate', 41, 'accept', lambda e: 41 not in e),
    ('blank', 42, 'accept', lambda e: 42 not in e),
    ('personal_data', 43, 'accept', lambda e: 'ada@example.org' not in e[43].prompt and 43 in e),
    ('personal_data', 43, 'reject', lambda e: 'ada@example.org' in e[43].prompt),
    ('near_duplicate', 44, 'accept', lambda e: 44 not in e and 5 in e),
    ('near_duplicate', 44, 'reject', lambda e: 44 in e and 5 in e),
])
def test_what_was_decided_is_what_is_trained_on(messy, tmp_path, kind, row, button, check):
    _, path = decided(messy, tmp_path, (kind, row, button))
    before, after = examples_of(messy), examples_of(messy, path)
    assert check(after)
    assert {r: e for r, e in before.items() if r != row} == {r: e for r, e in after.items() if r != row}


def test_a_kept_copy_stays_on_the_side_of_its_original(messy, tmp_path):
    _, path = decided(messy, tmp_path, ('duplicate', 41, 'reject'))
    for seed in range(4):
        prepared = prepare(make_config(data=messy, decisions=str(path), seed=seed), TOK, tmp_path / str(seed))
        parts = [set(cache.rows.tolist()) for cache in (prepared.train, prepared.validation, prepared.test)]
        assert any({1, 41} <= part for part in parts)


def test_the_fingerprint_knows_the_decisions(messy, tmp_path):
    plain = input_fingerprint(make_config(data=messy), TOK)
    browser, path = decided(messy, tmp_path, ('html', 40, 'reject'))
    rejected = input_fingerprint(make_config(data=messy, decisions=str(path)), TOK)
    browser.kind.value = 'html'
    browser.buttons['accept'].click()
    assert len({plain, rejected, input_fingerprint(make_config(data=messy, decisions=str(path)), TOK)}) == 3


def test_decisions_for_another_file_are_refused_or_reported(messy, tmp_path):
    _, path = decided(messy, tmp_path, ('html', 40, 'reject'), ('blank', 42, 'accept'))
    other = write(tmp_path / 'other.jsonl', [dict(prompt=f'What is {i * 3}?', completion=f'It is {i}.') for i in range(50)])
    with pytest.raises(DataError, match='another file'): prepare(make_config(data=other, decisions=str(path)), TOK, tmp_path / 'p')
    rows = [json.loads(line) for line in open(messy)]
    rows[39]['prompt'] = 'Is <b>it</b> new?'
    changed = write(tmp_path / 'changed.jsonl', rows)
    [opened] = open_data(make_config(data=changed, decisions=str(path)))
    assert opened.source.cleaning.rows('stale_decision') == [40]
    assert '<b>' not in next(e for e in opened.source.examples if e.row == 40).prompt
    assert 'earlier decisions are about another text' in dataset_browser(changed, path).message.value


@pytest.mark.parametrize('text', ['', 'decisions: 5', '- 1', 'decisions: [{row: 1}]', 'decisions: [5]', 'a: [', 'decisions: [{row: true, kind: a, decision: accept, text: b}]'])
def test_a_broken_file_of_decisions_is_refused(messy, tmp_path, text):
    (tmp_path / 'd.yaml').write_text(text)
    with pytest.raises(DataError): open_data(make_config(data=messy, decisions=str(tmp_path / 'd.yaml')))


def test_a_missing_file_of_decisions_is_refused(messy, tmp_path):
    with pytest.raises(DataError, match='cannot be read'): prepare(make_config(data=messy, decisions='nowhere.yaml'), TOK, tmp_path / 'p')


def test_decisions_belong_to_one_file(messy):
    with pytest.raises(ConfigError, match='one file'): make_config(data=[messy, messy], decisions='d.yaml')
    assert make_config(data=[dict(path=messy, decisions='d.yaml'), messy]).data[0].settings == {'decisions': 'd.yaml'}


@given(st.lists(st.tuples(st.integers(1, 23), st.sampled_from(['html', 'duplicate', 'blank', 'near_duplicate', 'mojibake']), st.sampled_from(['accept', 'reject'])), max_size=8))
@settings(max_examples=40, deadline=None)
def test_any_decisions_account_for_every_row(tmp_path_factory, choices):
    "Rows that remain are those of the settings, plus the rejected drops, minus the accepted ones; a row nobody decided on is untouched."
    def talk(row, question, answer): return Example([dict(role='user', content=question), dict(role='assistant', content=answer)], row=row)
    examples = [talk(i, f'Where is parcel {i * 37}?', f'In room {i}.') for i in range(1, 21)]
    examples += [talk(21, 'A <b>bold</b> &amp; good one', 'Fine.'), talk(22, 'Where is parcel 37?', 'In room 1.'), talk(23, '', 'x')]
    keys = {e.row: row_key(e) for e in examples}
    path = tmp_path_factory.getbasetemp() / 'any.yaml'
    unique = {(row, kind): Decision(row, kind, decision, keys[row]) for row, kind, decision in choices}
    save_decisions([*unique.values()], path)
    plain, found = clean(examples, RunConfig())
    result, report = clean_as_decided(examples, RunConfig(decisions=str(path)))
    decided_rows = {d.row for d in unique.values()}
    expected = {e.row: e for e in plain}
    assert {e.row: e for e in result if e.row not in decided_rows} == {r: e for r, e in expected.items() if r not in decided_rows}
    assert set(report.groups) == {e.row for e in result} and report.rows_out == len(result)
    for (row, kind), d in unique.items():
        if d.decision == 'reject' and row in found.rows(kind) and not any(o.decision == 'accept' for (r, _), o in unique.items() if r == row):
            assert row in {e.row for e in result}


# ---------------------------------------------------------------- widget


def test_every_finding_has_a_page_of_its_own(messy, tmp_path):
    browser = dataset_browser(messy, None)
    for kind, changes in browser.findings.kinds.items():
        browser.kind.value = kind
        for i, change in enumerate(changes):
            assert f'row {change.row}' in browser.view.value and f'{i + 1} of {len(changes)}' == browser.place.value
            browser.buttons['next'].click()
        assert browser.buttons['next'].disabled


def test_duplicates_stand_side_by_side(messy, tmp_path):
    browser = dataset_browser(messy, None)
    for kind, row, twin in (('duplicate', 41, 1), ('near_duplicate', 44, 5)):
        browser.kind.value = kind
        browser.go([change.row for change in browser.changes].index(row))
        assert f'<h4>row {row}</h4>' in browser.view.value and f'<h4>row {twin}</h4>' in browser.view.value


def test_all_of_a_kind_and_back(messy, tmp_path):
    browser, path = decided(messy, tmp_path, ('near_duplicate', 44, 'accept all'))
    assert len(load_decisions(path)) == len(browser.findings.kinds['near_duplicate'])
    browser.buttons['undo all'].click()
    assert load_decisions(path) == []


def test_a_folder_that_cannot_be_written_is_a_message(messy, tmp_path):
    (tmp_path / 'file').write_text('x')
    browser = dataset_browser(messy, tmp_path / 'file' / 'decisions.yaml')
    browser.buttons['accept'].click()
    assert '<pre>' in browser.message.value


class Tags(HTMLParser):
    "Every tag of a page."
    def __init__(self):
        super().__init__()
        self.tags = set()

    def handle_starttag(self, tag, attrs): self.tags.add(tag)


@pytest.mark.parametrize('text', ['<script>alert(1)</script>', '<img src=x onerror=y>', '\x1b]0;title\x07', '"><svg onload=z>'])
def test_what_a_row_says_is_never_markup(tmp_path, text):
    rows = [dict(prompt=f'{text} where is {i * 31}? &amp;', completion=f'{text} {i}') for i in range(30)] + [dict(prompt=f'{text} where is 31? &amp;', completion=f'{text} 1')]
    browser = dataset_browser(write(tmp_path / 'a.jsonl', rows), tmp_path / 'd.yaml')
    parser = Tags()
    for kind, changes in browser.findings.kinds.items():
        browser.kind.value = kind
        parser.feed(browser._repr_mimebundle_()['text/html'])
    assert browser.findings.kinds and parser.tags <= set('div span b p h3 h4 pre mark del ins style'.split())
    assert '\x1b' not in browser.view.value


@given(st.text(max_size=30), st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_marked_texts_are_the_texts(old, new):
    from html import unescape
    from homelab_ft.data.views import show_controls
    for text, marked, tag in zip((old, new), mark_changes(old, new), ('del', 'ins')):
        assert unescape(marked.replace(f'<{tag}>', '').replace(f'</{tag}>', '')) == ''.join(map(show_controls, text)) or '\r\n' in text


def test_a_browser_for_two_files_is_refused(messy):
    with pytest.raises(ConfigError, match='one file'): dataset_browser(make_config(data=[messy, messy]))
