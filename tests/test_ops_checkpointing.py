"Activation checkpointing: parity with the plain model, what is kept, what is refused."
import gc, weakref

import pytest
import torch
import torch._dynamo.testing, torch._functorch.config
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from homelab_ft.core import ConfigError
from homelab_ft.train.engine.ops import checkpointing
from homelab_ft.train.engine.ops.checkpointing import POLICIES, CheckpointedLayer, ChunkedMLP, require_grad_view, is_prenorm_block, restore
from homelab_ft.train.engine.ops.offload import ActivationOffloader

MIXTURE = ['none', 'mlp', 'layer', 'offload']
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def apply_policies(layers, policies, run=None, chunk=0, room=0): checkpointing.apply_policies(layers, policies, run, chunk, ActivationOffloader(room))


def toy(device='cpu'):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=224, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    return LlamaForCausalLM(config).train().to(device)


def quantize(model, dtype=torch.float32):
    "Every linear layer but the head in NF4, as bitsandbytes keeps it in CPU RAM."
    bnb = pytest.importorskip('bitsandbytes')
    for name, module in list(model.model.named_modules()):
        if not isinstance(module, torch.nn.Linear): continue
        new = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type='nf4')
        new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type='nf4', module=new)._quantize('cpu')
        new.support_avx512bf16_for_cpu = False
        parent, _, child = name.rpartition('.')
        setattr(model.model.get_submodule(parent), child, new)
    return model


def adapters(model, **kw):
    "The model with adapters over frozen weights, whose second matrix is not zero."
    peft = pytest.importorskip('peft')
    model.requires_grad_(False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=['q_proj', 'v_proj', 'gate_proj', 'up_proj', 'down_proj'], **kw)).train()
    for name, p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=.02)
    return model


def gradients(model, seed=0, tokens=24):
    model.zero_grad()
    device = next(model.parameters()).device
    ids = torch.randint(0, 96, (2, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    torch.manual_seed(seed)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def distance(a, b): return max(((x - y).norm() / y.norm()).item() for x, y in zip(a, b, strict=True))


@pytest.fixture(scope='module')
def model(): return toy()


@pytest.fixture(scope='module')
def plain(model): return gradients(model)


@given(st.lists(st.sampled_from(POLICIES), min_size=4, max_size=4), st.sampled_from([0, 0, 1, 5, 8, 23, 24, 100]), st.sampled_from([0, 30_000, 10**6]))
@settings(max_examples=25, deadline=None)
def test_parity_of_any_policies_and_chunks(model, plain, policies, chunk, room):
    apply_policies(model.model.layers, policies, chunk=chunk, room=room)
    assert distance(gradients(model), plain) <= 1e-5
    restore(model.model.layers)
    assert not any('forward' in vars(m) for m in model.modules())


@pytest.mark.parametrize('backend, policies, chunk', [('aot_eager_decomp_partition', MIXTURE, 0), ('aot_eager', MIXTURE, 7)])
def test_parity_compiled(model, plain, backend, policies, chunk):
    "The compiler's partitioner with every policy, and the interrupted program that chunks need; generated code is compared on a GPU."
    torch._dynamo.reset()
    layers = model.model.layers
    with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
        apply_policies(layers, policies, torch.compile(type(layers[0]).forward, backend=backend, fullgraph=not chunk), chunk=chunk)
        far = distance(gradients(model), plain)
    restore(layers)
    torch._dynamo.reset()
    assert far <= 1e-5


@pytest.mark.parametrize('policy', ['mlp'])
def test_all_layers_of_a_policy_share_one_program(model, policy):
    torch._dynamo.reset()
    layers, counter = model.model.layers, torch._dynamo.testing.CompileCounterWithBackend('eager')
    apply_policies(layers, [policy] * 4, torch.compile(type(layers[0]).forward, backend=counter, fullgraph=True))
    for _ in range(2): gradients(model)
    restore(layers)
    torch._dynamo.reset()
    assert counter.frame_count == 1


def test_parity_compiled_with_dropout():
    "The program without gradients and the one with them must draw the same numbers."
    torch._dynamo.reset()
    torch.manual_seed(0)
    a, b, drop = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), torch.nn.Dropout(.4)
    run, result = torch.compile(lambda x: x + drop(b(torch.tanh(drop(a(drop(x)))))), backend='aot_eager_decomp_partition', fullgraph=True), []
    for f in (run, lambda x: CheckpointedLayer.apply(x, run, None)):
        torch.manual_seed(3)
        x = torch.randn(10, 16).requires_grad_()
        a.zero_grad(), b.zero_grad()
        f(x).sum().backward()
        result.append([x.grad] + [p.grad.clone() for m in (a, b) for p in m.parameters()])
    torch._dynamo.reset()
    assert distance(*result) <= 1e-5


def test_parity_of_adapters_over_frozen_embeddings():
    "The first layer's input requires no gradient; its adapters must get theirs."
    model = adapters(quantize(toy()))
    layers, expected = model.get_base_model().model.layers, gradients(model)
    for policies, chunk in [([policy] * 4, 0) for policy in POLICIES] + [(MIXTURE[::-1], 5), (['offload'] * 4, 5)]:
        apply_policies(layers, policies, chunk=chunk, room=10**6)
        assert distance(gradients(model), expected) <= 1e-5


@pytest.mark.parametrize('policies', [['layer'] * 4, MIXTURE], ids=' '.join)
def test_parity_with_dropout_in_adapters_and_attention(policies):
    model = adapters(toy(), lora_dropout=.3)
    model.get_base_model().config._attn_implementation = 'eager'
    layers = model.get_base_model().model.layers
    for layer in layers: layer.self_attn.attention_dropout = .2
    expected = gradients(model, seed=5)
    apply_policies(layers, policies)
    assert distance(gradients(model, seed=5), expected) <= 1e-5
    assert distance(gradients(model, seed=6), expected) > .1
    state = torch.get_rng_state()
    gradients(model, seed=5)
    assert not torch.equal(state, torch.get_rng_state())


def test_parity_of_chunks_with_dropout_within_a_checkpointed_layer():
    "Attention draws first and the chunks after it, both times, and a chunk goes on where the one before ended."
    drop = torch.nn.functional.dropout

    def layer(x):
        h = x + drop(x, .5)
        return ChunkedMLP.apply(h, lambda part: part * drop(part, .5), 4, True, not torch.is_grad_enabled())

    x = torch.randn(1, 11, 3, requires_grad=True)
    torch.manual_seed(0)
    h = x + drop(x, .5)
    plain = torch.cat([part * drop(part, .5) for part in h.split(4, 1)], 1)
    expected, = torch.autograd.grad(plain.sum(), x)
    torch.manual_seed(0)
    y = CheckpointedLayer.apply(x, layer, None)
    result, = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, plain) and torch.allclose(result, expected)


