"data.dedup: near duplicates are found and no others, groups are deterministic."
import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.data.dedup import common_shingles, connected, jaccard, near_duplicate_groups, normalise, shingles
from homelab_ft.data.sample.tickets import make_tickets

any_text = st.text(st.characters(exclude_categories=['Cs']), max_size=40)


def close_pairs(texts, threshold=0.7):
    "All pairs at or above the threshold, by comparing every two texts."
    texts = [normalise(t) for t in texts]
    common = common_shingles(texts)
    sets = [shingles(t) - common for t in texts]
    return {(i, j) for i, j in itertools.combinations(range(len(texts)), 2) if jaccard(sets[i], sets[j]) >= threshold}


@pytest.mark.parametrize('seed', range(2))
def test_all_pairs_are_found_and_no_other(seed):
    texts = list({normalise(t['body']): t['body'] for t in make_tickets(400, seed) if t['body'].strip()}.values())
    groups = near_duplicate_groups(texts)
    assert groups == connected(len(texts), close_pairs(texts))
    assert groups == near_duplicate_groups(texts)


def test_crowded_bands():
    texts = [f'the very same letter to the whole street, and to everybody in it, number {i}' for i in range(300)]
    assert set(near_duplicate_groups(texts[:10])) == {0}
    assert len(set(near_duplicate_groups(texts + [f'{i * 7919:09d} {i * 104729:09d} nothing' for i in range(400)]))) >= 400


@settings(max_examples=60, deadline=None)
@given(st.lists(any_text, max_size=12))
def test_groups_are_named_by_their_first(texts):
    groups = near_duplicate_groups(texts)
    assert all(g <= i and groups[g] == g for i, g in enumerate(groups))
    assert all(groups[i] == groups[j] for i, j in itertools.combinations(range(len(texts)), 2) if normalise(texts[i]) == normalise(texts[j]))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=25))))
def test_connected_is_reachability(case):
    n, pairs = case
    reach = np.eye(n, dtype=bool)
    for i, j in pairs: reach[i, j] = reach[j, i] = True
    for _ in range(n): reach = reach @ reach
    assert connected(n, pairs) == [int(np.flatnonzero(r)[0]) for r in reach]


def test_shared_frame_does_not_make_texts_alike():
    frame = 'You are a careful assistant who sorts letters into drawers, and never says more than a word. '
    words = 'apple river stone cloud window garden bridge letter copper winter summer lantern'.split()
    texts = [f'{frame}{a} {b}' for a, b in itertools.permutations(words, 2)]
    assert len(set(near_duplicate_groups(texts))) > len(texts) // 4
    assert set(near_duplicate_groups([frame + 'x', frame + 'y'])) == {0}      # two texts are too few to know what is common
