"Batches and loss: properties, parity with the full logits of transformers for several model families, batches that do not fit into memory."
import gc
import logging
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from transformers import (CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          NanoChatConfig, NanoChatForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

from homelab_ft.config import make_config
from homelab_ft.train.engine import padded
from homelab_ft.train.engine.batching import SINGLE_SEQUENCE_OOM, batch_order, collate, in_batches
from homelab_ft.train.engine.padded import accumulate, count_labels, label_nll, mean_nll, unsupported_reason, precision
from homelab_ft.train.lora import attach_lora
from homelab_ft.train.base_model import load_base, explain_oom

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
FAMILIES = {'llama': (LlamaConfig, LlamaForCausalLM, dict(tie_word_embeddings=True)), 'qwen3': (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=8)),
            'mistral': (MistralConfig, MistralForCausalLM, dict(sliding_window=5)), 'phi3': (Phi3Config, Phi3ForCausalLM, {}),
            'gemma2': (Gemma2Config, Gemma2ForCausalLM, dict(head_dim=8, sliding_window=5)), 'granite': (GraniteConfig, GraniteForCausalLM, dict(logits_scaling=2.0))}


class Sequences:
    def __init__(self, rows): self.rows, self.lengths = rows, np.array([len(ids) for ids, _ in rows])
    def row(self, i): return self.rows[i]
    def __len__(self): return len(self.rows)


def random_rows(n=5, seed=0, vocab=96):
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        length = int(rng.integers(3, 15))
        mask = (rng.random(length) < 0.4).astype(np.uint8)
        mask[-1] = 1
        rows.append((rng.integers(1, vocab, length).astype(np.int32), mask))
    return Sequences(rows)


def reference(model, batch):
    "Mean loss over learned tokens from the model's own full logits, with the attention mask."
    logits = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], use_cache=False).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten(), ignore_index=-100, reduction='sum') / count_labels(batch)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_every_sequence_once_and_the_same_order_again(lengths, batch_size, seed, epoch):
    order = batch_order(lengths, batch_size, seed, epoch)
    assert sorted(r for b in order for r in b) == list(range(len(lengths)))
    assert all(1 <= len(b) <= batch_size for b in order) and sum(len(b) < batch_size for b in order) <= 1
    assert order == batch_order(lengths, batch_size, seed, epoch)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 95))
@settings(max_examples=30, deadline=None)
def test_collate_keeps_tokens_and_learns_only_the_mask(seed, n, pad):
    rows = random_rows(n, seed)
    batch = collate(rows, list(range(n)), pad)
    for i, (ids, mask) in enumerate(rows.rows):
        assert batch['input_ids'][i, :len(ids)].tolist() == ids.tolist() and (batch['input_ids'][i, len(ids):] == pad).all()
        assert batch['labels'][i, :len(ids)].tolist() == np.where(mask > 0, ids, -100).tolist()
        assert (batch['labels'][i, len(ids):] == -100).all() and batch['attention_mask'][i].sum() == len(ids)


@pytest.mark.parametrize('family', FAMILIES)
def test_loss_and_gradient_parity(family):
    config, cls, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = cls(config(**SMALL | extra)).eval()
    model.config._attn_implementation = 'eager' if family == 'gemma2' else 'sdpa'
    assert bool(unsupported_reason(model)) == (family in ('gemma2', 'granite'))
    batch = collate(random_rows(), [0, 1, 2, 3, 4], 0)
    expected = reference(model, batch)
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, n = accumulate(model, [batch])
    assert abs(loss.item() - expected.item()) < 1e-5 and n == count_labels(batch)
    for name, p in model.named_parameters():
        if name in wanted: assert (p.grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-8, name


@pytest.mark.parametrize('method', ['lora', 'qlora'])
def test_adapter_gradient_parity_with_plain_peft(method):
    rows = random_rows(6, vocab=4000)
    batch = collate(rows, list(range(6)), 0)
    model = attach_lora(load_base('embedded', method=method), make_config(lora_r=4))
    for name, p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=0.02)
    reference(model, batch).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    accumulate(model, [collate(rows, [0, 1], 0), collate(rows, [2, 3, 4, 5], 0)])
    for name, p in model.named_parameters():
        if p.requires_grad: assert (p.grad - wanted[name]).norm() <= 2e-5 * wanted[name].norm() + 1e-9, name


def test_validation_in_between_does_not_change_nf4_training():
    rows = random_rows(6, vocab=4000)
    batch = collate(rows, list(range(6)), 0)
    model = attach_lora(load_base('embedded', method='qlora'), make_config(lora_r=4))
    before = accumulate(model, [batch])[0].item()
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    mean_nll(model, rows)
    assert accumulate(model, [batch])[0].item() == before
    assert all((p.grad == first[n]).all() for n, p in model.named_parameters() if p.requires_grad)


def test_checkpointing_gives_the_same_gradient():
    batch, grads = collate(random_rows(6, vocab=4000), list(range(6)), 0), []
    for on in (False, True):
        model = attach_lora(load_base('embedded'), make_config(lora_r=4, lora_dropout=0.1))
        if on: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
        torch.manual_seed(1)
        accumulate(model, [batch])
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[0].norm()