def test_two_backward_passes_where_inputs_stay_on_the_gpu():
    torch.manual_seed(0)
    x = torch.ones(1, 9, 3, requires_grad=True)
    y = ChunkedMLP.apply(x, lambda part: torch.nn.functional.dropout(part, .5), 4)
    y.sum().backward(retain_graph=True)
    first, x.grad = x.grad, None
    y.sum().backward()
    assert torch.equal(first, x.grad) and torch.equal(first, y.detach())


def test_a_required_gradient_keeps_nothing_alive():
    x = torch.zeros(5)
    gone = weakref.ref(x.untyped_storage())
    y = CheckpointedLayer.apply(require_grad_view(x), lambda h: h * 2, ActivationOffloader())
    assert y.requires_grad
    del x
    gc.collect()
    assert gone() is None


def test_the_output_of_the_second_run_is_freed():
    left, w = [], torch.tensor(2., requires_grad=True)

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, grad):
            gc.collect()
            left.append([ref() is not None for ref in outs])
            return grad

    outs = []
    def layer(x):
        y = Look.apply(x * w)
        if torch.is_grad_enabled(): outs.append(weakref.ref(y))
        return y

    CheckpointedLayer.apply(torch.tensor(3., requires_grad=True), layer, None).backward()
    assert left == [[False]] and w.grad == 3


class Sized(torch.utils._python_dispatch.TorchDispatchMode):
    "Counts tensors of at least so many values that operators make, views aside."
    def __init__(self, values):
        super().__init__()
        self.values, self.found = values, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t) and t.numel() >= self.values and not func.is_view: self.found.append((func.name(), tuple(t.shape)))
        return out


def test_a_chunked_layer_makes_nothing_of_the_size_of_its_mlp(model):
    x, rotary = torch.randn(1, 600, 64, requires_grad=True), (torch.randn(1, 600, 8), torch.randn(1, 600, 8))
    for chunk, made in ((0, True), (50, False)):
        apply_policies(model.model.layers, ['offload'] * 4, chunk=chunk)
        with Sized(600 * 224) as seen: model.model.layers[0](x, position_embeddings=rotary, attention_mask=None).sum().backward()
        assert bool(seen.found) is made, seen.found
    restore(model.model.layers)


