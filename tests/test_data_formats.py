"data.formats: the format is detected from the columns or taken from the settings; every format gives the same kind of example."
import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.config import make_config
from homelab_ft.core import DataError
from homelab_ft.data.formats import DatasetFormat, detect_format, to_examples
from homelab_ft.data.load import load_rows

SHARED = Path(__file__).resolve().parent.parent.parent / 'shared' / 'data'
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason='the shared data are not here')
texts = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\r\x00'), max_size=30)


@pytest.mark.parametrize('row, kind, columns', [
    ({'messages': [{'role': 'user', 'content': 'a'}]}, 'conversational', {'messages_column': 'messages'}),
    ({'id': '1', 'conversations': [{'from': 'human', 'value': 'a'}]}, 'conversational', {'messages_column': 'conversations'}),
    ({'instruction': 'a', 'input': '', 'output': 'b'}, 'instruction', {'prompt_column': 'instruction', 'completion_column': 'output', 'input_column': 'input'}),
    ({'instruction': 'a', 'context': '', 'response': 'b', 'category': 'c'}, 'instruction', {'completion_column': 'response', 'left_out': ['category']}),
    ({'Question': 'a', 'Answer': 'b'}, 'prompt_completion', {'prompt_column': 'Question', 'completion_column': 'Answer'}),
    ({'prompt': 'a', 'completion': 'b'}, 'prompt_completion', {'prompt_column': 'prompt', 'completion_column': 'completion'}),
    ({'text': 'a', 'category': 'b'}, 'classification', {'text_columns': ['text'], 'label_column': 'category'}),
    ({'': '', 'review': 'a', 'label': 1}, 'classification', {'text_columns': ['review'], 'label_column': 'label'})])
def test_detection(row, kind, columns):
    dataset_format = detect_format([row])
    assert dataset_format.kind == kind
    for name, value in columns.items(): assert getattr(dataset_format, name) == value


def test_class_by_repetition_only_if_there_is_one():
    rows = [{'note': f'note {i}', 'queue': 'ab'[i % 2], 'floor': 'xy'[i % 2]} for i in range(12)]
    with pytest.raises(DataError, match='cannot be detected'): detect_format(rows)
    assert detect_format([{k: r[k] for k in ('note', 'queue')} for r in rows]).label_column == 'queue'
    assert detect_format(rows, make_config(label_column='floor')).text_columns == ['note', 'queue']


@pytest.mark.parametrize('chosen, words', [
    (dict(label_column='teem'), ['label_column', 'teem', 'did you mean team?']),
    (dict(text_columns=['body', 'subjekt']), ['text_columns', 'subjekt', 'did you mean subject?']),
    (dict(prompt_column='zzz'), ['prompt_column', 'zzz', 'subject, body, team']),
    (dict(dataset_format='conversational'), ['(conversational)', 'subject, body, team', 'messages_column']),
    (dict(prompt_column='body'), ['(prompt_completion)', 'completion_column'])])
def test_settings_that_do_not_fit(chosen, words):
    with pytest.raises(DataError) as e: detect_format([{'subject': 'a', 'body': 'b', 'team': 'c'}], make_config(**chosen))
    assert all(w in str(e.value) for w in words), str(e.value)


def test_detected_columns_fit_back_into_the_settings():
    rows = [{'subject': 'a', 'body': 'b', 'team': 'c', 'id': 5}]
    first = detect_format(rows)
    config = make_config(dataset_format=first.kind, text_columns=first.text_columns, label_column=first.label_column)
    assert detect_format(rows, config) == first


# ---------------------------------------------------------------- examples

