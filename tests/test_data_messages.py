"data.messages, data.parts, data.render: every key of a message is used or refused by name; masks cover calls and reasoning."
import gzip, json, re
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.config import make_config
from homelab_ft.core import DataError, ModelError
from homelab_ft.data.chat_template import answer_text, encode, end_of_turn_ids, load_tokenizer, prompt_ids, show_loss_mask
from homelab_ft.data.formats import detect_format, read_examples, to_examples, what_is_learned
from homelab_ft.data.messages import ABOUT, KEYS, Reading, read_message
from homelab_ft.data.prepare import prepare
from homelab_ft.data.render import call_style, render
from homelab_ft.data.tokenize import tokenize_examples
from test_data_chat_template import TEMPLATES, embedded, masked_parts, needs_shared, real, tokenizer

CASES = Path(__file__).resolve().parents[2] / 'shared' / 'cases' / 'data'
HUMAN_EVAL = CASES.parents[1] / 'data' / 'instruct' / 'human_eval'
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason='needs the small inputs in ../shared/cases')


def user(text, **more): return dict(role='user', content=text, **more)
def said(text, **more): return dict(role='assistant', content=text, **more)


TOOL = {'type': 'function', 'function': {'name': 'weather', 'description': 'Weather of a city.', 'parameters': {
    'type': 'object', 'properties': {'city': {'type': 'string', 'description': 'A city.'}}, 'required': ['city']}}}
CALL = {'id': 'weather01', 'type': 'function', 'function': {'name': 'weather', 'arguments': {'city': 'Paris'}}}
RESULT = dict(role='tool', content='12 degrees', tool_call_id='weather01', name='weather')


def talk(thoughts=(None, None), text=''):
    "A question, a call with its result, and an answer; perhaps with reasoning before both."
    before = [dict(reasoning_content=thought) if thought else {} for thought in thoughts]
    return [user('Is it warm?', tools=[TOOL]), said(text, tool_calls=[CALL], **before[0]), RESULT, said('It is cool.', **before[1])]


def read(row, **settings):
    "The only example of a file of this row."
    config = make_config(**settings)
    [example] = to_examples([row], detect_format([row], config), reading=None if not settings else Reading(
        config.reasoning, config.reasoning_history, config.empty_reasoning, tuple(config.ignored_keys)))
    return example


# -- one message -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('message, words', [
    ({'role': 'user', 'content': 'x', 'images': ['a.png']}, ['unknown key: images', 'tool_calls', 'ignored_keys=images']),
    ({'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': 'a.png'}}]}, ['no text: image_url']),
    ({'role': 'user', 'content': [{'type': 'input_audio', 'input_audio': 'x'}]}, ['no text: input_audio']),
    ({'role': 'user', 'content': [{'type': 'text', 'text': 7}]}, ['text is a int']),
    ({'role': 'assistant', 'content': '', 'tool_calls': [{'id': '1'}]}, ['call without a name']),
    ({'role': 'assistant', 'content': '', 'tool_calls': [{'function': {'name': 'f', 'arguments': '[1]'}}]}, ['arguments are no object']),
    ({'role': 'assistant', 'content': '', 'tool_calls': [{'type': 'custom', 'function': {'name': 'f'}}]}, ['no function', 'custom']),
    ({'role': 'user', 'content': 'x', 'tool_calls': [{'name': 'f'}]}, ['message of user with tool calls']),
    ({'role': 'user', 'content': 'x', 'reasoning': 'y'}, ['message of user with reasoning']),
    ({'role': 'assistant', 'content': 'x', 'reasoning': 'y', 'thinking': 'z'}, ['reasoning and thinking, which differ']),
    ({'role': 'assistant', 'content': 'x', 'weight': 0.5}, ['weight', 'neither 0 nor 1']),
    ({'role': 'user', 'content': 'x', 'train_on_turn': True}, ['train_on_turn', 'message of user']),
    ({'role': 'user', 'content': 'x', 'tools': [{'description': 'no name'}]}, ['tool without a name']),
], ids=str)
def test_what_is_not_understood_is_refused_by_name(message, words):
    row = {'messages': [user('Hi'), message, said('Hello')]}
    with pytest.raises(DataError) as e: to_examples([row, row], detect_format([row]))
    assert all(word in str(e.value) for word in ['row 1', *words]), str(e.value)


