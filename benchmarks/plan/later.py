"""What runs beside and after the training steps, rehearsed without a card, and what `plan.later` says of it: python later.py. Prints a table and writes later.json.

The functions are the run's own (`train.engine.mean_nll` beside the step that a run takes, `evaluate.likelihood.sequence_nll`, the loops of `evaluate.tasks` and `deploy.serve`), and so are the
model's class, its layers in 4 or 8 bits and its adapters; only the tensors have no values, so that a pass is over where somebody wants to read a number.
In PyTorch's inference mode nobody sees what a function like the cross-entropy makes inside, so `torch.no_grad` stands in for it.
"""
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from transformers import masking_utils

from homelab_ft.config import make_config
from homelab_ft.deploy import chat as serve
from homelab_ft.evaluate import likelihood, inference as tasks
from homelab_ft.table import Table
from homelab_ft.io import now, write_json
from homelab_ft.plan.memory import inference as later
from homelab_ft.plan.model_catalog import known_config
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.memory.static import adapter_params
from homelab_ft.train.engine import padded as engine
from homelab_ft.plan.trace import dry_run as rehearse
from homelab_ft.plan.trace.fake_model import fill, meta_model, model_config, on_meta
from homelab_ft.train.engine.packing import RandomSequences
from homelab_ft.plan.trace.memory_tracer import MemoryTracer

HERE = Path(__file__).resolve().parent
MODELS = ('Llama-3.2-1B', 'Llama-3.1-8B', 'Qwen2.5-7B')
NEW = 16      # tokens of an answer
PHASES = ('evaluation', 'final evaluation', 'generation', 'chat')


class Cache(RandomSequences):
    "Random rows, as many as there are lengths."
    def __len__(self): return len(self.lengths)


def no_values(data, dtype=torch.int64, device=None, **_):
    "`torch.tensor`: the same shape, no values."
    return torch.empty(np.asarray(data).shape, dtype=dtype, device='cpu')


@contextmanager
def stage(config, raw, layers, card, training):
    "A model without values, and who watches. After training no weight is trained any more, and what was tuned as a whole is in 16 bits."
    witness, mode, model = MemoryTracer(card), FakeTensorMode(), meta_model(config, raw, layers) if config.method != 'full' or training else on_meta(model_config(raw, layers), getattr(torch, 'float32' if config.dtype == 'float32' else 'bfloat16'))
    witness.expect_products(True)
    with mode, witness: fill(model, config)
    with ExitStack() as stack:
        FakeTensor.tolist = lambda t: [1] * t.shape[0]      # every token of an answer is this one
        stack.callback(delattr, FakeTensor, 'tolist')
        probe_configs = patch.object(torch, 'tensor', no_values), patch.object(serve, '_pick', lambda *_: 1), patch.object(torch, 'inference_mode', torch.no_grad)
        even = patch.object(masking_utils, 'is_tracing', lambda *_: False), patch.object(masking_utils, 'fast_all', lambda mask: len(mask) == 1)      # one row has no padding
        for context in (*rehearse.gpu_patches(witness, card), *probe_configs, *even, mode, witness): stack.enter_context(context)
        yield witness, model


def until_read(function, *args, **more):
    "A call, which is over where it wants a value."
    try: function(*args, **more)
    except DataDependentOutputException: pass
    except RuntimeError as e:
        if 'numpy' not in str(e): raise


def peak_of(book, begin):
    "Bytes from an event on, beyond those that exist there."
    now, most = 0, 0
    for n, _ in book.events[begin:]:
        now += n
        most = max(most, now)
    return most


def rehearsed(phase, config, raw, layers, card='hopper', prompt=0, new=0, label_share=1.):
    "Bytes that a phase takes beside the model, and, in the training process, beside what waits there for the next step."
    with stage(config, raw, layers, card, phase == 'evaluation') as (witness, model):
        rows, size = Cache([config.max_length] * config.per_device_train_batch_size, label_share, raw['vocab_size']), config.per_device_train_batch_size
        job = rehearse.make_job(witness, model, config, rehearse.DryRunSpec(raw, ['layer'] * layers, card=card)) if phase == 'evaluation' else None
        if not job: model.requires_grad_(False).eval()
        begin, prompts = len(witness.book.events), [[1] * (prompt - (i > 0)) for i in range(size)]      # of two lengths, so that attention has a mask
        if job:
            with job.engine.evaluating(): until_read(engine.mean_nll, model, rows, size)
        elif phase == 'final evaluation': until_read(likelihood.sequence_nll, model, rows, size, False)
        elif phase == 'chat': list(serve._tokens(model, prompts[0], set(), new, 0.))
        else: tasks.generate_greedy(model, prompts, set(), new, 0, size, False)
        return peak_of(witness.book, begin)


def said(phase, config, raw, layers, prompt=0, new=0, label_share=1.):
    "The same by the closed form."
    shape, b, rows, n = replace(model_shape(raw), num_hidden_layers=layers), 4 if config.dtype == 'float32' else 2, config.per_device_train_batch_size, config.max_length
    trained = shape.n_params if config.method == 'full' else adapter_params(shape, config.lora_r)
    if phase == 'generation': return sum(later.generation_bytes(shape, config.method, rows, prompt, new, b).values())
    if phase == 'chat': return sum(later.generation_bytes(shape, config.method, 1, prompt, new, b, autocast=False).values())
    fast = phase == 'evaluation' and config.padding_free is not False and config.method != 'full' and b == 2 and not shape.eager
    return sum(later.evaluation_bytes(shape, config.method, rows, n, round(label_share * rows * (n - 1)), b, fast, trained * (phase == 'evaluation')).values())


def table():
    "Every model, method and phase: (rehearsed, said)."
    rows = []
    for name in MODELS:
        raw = known_config(name)
        for method, size, length in (('qlora', 1, 1024), ('qlora', 4, 2048), ('lora', 4, 2048), ('int8', 2, 2048)):
            config = make_config(model=name, method=method, per_device_train_batch_size=size, max_length=length)
            for phase in PHASES:
                more = dict(prompt=length, new=NEW) if phase in ('generation', 'chat') else {}
                counted, told = (f(phase, config, raw, raw['num_hidden_layers'], **more) for f in (rehearsed, said))
                rows.append(dict(model=name, method=method, rows=size, tokens=length, phase=phase, rehearsed=counted, said=told))
                print(rows[-1], f'{told / counted - 1:+.3%}', flush=True)
    return rows


def main():
    rows = table()
    print(Table(['model', 'method', 'rows × tokens', 'phase', 'rehearsed', 'closed form', 'apart'],
                [[r['model'], r['method'], f"{r['rows']} × {r['tokens']}", r['phase'], f"{r['rehearsed']:,}", f"{r['said']:,}", f"{r['said'] / r['rehearsed'] - 1:+.2%}"] for r in rows]))
    versions = {name: metadata.version(name) for name in ('torch', 'transformers', 'peft', 'bitsandbytes')}
    write_json(HERE / 'later.json', dict(date=now()[:10], versions=versions, what='bytes beside the model', rows=rows))


if __name__ == '__main__': main()