TURNS = {'conversations': [{'from': 'system', 'value': 's'}, {'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]}


def test_conversations():
    dataset_format = DatasetFormat('conversational', messages_column='conversations')
    [e] = to_examples([TURNS], dataset_format, system_prompt='other')
    assert [m['role'] for m in e.messages] == ['system', 'user', 'assistant'] and e.messages[0]['content'] == 's'
    assert to_examples([{'conversations': json.dumps(TURNS['conversations'])}], dataset_format)[0].messages == e.messages
    for empty in ([], None, '', [{'from': 'human', 'value': 'q'}]): assert to_examples([{'conversations': empty}], dataset_format)[0].answer == ''


@pytest.mark.parametrize('cell, words', [
    ([{'role': 'tool', 'content': 'x'}], ['row 2', 'unknown role', 'tool']),
    ([{'role': None, 'content': 'x'}], ['row 2', 'unknown role']),
    (['text'], ['row 2', 'no object']),
    ('{not json', ['row 2', 'neither a list nor JSON of one']),
    (7, ['row 2', 'neither a list nor JSON of one']),
    ('7', ['row 2', 'neither a list nor JSON of one'])])
def test_bad_conversations(cell, words):
    rows = [{'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]}, {'messages': cell}]
    with pytest.raises(DataError) as e: to_examples(rows, detect_format(rows))
    assert all(w in str(e.value) for w in words), str(e.value)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries({'a': st.one_of(st.none(), texts, st.integers()), 'b': texts, 'y': texts}), min_size=1, max_size=5))
def test_classification_examples(rows):
    dataset_format = DatasetFormat('classification', text_columns=['a', 'b'], label_column='y')
    examples = to_examples(rows, dataset_format)
    assert [e.row for e in examples] == list(range(1, len(rows) + 1))
    for row, e in zip(rows, examples):
        assert [m['role'] for m in e.messages] == ['user', 'assistant']
        assert e.label == e.answer == row['y'].strip()
        blank = not any(str(row[c]).strip() for c in 'ab' if row[c] is not None)
        assert (e.prompt == '') == blank


def test_rows_keep_their_number_when_drawn(tmp_path):
    (tmp_path / 'a.csv').write_text('text,label\n' + ''.join(f'text {i},a\n' for i in range(1, 51)))
    rows = load_rows(tmp_path / 'a.csv', max_rows=10)
    examples = to_examples(rows, detect_format(rows))
    assert all(e.prompt.startswith(f'text {e.row}\n') for e in examples)


# ---------------------------------------------------------------- plain text

@pytest.mark.parametrize('rows, chosen, expected', [
    ([{'text': 'a'}], {}, ['text']), ([{'Content': 'a', 'id': '1'}], {}, ['Content']), ([{'note': 'a', 'url': 'b'}], dict(text_columns=['note']), ['note']),
    ([{'note': 'a'}], dict(dataset_format='text'), ['note']), ([{'text': 'a', 'url': 'b'}], dict(dataset_format='text'), ['text'])], ids=str)
def test_text_is_detected(rows, chosen, expected):
    assert (found := detect_format(rows, make_config(**chosen))).kind == 'text' and found.text_columns == expected

@pytest.mark.parametrize('rows, chosen', [([{'note': 'a'}], {}), ([{'text': 'a', 'url': 'b'}], {}), ([{'a': 'x', 'b': 'y'}], dict(dataset_format='text')),
                                            ([{'a': 'x', 'b': 'y'}], dict(dataset_format='text', text_columns=['a', 'b']))], ids=str)
def test_text_is_not_guessed(rows, chosen):
    with pytest.raises(DataError, match='cannot be detected'): detect_format(rows, make_config(**chosen))


@needs_shared
def test_real_files():
    rows = load_rows(SHARED / 'classify' / 'banking77' / 'train.csv')
    dataset_format = detect_format(rows)
    assert (len(rows), dataset_format.kind, dataset_format.text_columns, dataset_format.label_column) == (10003, 'classification', ['text'], 'category')
    assert len({e.label for e in to_examples(rows, dataset_format)}) == 77
    rows = load_rows(SHARED / 'instruct' / 'gsm8k' / 'train.jsonl')
    assert (len(rows), detect_format(rows).kind) == (7473, 'prompt_completion')
