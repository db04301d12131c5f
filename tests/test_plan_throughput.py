"plan.throughput: FLOPs of a small model by hand, and no figure where nothing was measured."
import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import ConfigError
from homelab_ft.hardware.gpu_catalog import find_gpu, read_gpus
from homelab_ft.plan.memory.estimate import METHODS, EstimateSpec
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.throughput import flops_per_token, hours, microbatch_seconds, pairs_per_token, tokens_per_second, unsupported_reason

SHAPES = {name: model_shape(name) for name in ('SmolLM2-135M', 'Llama-3.1-8B', 'Phi-4')}


def test_pairs_are_those_of_the_sequences():
    lengths = [1, 4, 9]
    assert pairs_per_token(lengths) == sum(k for n in lengths for k in range(1, n + 1)) / sum(lengths)


def test_flops_of_a_small_model_by_hand():
    shape = model_shape(dict(model_type='llama', hidden_size=8, num_hidden_layers=3, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=32))
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    adapter = (8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16)
    flops = flops_per_token(shape, policies=dict(none=1, mlp=1, layer=1), method='lora', length=5, label_share=0.5, lora_r=4)
    forward = 4 * 3 * 8      # 3 pairs per token on average, 8 values of the query heads
    assert flops == dict(layers=4 * 3 * layer, adapter=6 * 3 * 4 * adapter, attention=3.5 * 3 * forward, head=4 * 32 * 8 * 0.5,
                         recompute=2 * 2 * 8 * 16 + 2 * layer + forward)


def test_fused_matrices_count_like_separate_ones():
    sizes = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=32)
    fused, separate = (flops_per_token(model_shape(dict(sizes, model_type=kind)), policies=dict(mlp=2), lora_r=1) for kind in ('phi3', 'llama'))
    assert all(fused[part] == separate[part] for part in ('layers', 'attention', 'head', 'recompute'))


def test_throughput_is_known_only_where_it_was_measured():
    for gpu in read_gpus().values():
        for method in METHODS:
            speed = tokens_per_second(gpu, SHAPES['Llama-3.1-8B'], 4096, method=method)
            assert (speed is None) == bool(unsupported_reason(gpu, EstimateSpec(method=method))) == (not gpu.bf16_tflops or method not in ('lora', 'qlora'))
    assert tokens_per_second(find_gpu('h200'), SHAPES['Llama-3.1-8B'], 4096, method='lora', step='padded') is None


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(SHAPES)), st.sampled_from(METHODS), st.integers(1, 4000), st.integers(1, 256), st.floats(0.01, 1))
def test_more_is_more(name, method, length, rank, share):
    spec, n = EstimateSpec(method=method, length=length, lora_r=rank, label_share=share), SHAPES[name].num_hidden_layers
    def count(policies={}, **changes): return sum(flops_per_token(SHAPES[name], spec, policies, **changes).values())
    assert count() < count(length=length + 1) and count(dict(none=n)) == count() < count(dict(mlp=n)) < count(dict(layer=n))
    assert count(label_share=share / 2) < count() and (count(lora_r=rank + 1) > count() or method == 'full')
    assert count(method='full') > count(method='lora', lora_r=1)


@pytest.mark.parametrize('wrong', [0, -3, float('nan'), float('inf'), None, 'many', True])
def test_amounts_that_cannot_be(wrong):
    for call in (lambda: microbatch_seconds(wrong, 10), lambda: microbatch_seconds(10, wrong), lambda: microbatch_seconds(10, 10, wrong), lambda: hours(10, 5, wrong)):
        with pytest.raises(ConfigError): call()
