"Attention over packed sequences: masks by brute force, parity with transformers' own attention on padded batches, unsupported models."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from transformers import (Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GptOssConfig, GptOssForCausalLM,
                          Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM)

from homelab_ft.train.engine.ops import varlen_attention as attention
from homelab_ft.train.engine.ops.varlen_attention import (NAME, attend, batched_attention, block_causal_mask, masked_attention, time_kernels, unsupported_attention,
                                                          use_varlen_attention, varlen_attention)
from homelab_ft.train.engine.ops.device import DevicePort
from homelab_ft.train.engine.padded import accumulate, mean_nll
from homelab_ft.train.engine.batching import collate
from homelab_ft.train.engine.packing import collate_packed, bucket_shape

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
FAMILIES = {'llama': (LlamaConfig, LlamaForCausalLM, {}), 'qwen3': (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=8)),
            'mistral': (MistralConfig, MistralForCausalLM, dict(sliding_window=4)), 'phi3': (Phi3Config, Phi3ForCausalLM, dict(sliding_window=6)),
            'gemma3': (Gemma3TextConfig, Gemma3ForCausalLM, dict(head_dim=8, sliding_window=5, layer_types=['sliding_attention', 'full_attention']))}
UNEVEN, EVEN = [7, 13, 2, 9, 1, 4], [8, 8, 8]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def toy(name, **more):
    config, model, settings = FAMILIES[name]
    torch.manual_seed(0)
    return model(config(**SMALL, **settings, **more))


class Sequences:
    def __init__(self, lengths, seed=0):
        rng = np.random.default_rng(seed)
        self.lengths = np.array(lengths)
        self.rows = [(rng.integers(1, 96, n).astype(np.int32), (rng.random(n) < 0.6).astype(np.uint8)) for n in lengths]
    def row(self, i): return self.rows[i]
    def label_tokens(self): return [int((mask[1:] > 0).sum()) for _, mask in self.rows]
    def __len__(self): return len(self.rows)


def packed(cache, grain=16, device='cpu'):
    rows, n = list(range(len(cache))), sum(cache.label_tokens())
    arrays = collate_packed(cache, rows, bucket_shape(cache.lengths, cache.label_tokens(), rows, grain, max(cache.lengths)), int(max(cache.lengths)), n)
    return {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}


def packed_loss(model, b, longest, even=False):
    hidden = model.base_model(input_ids=b['input_ids'], position_ids=b['position_ids'], use_cache=False, cu_seqlens=b['cu_seqlens'], max_seq_len=longest,
                              equal_lengths=even).last_hidden_state[0]
    return (F.cross_entropy(model.lm_head(hidden[b['label_positions']]).float(), b['targets'], reduction='none') * b['weights']).sum()


def gradient(model):
    g = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    model.zero_grad()
    return g


def padded_result(model, cache):
    loss = accumulate(model, [collate(cache, list(range(len(cache))), 0)])[0].item()
    return loss, gradient(model)


def distance(a, b): return ((a - b).norm() / b.norm()).item()


def tensors(tokens, heads=4, groups=2, d=8, seed=0, **kw):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, h, d, generator=g).to(**kw).requires_grad_() for h in (heads, groups, groups)]


def cuts_of(lengths): return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)


# ---------------------------------------------------------------- masks and kernels