def test_a_chunked_layer_computes_attention_once_if_there_is_room_for_it(model):
    calls, layers = [], model.model.layers
    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append('scaled_dot_product' in func.name() and 'backward' not in func.name())
            return func(*args, **(kwargs or {}))
    for room, times in ((0, 8), (10**7, 4), (25_000, 7)):
        apply_policies(layers, ['offload'] * 4, chunk=7, room=room)
        calls.clear()
        with Counted(): gradients(model)
        assert sum(calls) == times, (room, sum(calls))
    restore(layers)


def test_other_layers_are_no_prenorm_blocks(model):
    from transformers import GPTNeoXConfig, GraniteConfig, Gemma2Config, Qwen3Config, AutoModelForCausalLM, MistralConfig, Qwen2Config
    small = dict(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    make = lambda config: AutoModelForCausalLM.from_config(config).base_model.layers[0]
    assert is_prenorm_block(model.model.layers[0])
    assert all(is_prenorm_block(make(c(**small))) for c in (MistralConfig, Qwen2Config, Qwen3Config))
    assert not is_prenorm_block(make(Gemma2Config(**small, head_dim=8)))
    assert not is_prenorm_block(make(GraniteConfig(**small, residual_multiplier=.2)))
    assert not is_prenorm_block(make(GPTNeoXConfig(**{k: v for k, v in small.items() if k != 'num_key_value_heads'})))


def test_parity_of_a_chunked_layer_called_by_position(model):
    "Positional arguments cannot be passed to attention alone: such a layer is not chunked."
    layer, x, rotary = model.model.layers[0], torch.randn(1, 20, 64, requires_grad=True), (torch.randn(1, 20, 8), torch.randn(1, 20, 8))
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    expected, = torch.autograd.grad(layer(x, mask, position_embeddings=rotary).square().sum(), x)
    apply_policies([layer], ['offload'], chunk=7)
    result, = torch.autograd.grad(layer(x, mask, position_embeddings=rotary).square().sum(), x)
    restore([layer])
    assert distance([result], [expected]) <= 1e-5


@pytest.mark.parametrize('kind', ['Qwen3', 'Granite'])
def test_parity_of_other_models_in_chunks(kind):
    "Pre-norm blocks, and other layers, of which only the MLP is chunked."
    import transformers
    more = dict(residual_multiplier=.2) if kind == 'Granite' else {}
    config = getattr(transformers, kind + 'Config')(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                    num_key_value_heads=2, **more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    expected = gradients(model)
    for policy in ('layer', 'offload', 'none'):
        apply_policies(model.model.layers, [policy] * 2, chunk=7, room=10**6)
        assert distance(gradients(model), expected) <= 1e-5


def test_a_second_run_leaves_the_random_numbers_alone():
    x = torch.ones(4, requires_grad=True)
    y = CheckpointedLayer.apply(x, lambda x: torch.nn.functional.dropout(x, .5), None)
    state = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(x.grad, y)


@pytest.mark.parametrize('inside', [False, True], ids=['backward after autocast', 'backward within'])
def test_parity_under_autocast(model, inside):
    "The second run must be in the precision of the first, and its weights must not come from the first run's cache."
    layers, x = model.model.layers, torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0))
    rotary = model.model.rotary_emb(x, torch.arange(24)[None])

    def run():
        model.zero_grad()
        h = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            y = h
            for layer in layers: y = layer(y, position_embeddings=rotary)
            if inside: y.float().square().sum().backward()
        if not inside: y.float().square().sum().backward()
        return [h.grad] + [p.grad.clone() for p in layers.parameters()]

    expected = run()
    for policies, chunk in ((['layer'] * 4, 0), (MIXTURE, 0), (['none'] * 4, 24)):
        apply_policies(layers, policies, chunk=chunk)
        assert distance(run(), expected) <= 1e-5
    apply_policies(layers, MIXTURE, chunk=9)
    assert distance(run(), expected) <= .02                   # sums over chunks round differently in bfloat16
    restore(layers)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_parity_of_chunks_that_are_never_too_long(tokens, chunk, batch):
    torch.manual_seed(0)
    mlp, seen = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.SiLU(), torch.nn.Linear(20, 6)), []
    mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    x = torch.randn(batch, tokens, 6, requires_grad=True)
    y = mlp(x)
    expected = torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])
    seen.clear()
    z = ChunkedMLP.apply(x, mlp, chunk)
    z.square().sum().backward()
    assert torch.allclose(y, z, atol=1e-6) and distance([x.grad, *(p.grad for p in mlp.parameters())], expected) <= 1e-5
    assert max(seen) <= chunk and sum(seen) == 2 * tokens


