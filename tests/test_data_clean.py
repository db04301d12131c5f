"data.clean: injected noise is found, code and fine text are left alone, ten thousand rows take seconds."
import time
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.config import CleaningSettings
from homelab_ft.core import DataError, Example
from homelab_ft.data.clean import clean, fix_mojibake, strip_html
from homelab_ft.data.formats import detect_format, to_examples
from homelab_ft.data.load import load_rows
from homelab_ft.data.sample.tickets import injected_noise, make_tickets

SHARED = Path(__file__).resolve().parent.parent.parent / 'shared' / 'data'
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason='the shared data are not here')
any_text = st.text(st.characters(exclude_categories=['Cs']), max_size=40)


def example(prompt, answer='x', label=None, row=0): return Example([{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': answer}], label, row)


def tickets(n=1200, seed=0):
    rows = make_tickets(n, seed)
    return to_examples(rows, detect_format(rows))


# ---------------------------------------------------------------- text repairs

CODE = ['<|eot_id|>', '<|start_header_id|>user<|end_header_id|>', 'List<String> names', 'std::vector<int> v', 'Map<String, List<P>> m', 'Optional<T>',
        'Box<b>', 'if a <b and c> d', 'x < 3 && y > 2', '1 << 4 >> 2', 'I <3 you', 'a<i and i>b', '<Button onClick={go}>', '<your name>', '<user@example.com>',
        '<https://example.com>', '<<48/2=24>>24', '&foo;', 'https://e.com/?a=1&copy=2&lt=3', 'R&D', 'AT&T', 'p <- c(1, 2)', '</thought>', '<think>so</think>']


@pytest.mark.parametrize('text', CODE)
def test_code_is_left_alone(text): assert strip_html(text) == text


@pytest.mark.parametrize('dirty, fine', [
    ('<p>One</p><p>Two</p>', 'One\nTwo'), ('a<br>b<br/>c<BR />d', 'a\nb\nc\nd'), ('<b>bold</b> <I>it</I>', 'bold it'),
    ('<div class="mail" id=x>Hi</div>', 'Hi'), ('<a href="https://e.com/?a=1&b=2">link</a>', 'link'), ('R&amp;D &lt;3&nbsp;you', 'R&D <3 you'),
    ('&#8217;&#x2019;', '’’'), ('<td>1</td><td>2</td>', '12'), ('word<span style="x">s</span>', 'words'), ('&lt;p&gt;twice&lt;/p&gt;', 'twice'),
    ('<p>x &lt; y</p>', 'x < y')])
def test_remnants_go(dirty, fine): assert strip_html(dirty) == fine


@settings(max_examples=200, deadline=None)
@given(any_text)
def test_text_without_marks_is_untouched(text):
    if not set(text) & set('<&'): assert strip_html(text) is text


@settings(max_examples=100, deadline=None)
@given(st.text('abcdefghij äöüéñß', min_size=1))
def test_good_text_has_no_mojibake(text): assert fix_mojibake(text) == text


@pytest.mark.parametrize('text', ['It’s', 'Zoë – José', 'naïve café', '“quoted” text…', 'Übergröße'])
def test_mojibake_is_undone(text):
    broken = text.encode('utf-8').decode('cp1252', errors='replace')
    if '\ufffd' not in broken: assert fix_mojibake(broken) == text


@pytest.mark.parametrize('messages', [('Write a list in HTML', '<ul><li>a</li></ul>'), ('Fix this', '```\n<p>x</p>\n```'), ('A page', '<!DOCTYPE html><p>x</p>'),
                                      ('A button in JSX', '<b>x</b>')])
def test_rows_about_code_keep_their_tags(messages):
    kept, report = clean([example(*messages, row=1)])
    assert kept[0].answer == messages[1] and report.rows('html') == []


# ---------------------------------------------------------------- the whole cleaning

@pytest.mark.parametrize('seed', range(2))
def test_injected_noise_is_found_row_by_row(seed):
    truth = injected_noise(1200, seed)
    kept, report = clean(tickets(seed=seed))
    for kind in ('mojibake', 'html', 'blank', 'conflict', 'duplicate'): assert report.rows(kind) == truth[kind], kind
    found = report.rows('near_duplicate')
    assert set(truth['near_duplicate']) <= set(found) and len(found) - len(truth['near_duplicate']) < 12
    assert report.rows_out == len(kept) == len(report.groups) == 1200 - sum(len(truth[k]) for k in ('blank', 'conflict', 'duplicate'))
    assert not set(e.row for e in kept) & set(truth['blank'] + truth['conflict'] + truth['duplicate'])


def test_given_examples_are_not_changed():
    examples = tickets(300)
    before = deepcopy(examples)
    clean(examples)
    assert examples == before


def test_cleaning_twice_finds_nothing():
    kept, report = clean(tickets())
    again, second = clean(kept)
    assert again == kept and second.groups == report.groups
    assert [r for r in second.to_records() if r['action'] in ('changed', 'dropped')] == []


def test_rows_are_counted_once_per_kind():
    rows = [example('<p>Ã©</p> <b>Ã©</b>', '<i>Ã©</i>', row=1)] + [example('same', 'b', row=i) for i in (2, 3, 4)]
    _, report = clean(rows)
    assert (report.rows('mojibake'), report.rows('html'), report.rows('duplicate')) == ([1], [1], [3, 4])


def test_html_that_hides_a_blank_or_a_duplicate():
    kept, report = clean([example('<br>&nbsp;', row=1), example('<p>Hi</p>', row=2), example('hi', row=3)])
    assert ([e.row for e in kept], report.rows('blank'), report.rows('duplicate')) == ([2], [1], [3])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['p', 'q', 'P ']), st.sampled_from(['a', 'b', 'c'])), min_size=1, max_size=12))