@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(-1, 6))
@settings(max_examples=80, deadline=None)
def test_the_mask_by_brute_force(lengths, window):
    row = [i for i, n in enumerate(lengths) for _ in range(n)]
    seen = [[row[i] == row[j] and 0 <= i - j and (window < 0 or i - j <= window) for j in range(len(row))] for i in range(len(row))]
    assert block_causal_mask(cuts_of(lengths), len(row), window).tolist() == seen


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(-1, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_masked_attention_is_the_formula_row_by_row(lengths, window, seed):
    q, k, v = (t.detach() for t in tensors(sum(lengths), seed=seed))
    out, cuts = masked_attention(q, k, v, cuts_of(lengths), 0.3, window), cuts_of(lengths).tolist()
    for a, b in zip(cuts, cuts[1:]):
        for i in range(a, b):
            first = a if window < 0 else max(a, i - window)
            for h in range(4):
                p = torch.softmax(0.3 * k[first:i + 1, h // 2] @ q[i, h], 0)
                assert (p @ v[first:i + 1, h // 2] - out[i, h]).abs().max() < 1e-5


@pytest.mark.parametrize('length', [1, 4, 12])
def test_parity_of_the_batch_with_the_mask(length):
    a, b = tensors(12), tensors(12)
    outs = batched_attention(*a, length, 0.3), masked_attention(*b, torch.arange(0, 13, length, dtype=torch.int32), 0.3)
    for out in outs: out.square().sum().backward()
    assert outs[0].shape == (12, 4, 8) and (outs[0] - outs[1]).abs().max() < 1e-6
    assert all((x.grad - y.grad).norm() <= 1e-5 * max(1, y.grad.norm()) for x, y in zip(a, b))


def test_values_may_be_narrower_than_keys():
    q, k, _ = tensors(12)
    v = torch.randn(12, 2, 6)
    even, masked = batched_attention(q, k, v, 4, 0.3), masked_attention(q, k, v, torch.tensor([0, 4, 8, 12]), 0.3)
    assert even.shape == masked.shape == (12, 4, 6) and (even - masked).abs().max() < 1e-6


@pytest.mark.parametrize('grouped', [True, False])
def test_arguments_of_the_variable_length_kernel(monkeypatch, grouped):
    seen = {}
    def fake(q, k, v, *rest, **more):
        seen.update(more, heads=k.shape[1], rest=rest)
        return q
    monkeypatch.setattr(attention, 'varlen_attn', fake)
    monkeypatch.setattr(attention, 'SUPPORTS_GQA', grouped)
    cuts = cuts_of([5, 3])
    varlen_attention(*tensors(8), cuts, 5, 0.3, window=2)
    assert seen.pop('rest') == (cuts, cuts, 5, 5)
    assert seen == dict(scale=0.3, window_size=(2, 0), heads=2 if grouped else 4, **({'enable_gqa': True} if grouped else {}))


@pytest.mark.parametrize('kernel', ['FLASH_ATTENTION', 'CUDNN_ATTENTION', 'varlen', 'sdpa'])
def test_a_preferred_kernel_changes_speed_only_and_only_inside(kernel):
    flags = lambda: [getattr(torch.backends.cuda, f'{k}_sdp_enabled')() for k in ('flash', 'cudnn', 'mem_efficient', 'math')]
    before, qkv = flags(), tensors(12)
    out = batched_attention(*qkv, 4, 0.3)
    with attention.prefer(kernel):
        assert flags() == ([True, kernel == 'CUDNN_ATTENTION', True, True] if kernel.isupper() else before)
        assert (batched_attention(*qkv, 4, 0.3) - out).abs().max() < 1e-6
    assert flags() == before


# ---------------------------------------------------------------- attend

def call(q, k, v, **more):
    layer = SimpleNamespace(is_causal=True, num_key_value_groups=q.shape[1] // k.shape[1])
    return attend(layer, *(t.transpose(0, 1)[None] for t in (q, k, v)), None, **more)[0]


@pytest.mark.parametrize('equal, window, has_flash, expected', [(False, None, False, 'masked'), (True, None, False, 'batched'), (True, 4, False, 'masked'), (True, 8, False, 'batched'),
                                                             (False, None, True, 'varlen'), (True, None, True, 'batched'), (True, 4, True, 'varlen')])
def test_which_kernel_is_used(monkeypatch, equal, window, has_flash, expected):
    used = []
    for name in ('masked', 'batched', 'varlen'): monkeypatch.setattr(attention, f'{name}_attention', lambda q, *_, name=name: used.append(name) or q)
    monkeypatch.setattr(DevicePort, 'has_flash_attention', lambda self, q, v: has_flash)
    call(*tensors(24), cu_seqlens=cuts_of(EVEN), max_seq_len=8, equal_lengths=equal, sliding_window=window)
    assert used == [expected]


def test_a_window_counts_the_token_itself_and_max_seq_len_is_optional():
    q, k, v = tensors(12)
    for more in (dict(max_seq_len=7), {}):
        out = call(q, k, v, cu_seqlens=cuts_of([7, 5]), sliding_window=3, scaling=0.3, **more)
        assert (out[0] - masked_attention(q, k, v, cuts_of([7, 5]), 0.3, window=2)).abs().max() < 1e-6


@pytest.mark.parametrize('more', [dict(softcap=50.), dict(s_aux=torch.zeros(4)), dict(position_bias=torch.zeros(1)), dict(dropout=0.1), dict(indices=torch.zeros(1))])
def test_arguments_that_change_attention_are_refused(more):
    with pytest.raises(ValueError, match=next(iter(more))): call(*tensors(8), cu_seqlens=cuts_of([8]), **more)


# ---------------------------------------------------------------- models

@pytest.mark.parametrize('lengths', [UNEVEN, EVEN])
@pytest.mark.parametrize('name', FAMILIES)
def test_parity_of_loss_and_gradient_with_padded_batches(name, lengths):
    model, cache = toy(name), Sequences(lengths)
    loss, expected = padded_result(model, cache)
    assert model.config._attn_implementation == 'sdpa' and unsupported_attention(model) == ''
    use_varlen_attention(model)
    for grain, even in ((16, False), (1, False), *([(1, True)] if lengths is EVEN else [])):
        result = packed_loss(model, packed(cache, grain), max(lengths), even)
        result.backward()
        assert abs(result.item() - loss) < 1e-5 and distance(gradient(model), expected) < 1e-5, (grain, even)


def test_padding_to_a_bucket_changes_nothing():
    model, cache = toy('llama'), Sequences(UNEVEN)
    use_varlen_attention(model)
    losses = []
    for grain in (1, 16, 64):
        b = packed(cache, grain)
        hidden = model.base_model(input_ids=b['input_ids'], position_ids=b['position_ids'], use_cache=False, cu_seqlens=b['cu_seqlens'], max_seq_len=13).last_hidden_state
        assert hidden.isfinite().all()
        losses.append(packed_loss(model, b, 13).item())
    assert max(losses) - min(losses) < 1e-6


def test_parity_of_compiled_layers():
    model, cache = toy('qwen3'), Sequences(UNEVEN)
    loss, expected = padded_result(model, cache)
    use_varlen_attention(model)
    for layer in model.model.layers: layer.forward = torch.compile(type(layer).forward, fullgraph=True, backend='aot_eager').__get__(layer)
    result = packed_loss(model, packed(cache), 13)
    result.backward()
    assert abs(result.item() - loss) < 1e-5 and distance(gradient(model), expected) < 1e-5


def test_transformers_builds_no_mask_for_packed_sequences(monkeypatch):
    from transformers import masking_utils
    model = toy('mistral')
    use_varlen_attention(model)
    def built(*_, **__): raise AssertionError('a mask was built')
    monkeypatch.setattr(masking_utils, 'find_packed_sequence_indices', built)
    packed_loss(model, packed(Sequences(UNEVEN)), 13)
    with pytest.raises(AssertionError): model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)     # the check does check


@pytest.mark.parametrize('name', ['mistral', 'gemma3'])
def test_padded_batches_are_exactly_as_before(name):
    model, cache = toy(name).eval(), Sequences(UNEVEN)
    ids, seen = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(0)), torch.ones(2, 12, dtype=torch.long)
    seen[0, :3] = 0
    def results():
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=seen).logits
            tokens = model.generate(input_ids=ids, attention_mask=seen, max_new_tokens=6, do_sample=False, pad_token_id=0)
        return logits, tokens, mean_nll(model, cache)
    before = results()
    use_varlen_attention(model)
    after = results()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2] == after[2]


def test_use_varlen_attention_twice_is_once():
    model = toy('llama')
    use_varlen_attention(model), use_varlen_attention(model)
    assert len(model.base_model._forward_pre_hooks) == 1 and model.config._attn_implementation == NAME


def test_a_model_set_back_to_sdpa_is_itself_again():
    model = toy('mistral').eval()
    ids = torch.randint(1, 96, (2, 12))
    before = model(input_ids=ids).logits
    use_varlen_attention(model)
    model.config._attn_implementation = 'sdpa'
    assert torch.equal(model(input_ids=ids).logits, before)
    hooked = attention.skip_mask_creation(model.base_model, (), dict(cu_seqlens=torch.zeros(2), attention_mask=None))
    assert hooked[1]['attention_mask'] is None


# ---------------------------------------------------------------- unsupported models

def test_unsupported_models_and_their_reasons():
    small = lambda config, model, **more: model(config(**SMALL, **more))
    assert unsupported_attention(small(Gemma2Config, Gemma2ForCausalLM, head_dim=8)) == 'the model sets attn_logit_softcapping'
    assert unsupported_attention(small(GptOssConfig, GptOssForCausalLM, head_dim=8, num_local_experts=2, num_experts_per_tok=1)) == 'the model has attention sinks'
    assert unsupported_attention(small(Lfm2Config, Lfm2ForCausalLM, layer_types=['conv', 'full_attention'])) == 'the model has layers of type conv'
    assert unsupported_attention(toy('llama', attention_dropout=0.1)) == 'the model sets attention_dropout'
    model = toy('llama')
    model.config.is_causal = False
    assert unsupported_attention(model) == 'the model is not causal'


def test_heterogeneous_models_are_unsupported():
    stub = SimpleNamespace(_supports_attention_backend=True, config=SimpleNamespace(is_heterogeneous=True), named_parameters=list)
    assert unsupported_attention(stub) == "the model's layers have different settings"


@pytest.mark.parametrize('capability, reason', [((7, 5), 'older than Ampere'), ((8, 0), ''), ((8, 9), ''), ((12, 0), '')])
def test_gpus_without_flash_attention_are_unsupported(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    stub = SimpleNamespace(_supports_attention_backend=True, config=SimpleNamespace(), named_parameters=list, device=torch.device('cuda', 0))
    assert (reason in unsupported_attention(stub)) if reason else unsupported_attention(stub) == ''


# ---------------------------------------------------------------- on a GPU

@cuda
@pytest.mark.parametrize('window', [-1, 3])
@pytest.mark.parametrize('groups', [4, 2, 1])
def test_parity_of_the_variable_length_kernel_with_the_mask(groups, window):
    lengths = [70, 1, 0, 33, 24, 0, 0]
    a, b = (tensors(128, groups=groups, d=64, device='cuda', dtype=t) for t in (torch.bfloat16, torch.float32))
    for x, y in zip(a, b): y.data.copy_(x.data)      # the same values, rounded once
    cuts = cuts_of(lengths).cuda()
    outs = varlen_attention(*a, cuts, 70, 0.125, window), masked_attention(*b, cuts, 0.125, window)
    for out in outs: out.float().square().sum().backward()
    assert distance(outs[0].float(), outs[1]) < 0.01
    assert all(distance(x.grad.float(), y.grad) < 0.02 for x, y in zip(a, b))


@cuda
@pytest.mark.parametrize('name', FAMILIES)
def test_parity_of_bf16_models_on_a_gpu(name):
    model, cache = toy(name).cuda().bfloat16(), Sequences(UNEVEN)
    reference = toy(name).cuda()
    for p, q in zip(reference.parameters(), model.parameters()): p.data.copy_(q.data)
    _, exact = padded_result(reference, cache)
    _, padded = padded_result(model, cache)
    use_varlen_attention(model)
    packed_loss(model, packed(cache, device='cuda'), 13).backward()
    assert distance(gradient(model), exact) < 1.5 * distance(padded, exact) + 0.01


@cuda
def test_kernels_are_timed_on_a_gpu():
    times = time_kernels((4, 2), 64, 2, 128, torch.bfloat16)
    assert times and set(times) <= {'FLASH_ATTENTION', 'CUDNN_ATTENTION'} and list(times.values()) == sorted(times.values()) and min(times.values()) > 0