def test_chunks_have_the_type_that_the_mlp_returns():
    x = torch.randn(1, 5, 3, requires_grad=True)
    assert ChunkedMLP.apply(x, lambda x: x.double() * 2, 2).dtype == torch.float64
    assert ChunkedMLP.apply(x, lambda x: x.sum(-1, keepdim=True), 2).shape == (1, 5, 1)


@pytest.mark.parametrize('policy, times', [('none', 1), ('mlp', 1), ('layer', 2), ('offload', 2)])
def test_a_recomputed_layer_runs_twice_and_only_with_gradients(model, policy, times):
    layers, calls = model.model.layers, []
    hook = layers[2].self_attn.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    apply_policies(layers, [policy] * 4)
    gradients(model)
    assert len(calls) == times and calls[-1]
    calls.clear()
    with torch.no_grad(): out = model(input_ids=torch.ones(1, 5, dtype=torch.long)).logits
    restore(layers)
    with torch.no_grad(): assert torch.equal(out, model(input_ids=torch.ones(1, 5, dtype=torch.long)).logits)
    assert calls == [False, False]
    hook.remove()


@pytest.mark.parametrize('policies, chunk, words', [(['none', 'unknown', 'mlp', 'layer'], 0, 'unknown'), (['none'] * 3, 0, '4 layers need as many policies'), (['none'] * 4, -5, 'negative')])
def test_nonsense_is_refused_and_changes_nothing(model, policies, chunk, words):
    apply_policies(model.model.layers, ['layer'] * 4)
    before = [layer.forward for layer in model.model.layers]
    with pytest.raises(ConfigError, match=words): apply_policies(model.model.layers, policies, chunk=chunk)
    assert [layer.forward for layer in model.model.layers] == before
    with pytest.raises(ConfigError, match='needs an offloader'): checkpointing.apply_policies(model.model.layers, MIXTURE)
    assert [layer.forward for layer in model.model.layers] == before
    restore(model.model.layers)


def test_a_model_can_be_freed_while_its_policies_are_applied():
    model = toy()
    apply_policies(model.model.layers, MIXTURE)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------- on a GPU


@cuda
@pytest.mark.parametrize('policies', [[policy] * 4 for policy in POLICIES] + [MIXTURE], ids=' '.join)
@pytest.mark.parametrize('chunk, room', [(0, 0), (300, 0), (300, 10**9)])
def test_parity_on_a_gpu(policies, chunk, room):
    model = toy('cuda')
    expected = gradients(model, tokens=1024)
    apply_policies(model.model.layers, policies, chunk=chunk, room=room)
    for _ in range(3): assert distance(gradients(model, tokens=1024), expected) <= 1e-4


@cuda
def test_parity_compiled_on_a_gpu():
    torch._dynamo.reset()
    model = toy('cuda')
    layers, expected = model.model.layers, gradients(model, tokens=1024)
    with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
        apply_policies(layers, MIXTURE, torch.compile(type(layers[0]).forward, fullgraph=True))
        for _ in range(3): assert distance(gradients(model, tokens=1024), expected) <= 1e-4
    torch._dynamo.reset()


@cuda
def test_parity_with_dropout_on_a_gpu():
    model = adapters(toy('cuda'), lora_dropout=.3)
    layers, expected = model.get_base_model().model.layers, gradients(model, seed=5)
    apply_policies(layers, MIXTURE)
    assert distance(gradients(model, seed=5), expected) <= 1e-4


@cuda
def test_inputs_of_policy_offload_leave_the_gpu():
    model, left = toy('cuda'), {}
    ids = torch.zeros(1, 4096, dtype=torch.long, device='cuda')
    for policy in ('layer', 'offload'):
        apply_policies(model.model.layers, [policy] * 4)
        before = torch.cuda.memory_allocated()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        torch.cuda.synchronize()
        left[policy] = torch.cuda.memory_allocated() - before
        del hidden
    assert left['layer'] - left['offload'] >= 3 * 4096 * 64 * 4
