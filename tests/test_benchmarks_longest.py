"The benchmark of the longest sequence, without a GPU: its search, and its two steps over a toy model."
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

FOLDER = Path(__file__).resolve().parent.parent / 'benchmarks' / 'train'


@pytest.fixture(scope='module')
def longest():
    sys.path.insert(0, str(FOLDER))
    try: import longest
    except ModuleNotFoundError as e: pytest.skip(f'the benchmark needs {e.name}')
    finally: sys.path.remove(str(FOLDER))
    return longest


@pytest.fixture
def no_card(monkeypatch):
    "Calls to a card that do nothing."
    for name in ('empty_cache', 'reset_peak_memory_stats'): monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ('memory_allocated', 'max_memory_allocated', 'memory_reserved', 'max_memory_reserved'): monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (2**34, 2**34))
    monkeypatch.setattr(torch.cuda, 'get_per_process_memory_fraction', lambda: 1., raising=False)
    monkeypatch.setattr(torch.cuda, 'host_memory_stats', lambda: {}, raising=False)


def searched(longest, monkeypatch, limit, first, seconds=1e9):
    "The row of a search on a pretended card that holds `limit` tokens, begun at `first`, and what it tried."
    tried, forgotten = [], []
    def attempt(step, optimizer, tokens, tile, room):
        tried.append(tokens)
        return tokens / 1e6 if tokens <= limit else 0
    step = SimpleNamespace(parameters=[torch.nn.Parameter(torch.zeros(1))], model=torch.nn.Identity(), drop_gradients=lambda: forgotten.append(1))
    for name, value in dict(attempt=attempt, load=lambda path: (None, 0), by_hand=lambda *a: step, guess=lambda *a: first).items(): monkeypatch.setattr(longest, name, value)
    row = longest.search('', 24., seconds, 2048, 0)
    assert len(forgotten) == sum(n > limit for n in tried[1:])      # what a step that broke off left
    return row, tried[1:]


@pytest.mark.parametrize('limit, first', [(110_000, 150_000), (150_000, 110_000), (5000, 4096), (4096, 4096), (300_000, 20_000)])
def test_a_search_ends_at_the_longest_row_to_two_percent(longest, monkeypatch, no_card, limit, first, capsys):
    row, tried = searched(longest, monkeypatch, limit, first)
    assert row['longest'] <= limit < row['too_long'] and row['too_long'] - row['longest'] <= max(1024, limit / 50)
    assert len(set(tried)) == len(tried) <= 40 and all(t % 1024 == 0 for t in tried)
    assert row['microseconds_per_token'] == pytest.approx(1, abs=.1)


def test_a_search_stops_when_time_is_up_or_nothing_fits(longest, monkeypatch, no_card, capsys):
    assert searched(longest, monkeypatch, 10**6, 10_000, seconds=0)[0]['longest'] == 0
    row, tried = searched(longest, monkeypatch, 0, 4096)
    assert row['longest'] == 0 and tried[-1] == 1024


@given(st.integers(1, 500), st.integers(1, 500))
@settings(max_examples=60, deadline=None)
def test_the_next_try_lies_between(longest, low, more):
    low, high = low * 1024, (low + more) * 1024
    if not longest.narrowed(low, high): assert low < longest.next_tokens(low, high) < high


def toy(_=None):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    model = get_peft_model(model, LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM')).train()
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize('tile', [None, 64])
def test_two_steps_over_one_row(longest, monkeypatch, no_card, tile):
    "Levels given by hand and chosen by the step train alike."
    monkeypatch.setattr(longest, 'load', toy)
    monkeypatch.setattr(torch, 'compile', lambda f, **_: f)
    row = longest.train('', 24., 300, tile, 10**6)
    assert len(row['losses']) == 2 and row['losses'][0] == pytest.approx(6, abs=.2) and row['losses'][1] < row['losses'][0] + .01
    assert row['max_rss_gib'] > 0 and row['microseconds_per_token'] > 0
    if tile: assert row['features']['mlp_chunk'] == 64 and row['features']['policies'] == {'offload': 2}