@settings(max_examples=80, deadline=None)
@given(key=st.text(st.characters(categories=['Ll']), min_size=1, max_size=8), value=st.one_of(st.text(min_size=1), st.integers(1), st.just([1])))
def test_a_key_is_used_ignored_with_a_count_or_refused(key, value):
    if key in KEYS: return
    reading = Reading()
    try: message = read_message({'role': 'user', 'content': 'x', key: value}, reading)
    except DataError as e: assert key not in ABOUT and key in e.what and e.next_step
    else: assert message == user('x') and reading.ignored == {key: 1}
    allowed = Reading(ignored_keys=(key,))
    assert read_message({'role': 'user', 'content': 'x', key: value}, allowed) == user('x') and allowed.ignored == {key: 1}


@pytest.mark.parametrize('nothing', [None, float('nan'), ''])
def test_nothing_is_never_a_word(nothing):
    row = {'messages': [user('Hi'), said('Hello', tool_calls=nothing, reasoning_content=nothing, name=nothing, tools=nothing, audio=nothing)]}
    assert read(row).messages == [user('Hi'), said('Hello')]
    assert read({'messages': [user(nothing), said('Hello')]}).prompt == ''


@pytest.mark.parametrize('role, expected', [('developer', 'system'), ('human', 'user'), ('gpt', 'assistant'), ('ipython', 'tool'),
                                            ('observation', 'tool'), ('function', 'tool'), ('tool', 'tool')])
def test_roles(role, expected): assert read_message({'role': role, 'content': 'x'})['role'] == expected


def test_objects_are_json():
    content = {'ok': True, 'note': None, 'name': "it's", 'größe': 1.5}
    assert json.loads(read({'messages': [user('As JSON'), said(content)]}).answer) == content
    assert read({'messages': [user('As JSON'), said(content)]}).answer == json.dumps(content, ensure_ascii=False)


# -- the same conversation in the notation of others --------------------------------------------------------------------------------------------

def openai():
    call = {'id': 'weather01', 'type': 'function', 'function': {'name': 'weather', 'arguments': '{"city": "Paris"}'}}
    messages = [user('Is it warm?'), {'role': 'assistant', 'content': None, 'tool_calls': [call], 'refusal': None},
                {'role': 'tool', 'tool_call_id': 'weather01', 'content': '12 degrees'}, {'role': 'assistant', 'content': 'It is cool.', 'weight': 1}]
    return {'messages': messages, 'tools': [TOOL], 'parallel_tool_calls': False}


def openai_legacy():
    messages = [user('Is it warm?'), {'role': 'assistant', 'content': None, 'function_call': {'name': 'weather', 'arguments': '{"city": "Paris"}'}},
                {'role': 'function', 'name': 'weather', 'content': '12 degrees'}, said('It is cool.')]
    return {'messages': messages, 'functions': [TOOL['function']]}


def sharegpt():
    turns = [('human', 'Is it warm?'), ('function_call', '{"name": "weather", "arguments": {"city": "Paris"}}'),
             ('observation', '12 degrees'), ('gpt', 'It is cool.')]
    return {'conversations': [{'from': role, 'value': text} for role, text in turns], 'tools': json.dumps([TOOL['function']])}


def trl():
    first, call, *rest = openai()['messages']
    return {'prompt': [first], 'completion': [call, *rest], 'tools': json.dumps([TOOL])}


def without_ids(messages):
    "The messages without ids, which are made up where the file has none."
    plain = [{key: value for key, value in m.items() if key != 'tool_call_id'} for m in messages]
    for m in plain:
        if 'tool_calls' in m: m['tool_calls'] = [{key: value for key, value in call.items() if key != 'id'} for call in m['tool_calls']]
    return plain


@pytest.mark.parametrize('row', [openai(), openai_legacy(), sharegpt(), trl()], ids=['openai', 'functions', 'sharegpt', 'trl'])
def test_a_tool_call_in_every_notation(row):
    example = read(row)
    assert without_ids(example.messages) == without_ids(talk())
    assert set(detect_format([row]).left_out) <= {'parallel_tool_calls'}