def test_bfloat16_stays_near_float32():
    rows = random_rows(6, vocab=4000)
    batch = collate(rows, list(range(6)), 0)
    full, half = (attach_lora(load_base('embedded', dtype=d), make_config(lora_r=4)) for d in ('float32', 'bfloat16'))
    a, b = accumulate(full, [batch])[0], accumulate(half, [batch])[0]
    assert b.dtype == torch.float32 and abs(a - b) < 0.05
    assert {p.grad.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}


def test_a_batch_without_labels_is_worth_nothing():
    model = attach_lora(load_base('embedded'), make_config(lora_r=4))
    rows = Sequences([(np.array([5, 6, 7], np.int32), np.zeros(3, np.uint8)), (np.array([5, 6, 7], np.int32), np.array([0, 0, 1], np.uint8))])
    alone = accumulate(model, [collate(rows, [1], 0)])
    both = accumulate(model, [collate(rows, [0], 0), collate(rows, [1], 0)])
    assert alone[1] == both[1] == 1 and alone[0].item() == both[0].item()
    assert label_nll(model, collate(rows, [0], 0))[0].numel() == 0


# ---------------------------------------------------------------- soft-capped logits


def gemma(cap=30., dtype=torch.float32, **more):
    "Gemma 2 with weights so wide that the soft cap shows."
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL | dict(initializer_range=0.3, head_dim=8, sliding_window=5, final_logit_softcapping=cap, attn_implementation='eager') | more)).eval().to(dtype)


def head_calls(model):
    "Shapes of what the output head is asked, growing."
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda head, given, out: seen.append(tuple(given[0].shape[:-1])))
    return seen


@pytest.mark.parametrize('cap', [0.5, 30., None])
@pytest.mark.parametrize('peft', [False, True])
def test_softcapped_logits_are_computed_at_label_positions_only(cap, peft):
    model, batch = gemma(cap), collate(random_rows(), [0, 1, 2, 3, 4], 0)
    if peft:
        model = attach_lora(model, make_config(lora_r=4))
        for name, p in model.named_parameters():
            if 'lora_B' in name: torch.nn.init.normal_(p, std=0.1)
        model.eval()
    expected = reference(model, batch)
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    padded.full_logits_reason(model)      # asks the head once
    seen = head_calls(model)
    loss, n = accumulate(model, [batch])
    assert seen == [(n,)] and abs(loss.item() - expected.item()) <= 1e-5 * expected.item()
    assert wanted and all((p.grad - wanted[n]).norm() <= 1e-5 * wanted[n].norm() + 1e-8 for n, p in model.named_parameters() if n in wanted)
    assert bool(unsupported_reason(model)) == (cap is not None)


def test_the_soft_cap_shows_in_these_tests():
    "A cap left out would be seen."
    batch = collate(random_rows(), [0, 1, 2, 3, 4], 0)
    with torch.no_grad(): losses = [label_nll(gemma(cap), batch)[0].mean().item() for cap in (0.5, 1., 30., None)]
    assert all(abs(a - b) > 1e-3 for a, b in zip(losses, losses[1:]))


def test_softcapped_bfloat16_is_as_near_to_float32_as_full_logits():
    ours = theirs = 0.
    for seed in range(5):
        batch = collate(random_rows(8, seed), list(range(8)), 0)
        model = gemma(dtype=torch.bfloat16)
        exact = gemma(dtype=torch.bfloat16).float()
        rows, at = padded.label_positions(batch['labels'])
        full = lambda m: F.cross_entropy(m(input_ids=batch['input_ids'], use_cache=False).logits[rows, at].float(), batch['labels'][rows, at + 1], reduction='none')
        with torch.no_grad():
            want, got = full(exact), label_nll(model, batch)[0]
            with precision(model): plain = full(model)
        ours, theirs = ours + (got - want).abs().sum().item(), theirs + (plain - want).abs().sum().item()
    assert 0 < ours <= 1.1 * theirs


@pytest.mark.parametrize('config, cls, extra', [(CohereConfig, CohereForCausalLM, 'logit_scale'), (GraniteConfig, GraniteForCausalLM, 'logits_scaling'),
                                                (NanoChatConfig, NanoChatForCausalLM, 'final_logit_softcapping')])
def test_what_is_unknown_keeps_full_logits(config, cls, extra, caplog):
    "Scaled logits, and a family whose soft cap nobody has compared."
    padded.warn_once.cache_clear()
    torch.manual_seed(0)
    model = cls(config(**SMALL | ({extra: 2.} if extra == 'logits_scaling' else {}))).eval()
    seen, batch = head_calls(model), collate(random_rows(), [0, 1, 2, 3, 4], 0)
    with torch.no_grad(), caplog.at_level(logging.WARNING, 'homelab_ft'):
        got = label_nll(model, batch)[0]
        assert seen == [tuple(batch['input_ids'].shape)] and abs(got.mean() - reference(model, batch)) < 1e-5
    assert unsupported_reason(model) and extra in caplog.text


