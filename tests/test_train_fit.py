"What the layers keep is chosen so that the card is full and no fuller: measured sizes, tries, very long rows."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from homelab_ft.train.engine import memory_budget as fit

COST = dict(none=94, mlp=37, layer=8, offload=1)        # bytes that a layer keeps on the pretended card


class Gpu:
    "A card without a card: what layers keep at their policies, a pass's own needs, and an allocator's waste."
    def __init__(self, n=4, once=20, waste=1.03, cost=COST, held=0):
        self.layers, self.policies, self.tile, self.tries = [torch.nn.Identity() for _ in range(n)], [], 0, []
        self.once, self.waste, self.cost, self.count, self.resident = once, waste, cost, held, held

    def apply_policies(self, policies, tile=0): self.policies, self.tile = policies, tile

    def held(self): return self.count

    def run(self):
        self.count = self.resident
        for layer, policy in zip(self.layers, self.policies):
            hook = layer.register_forward_hook(lambda *_, size=self.cost[policy]: setattr(self, 'count', self.count + size), prepend=True)
            layer(0)
            hook.remove()
        self.count = self.resident

    def need(self, policies, tile):
        once = self.once if tile == 0 else self.once / 4 + tile / 1024
        return int(self.waste * (self.resident + once + sum(self.cost[policy] for policy in policies)))

    def measure(self, run):
        self.tries.append((tuple(self.policies), self.tile))
        return self.need(self.policies, self.tile)

    def fit(self, limit, **known): return fit.fit_policies(self.run, self.layers, self.apply_policies, limit, self.measure, self.held, **known)


@given(st.integers(0, 600), st.integers(1, 6), st.integers(0, 60), st.sampled_from([1., 1.03, 1.1]))
@settings(max_examples=150, deadline=None)
def test_what_is_chosen_fits_and_is_in_force(limit, n, once, waste):
    card = Gpu(n, once, waste)
    peak = card.fit(limit)
    if peak:
        assert peak <= limit and peak == card.need(card.policies, card.tile) and (tuple(card.policies), card.tile) == card.tries[-1]
    else:
        assert all(card.need(['offload'] * n, tile) > limit or not card.need(['offload'] * n, tile) for tile in fit.TILES)


@given(st.integers(0, 600), st.integers(1, 6), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_nothing_cheaper_in_time_would_have_fitted(limit, n, once):
    card = Gpu(n, once, waste=1.)
    if not card.fit(limit): return
    assert 'offload' not in card.policies or card.need(['layer'] * n, 0) > limit or card.need(['layer'] * n, 0) == 0
    if card.tile: assert card.need(['offload'] * n, 0) > limit
    if 0 < card.tile < 8192: assert card.need(['offload'] * n, fit.TILES[fit.TILES.index(card.tile) - 1]) > limit


def test_what_cannot_fit_is_not_tried():
    card = Gpu(n=4, held=50)
    assert card.fit(80, inputs=8) == card.need(['offload'] * 4, card.tile) and card.tries[0] == (('offload',) * 4, 0)
    whole = Gpu(n=4, held=50)
    whole.fit(85, inputs=8)
    assert whole.tries[0] == (('none',) * 4, 0)           # 50 + 4 * 8 are below 85: tried, as it might fit


def test_a_tile_as_long_as_the_pass_is_not_tried():
    card = Gpu()
    card.fit(10, inputs=8, tokens=4096)
    assert [tile for _, tile in card.tries] == [t for t in fit.TILES if t < 4096]


def test_levels_without_tiles_are_set_with_one_argument():
    "A step that knows nothing of tiles can be fitted as long as nothing needs them."
    card = Gpu()
    plain = card.apply_policies
    card.apply_policies = lambda policies: plain(policies)
    assert card.fit(400) and card.fit(26) and card.policies == ['offload'] * 4


@pytest.mark.parametrize('policy, limit', [('none', 1000), ('layer', 55), ('offload', 30)])
def test_a_pass_that_runs_out_of_memory_is_an_answer(policy, limit):
    "`peak_bytes` gives 0 for it, and the next way is tried."
    card = Gpu()
    card.measure = lambda run: need if (need := card.need(card.policies, card.tile)) <= limit else 0
    assert 0 < card.fit(limit) <= limit and card.policies[0] == policy


@given(st.integers(0, 10_000), st.tuples(*[st.integers(1, 500)] * 3), st.integers(1, 40))
def test_levels_never_cost_more_than_the_room(room, steps, n):
    base, a, b = steps
    sizes = dict(layer=base, mlp=base + a, none=base + a + b)
    policies = fit.choose_policies(room, sizes, n)
    assert len(policies) == n and sum(sizes[policy] - base for policy in policies) <= room


@pytest.mark.parametrize('error', [RuntimeError, torch.OutOfMemoryError])
def test_hooks_are_removed_even_if_a_pass_fails(error):
    layer = torch.nn.Identity()
    def broken(): raise error('full')
    if error is RuntimeError:
        with pytest.raises(error): fit.kept_bytes(broken, layer, lambda: 0)
    else: assert fit.kept_bytes(broken, layer, lambda: 0) == 2**62
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_a_card_that_is_full_while_sizes_are_measured_recomputes_every_layer():
    card = Gpu(n=4, once=20, waste=1.)
    run = card.run
    def full():
        if 'none' in card.policies or 'mlp' in card.policies: raise torch.OutOfMemoryError('full')
        run()
    card.run = full
    assert card.fit(60) == card.need(['layer'] * 4, 0) and card.policies == ['layer'] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no card')
def test_a_pass_that_does_not_fit_is_a_zero_and_leaves_the_card_usable():
    assert fit.peak_bytes(lambda: torch.empty(2**44, device='cuda')) == 0
    assert fit.peak_bytes(lambda: torch.empty(2**24, device='cuda')) >= 2**24
