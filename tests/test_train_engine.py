"Batches and loss: properties, and parity with the plain transformers computation for several model families."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from transformers import (Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

from homelab_ft.core import make_config
from homelab_ft.train.engine import accumulate, batch_order, collate, count_labels, decoder_and_head, label_nll, mean_nll, padding_share
from homelab_ft.train.lora import attach_lora
from homelab_ft.train.quantize import load_base

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
FAMILIES = {'llama': (LlamaConfig, LlamaForCausalLM, dict(tie_word_embeddings=True)), 'qwen3': (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=8)),
            'mistral': (MistralConfig, MistralForCausalLM, dict(sliding_window=5)), 'phi3': (Phi3Config, Phi3ForCausalLM, {}),
            'gemma2': (Gemma2Config, Gemma2ForCausalLM, dict(head_dim=8, sliding_window=5)), 'granite': (GraniteConfig, GraniteForCausalLM, dict(logits_scaling=2.0))}


class Rows:
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
    return Rows(rows)


def reference(model, batch):
    "Mean loss over learned tokens from the model's own full logits, with the attention mask."
    logits = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], use_cache=False).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten(), ignore_index=-100, reduction='sum') / count_labels(batch)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_every_row_once_and_the_same_order_again(lengths, batch_size, seed, epoch):
    order = batch_order(lengths, batch_size, seed, epoch)
    assert sorted(r for b in order for r in b) == list(range(len(lengths)))
    assert all(1 <= len(b) <= batch_size for b in order) and sum(len(b) < batch_size for b in order) <= 1
    assert order == batch_order(lengths, batch_size, seed, epoch)
    assert 0 <= padding_share(lengths, order) < 1


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 95))
@settings(max_examples=50, deadline=None)
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
    assert (decoder_and_head(model) is None) == (family in ('gemma2', 'granite'))
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
    rows = Rows([(np.array([5, 6, 7], np.int32), np.zeros(3, np.uint8)), (np.array([5, 6, 7], np.int32), np.array([0, 0, 1], np.uint8))])
    alone = accumulate(model, [collate(rows, [1], 0)])
    both = accumulate(model, [collate(rows, [0], 0), collate(rows, [1], 0)])
    assert alone[1] == both[1] == 1 and alone[0].item() == both[0].item()
    assert label_nll(model, collate(rows, [0], 0))[0].numel() == 0
