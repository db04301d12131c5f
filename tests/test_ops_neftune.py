"train.engine.ops.neftune: noise in training, none in validation, equally strong in packed sequences."
import numpy as np
import pytest
import torch
from hypothesis import given, settings as tries, strategies as st
from transformers import (Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM)

from homelab_ft.config import make_config
from homelab_ft.data.tokenize import make_cache
from homelab_ft.train.engine.autotune import autotune
from homelab_ft.train.engine.memory_budget import StepOptions
from homelab_ft.train.engine.ops.cuda_graph import StepGraph
from homelab_ft.train.engine.ops.neftune import add_neftune, neftune_off, sequence_lengths
from homelab_ft.train.engine.packed import PackedStep
from homelab_ft.train.engine.packing import bucket_shape, collate_packed
from homelab_ft.train.engine.padded import PaddedStep, mean_nll
from homelab_ft.train.lora import attach_lora

SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
IDS = torch.arange(24).reshape(2, 12) + 20
pytestmark = pytest.mark.usefixtures('one_thread')


def rows(n=14, vocab=320, seed=0):
    draw = np.random.default_rng(seed)
    return make_cache([(draw.integers(1, vocab, k).tolist(), [0] + [1] * (k - 1)) for k in draw.integers(3, 20, n)], range(n))


MODELS = {'llama': lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), 'qwen3': lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
          'gemma2': lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)), 'gemma3': lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=8))}


@pytest.mark.parametrize('kind', MODELS)
def test_noise_reaches_training_and_never_validation(kind):
    torch.manual_seed(0)
    base, cache = MODELS[kind](), rows()
    before = mean_nll(base, cache)
    model = attach_lora(base, make_config(lora_r=4, neftune_noise_alpha=15.))
    step = PaddedStep(model, 'plain')
    def loss(seed):
        torch.manual_seed(seed)
        return float(step.accumulate(cache, [[0, 1, 2], [3, 4]])[0])
    assert mean_nll(model, cache) == pytest.approx(before, abs=1e-6)
    assert loss(1) == loss(1) != loss(2)
    with neftune_off(model): assert loss(1) == loss(2)
    assert loss(1) != loss(2)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 4))
@tries(max_examples=50, deadline=None)
def test_lengths_are_the_same_padded_and_packed(lengths, empty):
    padded = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for i, n in enumerate(lengths): padded[i, :n] = 7
    cuts = torch.tensor(np.cumsum([0, *lengths]).tolist() + [sum(lengths)] * empty, dtype=torch.int32)
    flat = sequence_lengths(torch.full((1, sum(lengths)), 7), cuts)
    assert sequence_lengths(padded).flatten().tolist() == lengths
    assert flat.flatten().tolist() == [n for n in lengths for _ in range(n)]


def test_noise_is_as_strong_in_packed_sequences():
    torch.manual_seed(0)
    model, cache, part = attach_lora(MODELS['llama'](), make_config(lora_r=4, neftune_noise_alpha=8.)), rows(6), [0, 1, 2, 3]
    table, seen = model.get_input_embeddings(), []
    model.get_base_model().model.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach().clone()))
    longest = int(cache.lengths.max())
    step = PackedStep(model, StepOptions(max_seq_len=longest, max_tokens_per_microbatch=100, bucket_size=16))
    batch = {k: torch.from_numpy(v) for k, v in collate_packed(cache, part, bucket_shape(cache.lengths, cache.lengths, part, 16, longest), longest, 10).items()}
    seen.clear()
    step.backward(batch, False)
    noise, begin = (seen[0] - table(batch['input_ids'])).abs().detach()[0], 0
    for r in part:
        n = int(cache.lengths[r])
        bound = 8 / (n * 64)**0.5
        assert 0.97 * bound < noise[begin:begin + n].max() <= bound * 1.0001 and float(noise[begin:begin + n].mean()) == pytest.approx(bound / 2, rel=0.1)
        begin += n


def test_parity_of_the_packed_step_is_checked_without_noise():
    torch.manual_seed(0)
    model = attach_lora(MODELS['llama'](), make_config(lora_r=4, neftune_noise_alpha=15.))
    with neftune_off(model): step = autotune(model, StepOptions(max_seq_len=40, max_tokens_per_microbatch=90, bucket_size=16))
    assert isinstance(step, PackedStep), step.features
    once = lambda: float(step.accumulate(rows(), [[0, 1, 2]])[0])
    assert once() != once()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_noise_in_a_captured_step_follows_the_seed():
    torch.manual_seed(0)
    model = MODELS['llama']().cuda()
    add_neftune(model, 15.)
    batch = {'ids': (IDS).cuda()}
    graph = StepGraph(lambda b: model(input_ids=b['ids'], labels=b['ids']).loss, batch)
    def loss(seed):
        torch.manual_seed(seed)
        return float(graph(batch))
    assert loss(1) == loss(1) != loss(2)
    with neftune_off(model): assert loss(1) == loss(2) == pytest.approx(float(model.eval()(**{'input_ids': batch['ids'], 'labels': batch['ids']}).loss), rel=1e-5)
