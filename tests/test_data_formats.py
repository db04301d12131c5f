"data.formats: the format is detected from the columns or taken from the settings; every format gives the same kind of example."
import json, re, shlex
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.config import load_config, make_config
from homelab_ft.core import DataError
from homelab_ft.data.formats import DatasetFormat, detect_format, to_examples, what_is_learned
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


# ---------------------------------------------------------------- files from real life

SUBJECTS = 'the heater,my parcel,the invoice,a red lamp,our contract,the garden hose,this app,the spare key,a new bike,the ticket,two chairs'.split(',')
EVENTS = 'stopped working last night,has not arrived,shows the wrong amount,was sold out,ends too early,came in the wrong size,asks for a code'.split(',')


def long(i, c): return f'{c[:3].title()}: {SUBJECTS[i % 11]} {EVENTS[i % 7]}, and nobody at number {i * 37 % 101} could say why it did.'
def short(i, c): return f'About {SUBJECTS[(i * 3) % 11]} ({SUBJECTS[(i * 5 + i % 7) % 11]})'
def story(i, c): return ' '.join(long(i * 5 + k, c) for k in range(5))
def few(i, c): return ('delivery', 'billing', 'returns')[i * 7 % 3]
def other(i, c): return ('web', 'phone')[i * 5 % 2]
def number(i, c): return str(1000 + 17 * i)
def stars(i, c): return i * 7 % 5 + 1
def date(i, c): return f'2024-0{i % 9 + 1}-1{i % 10}'
def url(i, c): return f'https://example.org/{c[:2].lower()}/{i}'
def code(i, c): return f'TCK-{1000 + i}'
def name(i, c): return ('Ann Lee', 'Ben Ott', 'Cleo Ray')[i % 3]
def verdict(i, c): return i % 3 > 0
def empty(i, c): return ''
def sql(i, c): return f'SELECT name FROM t{i} WHERE age > {i * 3} AND city = {i}'
def yes(i, c): return ('yes', 'no')[i % 2]


def table(n=42, **columns): return [{c: make(i, c) for c, make in columns.items()} for i in range(n)]


READ = [
    # English
    (dict(customer_message=long, agent_reply=long, category=few), 'learns `agent_reply` from `customer_message`'),
    (dict(article=story, summary=long, section=few), 'learns `summary` from `article`'),
    (dict(customer_question=long, our_answer=long, topic=few), 'learns `our_answer` from `customer_question`'),
    ({'Ticket ID': code, 'Customer Email': long, 'Support Response': long, 'Closed At': date}, 'learns `Support Response` from `Customer Email`'),
    (dict(ticketId=number, userQuery=long, assistantResponse=long, createdAt=date, sourceUrl=url), 'learns `assistantResponse` from `userQuery`'),
    (dict(question=long, context=story, answer=short), 'learns `answer` from `question`, `context`'),
    (dict(instruction=long, input=empty, output=long, text=lambda i, c: f'Do: {long(i, "ins")} So: {long(i, "out")}'), 'learns `output` from `instruction`, `input`'),
    (dict(title=short, body=story, reply=long, votes=stars), 'learns `reply` from `title`, `body`'),
    (dict(user=long, assistant=long), 'learns `assistant` from `user`'),
    (dict(customer_message=long, agent_message=long, agent_name=name, rating=stars), 'learns `agent_message` from `customer_message`'),
    (dict(question=long, sql=sql, db_id=code), 'learns `sql` from `question`'),
    (dict(review=long, sentiment=few), 'learns `sentiment` from `review`'),
    (dict(review_text=long, stars=stars, review_date=date), 'learns `stars` from `review_text`'),
    (dict(text=long, label=stars, label_text=lambda i, c: 'abcde'[stars(i, c) - 1]), 'learns `label_text` from `text`'),
    (dict(subject=short, body=story, url=url, ticket_category=few), 'learns `ticket_category` from `subject`, `body`'),
    (dict(question=long, answer=yes), 'learns `answer` from `question`'),
    (dict(tweet_id=number, reply=long, emotion=few), 'learns `emotion` from `reply`'),
    (dict(source=long, target=long), 'learns `target` from `source`'),
    # German
    (dict(Frage=long, Antwort=long, Kategorie=few), 'learns `Antwort` from `Frage`'),
    ({'Kundenanfrage': long, 'Unsere Antwort': long, 'Bearbeiter': name, 'Eingangsdatum': date}, 'learns `Unsere Antwort` from `Kundenanfrage`'),
    (dict(Aufgabe=long, Musterlösung=long, Fach=few), 'learns `Musterlösung` from `Aufgabe`'),
    (dict(Betreff=short, Nachricht=story, Rückmeldung=long), 'learns `Rückmeldung` from `Betreff`, `Nachricht`'),
    (dict(Nachricht=long, Abteilung=few), 'learns `Abteilung` from `Nachricht`'),
    (dict(Artikel=story, Zusammenfassung=long, Ressort=few), 'learns `Zusammenfassung` from `Artikel`'),
    (dict(Bewertungstext=long, Stimmung=few, Datum=date), 'learns `Stimmung` from `Bewertungstext`'),
    # French
    ({'Question du client': long, 'Réponse de l’agent': long, 'Catégorie': few}, 'learns `Réponse de l’agent` from `Question du client`'),
    (dict(numéro=number, demande=long, réponse=long, priorité=few), 'learns `réponse` from `demande`'),
    (dict(article=story, résumé=long, rubrique=few), 'learns `résumé` from `article`'),
    (dict(commentaire=long, étiquette=few), 'learns `étiquette` from `commentaire`'),
    # Spanish
    (dict(pregunta=long, respuesta=long, categoría=few, fecha=date), 'learns `respuesta` from `pregunta`'),
    ({'Mensaje del cliente': long, 'Respuesta del agente': long, 'Etiqueta': few}, 'learns `Respuesta del agente` from `Mensaje del cliente`'),
    (dict(reseña=long, sentimiento=few, país=other), 'learns `sentimiento` from `reseña`'),
    # Italian and Portuguese
    (dict(domanda=long, risposta=long, argomento=few), 'learns `risposta` from `domanda`'),
    (dict(articolo=story, riassunto=long, sezione=few), 'learns `riassunto` from `articolo`'),
    (dict(pergunta=long, resposta=long, categoria=few, id=number), 'learns `resposta` from `pergunta`'),
    (dict(mensagem_cliente=long, resposta_atendente=long), 'learns `resposta_atendente` from `mensagem_cliente`'),
]


