"The closed form of the padded step against what PyTorch keeps and peaks at, on a CPU with tiny models; and its invariants."
import subprocess, sys, timeit, weakref

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.plan.model_shape import known_shapes, model_shape
from homelab_ft.plan.memory.padded_step import layer_bytes
from homelab_ft.plan.memory.estimate import PARTS, estimate
from homelab_ft.config import METHODS
from homelab_ft.plan.memory.static import OPTIMIZER_BYTES, adapter_params, target_linears, weight_bytes

HIDDEN, VOCAB, BATCH, LENGTH, RANK = 256, 512, 3, 64, 8
SIZES = dict(hidden_size=HIDDEN, intermediate_size=704, num_attention_heads=8, num_key_value_heads=2, head_dim=32, pad_token_id=0)


@pytest.fixture(scope='module')
def torch():
    torch = pytest.importorskip('torch')
    torch.set_num_threads(1)
    return torch


def config_of(kind, layers, vocab=VOCAB, window=None):
    return dict(SIZES, model_type=kind, num_hidden_layers=layers, vocab_size=vocab, tie_word_embeddings=kind.startswith('gemma'), sliding_window=window)


def build(torch, kind, layers, method, mixed, vocab=VOCAB, window=None):
    "A real model, wrapped by peft for LoRA; adapters in 32 bits as in training."
    import peft, transformers
    config = config_of(kind, layers, vocab, window)
    config = transformers.AutoConfig.for_model(config.pop('model_type'), **config)
    dtype = torch.bfloat16 if mixed and method != 'full' else torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation='sdpa')
    if method == 'full': return model
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules='all-linear', task_type='CAUSAL_LM'))
    for p in model.parameters():
        if p.requires_grad: p.data = p.data.float()
    return model


def inner(model): return model.get_base_model() if hasattr(model, 'get_base_model') else model


def batch(torch, vocab=VOCAB): return torch.randint(0, vocab, (BATCH, LENGTH))


def kept_bytes(torch, model, mixed):
    "Bytes of everything autograd saves in a forward pass, parameters left out, each storage once."
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen, hold = {}, []
    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known: seen[storage.data_ptr()] = storage.nbytes(); hold.append(t)
        return t
    ids = batch(torch)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast('cpu', torch.bfloat16, enabled=mixed):
        inner(model).model(input_ids=ids, use_cache=False)
    return sum(seen.values())


@pytest.mark.parametrize('mixed', [True, False], ids=['bf16', 'fp32'])
@pytest.mark.parametrize('method', ['lora', 'full'])
@pytest.mark.parametrize('kind, window', [('llama', None), ('mistral', 32), ('qwen3', None), ('phi3', 32), ('gemma3_text', 4096)])
def test_what_a_layer_keeps(torch, kind, window, method, mixed):
    "The table of kept activations equals what autograd keeps for one more layer."
    two, three = (kept_bytes(torch, build(torch, kind, n, method, mixed, window=window), mixed) for n in (2, 3))
    shape = model_shape(config_of(kind, 3, window=window))
    trained = shape.linear_params if method == 'full' else adapter_params(shape, RANK) // 3
    copies = 2 * trained if mixed else 0
    predicted = BATCH * LENGTH * layer_bytes(shape, method, LENGTH, 2 if mixed else 4, RANK, {} if method == 'full' else target_linears(shape)) + copies
    if kind == 'gemma3_text': predicted += 4 * (4 * HIDDEN + 2 * 32)     # its norms keep 1 + weight, whatever the number of tokens
    assert three - two == predicted


def make_tracer(torch):
    "Counts live bytes of every storage made under it."
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter
    class Tracer(TorchDispatchMode):
        def __init__(self, known): super().__init__(); self.live, self.now, self.peak, self.known = {}, 0, 0, known
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            for t in tree_iter(out):
                if isinstance(t, torch.Tensor): self.note(t.untyped_storage())
            return out
        def note(self, storage):
            key = storage._cdata
            if storage.data_ptr() in self.known or key in self.live: return
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)
        def drop(self, key): self.now -= self.live.pop(key, 0)
    return Tracer


def traced_peak(torch, model, mixed, checkpointing, vocab):
    "Peak bytes of two training steps, the weights and adapters themselves left out."
    model.train()
    if checkpointing: model.gradient_checkpointing_enable({'use_reentrant': False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    tracer = make_tracer(torch)({p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]})
    ids = batch(torch, vocab)
    with tracer:
        for _ in range(2): one_step(torch, model, mixed, ids).backward(); optimizer.step(); optimizer.zero_grad()
    return tracer.peak


def one_step(torch, model, mixed, ids):
    "The loss as the training engine computes it: the head at the positions with labels, 32-bit cross-entropy."
    with torch.autocast('cpu', torch.bfloat16, enabled=mixed):
        hidden = inner(model).model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].reshape(-1, HIDDEN)
        return cross_entropy(torch, inner(model).lm_head(hidden), ids[:, 1:].reshape(-1)) / hidden.shape[0]


