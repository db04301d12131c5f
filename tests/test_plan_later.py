"plan.later: what it says of evaluation, generation and merging against the functions themselves, on tensors without values and, where a processor can, on real ones."
import json, os, runpy, weakref
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault('KINETO_LOG_LEVEL', '99')
import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import GiB
from homelab_ft.config import make_config
from homelab_ft.plan.memory import inference as later
from homelab_ft.plan.memory.inference import INFERENCE_PHASES, evaluation_bytes, generation_bytes, kv_cache_bytes, logits_bytes, merge_bytes
from homelab_ft.plan.model_shape import known_shapes, model_shape
from homelab_ft.plan.memory.estimate import PARTS, estimate, estimate_for, estimate_table, estimate_with_checkpointing, verdict
from homelab_ft.plan.memory.static import METHODS, adapter_params, weight_bytes

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.usefixtures('one_thread')
SCRIPT = Path(__file__).resolve().parent.parent / 'benchmarks' / 'plan' / 'later.py'
SIZES = dict(hidden_size=256, intermediate_size=704, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_hidden_layers=3, vocab_size=4096, max_position_embeddings=4096,
             tie_word_embeddings=False, pad_token_id=0)
SHAPES = known_shapes()


@pytest.fixture(scope='module')
def script(): return runpy.run_path(str(SCRIPT))


def compared(script, phase, kind, method, raw={}, rows=2, tokens=512, label_share=1., **said):
    "Closed form over rehearsal."
    raw, config = dict(SIZES, model_type=kind, **raw), make_config(method=method, per_device_train_batch_size=rows, max_length=tokens, **said)
    more = dict(prompt=tokens, new=8) if phase in ('generation', 'chat') else dict(label_share=label_share)
    told, counted = (script[who](phase, config, raw, raw['num_hidden_layers'], **more) for who in ('said', 'rehearsed'))
    return told / counted


# ---------------------------------------------------------------- against rehearsals


@pytest.mark.parametrize('kind, method, said', [
    ('qwen2', 'lora', {}), ('qwen3', 'qlora', {}), ('gemma3_text', 'lora', {}), ('mistral', 'lora', dict(raw=dict(sliding_window=128))), ('llama', 'full', dict(dtype='float32')),
    ('phi3', 'qlora', dict(padding_free=False)), ('llama', 'lora', dict(dtype='float32')), ('llama', 'qlora', dict(rows=1, tokens=16, lora_r=2)), ('llama', 'lora', dict(label_share=0.05)),
    ('qwen3', 'lora', dict(raw=dict(num_attention_heads=16, intermediate_size=320)))], ids=str)
def test_a_pass_without_gradients_is_counted(script, kind, method, said):
    "To within a percent, whichever moment is the peak."
    for phase in ('evaluation', 'final evaluation'): assert 0.99 <= compared(script, phase, kind, method, **said) <= 1.02, phase


@pytest.mark.parametrize('raw', [{}, dict(intermediate_size=64, num_attention_heads=8)], ids=['usual', 'thin MLP'])
@pytest.mark.parametrize('kind', ['llama', 'phi3', 'mistral', 'gemma3_text', 'gemma2'])
def test_answers_are_never_more_than_said(script, kind, raw):
    "A bound where attention is the peak, which a thin MLP leaves it to be."
    for phase in ('generation', 'chat'): assert 0.99 <= compared(script, phase, kind, 'lora', raw, tokens=256) <= (1.02 if kind != 'gemma2' and not raw else 1.45)


def test_long_answers_are_mostly_cache(script):
    raw, config = dict(SIZES, model_type='llama', num_hidden_layers=2), make_config(method='lora', per_device_train_batch_size=2, max_length=64)
    told, counted = (script[who]('generation', config, raw, 2, prompt=16, new=100) for who in ('said', 'rehearsed'))
    cache = kv_cache_bytes(model_shape(raw), 2, 116)
    assert told == pytest.approx(counted, rel=0.2) and cache < counted < 2.5 * cache


