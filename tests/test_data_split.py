"data.split: no group on both sides, every label in training, the same seed gives the same split."
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import DataError, Example
from homelab_ft.data.clean import clean
from homelab_ft.data.formats import detect_format, to_examples
from homelab_ft.data.load import load_rows
from homelab_ft.data.split import check_labels, split, split_half

SHARED = Path(__file__).resolve().parent.parent.parent / 'shared' / 'data'
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason='the shared data are not here')


def example(prompt, label=None, row=0):
    return Example([{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': label or 'x'}], label, row)


cells_of_rows = st.lists(st.tuples(st.integers(0, 30), st.sampled_from(['a', 'b', 'c', None]), st.integers(0, 40)), min_size=2, max_size=60)


def build(cells):
    "Examples and their near-duplicate groups; prompts repeat too."
    examples = [example(f'prompt {p}', label, i) for i, (p, label, _) in enumerate(cells)]
    return examples, [group for _, _, group in cells]


def share_nothing(a, b, groups):
    "No prompt and no group is in both parts."
    no_prompt = not {e.prompt for e in a} & {e.prompt for e in b}
    return no_prompt and not {groups[e.row] for e in a} & {groups[e.row] for e in b}


@settings(max_examples=100, deadline=None)
@given(cells_of_rows, st.floats(0.05, 0.6), st.integers(0, 100))
def test_split(cells, fraction, seed):
    examples, groups = build(cells)
    try: train, held = split(examples, groups, fraction, seed)
    except DataError as e: assert 'next step' in str(e); return
    assert sorted(e.row for e in train + held) == [e.row for e in examples]
    assert [e.row for e in train] == sorted(e.row for e in train) and train and held
    assert share_nothing(train, held, groups)
    assert {e.label for e in held} <= {e.label for e in train}
    assert len(held) <= round(fraction * len(examples))
    assert split(examples, groups, fraction, seed) == (train, held)


@settings(max_examples=100, deadline=None)
@given(cells_of_rows, st.integers(0, 100))
def test_split_half(cells, seed):
    examples, groups = build(cells)
    try: validation, test = split_half(examples, groups, seed)
    except DataError as e: assert 'next step' in str(e); return
    assert validation and test and sorted(e.row for e in validation + test) == [e.row for e in examples]
    assert share_nothing(validation, test, groups)


@settings(max_examples=50, deadline=None)
@given(st.integers(20, 200), st.floats(0.05, 0.5), st.integers(1, 8))
def test_shares_are_met_where_nothing_is_related(n, fraction, n_labels):
    examples = [example(f'p{i}', f'label {i % n_labels}', i) for i in range(n)]
    train, held = split(examples, list(range(n)), fraction)
    assert abs(len(held) - fraction * n) <= 1
    whole, out = Counter(e.label for e in examples), Counter(e.label for e in held)
    assert all(abs(out[l] - fraction * whole[l]) <= 1.5 for l in whole)


def test_many_small_labels():
    examples = [example(f'p{i}', f'label {i // 13}', i) for i in range(77 * 13)]
    train, held = split(examples, list(range(len(examples))))
    assert len(held) == 150
    assert set(Counter(e.label for e in held).values()) <= {1, 2}


def test_labels_with_two_examples_are_never_only_held_out():
    examples = [example(f'p{i}', f'label {i // 2}', i) for i in range(40)]
    train, held = split(examples, list(range(40)), 0.4)
    assert len(held) == 16 and {e.label for e in held} <= {e.label for e in train}


def test_a_giant_group_stays_in_training():
    examples = [example(f'p{i}', None, i) for i in range(100)]
    train, held = split(examples, [0] * 80 + list(range(1, 21)))
    assert len(held) == 15 and all(e.row >= 80 for e in held)


def test_groups_with_different_labels():
    examples = [example('a', 'x', 0), example('b', 'y', 1), example('c', 'x', 2), example('d', 'x', 3), example('e', 'x', 4)]
    for seed in range(20):
        train, held = split(examples, [0, 0, 1, 2, 3], 0.4, seed)
        assert 'y' in {e.label for e in train} and len(held) == 2 and {e.row for e in held} <= {2, 3, 4}


@pytest.mark.parametrize('labels, kept', [(['a', 'a', 'b', 'b'], [0, 1, 2, 3]), (['a', 'a', 'b'], [0, 1]), ([None, None], [0, 1]), (['a', 'a', None], [0, 1, 2])])
def test_rare_labels(labels, kept):
    examples = [example(f'p{i}', label, i + 1) for i, label in enumerate(labels)]
    assert [e.row - 1 for e in check_labels(examples, 'drop')] == kept
    if len(kept) < len(labels):
        with pytest.raises(DataError, match=r'b \(row 3\)') as e: check_labels(examples)
        assert 'rare_labels=drop' in str(e.value)
    else: assert check_labels(examples) == examples


def test_only_rare_labels_is_an_error_even_when_they_may_be_dropped():
    with pytest.raises(DataError, match='only once'): check_labels([example('p', 'a'), example('q', 'b')], 'drop')


@needs_shared
def test_banking77_splits_without_leaks():
    found = load_rows(SHARED / 'classify' / 'banking77' / 'train.csv', max_rows=2000)
    examples, report = clean(to_examples(found, detect_format(found)))
    examples, groups = check_labels(examples, 'drop'), report.groups
    train, held = split(examples, groups)
    validation, test = split_half(held, groups)
    assert abs(len(held) - 0.15 * len(examples)) < 2 and abs(len(validation) - len(test)) < 4
    assert share_nothing(train, held, groups) and share_nothing(validation, test, groups)
    assert {e.label for e in held} <= {e.label for e in train}