@pytest.mark.parametrize('make', [gemma, lambda: load_base('embedded').requires_grad_(True)], ids=['gemma2', 'embedded'])
def test_slices_of_logits_change_nothing(make, monkeypatch):
    model, rows = make(), random_rows(6)
    vocab = model.config.vocab_size
    batch = collate(rows, list(range(6)), 0)
    with torch.no_grad(): whole = label_nll(model, batch)[0]
    monkeypatch.setattr(padded, 'MAX_EVAL_LOGITS', 3 * vocab + 1)
    seen = head_calls(model)
    with torch.no_grad(): sliced = label_nll(model, batch)[0]
    assert {n for n, in seen[:-1]} == {3} and 1 <= seen[-1][0] <= 3 and sum(n for n, in seen) == len(whole)
    assert (whole - sliced).abs().max() < 1e-5
    seen.clear()
    accumulate(model, [batch])
    assert seen == [(len(whole),)]      # a gradient keeps all logits anyway


# ---------------------------------------------------------------- batches that do not fit into memory


def holds(k, work, tried=None):
    "As `work` with memory for `k` sequences."
    def limited(rows):
        if tried is not None: tried.append(len(rows))
        if len(rows) > k: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        return work(rows)
    return limited


@given(st.integers(0, 40), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_sequences_come_once_and_in_order_however_few_fit(n, batch_size, k):
    rows, tried = [f'row {i}' for i in range(n)], []
    found = list(in_batches(rows, batch_size, holds(k, lambda part: [r.upper() for r in part], tried)))
    assert sum((part for part, _ in found), []) == rows and sum((done for _, done in found), []) == [r.upper() for r in rows]
    assert all(len(part) <= min(k, batch_size) for part, _ in found)
    assert sum(t > k for t in tried) <= 5 and tried[:1] == ([min(n, batch_size)] if n else [])      # 20 halves five times at most
    sizes = [len(part) for part, _ in found[:-1]]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) <= 1


def test_a_size_that_fails_later_stays_small_from_there():
    "Sequences become longer; what was possible before is not tried again."
    tried = []
    def work(rows):
        tried.append(len(rows))
        if len(rows) * rows[-1] > 24: raise torch.OutOfMemoryError('full')
        return rows
    assert sum((done for _, done in in_batches(list(range(1, 13)), 4, work)), []) == list(range(1, 13))
    assert tried == [4, 4, 2, 2, 2, 2]


@pytest.mark.parametrize('error, tries', [(torch.OutOfMemoryError, [4, 2, 1]), (RuntimeError, [4]), (KeyboardInterrupt, [4])])
def test_one_sequence_that_is_too_much_raises_the_error_as_it_is(error, tries):
    tried, raised = [], error('CUDA out of memory. Tried to allocate 2.00 GiB.')
    def work(rows):
        tried.append(len(rows))
        raise raised
    with pytest.raises(error) as seen: list(in_batches([1, 2, 3, 4, 5], 4, work))
    assert seen.value is raised and tried == tries
    advice = str(explain_oom(raised)) if error is torch.OutOfMemoryError else ''
    assert (SINGLE_SEQUENCE_OOM in advice and 'smaller max_length' in advice and 'halve' not in advice) == bool(advice)


def test_what_failed_is_gone_before_the_next_try(monkeypatch):
    "An exception holds frames and so tensors; nobody waits for the garbage collector."
    class Tensor: pass
    alive, emptied = [], []
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: emptied.append([a() is None for a in alive]))
    def deep(rows):
        large = Tensor()
        alive.append(weakref.ref(large))
        if len(rows) > 1: raise torch.OutOfMemoryError('full')
        return len(rows)
    def work(rows):
        assert all(a() is None for a in alive)
        return deep(rows)
    gc.disable()
    try: assert [n for _, n in in_batches([1, 2, 3, 4], 4, work)] == [1] * 4
    finally: gc.enable()
    assert emptied == [[True], [True, True]]


def test_one_warning_says_from_what_to_what(caplog):
    padded.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, 'homelab_ft'):
        list(in_batches(list(range(9)), 4, holds(9, len)))
        assert not caplog.records
        for _ in range(3): list(in_batches(list(range(9)), 8, holds(2, len)))
    assert [r.getMessage() for r in caplog.records] == ['batches of 8 do not fit into GPU memory; from here on 2']


def limit_rows(model, k):
    "A model with memory for `k` sequences."
    def check(module, args, kwargs):
        if len(kwargs['input_ids']) > k: raise torch.OutOfMemoryError('CUDA out of memory.')
    return model.base_model.register_forward_pre_hook(check, with_kwargs=True)


@pytest.mark.parametrize('k', [1, 3])
def test_validation_loss_with_too_little_memory(k):
    model, rows = load_base('embedded').train(), random_rows(11)
    whole = mean_nll(model, rows, batch_size=8)
    hook = limit_rows(model, k)
    assert mean_nll(model, rows, batch_size=8) == pytest.approx(whole, rel=1e-6) and model.training
    hook.remove()
    limit_rows(model, 0)
    with pytest.raises(torch.OutOfMemoryError): mean_nll(model, rows, batch_size=8)
