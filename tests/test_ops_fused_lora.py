"Fused LoRA and NF4 kernels: parity with peft's own forward pass, promises of the custom operators, unsupported layers."
import copy, io, logging, warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st

logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
warnings.filterwarnings('ignore', message='`is_gradient_checkpointing` is deprecated')

import bitsandbytes as bnb
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from homelab_ft.train.engine.ops import nf4_kernels
from homelab_ft.train.engine.ops.fused_lora import fuse, fused_layers, lora_linear, lora_linear_backward, unfuse, unsupported_reason
from homelab_ft.train.engine.ops.nf4_kernels import dequantize, dequantize_bitsandbytes, merge_lora, quant_tensors

KINDS = [('', False), ('nf4', False), ('nf4', True), ('fp4', False), ('fp4', True)]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def packed(layer, kind, double, dtype, device='cpu'):
    "The linear layer in 4 bits."
    new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, compress_statistics=double, quant_type=kind)
    new.load_state_dict(layer.state_dict())
    new = new.to(dtype).to(device)
    new.support_avx512bf16_for_cpu = False
    return new


def toy(kind='', double=True, bias=False, dtype=torch.float32, r=4, device='cpu', shape=(128, 64), **options):
    torch.manual_seed(0)
    layer = torch.nn.Linear(*shape, bias=bias).to(dtype)
    if kind: layer = packed(layer, kind, double, dtype, device)
    base = torch.nn.Sequential(layer).to(device).requires_grad_(False)
    base.is_loaded_in_4bit = bool(kind)
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=3 * r, target_modules=['0'], **options)).train()
    for name, p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=0.1)
    return model


def llama(quant=True, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96))
    for name, m in list(model.named_modules()):
        if quant and isinstance(m, torch.nn.Linear) and name != 'lm_head': model.set_submodule(name, packed(m, 'nf4', True, torch.float32))
    model.is_loaded_in_4bit = quant
    model = get_peft_model(model.requires_grad_(False), LoraConfig(r=4, lora_alpha=8, target_modules='all-linear', task_type='CAUSAL_LM', **options)).train()
    for name, p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=0.05)
    return model


def adapter(model): return model.base_model.model[0]


def results(model, x, dy):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def distance(result, expected):
    return max(((r.float() - e.float()).norm() / e.float().norm().clamp(min=1e-30)).item() for r, e in zip(result, expected, strict=True))


# ---- the same numbers

@pytest.mark.parametrize('kind, double, bias, r', [('', False, True, 1), ('nf4', False, False, 16), ('nf4', True, True, 16), ('fp4', True, True, 1)])
def test_parity_with_peft(kind, double, bias, r):
    model = toy(kind, double, bias, r=r, use_rslora=r == 16)
    for lead in [(9,), (2, 7)]:
        x, dy = torch.randn(*lead, 128), torch.randn(*lead, 64)
        unfuse(model)
        expected = results(model, x, dy)
        assert fuse(model) == {}
        assert distance(results(model, x, dy), expected) < 1e-5


@pytest.mark.parametrize('kind, double, r', [('', False, 1), ('nf4', True, 16)])
def test_parity_in_bfloat16_is_within_its_rounding(kind, double, r):
    half, exact = toy(kind, double, True, torch.bfloat16, r), toy('', False, True, torch.float32, r)
    weight = adapter(half).base_layer.weight
    adapter(exact).base_layer.weight.data.copy_(dequantize(quant_tensors(weight), torch.bfloat16))
    adapter(exact).base_layer.bias.data.copy_(adapter(half).base_layer.bias)
    exact.load_state_dict({k: v for k, v in half.state_dict().items() if 'lora_' in k}, strict=False)
    x, dy = torch.randn(50, 128).bfloat16(), torch.randn(50, 64).bfloat16()
    truth, by_peft = results(exact, x.float(), dy.float()), results(half, x, dy)
    fuse(half)
    result = results(half, x, dy)
    assert [t.dtype for t in result] == [t.dtype for t in by_peft]
    assert distance(result, truth) < 0.01 and distance(by_peft, truth) < 0.01


