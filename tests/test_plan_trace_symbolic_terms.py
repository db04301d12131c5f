"The formula read off from traces of a toy, against traces of other sizes."
import gc

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.config import make_config
from homelab_ft.plan.trace import symbolic_terms as terms
from homelab_ft.plan.trace.ledger import Ledger
from homelab_ft.plan.trace.symbolic_terms import pair_moments, pareto_front, phase_bytes, products, value

SIZES = dict(n=512, r=16, i=256)


def traced(policy, layers, n, r, i):
    "The ledger of two steps of a small Llama, uncompiled."
    dry_run = pytest.importorskip('homelab_ft.plan.trace.dry_run')
    raw = dict(model_type='llama', hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64, intermediate_size=i, vocab_size=1024,
               num_hidden_layers=layers, max_position_embeddings=2**20)
    config = make_config(model='Llama-3.1-8B', method='lora', lora_r=r, max_length=n, per_device_train_batch_size=2, torch_compile=False, padding_free=True)
    gc.collect()
    gc.disable()        # storages are freed in order
    try:
        tracer, _ = dry_run.dry_run(config, dry_run.DryRunSpec(hf_config=raw, policies=[policy] * layers, bucket=(2 * n, 512, 8), gradients=False))
        return Ledger(list(tracer.ledger.events), list(tracer.ledger.phases), dict(tracer.ledger.categories))
    finally: gc.enable()


def traced_moments(policy, layers):
    "Every moment as a sum of products."
    doubled = {x: traced(policy, layers, **SIZES | {x: 2 * n}) for x, n in SIZES.items()}
    book = traced(policy, layers, **SIZES)
    return terms.moments(book, terms.storage_products(book, doubled, SIZES))


def most(book):
    "Bytes at the peak of every phase, from its beginning on, added up event by event."
    now, found, key, marks = 0, {}, (0, 'load'), {}
    for i, *where in book.phases: marks.setdefault(i, []).append(tuple(where))
    for i, (n, _) in enumerate(book.events):
        for key in marks.get(i, ()): found[key] = max(found.get(key, 0), now)
        now += n
        found[key] = max(found.get(key, 0), now)
    return found


@pytest.mark.parametrize('policy', ['none', 'layer'])
def test_the_formula_of_a_toy_says_what_a_trace_of_any_size_says(policy):
    two, three = traced_moments(policy, 2), traced_moments(policy, 3)
    for layers, sizes in [(5, dict(n=1536, r=48, i=704)), (2, dict(n=320, r=64, i=1024))]:
        wanted = most(traced(policy, layers, **sizes))
        for phase in ('forward', 'loss', 'backward'):
            found = phase_bytes(pareto_front(pair_moments(two[1, phase], three[1, phase])), sizes, layers)
            assert found == pytest.approx(wanted[1, phase], rel=1e-3), (phase, layers)


NUMBERS = st.dictionaries(st.sampled_from(['', 'a', 'ab', 'bb', 'c']), st.integers(0, 9), max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8), st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.integers(2, 40))
def test_what_is_left_out_is_never_the_largest(pairs, a, b, c, layers):
    sizes = dict(a=a, b=b, c=c)
    kept = pareto_front(pairs)
    assert len(kept) <= len(pairs) and phase_bytes(kept, sizes, layers) == phase_bytes(pairs, sizes, layers)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(['t', 'ht', 'hi', 'qt', 'kt']), st.integers(1, 9), min_size=1, max_size=1), st.integers(2, 30), st.integers(2, 30), st.integers(2, 30))
def test_a_product_is_found_again(wanted, t, h, i):
    sizes = dict(t=t, h=h, i=i, q=5, k=7)
    bytes_ = lambda **other: round(value(wanted, sizes | other))
    assert products(bytes_(), {x: bytes_(**{x: 2 * n}) for x, n in sizes.items()}, sizes) == pytest.approx(wanted)


def test_parts_of_a_sum_are_found_again():
    sizes = dict(t=3, q=4, k=2)
    size = lambda t, q, k: 2 * t * (q + 2 * k)
    assert products(size(**sizes), {x: size(**sizes | {x: 2 * n}) for x, n in sizes.items()}, sizes) == {'qt': 2, 'kt': 4}
