"""Gaps of the allocator for the closed form's rules, from traces: python gaps.py [workers [kind ...]]. Writes gaps.json and prints the constants; half an hour on two cores, without a
card. Only the kinds that are named are traced, all if none is; `python gaps.py 0` puts the rules of today beside the traces that are there.

Rows end to end, compiled and not, and with DoRA, from 512 to 16,384 tokens of a pass (compiled: to 65,536), on all policies; whole models, which keep everything or compute layers again; and adapters in padded rows, with
one pass for a step and with two. Padded rows are traced with all their layers. Every block is replayed.
The constants are those of a grid that leave least: the worst difference to a trace, as a share of the process, and twice the root of the mean square.
What is under counts one and a half times: a run that was said to need too little breaks off.
"""
import json, sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
from tqdm.auto import tqdm

from homelab_ft.core import MiB
from homelab_ft.config import make_config
from homelab_ft.table import Table
from homelab_ft.io import now, write_json
from homelab_ft.plan.memory.overhead import process_constants
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.trace.trace import trace
from homelab_ft.plan.memory.estimate import EstimateSpec, estimate
from homelab_ft.train.run_folder import versions

from predict import reserved_bytes, tensors

HERE = Path(__file__).resolve().parent
EAGER = 'SmolLM2-135M', 'SmolLM2-360M', 'Qwen3-0.6B', 'Llama-3.2-1B', 'TinyLlama-1.1B', 'Qwen2.5-1.5B', 'Llama-3.1-8B'
COMPILED = 'SmolLM2-135M', 'Llama-3.2-1B', 'Llama-3.1-8B', 'Qwen3-0.6B', 'Phi-3-mini', 'TinyLlama-1.1B', 'Qwen3-8B', 'Llama-3.2-3B'
WHOLE = 'SmolLM2-135M', 'SmolLM2-360M', 'Qwen3-0.6B', 'Llama-3.2-1B', 'TinyLlama-1.1B', 'Qwen2.5-1.5B'
WHOLE_PASSES, LONG_PASSES = ((1, 512), (1, 2048), (4, 1024)), ((3, 3000), (8, 2048))        # rows, tokens of each; the long ones only where layers are computed again
EAGER_PASSES = ('lora', 1, 512), ('qlora', 1, 1024), ('lora', 2, 1024), ('qlora', 4, 1024), ('qlora', 4, 2048)      # method, rows, tokens of each
COMPILED_PASSES = ('qlora', 1, 512), ('lora', 2, 1024), ('qlora', 4, 1024), ('qlora', 8, 2048), ('qlora', 8, 8192)
DORA = 'Qwen2.5-0.5B', 'Llama-3.2-1B', 'Qwen3-0.6B', 'Llama-3.1-8B'
DORA_PASSES = ('lora', 1, 512), ('qlora', 1, 1024), ('lora', 2, 1024), ('qlora', 4, 1024), ('lora', 4, 2048), ('qlora', 3, 4096)
INT8 = 'SmolLM2-360M', 'Llama-3.2-1B', 'Qwen3-0.6B', 'Phi-3-mini', 'Llama-3.1-8B'
INT8_PASSES = ('int8', 1, 512), ('int8', 2, 1024), ('int8', 4, 512), ('int8', 4, 2048)
PADDED = 'SmolLM2-135M', 'Qwen3-0.6B', 'Llama-3.2-1B', 'Qwen2.5-1.5B'
PADDED_RUNS = [(method, *run) for method, n in (('qlora', 2), ('lora', 1)) for run in product((8, 64), (False, True), range(1, n + 1)) if run[:2] != (8, True)]     # method, rank, layers computed again, passes of a step
LARGER, LARGER_RUNS = ('Qwen3-4B', 'Mistral-7B-v0.3', 'Phi-3-mini'), (('qlora', 16, True, 1, 'adamw_8bit'), ('qlora', 64, True, 2, 'adamw_torch'), ('qlora', 16, False, 2, 'adamw_torch'), ('lora', 16, False, 1, 'adamw_torch'), ('lora', 8, True, 2, 'adamw_8bit'))
GRID = dict(compiled=dict(gaps_compiled=range(0, 60, 5), gaps_compiled_wide=np.arange(0, 1.3, .05), gaps_compiled_logits=(0, .01, .02, .03)),
            eager=dict(gaps_eager=range(0, 60, 5), gaps_eager_wide=np.arange(0, 1.3, .05), gaps_eager_logits=np.arange(0, .12, .005)),
            dora=dict(gaps_dora=range(0, 200, 5), gaps_dora_wide=np.arange(0, 3, .05), gaps_dora_logits=np.arange(0, .12, .01)),
            int8=dict(gaps_int8=range(0, 60, 5), gaps_int8_wide=np.arange(0, 3, .1), gaps_int8_logits=np.arange(0, .12, .01), gaps_int8_inputs=np.arange(0, 1.5, .05)),
            whole=dict(gaps_whole=range(0, 60, 5), gaps_whole_gradients=np.arange(0, .3, .005)),
            again=dict(gaps_again=range(0, 100, 5), gaps_again_gradient=np.arange(0, 6, .25), gaps_again_wide=np.arange(0, 2, .05)),
            padded=dict(gaps_plain=range(0, 60, 5), gaps_plain_wide=np.arange(0, 3, .1), gaps_plain_again=np.arange(0, 3, .1), gaps_plain_inputs=np.arange(0, 2, .1)))