@pytest.mark.parametrize('kind', ['', 'nf4'])
@pytest.mark.parametrize('weights', [torch.float32, torch.bfloat16])
def test_parity_under_autocast(kind, weights):
    "Whatever the input's type, products are in autocast's and that comes out; bitsandbytes' layer would return the input's type."
    model = toy(kind, bias=True, dtype=weights)
    for x in (torch.randn(5, 128), torch.randn(5, 128).bfloat16()):
        unfuse(model)
        with torch.autocast('cpu', torch.bfloat16):
            expected = model(x)
            fuse(model)
            result = model(x)
        assert result.dtype == torch.bfloat16 and expected.dtype == (x.dtype if kind else torch.bfloat16)
        assert distance([result], [expected]) < 0.01
        result.sum().backward()


@pytest.mark.parametrize('quant', [False, True])
def test_parity_of_a_whole_model(quant):
    model = llama(quant)
    ids = torch.randint(0, 96, (2, 12))
    def gradients():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
    expected = gradients()
    assert fuse(model) == {}
    assert len(fused_layers(model)) == 14
    assert distance(gradients(), expected) < 1e-5
    unfuse(model)
    assert distance(gradients(), expected) == 0


def test_parity_when_compiled_in_one_piece():
    model = toy('nf4', bias=True)
    fuse(model)
    x, dy = torch.randn(2, 6, 128), torch.randn(2, 6, 64)
    expected = results(model, x, dy)
    layer, plain = adapter(model), adapter(model).forward
    layer.forward = torch.compile(plain, fullgraph=True, backend='aot_eager')
    assert distance(results(model, x, dy), expected) < 1e-6


@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_parity_with_the_formula(tokens, r, n_in, n_out, seed):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x, a, b, w, dy = make(tokens, n_in), make(r, n_in), make(n_out, r), make(n_out, n_in), make(tokens, n_out)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    expected = torch.autograd.grad(x @ w.t() + x @ a.t() @ b.t(), leaves, dy)
    y, h = lora_linear(x, a, b, w, [], 0, '', [n_out, n_in])
    torch.testing.assert_close(y, x @ w.t() + x @ a.t() @ b.t())
    torch.testing.assert_close(h, x @ a.t())
    torch.testing.assert_close(torch.autograd.grad(y, leaves, dy), expected)


@pytest.mark.parametrize('kind, double', KINDS[1:])
@pytest.mark.parametrize('shape', [(64, 64), (192, 5), (128, 200)])
def test_unpacking_follows_the_formula(kind, double, shape):
    weight = adapter(toy(kind, double, shape=shape)).base_layer.weight
    q = quant_tensors(weight)
    bytes_, constants = q.weight, q.constants
    scales = constants[0] if not double else constants[3][constants[0].long()] * constants[2].repeat_interleave(256)[:constants[0].numel()] + constants[4]
    index = torch.stack([bytes_[:, 0] >> 4, bytes_[:, 0] & 15], -1).flatten().long()
    expected = (constants[1][index] * scales.repeat_interleave(q.blocksize)).view(shape[1], shape[0])
    torch.testing.assert_close(dequantize(q, torch.float32), expected, rtol=0, atol=1e-7)
    assert dequantize(q, torch.bfloat16).dtype == torch.bfloat16


# ---- promises of the operators

@pytest.mark.parametrize('kind, double', [('', False), ('nf4', True)])
def test_opcheck(kind, double):
    rest = quant_tensors(adapter(toy(kind, double)).base_layer.weight)
    x, a, b = torch.randn(5, 128), torch.randn(3, 128), torch.randn(64, 3)
    torch.library.opcheck(lora_linear, (*(t.clone().requires_grad_() for t in (x, a, b)), *rest))
    torch.library.opcheck(lora_linear_backward, (torch.randn(5, 64), a, b, *rest))