def cross_entropy(torch, logits, targets): return torch.nn.functional.cross_entropy(logits.float(), targets, reduction='none').sum()


@pytest.mark.parametrize('method, mixed, checkpointing, vocab', [
    ('lora', True, False, 64), ('lora', True, True, 4096), ('full', True, False, 4096), ('full', False, True, 64)])
def test_peak_of_a_step(torch, method, mixed, checkpointing, vocab):
    "The maximum over phases against a trace of a whole step: never 1 % under, never 10 % over."
    measured = traced_peak(torch, build(torch, 'llama', 4, method, mixed, vocab), mixed, checkpointing, vocab)
    shape = model_shape(config_of('llama', 4, vocab))
    est = estimate(shape, method=method, lora_r=RANK, batch_size=BATCH, length=LENGTH, gradient_checkpointing=checkpointing, dtype='bfloat16' if mixed else 'float32', padding_free=False, arch='cpu')
    static = weight_bytes(shape, method, 2 if mixed else 4) + (0 if method == 'full' else 4 * adapter_params(shape, RANK))
    predicted = est.allocated - static
    print(f'{predicted / measured - 1:+.1%}')
    assert 0.99 <= predicted / measured <= 1.10


@pytest.mark.parametrize('double', [True, False])
def test_nf4_bytes(torch, double):
    "Bits per weight against tensors that bitsandbytes really makes."
    F = pytest.importorskip('bitsandbytes.functional')
    rows, columns = 512, 1024
    packed, state = F.quantize_4bit(torch.randn(rows, columns), blocksize=64, quant_type='nf4', compress_statistics=double)
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    bits = 8 * (packed.nbytes + scales) / (rows * columns)
    shape = known_shapes()['Llama-3.2-1B']
    kept = 2 * (shape.embedding_params + shape.small_params)
    ours = 8 * (weight_bytes(shape, 'qlora', 2, double) - kept) / (shape.num_hidden_layers * shape.linear_params)
    assert ours == pytest.approx(bits, rel=1e-6)


SHAPES = known_shapes()
CHANGES = dict(method=st.sampled_from(METHODS), lora_r=st.integers(1, 256), batch_size=st.integers(1, 32), length=st.integers(1, 2048),
              gradient_checkpointing=st.booleans(), optim=st.sampled_from(sorted(OPTIMIZER_BYTES)), dtype=st.sampled_from(['bfloat16', 'float32']),
              label_share=st.floats(0.01, 1), gradient_accumulation_steps=st.integers(1, 4), padding_free=st.sampled_from([False, 'auto']))


@given(name=st.sampled_from(sorted(SHAPES)), changes=st.fixed_dictionaries(CHANGES))
@settings(max_examples=60, deadline=None)
def test_always_sane(name, changes):
    est = estimate(SHAPES[name], **changes)
    assert all(isinstance(size, int) and size >= 0 for phase in est.phases.values() for size in phase.values())
    assert est.peak == max(sum(p.values()) for p in est.phases.values()) == sum(est.phases[est.phase].values())
    assert all(tuple(p) == PARTS for p in est.phases.values()) and est.allocated + est.overhead == est.peak and sum(est.policies.values()) == SHAPES[name].num_hidden_layers
    assert est.fits(est.peak, margin=0) and est.fits(est.min_required, margin=0) and not est.fits(est.min_required, margin=0.05)
    assert 0 <= est.reclaimable <= est.overhead and (est.step == 'padded' or 'offload' in est.policies or not est.reclaimable)


@given(name=st.sampled_from(sorted(SHAPES)), changes=st.fixed_dictionaries(CHANGES), field=st.sampled_from(['lora_r', 'batch_size', 'length']))
@settings(max_examples=60, deadline=None)
def test_more_never_costs_less(name, changes, field):
    more = {**changes, field: changes[field] * 2} if field != 'length' else {**changes, 'length': min(2048, changes['length'] * 2)}
    assert estimate(SHAPES[name], **more).peak >= estimate(SHAPES[name], **changes).peak


def test_fast():
    shape = SHAPES['Llama-3.1-70B']
    assert min(timeit.repeat(lambda: estimate(shape), number=20, repeat=10)) / 20 < 0.002     # seconds a call, on a machine that does other things too


def test_no_torch():
    code = 'import sys; from homelab_ft.plan.memory.estimate import estimate, model_shape; estimate(model_shape("Llama-3.1-8B")); print([m for m in ("torch", "transformers", "matplotlib") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