def test_tools_reach_the_template_behind_a_system_prompt():
    row = openai()
    [example] = to_examples([row], detect_format([row]), system_prompt='Be brief.')
    assert [m['role'] for m in example.messages[:2]] == ['system', 'user'] and example.messages[0]['tools'] == [TOOL]
    assert 'tools' not in example.messages[1] and 'weather' in example.answer or example.answer == 'It is cool.'


# -- formats of rows ----------------------------------------------------------------------------------------------------------------------------

SHAPES = {
    'prompt and completion as messages': (
        dict(prompt=[user('Hi'), said('Hello'), user('And?')], completion=[said('So.')]),
        'learns `completion` from `prompt`', [user('Hi'), said('Hello', loss=False), user('And?'), said('So.')]),
    'completion of one message': (dict(prompt='Why?', completion=said('So.')), 'learns `completion` from `prompt`', [user('Why?'), said('So.')]),
    'alpaca with history and system': (
        dict(instruction='And 3?', input='Add 1.', output='4', history=[['Hi', 'Hello']], system='Count.'),
        'learns `output` from `instruction`, `input`, with `history`, `system`',
        [dict(role='system', content='Count.'), user('Hi'), said('Hello'), user('And 3?\n\nAdd 1.'), said('4')]),
    'sharegpt with system': (
        dict(conversations=[{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Hello'}], system='Be kind.'),
        "learns the assistant's messages in `conversations`, with `system`", [dict(role='system', content='Be kind.'), user('Hi'), said('Hello')]),
    'squad': (
        dict(id='5', title='Bells', context='The bell is red.', question='Which colour?', answers={'text': ['red', 'Red'], 'answer_start': [12, 12]}),
        'learns `answers` from `question`, `context`', [user('Which colour?\n\nThe bell is red.'), said('red')]),
    'mmlu': (dict(question='Which is warm?', subject='colours', choices=['blue', 'red'], answer=1),
             'learns `answer` from `question`, with `choices`', [user('Which is warm?\n\nA. blue\nB. red'), said('B. red')]),
    'arc': (dict(id='a', question='Which is warm?', choices={'text': ['blue', 'red'], 'label': ['A', 'B']}, answerKey='B'),
            'learns `answerKey` from `question`, with `choices`', [user('Which is warm?\n\nA. blue\nB. red'), said('B. red')]),
    'race': (dict(article='Red is warm.', question='Which is warm?', options=['blue', 'red'], answer='B'),
             'learns `answer` from `question`, `article`, with `options`', [user('Which is warm?\n\nRed is warm.\n\nA. blue\nB. red'), said('B. red')]),
    'article and highlights': (dict(article='It rained all day.', highlights='Rain.', id='x'), 'learns `highlights` from `article`',
                               [user('It rained all day.'), said('Rain.')]),
    'humaneval': (dict(task_id='t/0', prompt='def f(x):\n', canonical_solution='    return x\n', test='assert f(1) == 1', entry_point='f'),
                  'learns `canonical_solution` from `prompt`', [user('def f(x):\n'), said('    return x\n')]),
    'transcript': (dict(messages='\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye'), "learns the assistant's messages in `messages`",
                   [user('Hi'), said('Hello')]),
}


@pytest.mark.parametrize('row, learned, messages', SHAPES.values(), ids=SHAPES)
def test_shapes_of_rows(row, learned, messages):
    rows = [row] * 3
    found = detect_format(rows)
    assert what_is_learned(found) == learned
    assert to_examples(rows, found)[2].messages == messages
    assert set(found.left_out) == set(row) - set(found.columns)


PAIRS = {
    'hh': dict(chosen='\n\nHuman: Why?\n\nAssistant: So.', rejected='\n\nHuman: Why?\n\nAssistant: No.'),
    'sharegpt': dict(conversations=[{'from': 'human', 'value': 'Why?'}], chosen={'from': 'gpt', 'value': 'So.'}, rejected={'from': 'gpt', 'value': 'No.'}),
    'messages': dict(prompt=[user('Why?')], chosen=[said('So.')], rejected=[said('No.')]),
    'openai': dict(input={'messages': [user('Why?')]}, preferred_output=[said('So.')], non_preferred_output=[said('No.')]),
}


@pytest.mark.parametrize('row', PAIRS.values(), ids=PAIRS)
def test_pairs_are_never_conversations(row):
    [example] = to_examples([row], found := detect_format([row]))
    assert found.kind == 'preference' and (example.messages, example.rejected) == ([user('Why?'), said('So.')], 'No.')


def test_kto_as_messages():
    rows = [dict(prompt=[user(f'Why {i}?')], completion=[said('So.')], label=i % 2 == 0) for i in range(8)]
    with pytest.raises(DataError, match='KTO'): detect_format(rows)
    examples = to_examples(rows, detect_format(rows, make_config(dataset_format='kto')))
    assert [e.messages for e in examples] == [[user(f'Why {i}?'), said('So.')] for i in range(0, 8, 2)]


def test_system_prompts_that_contradict():
    row = dict(messages=[dict(role='system', content='Be kind.'), user('Hi'), said('Hello')], system='Be rude.')
    with pytest.raises(DataError, match='two system prompts'): read(row)
    assert read(row | dict(system='Be kind.')).messages[0]['content'] == 'Be kind.'
    assert 'system' in detect_format([row], make_config(system_column='')).left_out


def test_a_class_is_told_from_any_column():
    rows = [dict(system=f'The heater {i} is cold', team='ab'[i % 2]) for i in range(20)]
    assert what_is_learned(detect_format(rows)) == 'learns `team` from `system`'


# -- loss, cuts, counts -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mark', [dict(weight=0), dict(weight=0.0), dict(train=False), dict(train_on_turn='false'), dict(loss=0)], ids=str)
def test_no_loss_where_the_file_says_so(mark):
    row = {'messages': [user('a'), said('one', **mark), user('b'), said('two')]}
    shown = show_loss_mask(encode(read(row).messages, load_tokenizer('embedded')), load_tokenizer('embedded'))
    assert re.findall('⟦(.*?)⟧', shown) == ['two<|eot_id|>'] and 'one' in shown
    last = {'messages': [user('a'), said('one'), user('b'), said('two', **mark)]}
    assert read(last).messages == [user('a'), said('one')]
    with pytest.raises(DataError, match='no answer has loss'): read({'messages': [user('a'), said('one', **mark)]})


def test_what_is_cut_is_counted():
    rows = [{'messages': [user('a'), said('b')]}, {'messages': [user('a'), said('b'), user('c')]}, {'messages': [user('a'), said(''), user('b'), said('c')]},
            {'messages': [user('a', timestamp=7), said('b')]}]
    examples, reading = read_examples(rows, detect_format(rows), make_config())
    assert (reading.cut, reading.unlearned, dict(reading.ignored)) == ([2], [3], {'timestamp': 1})
    assert examples[2].messages[1] == said('', loss=False)
    assert 'timestamp' in str(reading.table())


@pytest.mark.parametrize('n_bad, is_used', [(0, True), (1, True), (4, True), (5, False), (40, False)])
def test_rows_in_are_rows_used_plus_rows_reported(tmp_path, n_bad, is_used):
    rows = [{'messages': [user(f'Question number {i} of the {i * 7919} kind?'), said(f'Answer {i * 31}')]} for i in range(40)]
    for i in range(n_bad): rows[i]['messages'][0]['content'] = [{'type': 'image', 'image': 'x.png'}]
    path = tmp_path / 'rows.jsonl'
    path.write_text('\n'.join(map(json.dumps, rows)))
    tok = load_tokenizer('embedded')
    if not is_used:
        with pytest.raises(DataError, match='row 1: a message with a part that is no text') as e: prepare(make_config(data=str(path)), tok, tmp_path / 'data')
        assert f'{n_bad} of 40 rows' in e.value.value
        return
    p = prepare(make_config(data=str(path)), tok, tmp_path / 'data')
    used = sorted(row for part in (p.train, p.validation, p.test) for row in part.rows.tolist())
    assert used == list(range(n_bad + 1, 41))
    report = p.markdown()
    assert ('Rows that cannot be used' in report) == bool(n_bad)
    for row in range(1, n_bad + 1): assert re.search(rf'\|\s+{row}\s+\| a message with a part that is no text: image', report)


REFUSES_TWO = """{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}{{ raise_exception('take turns') }}{% endif %}{% endfor %}"""


def test_a_row_that_the_template_refuses_is_reported(tmp_path):
    tok = load_tokenizer('embedded')
    tok.chat_template = REFUSES_TWO + tok.chat_template
    rows = [{'messages': [user(f'Question number {i} about {i * 7}'), said(f'Answer {i}')]} for i in range(40)]
    rows[16]['messages'].insert(0, user('And one more'))
    examples = to_examples(rows, detect_format(rows))
    result = tokenize_examples(examples, tok, 64, 'error')
    assert list(result.refused) == [17] and 'take turns' in result.refused[17].what
    assert len(result.positions) == 39 and 'refuses it' in str(result.table())
    with pytest.raises(ModelError, match='row 17: .*take turns'): tokenize_examples(examples[14:18], tok, 64, 'error')


# -- masks --------------------------------------------------------------------------------------------------------------------------------------

WRITES_CALL = {
    'Qwen-Qwen2.5-7B-Instruct': '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
    'Qwen-Qwen3-0.6B': '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
    'meta-llama-Llama-3.1-8B-Instruct': '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
    'meta-llama-Llama-3.2-3B-Instruct': '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
    'mistralai-Mistral-Nemo-Instruct-2407': '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}, "id": "weather01"}]</s>',
    'openai-gpt-oss-120b': ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
}


@needs_shared
@pytest.mark.parametrize('file', WRITES_CALL)
def test_loss_covers_the_call_and_never_its_result(file):
    tok, messages = real('gpt2', file), talk()
    encoded = encode(messages, tok)
    call, answer = masked_parts(encoded, tok)
    assert call == WRITES_CALL[file] and 'It is cool.' in answer and 'degrees' not in answer
    for end in (2, 3, 4):      # what a model continues in use is what it saw in training
        before = prompt_ids(messages[:end - 1], tok) if messages[end - 1]['role'] == 'assistant' else []
        assert encode(messages[:end], tok).input_ids[:len(before)] == before if before else True
    assert {i for i, m in zip(encoded.input_ids, encoded.mask) if m} & end_of_turn_ids(tok)
    last_of_call = encode(messages[:2], tok).input_ids[-1]
    assert last_of_call in end_of_turn_ids(tok)
    assert 'weather' in answer_text(messages[:2], tok)


@needs_shared
@pytest.mark.parametrize('file', sorted(set(TEMPLATES) - set(WRITES_CALL)))
def test_templates_without_tools_refuse_the_row(file):
    tok = real('gpt2', file)
    assert call_style(tok, tok.get_chat_template()) is None
    with pytest.raises(ModelError, match='leaves out tool calls'): encode(talk(), tok)
    with pytest.raises(ModelError, match='leaves out the tools'): prompt_ids(talk()[:1], tok)


THOUGHTS = {
    'Qwen-Qwen3-0.6B': ['<think>\nTwelve is cool.\n</think>\n\nIt is cool.<|im_end|>'],
    'openai-gpt-oss-120b': ['<|channel|>analysis<|message|>Twelve is cool.<|end|><|start|>assistant<|channel|>final<|message|>It is cool.<|return|>'],
}


@needs_shared
@pytest.mark.parametrize('file', TEMPLATES)
def test_reasoning_is_learned_or_refused(file):
    tok = real('gpt2', file)
    messages = [user('Is it warm?'), said('It is cool.', reasoning_content='Twelve is cool.')]
    if file in THOUGHTS: assert masked_parts(encode(messages, tok), tok) == THOUGHTS[file]
    else:
        with pytest.raises(ModelError, match='leaves out the reasoning') as e: encode(messages, tok)
        assert 'think_tags' in e.value.next_step
    row = dict(messages=messages)
    tagged = read(row, reasoning='think_tags').messages
    assert tagged[1]['content'] == '<think>\nTwelve is cool.\n</think>\n\nIt is cool.'
    [part] = masked_parts(encode(tagged, tok), tok)
    assert 'Twelve is cool.\n</think>' in part and part.endswith(TEMPLATES[file][3])
    assert read(row, reasoning='drop').messages == [user('Is it warm?'), said('It is cool.')]


@needs_shared
def test_reasoning_in_a_loop_of_calls():
    qwen, oss = real('gpt2', 'Qwen-Qwen3-0.6B'), real('gpt2', 'openai-gpt-oss-120b')
    both = talk(('I must look.', 'Twelve is cool.'))
    call, answer = masked_parts(encode(both, qwen), qwen)
    assert call.startswith('<think>\nI must look.\n</think>\n\n<tool_call>') and answer.startswith('<think>\nTwelve is cool.')
    with pytest.raises(ModelError) as e: encode(both, oss)      # it takes the first reasoning away once the answer follows
    assert 'reasoning_history=drop' in e.value.next_step
    dropped = read(dict(messages=both), reasoning_history='drop').messages
    assert 'analysis' in masked_parts(encode(dropped, oss), oss)[-1]


@needs_shared
def test_reasoning_of_earlier_answers():
    tok = real('gpt2', 'Qwen-Qwen3-0.6B')
    row = dict(messages=[user('a'), said('b', reasoning='first thought'), user('c'), said('d', reasoning='second thought')])
    encoded = encode(read(row).messages, tok)
    assert 'first thought' not in tok.decode(encoded.input_ids) and encoded.notes == ['reasoning of earlier answers: left out by the chat template']
    with pytest.raises(ModelError, match='reasoning of an earlier answer'): encode(read(row, reasoning_history='keep').messages, tok)
    assert encode(read(row, reasoning_history='drop').messages, tok).notes == []


@needs_shared
def test_answers_without_reasoning_have_an_empty_block_or_none():
    tok = real('gpt2', 'Qwen-Qwen3-0.6B')
    row = dict(messages=[user('a'), said('b'), user('c'), said('d')])
    empty, none = (encode(read(row, empty_reasoning=choice).messages, tok) for choice in ('empty', 'none'))
    assert masked_parts(empty, tok) == ['<think>\n\n</think>\n\nd<|im_end|>'] and empty.notes == ['an empty reasoning block is learned']
    assert masked_parts(none, tok) == ['b<|im_end|>', 'd<|im_end|>'] and none.notes == ['no reasoning block is learned (empty_reasoning=none)']
    result = tokenize_examples(to_examples([row], detect_format([row])), tok, 64, 'error')
    assert 'an empty reasoning block is learned' in str(result.table())


# Templates in which the authors of TRL marked the answers with {% generation %}: (special tokens that end a turn, the conversations they can write)
MARKED = dict(qwen2_5='two calls', qwen3='two calls thoughts both', llama3='two', glm4moe='two calls thoughts both', gptoss='two calls thoughts',
              gemma3='two', lfm2_v2='two calls', phi3_5='two', qwen3_instruct_2507='two calls', qwen3_5_think='two calls thoughts both', cohere='two')
ENDS = ('<|im_end|>', '<|eot_id|>', '<end_of_turn>', '<|return|>', '<|end|>', '<|END_OF_TURN_TOKEN|>', '<|user|>')
TALKS = dict(two=[user('Hi?'), said('Hello.'), user('And?'), said('So.')], calls=talk(),
             thoughts=[user('Is it warm?'), said('It is cool.', reasoning_content='Twelve is cool.')], both=talk(('I must look.', 'Twelve is cool.')))


def marked_tokenizer(name):
    trl = pytest.importorskip('trl')
    path = Path(trl.__file__).parent / 'chat_templates' / f'{name}_training.jinja'
    if not path.exists(): pytest.skip(f'this release of TRL has no {path.name}')
    template = path.read_text(encoding='utf-8')
    special = tuple(sorted(set(re.findall(r'<\|[a-zA-Z_0-9]+\|>|<(?:start|end)_of_turn>', template))))
    return tokenizer('gpt2', template, '<bos>', next(e for e in ENDS if e in template), special)


def letters(ids, mask, tok):
    "The text, and for each letter whether it has loss."
    text, has_loss = '', []
    for i in range(len(ids)):
        longer = tok.decode(ids[:i + 1])
        has_loss += [bool(mask[i])] * (len(longer) - len(text))
        text = longer
    return text, has_loss


@needs_shared
@pytest.mark.parametrize('name, which', [(name, which) for name, talks in MARKED.items() for which in talks.split()])
def test_no_token_with_loss_that_generation_marks_lack(name, which):
    tok, messages = marked_tokenizer(name), TALKS[which]
    encoded, true = encode(messages, tok), {}
    apply = tok.apply_chat_template

    def marks(ready, **options):
        true.update(apply(ready, tools=options.get('tools'), tokenize=True, return_dict=True, return_assistant_tokens_mask=True))
        return apply(ready, **options)

    tok.apply_chat_template = marks
    try: render(messages, tok)
    finally: del tok.apply_chat_template
    text, ours = letters(encoded.input_ids, encoded.mask, tok)
    whole, theirs = letters(true['input_ids'], true['assistant_masks'], tok)
    assert whole.startswith(text)
    extra = ''.join(letter for letter, a, b in zip(text, ours, theirs) if a and not b)
    assert not extra, extra
    lacking = [letter for letter, a, b in zip(text, ours, theirs) if b and not a]
    in_prompt = ''.join(lacking).replace('<|start|>assistant', '').replace('<think>', '').strip()
    if name != 'gptoss': assert not in_prompt, in_prompt     # gpt-oss ends earlier answers otherwise than the last: they are context
    assert encoded.mask[-1] == 1 and encoded.input_ids[-1] in end_of_turn_ids(tok)


# -- the small inputs that failed ---------------------------------------------------------------------------------------------------------------

def prepared(name, tmp_path, **settings):
    tok = load_tokenizer('embedded')
    config = make_config(data=str(CASES / f'{name}.jsonl'), max_length=4096, **settings)
    p = prepare(config, tok, tmp_path / 'data')
    return p, [tok.decode(part.row(i)[0]) for part in (p.train, p.validation, p.test) for i in range(len(part))]


@needs_cases
def test_cases_that_are_rendered(tmp_path):
    p, _ = prepared('dpo_sharegpt', tmp_path / '1', objective='dpo')
    assert p.dataset_format.kind == 'preference' and sum(map(len, p.rejected.values())) == 150
    p, texts = prepared('system_column', tmp_path / '2')
    assert all('You are a pirate number' in text and 'earlier a' in text for text in texts) and len(texts) == 150
    _, texts = prepared('content_dict', tmp_path / '3')
    assert not any("{'text'" in text or '{"text"' in text for text in texts) and 'Natalia' in ''.join(texts)


@needs_cases
def test_cases_that_are_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match='leaves out the tools'): prepared('tool_calls_lost', tmp_path / '1')
    with pytest.raises(DataError, match='row 1: a part whose text is a list'): prepared('part_text_list', tmp_path / '2')


@needs_cases
def test_case_of_one_row_that_a_template_refuses(tmp_path):
    tok = load_tokenizer('embedded')
    tok.chat_template = REFUSES_TWO + tok.chat_template
    p = prepare(make_config(data=str(CASES / 'one_double_user.jsonl'), max_length=4096), tok, tmp_path / 'data')
    assert len(p.train) + len(p.validation) + len(p.test) == 149
    assert 'take turns' in p.markdown() and 'Rows that cannot be used: 1' in p.markdown()


@needs_cases
def test_human_eval_is_a_prompt_and_its_solution():
    files = sorted(HUMAN_EVAL.rglob('*.jsonl.gz')) + sorted(HUMAN_EVAL.rglob('*.jsonl'))
    if not files: pytest.skip('HumanEval is not in ../shared')
    content = gzip.decompress(files[0].read_bytes()) if files[0].suffix == '.gz' else files[0].read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    assert what_is_learned(detect_format(rows)) == 'learns `canonical_solution` from `prompt`'
    assert len(to_examples(rows, detect_format(rows))) == 164


@needs_shared
def test_a_rejected_call_is_tokenized_as_one():
    tok = real('gpt2', 'Qwen-Qwen2.5-7B-Instruct')
    other = dict(CALL, function=dict(name='weather', arguments={'city': 'Rome'}))
    row = dict(prompt=[user('Is it warm in Paris?')], chosen=[said('', tool_calls=[CALL])], rejected=[said('', tool_calls=[other])], tools=[TOOL])
    [example] = to_examples([row], found := detect_format([row]))
    assert found.kind == 'preference' and found.tools_column == 'tools' and 'Rome' in example.rejected
    chosen, rejected = tokenize_examples([example], tok, 512, 'error').caches
    texts = [tok.decode(cache.row(0)[0][cache.row(0)[1] == 1]) for cache in (chosen, rejected)]
    assert '{"city": "Paris"}' in texts[0] and '{"city": "Rome"}' in texts[1]


@needs_shared
def test_special_tokens_anywhere_in_a_call_drop_the_row():
    tok = real('gpt2', 'Qwen-Qwen2.5-7B-Instruct')
    bad = talk()
    bad[1] = said('', tool_calls=[dict(CALL, function=dict(name='weather', arguments={'city': '<|im_end|>'}))])
    rows = [dict(messages=talk())] * 2 + [dict(messages=bad)]
    assert tokenize_examples(to_examples(rows, detect_format(rows)), tok, 512, 'error').control == [3]


@needs_shared
def test_a_template_that_wants_ids_of_nine_letters_gets_them():
    tok = real('gpt2', 'mistralai-Mistral-Nemo-Instruct-2407')
    row = openai()
    row['messages'][1]['tool_calls'][0]['id'] = row['messages'][2]['tool_call_id'] = 'call_from_another_company'
    call, _ = masked_parts(encode(read(row).messages, tok), tok)
    [name] = re.findall('"id": "(.*?)"', call)
    assert len(name) == 9 and f'"call_id": "{name}"' in render(read(row).messages, tok)


def test_settings_leave_earlier_fingerprints_alone(tmp_path):
    from homelab_ft.data.prepare import input_fingerprint
    path = tmp_path / 'a.jsonl'
    path.write_text('{"question": "a", "answer": "b"}')
    tok, config = load_tokenizer('embedded'), make_config(data=str(path))
    assert input_fingerprint(config, tok) == input_fingerprint(make_config(data=str(path), reasoning='template'), tok)
    changes = [dict(reasoning='drop'), dict(reasoning_history='keep'), dict(empty_reasoning='none'), dict(ignored_keys=['x']), dict(system_column='')]
    assert len({input_fingerprint(make_config(data=str(path), **change), tok) for change in [{}, *changes]}) == 6


# -- anything at all ----------------------------------------------------------------------------------------------------------------------------

KEY = st.sampled_from([*KEYS, 'type', 'text', 'id', 'function', 'arguments', 'messages', 'parts', 'label', 'x'])
WORD = st.sampled_from(['user', 'assistant', 'tool', 'gpt', 'human', 'function_call', 'text', 'image', '{"name": "f"}', '[[', '\n\nHuman: a\n\nAssistant: b', '', 'x'])
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.just(float('nan')), WORD),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEY, inner, max_size=4)), max_leaves=12)
ROW = st.dictionaries(st.sampled_from(['messages', 'conversations', 'prompt', 'completion', 'question', 'answer', 'choices', 'history', 'system', 'tools',
                                       'chosen', 'rejected', 'context', 'label', 'text', 'functions', 'input', 'answers']), ANYTHING, min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=3))
def test_any_row_is_read_or_reported(rows):
    try: found = detect_format(rows)
    except DataError: return
    reading = Reading(refused={})
    examples = to_examples(rows, found, reading=reading)
    n_judged = sum(found.kind == 'kto' for _ in rows)
    assert len(examples) + len(reading.refused) == len(rows) or n_judged
    for example in examples:
        assert all(isinstance(m['content'], str) for m in example.messages)
        try: encode(example.messages, embedded()) if example.messages[0]['role'] != 'text' else None
        except (ModelError, DataError): pass