@pytest.mark.parametrize('dy', [torch.ones(()).expand(5, 64), torch.randn(64, 5).t()])
def test_gradients_that_are_views(dy):
    model = toy()
    x = torch.randn(5, 128)
    expected = results(model, x, dy)
    fuse(model)
    assert distance(results(model, x, dy), expected) < 1e-5
    assert distance(results(model, torch.randn(128, 5).t(), dy)[:1], [model(x).detach()]) > 0      # a strided input is fine


def test_only_input_and_low_rank_product_are_saved():
    model = toy('nf4', r=16)
    fuse(model)
    own, seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *adapter(model)._frozen.constants)}, {}
    def note(t):
        if t.untyped_storage().data_ptr() not in own: seen[t.untyped_storage().data_ptr()] = t
        return t
    x = torch.randn(512, 128).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): y = model(x)
    assert sorted(t.numel() for t in seen.values()) == [64 * 16, 512 * 16, 512 * 128]     # scaled B, h, x
    assert y.requires_grad


# ---- unsupported layers

class UnknownLinear(torch.nn.Linear): pass


def eight_bits():
    base = torch.nn.Sequential(bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False).to('cpu')).requires_grad_(False)
    base.is_loaded_in_8bit = True
    return get_peft_model(base, LoraConfig(r=4, target_modules=['0']))


def changed(**attributes):
    "An adapter whose base layer or description of the packing differs from what is known."
    model = toy('nf4')
    for name, value in attributes.items(): setattr(adapter(model).base_layer.weight.quant_state, name, value)
    return model


def wrapped(layer): return get_peft_model(torch.nn.Sequential(layer).requires_grad_(False), LoraConfig(r=4, target_modules=['0']))


@pytest.mark.parametrize('make, reason', [
    (lambda: toy(use_dora=True), 'DoRA or another variant of LoRA'),
    (lambda: toy('nf4', use_dora=True), 'DoRA or another variant of LoRA'),
    (lambda: toy(lora_dropout=0.1), 'lora_dropout is above 0'),
    (lambda: toy(lora_bias=True, bias=True), 'transposed weights or a trained bias'),
    (eight_bits, '8-bit weights'),
    (lambda: wrapped(torch.nn.Embedding(64, 8)), 'a base layer of type Embedding'),
    (lambda: wrapped(torch.nn.Conv1d(8, 8, 1)), 'a base layer of type Conv1d'),
    (lambda: wrapped(UnknownLinear(8, 8)), 'a weight of unknown packing'),
    (lambda: changed(packing_format_for_cpu=True), 'a weight of unknown packing')])
def test_unsupported_layers_stay_as_they_are(make, reason):
    model = make()
    assert unsupported_reason(adapter(model)) == reason
    before = type(adapter(model))
    assert fuse(model) == {reason: 1}
    assert type(adapter(model)) is before and not hasattr(adapter(model), '_frozen')


def test_some_fused_some_not():
    model = llama(False, lora_dropout=0.)
    up = model.get_submodule('base_model.model.model.layers.0.mlp.up_proj')
    up.lora_dropout['default'] = torch.nn.Dropout(0.1)
    assert fuse(model) == {'lora_dropout is above 0': 1}
    assert len(fused_layers(model)) == 13


# ---- replacing peft's class

@pytest.mark.parametrize('quant', [False, True])
def test_names_state_and_parameters_stay(quant):
    model = llama(quant)
    parameters, state = dict(model.named_parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    fuse(model)
    now = dict(model.named_parameters())
    assert list(now) == list(parameters) and all(now[k] is parameters[k] for k in parameters)
    assert list(model.state_dict()) == list(state) and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    if not quant: model.load_state_dict(state)      # bitsandbytes' layers cannot, fused or not
    unfuse(model)
    assert list(model.state_dict()) == list(state) and not any(hasattr(m, '_frozen') or hasattr(m, '_fused_adapters') for m in model.modules())


def test_fusing_twice_is_fusing_once():
    model = toy('nf4')
    kind = type(adapter(model))
    fuse(model), fuse(model)
    assert type(adapter(model)).peft_class is kind and type(adapter(model)).__name__ == 'FusedLinear4bit'
    unfuse(model), unfuse(model)
    assert type(adapter(model)) is kind
    model(torch.randn(2, 128))


def test_a_copy_works_by_itself():
    model = toy()
    fuse(model)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 128)
    assert torch.equal(twin(x), model(x))
    adapter(twin).base_layer.weight.data.zero_()
    adapter(twin)._frozen.weight.zero_()
    assert not torch.equal(twin(x), model(x))