def test_conflicts_follow_the_strict_majority(pairs):
    examples = [example(p, l, l, i) for i, (p, l) in enumerate(pairs, 1)]
    expected = set()
    for prompt in ('p', 'q'):
        labels = [l for p, l in pairs if p.strip().lower() == prompt]
        expected |= {(prompt, l) for l in set(labels) if 2 * labels.count(l) > len(labels)}
    if not expected:
        with pytest.raises(DataError, match='no example is left'): clean(examples)
    else:
        kept, _ = clean(examples)
        assert {(e.prompt.strip().lower(), e.label) for e in kept} == expected and len(kept) == len(expected)


def test_answers_may_differ_where_there_are_no_classes():
    kept, report = clean([example('Tell a joke', 'one', row=1), example('Tell a joke', 'two', row=2)])
    assert len(kept) == 2 and report.rows('conflict') == [] and list(report.groups.values()) == [0, 0]


def test_a_system_prompt_is_no_question():
    messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': ' '}, {'role': 'assistant', 'content': 'a'}]
    with pytest.raises(DataError, match='1 blank'): clean([Example(messages, row=1)])


def test_report_shows_rows_and_escapes():
    report = clean(tickets())[1]
    assert '48' in str(report) and 'Cleaning: 1200 rows in, 1128 out' in str(report)
    assert '<table' in report._repr_html_()
    

@pytest.mark.slow
def test_ten_thousand_rows_take_seconds():
    kept = clean(tickets())[0]
    many = [example(f'{e.prompt} {i * 7919} {e.answer} {i}', e.answer, e.label, i) for i in range(9) for e in kept]
    started = time.perf_counter()
    clean(many)
    assert time.perf_counter() - started < 60      # seconds on an idle machine


@needs_shared
def test_banking77():
    rows = load_rows(SHARED / 'classify' / 'banking77' / 'train.csv')
    kept, report = clean(to_examples(rows, detect_format(rows)))
    assert (len(kept), report.rows('html'), report.rows('mojibake'), report.rows('blank')) == (9999, [], [], [])
    assert 1000 < len(report.rows('near_duplicate')) < 2200      # most of them: one word differs
    assert len(report.rows('near_conflict')) <= 0.01 * len(rows)


@needs_shared
@pytest.mark.slow
def test_gsm8k_is_left_alone():
    rows = load_rows(SHARED / 'instruct' / 'gsm8k' / 'train.jsonl')
    examples = to_examples(rows, detect_format(rows))
    kept, report = clean(examples)
    assert [new.row for new, old in zip(kept, examples, strict=True) if new != old] == report.rows('zero_width') == [7389]


# ---------------------------------------------------------------- settings

FAULTS = dict(      # setting -> a prompt with its fault, and the prompt as repaired
    clean_mojibake=('Itâ€™s late', 'It’s late'), clean_invisible=('la\u200bte', 'late'), clean_html=('<b>late</b>', 'late'),
    clean_scripts=('late<script>x()</script>', 'late'), clean_homoglyphs=('l\u0430te again', 'late again'),
    clean_personal_data=('ask ann@mail.org', 'ask [email]'), clean_secrets=('use ghp_' + 'aB3dE6gH9' * 4, 'use [github token]'))