def test_logits_come_in_slices(script):
    "A vocabulary so large that logits are the peak; Gemma 2 squashes them, which counts in 32 bits."
    raw = dict(vocab_size=200_000)
    for kind in ('llama', 'gemma2'):
        for more in (dict(label_share=1.), dict(label_share=0.5), dict(dtype='float32')):
            assert compared(script, 'evaluation', kind, 'lora', raw, tokens=512, **more) == pytest.approx(1, rel=0.002), (kind, more)
    llama, gemma = (model_shape(dict(SIZES, model_type=kind, vocab_size=200_000)) for kind in ('llama', 'gemma2'))
    assert logits_bytes(llama, 10**5) == logits_bytes(gemma, 10**5) < 0.4 * GiB < logits_bytes(gemma, 10**5, 4)


def test_plans_know_how_many_logits_there_are_at_a_time():
    from homelab_ft.plan.memory import padded_step as plain
    from homelab_ft.train.engine import padded as engine
    from homelab_ft.train.engine.ops import chunked_loss as loss
    assert (later.SLICE, plain.INPLACE_LOGITS, plain.MAX_CHUNK_VALUES) == (engine.MAX_EVAL_LOGITS, loss.INPLACE_LOGITS, loss.MAX_CHUNK_VALUES)


def test_the_kept_figures_are_todays():
    "The table of the notebook, by today's formula."
    script = runpy.run_path(str(SCRIPT))
    for r in json.loads((SCRIPT.parent / 'later.json').read_text())['rows']:
        config, raw = make_config(method=r['method'], per_device_train_batch_size=r['rows'], max_length=r['tokens']), script['known_config'](r['model'])
        more = dict(prompt=r['tokens'], new=script['NEW']) if r['phase'] in ('generation', 'chat') else {}
        assert script['said'](r['phase'], config, raw, raw['num_hidden_layers'], **more) == r['said'], 'run benchmarks/plan/later.py'


# ---------------------------------------------------------------- against real tensors


@pytest.mark.parametrize('method', ['lora', 'full'])
def test_a_rehearsed_evaluation_takes_what_a_real_one_does(script, method):
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoModelForCausalLM
    from homelab_ft.train.engine import padded as engine
    from homelab_ft.plan.trace.fake_model import model_config
    from homelab_ft.train.lora import attach
    raw, config = dict(SIZES, model_type='llama'), make_config(method=method, per_device_train_batch_size=2, max_length=256, padding_free=False)
    model = AutoModelForCausalLM.from_config(model_config(raw), dtype=torch.float32 if method == 'full' else torch.bfloat16).requires_grad_(False)
    model = attach(model, config, 'bfloat16')
    rows = script['Cache']([256] * 2, 1., 4096)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: engine.mean_nll(model, rows, 2)
    now = most = 0
    for e in p.profiler.kineto_results.events():
        if e.name() == '[memory]': now += e.nbytes(); most = max(most, now)
    assert script['rehearsed']('evaluation', config, raw, 3, card='cpu') == pytest.approx(most, rel=0.01)


def watcher():
    "Counts live bytes of every storage made under it."
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter
    class Watcher(TorchDispatchMode):
        def __init__(self): super().__init__(); self.live, self.now, self.peak = {}, 0, 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            for t in tree_iter(out):
                if isinstance(t, torch.Tensor) and t.device.type != 'meta': self.note(t.untyped_storage())
            return out
        def note(self, storage):
            key = storage._cdata
            if key in self.live: return
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)
        def drop(self, key): self.now -= self.live.pop(key, 0)
    return Watcher()