LINEAR = 'compiled', 'eager', 'int8', 'dora', 'again', 'padded'     # rules that are sums in their constants


def case(model, method, rows, length, policy=None, **more):
    "Settings, and what all layers keep."
    settings = dict(model=model, method=method, per_device_train_batch_size=rows, max_length=length, **more)
    return settings, policy and {policy: model_shape(model).num_hidden_layers}


def cases():
    "(kind, settings, policies)."
    policies = 'none', 'mlp', 'layer'
    for m, p, k in product(EAGER, EAGER_PASSES, policies): yield 'eager', *case(m, *p, k, torch_compile=False)
    for m, p, k in product(DORA, DORA_PASSES, policies): yield 'dora', *case(m, *p, k, torch_compile=False, use_dora=True)
    for m, p, k in product(INT8, INT8_PASSES, policies): yield 'int8', *case(m, *p, k)
    for m, p, k in product(COMPILED, COMPILED_PASSES, policies):
        if p[2] <= max(2048, model_shape(m).max_position_embeddings): yield 'compiled', *case(m, *p, k)
    for p, k in ((('lora', 2, 1024), 'none'), (('qlora', 2, 1024), 'layer'), (('qlora', 1, 512), 'none'), (('qlora', 4, 1024), 'layer')): yield 'eager', *case('gemma-3-1b', *p, k, torch_compile=False)
    for more, k in product((dict(method='qlora', lora_r=64), dict(method='qlora', lora_r=4), dict(method='lora', target_modules=['q_proj', 'v_proj'])), ('none', 'layer')):
        yield 'compiled', *case('Llama-3.1-8B', rows=1, length=2048, policy=k, **more)
    for m, again, optim in product(WHOLE, (False, True), ('adamw_torch', 'adamw_8bit')):
        for n, length in WHOLE_PASSES + LONG_PASSES * again:
            if length <= model_shape(m).max_position_embeddings: yield 'again' if again else 'whole', *case(m, 'full', n, length, gradient_checkpointing=again, optim=optim)
    for m, (method, r, again, passes), (n, length) in product(PADDED, PADDED_RUNS, ((1, 256), (2, 1024))):
        yield 'padded', *case(m, method, n, length, padding_free=False, lora_r=r, gradient_checkpointing=again, gradient_accumulation_steps=passes)
    for m, (method, r, again, passes, optim), (n, length) in product(LARGER, LARGER_RUNS, ((1, 333), (3, 1000))):
        yield 'padded', *case(m, method, n, length, padding_free=False, lora_r=r, gradient_checkpointing=again, gradient_accumulation_steps=passes, optim=optim)


