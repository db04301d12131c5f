"train.schedule: learning rates are transformers', parameter groups are peft's."
import pytest
import torch
from hypothesis import given, settings as tries, strategies as st
from peft.optimizers import create_loraplus_optimizer
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from homelab_ft.config import make_config
from homelab_ft.train.lora import attach_lora
from homelab_ft.train.schedule import lr_multiplier, make_optimizer, warmup_length

SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


@pytest.mark.parametrize('kind', ['linear', 'cosine', 'constant', 'constant_with_warmup', 'inverse_sqrt'])
@given(total=st.integers(1, 200), warmup=st.integers(0, 60))
@tries(max_examples=15, deadline=None)
def test_schedules_are_those_of_transformers_and_one_step_ahead_during_the_warm_up(kind, total, warmup):
    config = make_config(lr_scheduler_type=kind, warmup_steps=warmup if kind != 'constant' else 0, warmup_ratio=0)
    warmup = warmup_length(total, config)
    schedule = get_scheduler(kind, torch.optim.SGD([torch.zeros(1)], lr=1.), num_warmup_steps=warmup, num_training_steps=total).lr_lambdas[0]
    for step in range(total):
        theirs = 1. if step == warmup - 1 else schedule(step + (step < warmup))      # theirs is at its highest one step later, if there is one
        assert lr_multiplier(step, total, config) == pytest.approx(theirs, abs=1e-12)


def test_warmup_steps_stand_above_the_ratio():
    assert warmup_length(100, make_config(warmup_ratio=0.1)) == 10
    assert warmup_length(100, make_config(warmup_ratio=0.1, warmup_steps=25)) == 25
    assert warmup_length(100, make_config(warmup_ratio=0.1, lr_scheduler_type='constant')) == 0


@pytest.mark.parametrize('dora', [False, True])
def test_the_groups_of_lora_plus_are_those_of_peft(dora):
    model = attach_lora(LlamaForCausalLM(LlamaConfig(**SIZES)).requires_grad_(False), make_config(lora_r=4, use_dora=dora))
    ours = make_optimizer(model, make_config(loraplus_lr_ratio=16., learning_rate=1e-3))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.)
    rate = lambda optimizer, scale: {id(p): scale(g) for g in optimizer.param_groups for p in g['params']}
    assert rate(ours, lambda g: 1e-3 * g['lr_ratio']) == pytest.approx(rate(theirs, lambda g: g['lr']))
    assert {len(g['params']) for g in ours.param_groups} == {14, 28 if dora else 14}
    assert len(make_optimizer(model, make_config()).param_groups) == 1
