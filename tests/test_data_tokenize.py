"Token caches: what goes in comes out, whatever is torn is found, no row is longer than promised."
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import homelab_ft.io
from homelab_ft.core import DataError, Example
from homelab_ft.data.chat_template import encode, load_tokenizer
from homelab_ft.data.tokenize import control_pattern, encode_text, load_cache, make_cache, save_cache, select, tokenize_examples

quick = settings(max_examples=25, deadline=None)


@lru_cache
def tok(): return load_tokenizer('embedded')


def example(text, answer, row): return Example([{'role': 'user', 'content': text}, {'role': 'assistant', 'content': answer}], answer, row)


rows_of_tokens = st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 1)), max_size=9), max_size=9)


@quick
@given(rows_of_tokens)
def test_what_goes_in_comes_out(tmp_path_factory, rows):
    encoded = [([t for t, _ in row], [m for _, m in row]) for row in rows]
    path = tmp_path_factory.mktemp('cache') / 'a.safetensors'
    save_cache(make_cache(encoded, list(range(1, len(rows) + 1))), path)
    cache = load_cache(path)
    assert [(ids.tolist(), mask.tolist()) for ids, mask in map(cache.row, range(len(cache)))] == encoded
    assert (cache.input_ids.dtype, cache.mask.dtype, cache.offsets.dtype, cache.rows.dtype) == (np.int32, np.uint8, np.int64, np.int64)
    assert cache.lengths.tolist() == [len(r) for r in rows] and cache.loss_tokens == sum(m for r in rows for _, m in r)
    back = list(reversed(range(len(cache))))
    assert select(select(cache, back), back).fingerprint == cache.fingerprint


@quick
@given(cut=st.floats(0, 1, exclude_max=True), flip=st.integers(0, 10**6))
def test_every_tear_is_found(tmp_path_factory, cut, flip):
    path = tmp_path_factory.mktemp('cache') / 'a.safetensors'
    whole = save_cache(make_cache([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])], [1, 4]), path).read_bytes()
    path.write_bytes(whole[:int(cut * len(whole))])
    with pytest.raises(DataError, match='torn'): load_cache(path)
    start = 8 + int.from_bytes(whole[:8], 'little')                    # behind the header
    at = start + flip % (len(whole) - start)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << flip % 8)]) + whole[at + 1:])
    with pytest.raises(DataError, match='torn'): load_cache(path)


def test_another_safetensors_file_is_no_cache(tmp_path):
    from safetensors.numpy import save_file
    save_file({'weight': np.zeros(3)}, tmp_path / 'model.safetensors')
    with pytest.raises(DataError, match='torn or was altered'): load_cache(tmp_path / 'model.safetensors')


def test_a_failed_write_leaves_the_old_cache(tmp_path, monkeypatch):
    path = save_cache(make_cache([([1], [1])], [1]), tmp_path / 'a.safetensors')
    def no_space(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(homelab_ft.io.os, 'fsync', no_space)
    with pytest.raises(OSError): save_cache(make_cache([([2], [1])], [2]), path)
    monkeypatch.undo()
    assert load_cache(path).rows.tolist() == [1] and [p.name for p in tmp_path.iterdir()] == ['a.safetensors']


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8), limit=st.integers(16, 60),
       choice=st.sampled_from(['drop', 'truncate']))
def test_no_row_is_longer_than_promised(lengths, limit, choice):
    examples = [example('word ' * a, 'word ' * b, i) for i, (a, b) in enumerate(lengths, 1)]
    full = [encode(e.messages, tok()) for e in examples]
    try: result = tokenize_examples(examples, tok(), limit, choice)
    except DataError as e:
        assert 'no row is left' in str(e) and all(len(f.input_ids) > limit for f in full)
        return
    [cache], kept = result.caches, result.positions
    assert cache.lengths.max() <= limit and len(cache) == len(kept)
    assert cache.rows.tolist() == [examples[i].row for i in kept]
    for k, i in enumerate(kept):
        ids, mask = cache.row(k)
        assert ids.tolist() == full[i].input_ids[:limit] and mask.tolist() == full[i].mask[:limit] and mask.any()
    assert sorted(kept + [r - 1 for r in result.too_long]) == list(range(len(examples)))
    assert result.truncated == [examples[i].row for i in kept if len(full[i].input_ids) > limit] and (choice == 'truncate' or not result.truncated)


def test_too_long_says_how_many_how_long_and_which():
    examples = [example('short', 'yes', 3), example('long ' * 50, 'no', 8), example('longer ' * 80, 'no', 9)]
    with pytest.raises(DataError, match='2 of 3 rows') as e: tokenize_examples(examples, tok(), 40, 'error')
    longest = len(encode(examples[2].messages, tok()).input_ids)
    assert str(longest) in e.value.value and 'row 9' in e.value.value
    assert 'overlong_rows=drop' in e.value.next_step and f'max_length={longest}' in e.value.next_step
    assert len(tokenize_examples(examples, tok(), longest, 'error').positions) == 3


def test_control_tokens_anywhere_drop_the_row():
    special = [t.content for t in tok().added_tokens_decoder.values()]
    examples = [example('fine', 'yes', 1), *(example(f'a{s}b', 'no', 2 + i) for i, s in enumerate(special)), example('fine', f'no {special[0]}', 99)]
    examples.append(Example([{'role': 'system', 'content': special[-1]}, *examples[0].messages], 'yes', 100))
    result = tokenize_examples(examples, tok(), 64, 'error')
    assert result.positions == [0] and result.control == [e.row for e in examples[1:]]
    assert not control_pattern(tok()).search('<|no such token|> <b> </s> [INST]')


def test_nothing_left():
    with pytest.raises(DataError, match='no row is left'): tokenize_examples([example('<|eot_id|>', 'x', 1)], tok(), 64, 'drop')
    with pytest.raises(DataError, match='no row is left'): tokenize_examples([], tok(), 64, 'drop')


@given(st.text(alphabet=st.characters(blacklist_categories=('Cs',)), min_size=1, max_size=200).filter(lambda t: '<|' not in t))
@settings(max_examples=40, deadline=None)
def test_every_token_is_learned_and_the_text_comes_back(text):
    ids, mask = encode_text([{'role': 'text', 'content': text}], tok())
    assert ids[0] == tok().bos_token_id and ids[-1] == tok().eos_token_id and mask == [1] * len(ids)
    assert ids[1:-1] == tok()(text, add_special_tokens=False).input_ids