def traced(kind, settings, policies):
    "What a trace says."
    found = trace(make_config(**settings), policies, whole=kind not in ('eager', 'int8', 'dora', 'compiled'))
    return dict(kind=kind, settings=settings, policies=policies, allocated=found.allocated, reserved=found.reserved, process=found.process)


def rule(row):
    "Function that gives the bytes of today's rule with other constants."
    config, shape = make_config(**row['settings']), model_shape(row['settings']['model'])
    def said(**constants):
        "The gaps that the closed form counts."
        with patch.dict(process_constants(), constants):
            est = estimate(shape, EstimateSpec.from_config(config), policies=row['policies'], gradient_checkpointing=config.gradient_checkpointing is True)
            return reserved_bytes(est, row['kind'] in ('compiled', 'int8'), config.method == 'int8') - tensors(est)
    return said


def rules(kind, rows):
    "Function that gives the bytes of the rule for all rows with these constants."
    names, each = [*GRID[kind]], [rule(r) for r in rows]
    said = lambda values: np.array([f(**dict(zip(names, values))) for f in each])
    if kind not in LINEAR: return said
    nothing, many = said([0] * len(names)), 2**24
    slopes = [(said([many * (n == name) for n in names]) - nothing) / many for name in names]
    return lambda values: nothing + sum(v * slope for v, slope in zip(values, slopes))


def best(kind, rows):
    "The constants that leave least, and what they leave of each row's process."
    gap, process, said = *(np.array([f(r) for r in rows]) for f in (lambda r: r['reserved'] - r['allocated'], lambda r: r['process'])), rules(kind, rows)
    left = lambda values: (said(values) - gap) / process
    weighed = lambda off: np.where(off < 0, -1.5 * off, off)
    cost = lambda values: (w := weighed(left(values))).max() + 2 * (w**2).mean()**0.5
    found = min(product(*([v * MiB for v in values] if isinstance(values, range) else map(float, values) for values in GRID[kind].values())), key=cost)
    return dict(zip(GRID[kind], found)), left(found)


def main(workers='2', *kinds):
    path, asked = HERE / 'gaps.json', [c for c in cases() if int(workers) and (c[0] in kinds or not kinds)]
    there = json.loads(path.read_text())
    with ThreadPoolExecutor(max(1, int(workers))) as pool: found = list(tqdm(pool.map(lambda c: traced(*c), asked), total=len(asked), disable=not asked))
    rows = [r for r in there['rows'] if r['kind'] not in {c[0] for c in asked}] + found
    write_json(path, (dict(date=now()[:10], versions=versions()) if asked else {k: v for k, v in there.items() if k != 'rows'}) | dict(rows=[r | dict(rule=rule(r)() - (r['reserved'] - r['allocated'])) for r in rows]))
    for kind in GRID:
        found, left = best(kind, [r for r in rows if r['kind'] == kind])
        for name, n in found.items(): print(f'{name}: {n:g}')
        print(f'  leaves {min(left):+.2%} to {max(left):+.2%} of the process')
    print(Table(['what', 'settings', 'policies', 'rule', 'of the process'], [[r['kind'], json.dumps(r['settings']), json.dumps(r['policies']), f"{r['rule'] / MiB:+.0f} MiB", f"{r['rule'] / r['process']:+.2%}"]
                                                                          for r in sorted(json.loads(path.read_text())['rows'], key=lambda r: -abs(r['rule'] / r['process']))[:12]]))


if __name__ == '__main__':
    with patch.dict(process_constants(), gaps_eight_bits=0): main(*sys.argv[1:])      # beyond what a replay says
