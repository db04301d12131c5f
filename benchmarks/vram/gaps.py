"""Gaps of the allocator for the closed form's rules, from traces: python gaps.py [workers [kind ...]]. Writes gaps.json and prints the constants; half an hour on two cores, without a
card. Only the kinds that are named are traced, all if none is; `python gaps.py 0` puts the rules of today beside the traces that are there.

Rows end to end, compiled and not, from 512 to 16,384 tokens of a pass, on all levels; and whole models in padded rows, traced with all their layers. Every block is replayed.
The constants of rows end to end are those of a grid that leave least: the worst difference to a trace, as a share of the process, and twice the root of the mean square.
"""
import json, sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
from tqdm.auto import tqdm

from homelab_ft.core import MiB, make_config
from homelab_ft.files import Table, now, write_json
from homelab_ft.plan.later import LATER
from homelab_ft.plan.outside import pools_apart, usual_gaps
from homelab_ft.plan.shape import model_shape
from homelab_ft.plan.trace import trace
from homelab_ft.plan.vram import _wishes, estimate
from homelab_ft.plan.weights import target_linears, trained_matrices
from homelab_ft.train.watch import versions

HERE = Path(__file__).resolve().parent
EAGER = 'SmolLM2-135M', 'SmolLM2-360M', 'Qwen3-0.6B', 'Llama-3.2-1B', 'TinyLlama-1.1B', 'Qwen2.5-1.5B', 'Llama-3.1-8B'
COMPILED = 'SmolLM2-135M', 'Llama-3.2-1B', 'Llama-3.1-8B', 'Qwen3-0.6B', 'Phi-3-mini', 'TinyLlama-1.1B', 'Qwen3-8B', 'Llama-3.2-3B'
WHOLE = 'SmolLM2-135M', 'Qwen3-0.6B', 'Llama-3.2-1B'
EAGER_PASSES = ('lora', 1, 512), ('qlora', 1, 1024), ('lora', 2, 1024), ('qlora', 4, 1024), ('qlora', 4, 2048)      # method, rows, tokens of each
COMPILED_PASSES = ('qlora', 1, 512), ('lora', 2, 1024), ('qlora', 4, 1024), ('qlora', 8, 2048)
FEATURES = '', '_wide', '_logits'       # of the constants' names
GRID = dict(compiled=(range(0, 60, 5), np.arange(0, 1.3, .05), (0, .01, .02, .03)), eager=(range(0, 60, 5), np.arange(0, 1.3, .05), np.arange(0, .12, .005)))


def case(model, method, rows, length, level=None, **more):
    "Settings, and what all layers keep."
    settings = dict(model=model, method=method, per_device_train_batch_size=rows, max_length=length, **more)
    return settings, level and {level: model_shape(model).num_hidden_layers}


def cases():
    "(kind, settings, levels)."
    levels = 'keep', 'mlp', 'layer'
    for m, p, k in product(EAGER, EAGER_PASSES, levels): yield 'eager', *case(m, *p, k, torch_compile=False)
    for m, p, k in product(COMPILED, COMPILED_PASSES, levels): yield 'compiled', *case(m, *p, k)
    for p, k in ((('lora', 2, 1024), 'keep'), (('qlora', 2, 1024), 'layer'), (('qlora', 1, 512), 'keep'), (('qlora', 4, 1024), 'layer')): yield 'eager', *case('gemma-3-1b', *p, k, torch_compile=False)
    for more, k in product((dict(method='qlora', lora_r=64), dict(method='qlora', lora_r=4), dict(method='lora', target_modules=['q_proj', 'v_proj'])), ('keep', 'layer')):
        yield 'compiled', *case('Llama-3.1-8B', rows=1, length=2048, level=k, **more)
    for m, again, optim, (n, length) in product(WHOLE, (False, True), ('adamw_torch', 'adamw_8bit'), ((1, 2048), (1, 512), (4, 1024))):
        yield 'whole', *case(m, 'full', n, length, gradient_checkpointing=again, optim=optim)


def traced(kind, settings, levels):
    "What a trace says."
    found = trace(make_config(**settings), levels, whole=kind == 'whole')
    return dict(kind=kind, settings=settings, levels=levels, allocated=found.allocated, reserved=found.reserved, process=found.process)


def facts(row):
    "(bytes that need no constant, widest result, logits and loss), as `vram` puts them into the rule."
    config, shape = make_config(**row['settings']), model_shape(row['settings']['model'])
    est = estimate(shape, **_wishes(config, 1.), levels=row['levels'], gradient_checkpointing=config.gradient_checkpointing is True)
    logits = max(parts['logits_loss'] for name, parts in est.phases.items() if name not in LATER)
    tokens, kept = config.per_device_train_batch_size * config.max_length, 'layer' not in est.levels
    apart = pools_apart(trained_matrices(shape, target_linears(shape, config.target_modules), config.lora_r), config.lora_r, tokens, kept)
    return apart, 2 * tokens * max(o for _, o, _ in shape.linears.values()), logits


def beside(row):
    "The row, and how far today's rule is from it, in bytes."
    apart, wide, logits = facts(row)
    rule = usual_gaps(apart, logits, wide, 64 * MiB, row['kind'] != 'whole', row['kind'] == 'compiled', row['kind'] == 'whole', row['settings'].get('gradient_checkpointing', False))
    return row | dict(rule=rule - (row['reserved'] - row['allocated']))


def best(rows, grid):
    "The constants that leave least, and what they leave of each row's process."
    known, wide, logits = np.array([facts(r) for r in rows]).T
    gap, process = (np.array([f(r) for r in rows]) for f in (lambda r: r['reserved'] - r['allocated'] - 64 * MiB, lambda r: r['process']))
    left = lambda c: (known + c[0] * MiB + c[1] * wide + c[2] * logits - gap) / process
    cost = lambda c: abs(left(c)).max() + 2 * (left(c)**2).mean()**0.5
    found = min(product(*grid), key=cost)
    return found, left(found)


def main(workers='2', *kinds):
    path, asked = HERE / 'gaps.json', [c for c in cases() if int(workers) and (c[0] in kinds or not kinds)]
    there = json.loads(path.read_text())
    with ThreadPoolExecutor(max(1, int(workers))) as pool: found = list(tqdm(pool.map(lambda c: traced(*c), asked), total=len(asked), disable=not asked))
    rows = [r for r in there['rows'] if r['kind'] not in {c[0] for c in asked}] + found
    write_json(path, (dict(date=now()[:10], versions=versions()) if asked else {k: there[k] for k in ('date', 'versions')}) | dict(rows=[beside(r) for r in rows]))
    for kind, grid in GRID.items():
        found, left = best([r for r in rows if r['kind'] == kind], grid)
        for name, n in zip(FEATURES, (found[0] * MiB, *found[1:])): print(f'gaps_{kind}{name}: {n:g}')
        print(f'  leaves {min(left):+.2%} to {max(left):+.2%} of the process')
    print('gaps_whole:', round(median(r['reserved'] - r['allocated'] for r in rows if r['kind'] == 'whole')))
    print(Table(['what', 'settings', 'levels', 'rule', 'of the process'], [[r['kind'], json.dumps(r['settings']), json.dumps(r['levels']), f"{r['rule'] / MiB:+.0f} MiB", f"{r['rule'] / r['process']:+.2%}"]
                                                                          for r in sorted(map(beside, rows), key=lambda r: -abs(r['rule'] / r['process']))[:12]]))


if __name__ == '__main__': main(*sys.argv[1:])
