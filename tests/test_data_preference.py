"Preference data: every common form of it, and nothing of it lost or crossed on the way to the caches."
import csv
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings as tries, strategies as st

from homelab_ft.core import DataError
from homelab_ft.config import make_config
from homelab_ft.data.chat_template import load_tokenizer
from homelab_ft.data.formats import detect_format
from homelab_ft.data.preference import PreferencePairs, answer_span
from homelab_ft.data.prepare import PARTS, load_prepared, prepare


@pytest.fixture(scope='module')
def tok(): return load_tokenizer('embedded')


def message(role, text): return {'role': role, 'content': text}


def rows_of(n):
    return [dict(prompt=f'What is {i} times {i + 7}, and {"why" * (i % 5)}?', chosen=f'It is {i * (i + 7)}.', rejected=f'Perhaps {i}.') for i in range(n)]


FORMS = {
    'text': lambda r: r,
    'prompt as messages': lambda r: dict(prompt=[message('user', r['prompt'])], chosen=[message('assistant', r['chosen'])], rejected=[message('assistant', r['rejected'])]),
    'implicit prompt': lambda r: {k: [message('user', r['prompt']), message('assistant', r[k])] for k in ('chosen', 'rejected')},
    'both': lambda r: dict(prompt=r['prompt']) | {k: [message('user', r['prompt']), message('assistant', r[k])] for k in ('chosen', 'rejected')},
    'from/value': lambda r: {k: [{'from': 'human', 'value': r['prompt']}, {'from': 'gpt', 'value': r[k]}] for k in ('chosen', 'rejected')},
    'question': lambda r: dict(question=r['prompt'], chosen=r['chosen'], rejected=r['rejected'], score=3),
    'instruction': lambda r: dict(Instruction=r['prompt'], Chosen=r['chosen'], Rejected=r['rejected']),
}


def write(path, rows):
    if path.suffix == '.csv':
        with open(path, 'w', newline='', encoding='utf-8') as f:
            out = csv.DictWriter(f, list(rows[0]))
            out.writeheader()
            out.writerows([{k: v if isinstance(v, str | int) else json.dumps(v) for k, v in r.items()} for r in rows])
    else: path.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    return str(path)


def config_of(path, **settings): return make_config(**dict(data=path, objective='dpo', overlong_rows='drop', max_length=128) | settings)


@given(st.lists(st.booleans(), max_size=30))
@tries(max_examples=200, deadline=None)
def test_answer_is_the_last_run_of_ones(bits):
    text = ''.join('1' if b else '0' for b in bits)
    runs = list(re.finditer('1+', text))
    assert answer_span(np.array(bits, dtype=np.uint8)) == (runs[-1].span() if runs else (0, 0))


@pytest.mark.parametrize('suffix', ['.jsonl', '.csv'])
@pytest.mark.parametrize('form', FORMS)
def test_every_form_gives_the_same_caches(tmp_path, tok, form, suffix):
    rows = rows_of(40)
    found = prepare(config_of(write(tmp_path / f'a{suffix}', [FORMS[form](r) for r in rows])), tok, tmp_path / 'a')
    expected = prepare(config_of(write(tmp_path / 'b.jsonl', rows)), tok, tmp_path / 'b')
    assert found.dataset_format.kind == 'preference'
    assert {n: c.fingerprint for n, c in found.caches.items()} == {n: c.fingerprint for n, c in expected.caches.items()}


def test_pairs_are_not_crossed_and_no_prompt_is_on_both_sides(tmp_path, tok):
    rows = rows_of(60)
    rows += [dict(rows[i], rejected='No idea.') for i in range(20)]        # the same prompt, judged against another answer
    made = prepare(config_of(write(tmp_path / 'a.jsonl', rows)), tok, tmp_path / 'a')
    again = load_prepared(tmp_path / 'a')
    where = {}
    for part in PARTS:
        pairs = PreferencePairs(getattr(again, part), again.rejected[f'{part}_rejected'])
        assert pairs.chosen.rows.tolist() == pairs.rejected.rows.tolist()
        for i, row in enumerate(pairs.chosen.rows.tolist()):
            prompt, chosen, rejected = (tok.decode(ids, skip_special_tokens=True) for ids in pairs.pair(i))
            expected = rows[row - 1]
            assert (chosen, rejected) == (expected['chosen'], expected['rejected']) and expected['prompt'] in prompt
            where.setdefault(expected['prompt'], set()).add(part)
    assert made.rows['cleaned'] == 80 and all(len(parts) == 1 for parts in where.values())
    assert sum(made.rows[p] for p in PARTS) == 80


def test_useless_judgements_are_dropped_and_reported(tmp_path, tok):
    rows = rows_of(40)
    rows += [dict(rows[0], rejected=rows[0]['chosen'] + ' '), dict(rows[1], chosen=rows[1]['rejected'], rejected=rows[1]['chosen']), dict(rows[2], rejected=' '),
             dict(rows[3], rejected='ends <|eot_id|> early'), dict(rows[4], rejected='very long ' * 200), dict(rows[5])]
    made = prepare(config_of(write(tmp_path / 'a.jsonl', rows)), tok, tmp_path / 'a')
    report = '\n'.join(map(str, made.report))
    kept = {r for p in PARTS for r in getattr(made, p).rows.tolist()}
    assert kept == set(range(1, 41)) - {2}
    for line in (r'same answers +1 .* 41', r'both ways +2 .* 2, 42', r'blank +1 .* 43', r'control tokens in the text +1 \(row 44\)', r'too long +1 \(row 45\)', r'duplicate +1 .* 46'):
        assert re.search(line, report), line


def test_too_long_rejected_answer_is_an_error_by_default(tmp_path, tok):
    path = write(tmp_path / 'a.jsonl', [*rows_of(20), dict(prompt='How?', chosen='So.', rejected='very long ' * 200)])
    with pytest.raises(DataError, match='1 of 21 rows are longer than max_length'): prepare(config_of(path, overlong_rows='error'), tok, tmp_path / 'a')
    assert not (tmp_path / 'a').exists()


def test_test_data_has_pairs_too(tmp_path, tok):
    rows = rows_of(50)
    made = prepare(config_of(write(tmp_path / 'a.jsonl', rows[:40] + rows[45:46]), test_data=write(tmp_path / 'b.jsonl', rows[40:])), tok, tmp_path / 'a')
    assert made.rows['test'] == 10 == len(made.rejected['test_rejected']) and [e.rejected for e in made.test_examples] == [r['rejected'] for r in rows[40:]]
    assert 41 not in made.train.rows.tolist() + made.validation.rows.tolist()      # asked in the test
    with pytest.raises(DataError, match='test_data: columns of data are missing'):
        prepare(config_of(write(tmp_path / 'a.jsonl', rows[:40]), test_data=write(tmp_path / 'c.jsonl', [dict(prompt='a', chosen='b')])), tok, tmp_path / 'c')


@pytest.mark.parametrize('settings, error', [(dict(chosen_column='choosen'), 'did you mean chosen'), (dict(dataset_format='preference', chosen_column='prompt'), None),
                                            (dict(dataset_format='prompt_completion', completion_column='chosen'), 'needs pairs of answers')])
def test_named_columns_and_formats(tmp_path, tok, settings, error):
    path = write(tmp_path / 'a.jsonl', rows_of(40))
    if error is None: assert detect_format(rows_of(3), config_of(path, **settings)).chosen_column == 'prompt'
    else:
        with pytest.raises(DataError, match=error): prepare(config_of(path, **settings), tok, tmp_path / 'a')