@pytest.mark.parametrize('columns, learned', READ, ids=lambda value: '-'.join(value) if isinstance(value, dict) else '')
def test_files_from_real_life(columns, learned):
    found = detect_format(table(**columns))
    assert what_is_learned(found) == learned
    assert set(found.left_out) == set(columns) - set(re.findall('`([^`]*)`', learned))


UNCLEAR = [
    (dict(english=long, german=long), 2),                                        # either way
    (dict(problem=long, solution=story, answer=short), 2),                       # which is the answer?
    (dict(pytanie=long, odpowiedz=long, category=few), 3),                       # unknown words beside a class
    (dict(question=long, sql=sql, category=few), 2),                             # a query or a class
    (dict(text=long, url=url, dump=few, language=other), 1),                     # a dump of web pages
    (dict(text=long, url=url, id=number, file_path=url, dump=few, host=other), 2),
    (dict(message=long, topic=few, sentiment=other), 2),                         # which class?
    (dict(note=long, who=name), 2),
    (dict(headline=short, story=story), 2),
    (dict(a=number, b=number), 0),
]


@pytest.mark.parametrize('columns, n', UNCLEAR, ids=lambda value: '-'.join(value) if isinstance(value, dict) else '')
def test_unclear_files_are_refused_with_what_to_paste(columns, n):
    rows = table(**columns)
    with pytest.raises(DataError, match='cannot be detected') as e: detect_format(rows)
    step = e.value.next_step.splitlines()
    pasted = [shlex.split(line) for line in step if line.startswith('    --set')]
    assert len(pasted) == max(n, 1), str(e.value)
    offered = []
    detect_format(rows, choose=lambda readings: offered.extend(readings) or readings[0]) if n else None
    for words, reading in zip(pasted, offered):
        chosen = detect_format(rows, load_config(overrides=words[1::2]))
        assert what_is_learned(chosen) == what_is_learned(reading) and what_is_learned(reading) in e.value.next_step


def test_nobody_chose():
    with pytest.raises(DataError, match='cannot be detected'): detect_format(table(english=long, german=long), choose=lambda readings: None)


@pytest.mark.parametrize('columns, settings, pasted', [
    (dict(alpha=long, beta=long, gamma=long), dict(prompt_column='alpha'), '--set prompt_column=alpha --set completion_column=beta'),
    ({'My question': long, 'Antwort': long}, dict(prompt_column='My qestion'), "--set 'prompt_column=My question'"),
    (dict(Frage=long, Antwort=long), dict(completion_column='zzz'), '--set completion_column=Frage'),
    (dict(Betreff=short, Text=long, Team=few), dict(text_columns=['Betref', 'Text']), "--set 'text_columns=[Betreff, Text]'"),
    (dict(a=number, b=number), {}, '--set prompt_column=a --set completion_column=b'),
    (dict(a=number, b=long), {}, '--set dataset_format=text --set text_columns=b'),
    (dict(a=long, chosen=long, rejected=long), {}, '--set prompt_column=a --set chosen_column=chosen --set rejected_column=rejected'),
])
def test_errors_on_columns_hold_what_to_paste(columns, settings, pasted):
    with pytest.raises(DataError) as e: detect_format(table(**columns), make_config(**settings))
    assert pasted in e.value.next_step, str(e.value)


