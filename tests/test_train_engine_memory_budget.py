"The checkpointing policies that fit into GPU memory: measured sizes, tries, very long sequences."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from homelab_ft.train.engine import memory_budget
from homelab_ft.train.engine.memory_budget import MLP_CHUNKS, PolicySearch, kept_bytes, peak_bytes

COST = dict(none=94, mlp=37, layer=8, offload=1)        # bytes that a layer keeps on the pretended GPU


class PretendedGpu:
    "What layers keep under their policies, what else a micro-batch needs, and what the allocator wastes."
    def __init__(self, n=4, base=20, waste=1.03, resident=0):
        self.layers, self.policies, self.chunk, self.tries = [torch.nn.Identity() for _ in range(n)], [], 0, []
        self.base, self.waste, self.count, self.resident = base, waste, resident, resident

    def apply_policies(self, policies, chunk): self.policies, self.chunk = policies, chunk

    def run(self):
        self.count = self.resident
        for layer, policy in zip(self.layers, self.policies):
            hook = layer.register_forward_hook(lambda *_, size=COST[policy]: setattr(self, 'count', self.count + size), prepend=True)
            layer(0)
            hook.remove()
        self.count = self.resident

    def need(self, policies, chunk):
        base = self.base if chunk == 0 else self.base / 4 + chunk / 1024
        return int(self.waste * (self.resident + base + sum(COST[policy] for policy in policies)))

    def measure(self, run):
        self.tries.append((tuple(self.policies), self.chunk))
        return self.need(self.policies, self.chunk)

    def fit(self, limit, **known):
        return PolicySearch(self.run, self.layers, self.apply_policies, limit, self.measure, lambda: self.count, **known).fit()


@given(st.integers(0, 600), st.integers(1, 6), st.integers(0, 60), st.sampled_from([1., 1.03, 1.1]))
@settings(max_examples=60, deadline=None)
def test_the_result_fits_and_is_applied(limit, n, base, waste):
    gpu = PretendedGpu(n, base, waste)
    if peak := gpu.fit(limit):
        assert peak <= limit and peak == gpu.need(gpu.policies, gpu.chunk) and (tuple(gpu.policies), gpu.chunk) == gpu.tries[-1]
    else:
        assert all(gpu.need(['offload'] * n, chunk) > limit or not gpu.need(['offload'] * n, chunk) for chunk in MLP_CHUNKS)


@given(st.integers(0, 600), st.integers(1, 6), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_nothing_faster_would_have_fitted(limit, n, base):
    gpu = PretendedGpu(n, base, waste=1.)
    if not gpu.fit(limit): return
    assert 'offload' not in gpu.policies or gpu.need(['layer'] * n, 0) > limit or gpu.need(['layer'] * n, 0) == 0
    if gpu.chunk: assert gpu.need(['offload'] * n, 0) > limit
    if 0 < gpu.chunk < 8192: assert gpu.need(['offload'] * n, MLP_CHUNKS[MLP_CHUNKS.index(gpu.chunk) - 1]) > limit


def test_what_cannot_fit_is_not_tried():
    gpu = PretendedGpu(resident=50)
    assert gpu.fit(80, input_bytes=8) == gpu.need(['offload'] * 4, gpu.chunk) and gpu.tries[0] == (('offload',) * 4, 0)
    larger = PretendedGpu(resident=50)
    larger.fit(85, input_bytes=8)
    assert larger.tries[0] == (('none',) * 4, 0)           # 50 + 4 * 8 are below 85: tried, as it might fit
    short = PretendedGpu()
    short.fit(10, input_bytes=8, tokens=4096)
    assert [chunk for _, chunk in short.tries] == [c for c in MLP_CHUNKS if c < 4096]


@pytest.mark.parametrize('policy, limit', [('none', 1000), ('layer', 55), ('offload', 30)])
def test_running_out_of_memory_is_an_answer(policy, limit):
    "`peak_bytes` returns 0 for it, and the next way is tried."
    gpu = PretendedGpu()
    gpu.measure = lambda run: need if (need := gpu.need(gpu.policies, gpu.chunk)) <= limit else 0
    assert 0 < gpu.fit(limit) <= limit and gpu.policies[0] == policy


def test_out_of_memory_while_sizes_are_measured_checkpoints_every_layer():
    gpu = PretendedGpu(waste=1.)
    run = gpu.run
    def full():
        if 'none' in gpu.policies or 'mlp' in gpu.policies: raise torch.OutOfMemoryError('full')
        run()
    gpu.run = full
    assert gpu.fit(60) == gpu.need(['layer'] * 4, 0) and gpu.policies == ['layer'] * 4


@pytest.mark.parametrize('error', [RuntimeError, torch.OutOfMemoryError])
def test_hooks_are_removed_even_if_a_micro_batch_fails(error):
    layer = torch.nn.Identity()
    def broken(): raise error('full')
    if error is RuntimeError:
        with pytest.raises(error): kept_bytes(broken, layer, lambda: 0)
    else: assert kept_bytes(broken, layer, lambda: 0) == 2**62
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_the_limit_is_the_smaller_of_free_memory_and_the_share_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (600, 1000))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda: 100)
    monkeypatch.setattr(torch.cuda, 'get_per_process_memory_fraction', lambda: 1., raising=False)
    assert memory_budget.memory_limit(0.) == 700 and memory_budget.memory_limit(0.1, 30) == 600
    monkeypatch.setattr(torch.cuda, 'get_per_process_memory_fraction', lambda: 0.5, raising=False)
    assert memory_budget.memory_limit(0.) == 500


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_what_does_not_fit_is_a_zero_and_leaves_the_gpu_usable():
    assert peak_bytes(lambda: torch.empty(2**44, device='cuda')) == 0
    assert peak_bytes(lambda: torch.empty(2**24, device='cuda')) >= 2**24