@pytest.mark.parametrize('setting', FAULTS)
@pytest.mark.parametrize('mode', ['repair', 'report', 'off'])
def test_every_repair_has_three_values(setting, mode):
    dirty, fine = FAULTS[setting]
    kept, report = clean([example(dirty, 'ok', row=1), example('Another one', 'ok', row=2)], CleaningSettings(**{setting: mode}))
    assert kept[0].prompt == (fine if mode == 'repair' else dirty)
    records = [r for r in report.to_records() if r['row'] == 1]
    assert [r['action'] for r in records] == {'repair': ['changed'], 'report': ['reported'], 'off': []}[mode]
    assert all(r['before'] != r['after'] and r['reason'] for r in records)


DROPPED = dict(
    clean_blank=[example('', 'a', row=1)], clean_duplicates=[example('x y', 'a', row=1), example('X y', 'a', row=9)],
    clean_conflicts=[example('x', 'a', 'a', 1), example('x', 'b', 'b', 9)], clean_empty_answers=[example('Why?', 'N/A', row=1)],
    clean_broken_characters=[example('caf\ufffd', 'a', row=1)], clean_gibberish=[example('no ' * 30, 'a', row=1)],
    clean_near_conflicts=[example('Is it here?', 'a', 'a', 1), example('is it here', 'b', 'b', 9)])


@pytest.mark.parametrize('setting', DROPPED)
@pytest.mark.parametrize('mode', ['drop', 'report', 'off'])
def test_every_check_has_three_values(setting, mode):
    rest = [example('Something else entirely', 'well', row=50)]
    off = {name: 'off' for name in DROPPED if name != setting}
    kept, report = clean([*DROPPED[setting], *rest], CleaningSettings(**(off | {setting: mode})))
    rows = {e.row for e in DROPPED[setting]}
    gone = rows - {e.row for e in kept}
    named = [r for r in report.to_records() if r['row'] in rows and r['action'] != 'grouped']
    assert bool(gone) == (mode == 'drop') and bool(named) == (mode != 'off')
    assert {r['row'] for r in report.removed()} == gone and report.rows_out == len(kept)


@pytest.mark.parametrize('html_in, prompt, answer', [('prompts', 'Hi', '<p>Ho</p>'), ('answers', '<p>Hi</p>', 'Ho'), ('both', 'Hi', 'Ho')])
def test_html_is_changed_where_it_is_asked(html_in, prompt, answer):
    kept, report = clean([example('<p>Hi</p>', '<p>Ho</p>', row=1)], CleaningSettings(html_in=html_in))
    assert (kept[0].prompt, kept[0].answer) == (prompt, answer)
    assert report.rows('html_in_answers') == ([1] if html_in == 'prompts' else [])


def test_entities_in_the_programs_of_answers():
    code = 'def f(a, b):\n    if a &lt; b:\n        return a\n\n    return b'
    for html_in, answer in (('prompts', code), ('both', code.replace('&lt;', '<'))):
        assert clean([example('Compare two numbers', code, row=1)], CleaningSettings(html_in=html_in))[0][0].answer == answer


def test_what_a_tool_returned_and_a_rejected_message():
    messages = [dict(role='user', content='Look'), dict(role='tool', content='<p>page</p>'), dict(role='assistant', content='It says <b>page</b>.')]
    e = Example(messages, row=1, rejected='No <i>way</i>', rejected_message=dict(role='assistant', content='No <i>way</i>', reasoning_content='hm'))
    [same], _ = clean([e])
    assert same == e
    [new], _ = clean([e], CleaningSettings(html_in='answers'))
    assert [m['content'] for m in new.messages] == ['Look', '<p>page</p>', 'It says page.'] and new.rejected == 'No way'
    assert new.rejected_message == dict(role='assistant', content='No way', reasoning_content='hm')


def test_no_record_holds_a_whole_secret():
    secret = 'sk-proj-' + 'aB3dE6gH9' * 4
    rows = [example(f'<p>My key {secret} is lost</p>', f'{secret}', row=1), example(f'<p>My key {secret} is lost</p>', f'{secret}', row=2)]
    _, report = clean(rows)
    assert report.rows('secret') == [1, 2] and secret[12:] not in str(report.to_records()) and secret[12:] not in str(report.examples_table())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs']), max_size=60), min_size=1, max_size=8))
def test_nothing_changes_that_is_not_reported(texts):
    examples = [example(text, 'fine words', row=i) for i, text in enumerate(texts, 1)]
    try: kept, report = clean(examples, CleaningSettings(clean_scripts='repair', clean_homoglyphs='repair', html_in='both'))
    except DataError: return
    changed = {r['row'] for r in report.to_records() if r['action'] == 'changed'}
    assert {new.row for new in kept if new != examples[new.row - 1]} <= changed
    assert {e.row for e in examples} == {e.row for e in kept} | {r['row'] for r in report.removed()}