@pytest.mark.parametrize('method', ['qlora', 'int8'])
def test_a_merge_holds_the_packed_weights_and_one_matrix(tmp_path, monkeypatch, method):
    "A processor stands for the card: what is written out there is counted from the packed matrix to the moment it goes to host memory."
    pytest.importorskip('bitsandbytes')
    from transformers.integrations import bitsandbytes as theirs
    from homelab_ft.deploy import merge
    from homelab_ft.train.base_model import load_base
    shape, model, watch, most = model_shape('embedded'), load_base('embedded', method, 'bfloat16', 'cpu'), watcher(), []
    one_by_one = theirs.dequantize_and_replace

    def watched(alone, *args):
        "One matrix, from empty hands."
        with watch: done = one_by_one(alone, *args)
        most.append(watch.peak)
        watch.now = watch.peak = 0
        return done

    monkeypatch.setattr(theirs, 'dequantize_and_replace', watched)
    merge._written_out(model)
    said = merge_bytes(shape, method, weight_bytes(shape, method))
    assert len(most) == 7 * shape.num_hidden_layers and 0.5 * said['activations'] < max(most) <= 1.01 * said['activations']


# ---------------------------------------------------------------- in the estimate


WISHES = dict(method=st.sampled_from(METHODS), batch_size=st.integers(1, 16), length=st.integers(1, 2048), dtype=st.sampled_from(['bfloat16', 'float32']),
              label_share=st.floats(0.01, 1), max_new_tokens=st.integers(1, 2048), padding_free=st.sampled_from([False, 'auto']), card=st.sampled_from(['hopper', 'ampere', 'cpu']))


@given(name=st.sampled_from(sorted(SHAPES)), wishes=st.fixed_dictionaries(WISHES))
@settings(max_examples=100, deadline=None)
def test_every_run_has_all_phases(name, wishes):
    est = estimate(SHAPES[name], **wishes)
    assert [*est.phases][-3:] == [*INFERENCE_PHASES] and est.step_peak <= est.peak == max(sum(parts.values()) for parts in est.phases.values())
    for name in INFERENCE_PHASES[1:]: assert est.phases[name]['optimizer'] == est.phases[name]['gradients'] == 0
    for name in INFERENCE_PHASES: assert all(isinstance(n, int) and n >= 0 for n in est.phases[name].values())
    assert est.phases['evaluation']['optimizer'] == est.phases['optimizer step']['optimizer']


def test_evaluation_counts_where_it_is_the_peak(monkeypatch):
    "A GiB of logits on top of a step that computes the loss in small pieces."
    monkeypatch.setattr(later, 'SLICE', 2**27)
    shape = SHAPES['Llama-3.1-8B']
    est = estimate(shape, batch_size=1, length=1024, optim='adamw_8bit', gradient_checkpointing=True, chunk=128)
    assert est.phase == 'evaluation' and est.peak == sum(est.phases['evaluation'].values()) > est.step_peak
    assert est.parts == est.phases['evaluation'] and 'evaluation ← peak' in str(estimate_table(est)) and 'peak is at evaluation' in verdict(est, 24 * GiB)


def test_long_answers_count():
    shape = SHAPES['Llama-2-7B']
    short, long = (estimate_for(make_config(method='qlora', per_device_train_batch_size=1, max_length=64, max_new_tokens=n), shape) for n in (64, 4000))
    assert short.phase != 'generation' == long.phase and long.phases['loss'] == short.phases['loss']
    assert long.phases['generation']['activations'] - short.phases['generation']['activations'] > 1024 * 1024 * GiB // 2**21


@pytest.mark.parametrize('method', METHODS)
def test_more_of_anything_takes_no_less(method):
    shape = SHAPES['Qwen2.5-7B']
    base = dict(batch_size=2, length=512)
    for more in (dict(batch_size=3), dict(length=1024), dict(b=4)):
        measured = [sum(evaluation_bytes(shape, method, **base | given, learned=(base | given)['batch_size'] * (base | given)['length']).values()) for given in ({}, more)]
        answered = [sum(generation_bytes(shape, method, prompt=(base | given)['length'], new=8, batch_size=(base | given)['batch_size'], b=given.get('b', 2)).values()) for given in ({}, more)]
        assert measured[0] <= measured[1] and answered[0] < answered[1]