def test_weights_loaded_later_are_used():
    model, other = toy(), toy(r=4)
    adapter(other).base_layer.weight.data.mul_(2)
    fuse(model)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))
    x = torch.randn(3, 128)
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize('kind', ['', 'nf4'])
def test_parity_when_disabled_or_merged(kind):
    model, x = toy(kind, bias=True), torch.randn(3, 128)
    with torch.no_grad():
        expected, on = adapter(model).base_layer(x), model(x)
        fuse(model)
        with model.disable_adapter(): assert torch.equal(model(x), expected)
        torch.testing.assert_close(model(x), on)
        model.merge_adapter()
        assert unsupported_reason(adapter(model)) == 'several adapters, or a merged one'
        assert torch.equal(model(x), adapter(model).base_layer(x))
        with model.disable_adapter(): model(x)      # peft unmerges here
        torch.testing.assert_close(model(x), on)


def test_parity_with_two_adapters():
    "peft's own forward pass takes over; choosing the first again brings the fused one back."
    model, x = toy(), torch.randn(4, 128)
    first = model(x).detach()
    fuse(model)
    model.add_adapter('other', LoraConfig(r=2, target_modules=['0']))
    torch.nn.init.normal_(adapter(model).lora_B['other'].weight)
    model.base_model.set_adapter(['default', 'other'])
    both = model(x)
    assert unsupported_reason(adapter(model)) == 'several adapters, or a merged one'
    model.set_adapter('other')
    other = model(x)
    torch.testing.assert_close(both + adapter(model).base_layer(x), first + other)
    mixed = model.eval()(x, adapter_names=['default', 'other', 'default', 'other'])
    torch.testing.assert_close(mixed, torch.where(torch.tensor([[True], [False]] * 2), first, other))
    model.set_adapter('default')
    torch.testing.assert_close(model(x), first)
    assert fuse(model) == {}


# ---- on a GPU

@cuda
@pytest.mark.parametrize('kind, double', KINDS[1:])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('shape', [(128, 64), (4096, 1024), (96, 33)])
def test_parity_of_the_kernel_with_bitsandbytes(kind, double, dtype, shape):
    if not nf4_kernels.triton: pytest.skip('no Triton')
    weight = adapter(toy(kind, double, device='cuda', shape=shape)).base_layer.weight
    arguments = quant_tensors(weight), dtype
    assert torch.equal(dequantize(*arguments), dequantize_bitsandbytes(*arguments))


@cuda
@pytest.mark.parametrize('double', [False, True])
@pytest.mark.parametrize('shape, r', [((128, 64), 4), ((4096, 1024), 16), ((1024, 200), 64)])
def test_parity_of_the_merge_kernel_with_pytorch(double, shape, r):
    q = quant_tensors(adapter(toy('nf4', double, device='cuda', shape=shape)).base_layer.weight)
    if not nf4_kernels.triton: pytest.skip('no Triton')
    a, b = torch.randn(r, shape[0], device='cuda', dtype=torch.bfloat16) * 0.01, torch.randn(shape[1], r, device='cuda', dtype=torch.bfloat16)
    exact = dequantize(q, torch.float32).addmm(b.float(), a.float())
    assert (merge_lora(a, b, q).float() - exact).abs().max() <= 2**-8 * exact.abs().max()


@cuda
@pytest.mark.parametrize('kind, double', KINDS)
def test_parity_on_a_gpu(kind, double):
    model = toy(kind, double, True, r=16, device='cuda')
    x, dy = torch.randn(2, 40, 128, device='cuda'), torch.randn(2, 40, 64, device='cuda')
    expected = results(model, x, dy)
    assert fuse(model) == {}
    assert distance(results(model, x, dy), expected) < 1e-5