def test_a_setting_that_does_nothing_is_refused():
    rows = table(question=long, answer=long, team=few)
    with pytest.raises(DataError, match='prompt_column is not read'):
        detect_format(rows, make_config(label_column='team', prompt_column='question'))


def test_a_file_without_names_is_recognised():
    rows = [{'Where is the key to the cellar of this house?': 'a', 'x': 'b'}]
    with pytest.raises(DataError, match='the first line looks like a row') as e: detect_format(rows)
    assert 'question,answer' in e.value.next_step and '--set' not in e.value.next_step


# ---------------------------------------------------------------- judged answers

TALK = lambda i, c: [{'role': 'user', 'content': long(i, c)}, {'role': 'assistant', 'content': short(i, c)}]

@pytest.mark.parametrize('columns, read', [
    (dict(prompt=long, completion=long, label=verdict), 'learns `completion` from `prompt` where `label` is true'),
    (dict(question=long, response=long, thumbs_up=lambda i, c: int(verdict(i, c))), 'learns `response` from `question` where `thumbs_up` is true'),
    (dict(Frage=long, Antwort=long, korrekt=lambda i, c: str(verdict(i, c)).lower()), 'learns `Antwort` from `Frage` where `korrekt` is true'),
    (dict(messages=TALK, label=verdict), "learns the assistant's messages from `messages` where `label` is true"),
], ids=lambda value: '-'.join(value) if isinstance(value, dict) else '')
def test_judged_answers_are_refused_or_learned_by_their_judgement(columns, read):
    rows = table(**columns)
    with pytest.raises(DataError, match='KTO') as e: detect_format(rows)
    assert '--set dataset_format=kto' in e.value.next_step and '28 of 42 rows' in e.value.next_step
    chosen = detect_format(rows, make_config(dataset_format='kto'))
    assert what_is_learned(chosen) == read
    assert [e.row for e in to_examples(rows, chosen)] == [i + 1 for i in range(42) if i % 3]


@pytest.mark.parametrize('settings', [dict(prompt_column='prompt', completion_column='completion'), dict(prompt_column='prompt')])
def test_named_columns_do_not_hide_a_judgement(settings):
    with pytest.raises(DataError, match='KTO'): detect_format(table(prompt=long, completion=long, label=verdict), make_config(**settings))


def test_a_class_may_be_true_or_false():
    assert what_is_learned(detect_format(table(text=long, label=verdict))) == 'learns `label` from `text`'


def test_two_answers_are_never_a_conversation():
    rows = table(conversations=lambda i, c: [{'from': 'human', 'value': long(i, c)}], chosen=lambda i, c: {'from': 'gpt', 'value': short(i, c)},
                 rejected=lambda i, c: {'from': 'gpt', 'value': 'No.'})
    found = detect_format(rows)
    assert (found.kind, found.prompt_column) == ('preference', 'conversations')
    assert [(e.prompt, e.answer, e.rejected) for e in to_examples(rows[:1], found)] == [(long(0, 'conversations'), short(0, ''), 'No.')]


# ---------------------------------------------------------------- missing cells

@pytest.mark.parametrize('missing', [None, float('nan')])
@pytest.mark.parametrize('row, column', [
    (dict(question='Why?', answer='So.'), 'answer'), (dict(text='Fine.', label='good'), 'label'), (dict(prompt='Why?', chosen='So.', rejected='No.'), 'rejected'),
    (dict(text='Fine.'), 'text'), (dict(instruction='Add', input='1', output='2'), 'input'), (dict(messages=TALK(0, 'a')), 'messages')], ids=str)
def test_a_missing_cell_is_never_a_word(row, column, missing):
    rows = [row, row | {column: missing}]
    example = to_examples(rows, detect_format(rows))[1]
    said = ' '.join([*(m['content'] for m in example.messages), example.rejected or '', str(example.label or '')]).lower()
    assert not {'nan', 'none', 'null'} & set(said.split()), said


# ---------------------------------------------------------------- examples

TURNS = {'conversations': [{'from': 'system', 'value': 's'}, {'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]}


def test_conversations():
    dataset_format = DatasetFormat('conversational', messages_column='conversations')
    [e] = to_examples([TURNS], dataset_format, system_prompt='other')
    assert [m['role'] for m in e.messages] == ['system', 'user', 'assistant'] and e.messages[0]['content'] == 's'
    assert to_examples([{'conversations': json.dumps(TURNS['conversations'])}], dataset_format)[0].messages == e.messages
    for empty in ([], None, '', [{'from': 'human', 'value': 'q'}]): assert to_examples([{'conversations': empty}], dataset_format)[0].answer == ''


@pytest.mark.parametrize('cell, words', [
    ([{'role': 'wizard', 'content': 'x'}], ['row 2', 'unknown role', 'wizard']),
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
