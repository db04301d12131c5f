"""Does what the plan says fits train, and does what it says is too much run out? GPUs limited to 8, 12, 16 and 24 GiB: python cliff.py OUT.json [workers].

Without arguments it prints its cases, which needs no GPU. Exit code 1 if a verdict was wrong.

The limit is `torch.cuda.set_per_process_memory_fraction`. It holds for what PyTorch takes from the driver, reserved memory; the context and the libraries lie outside of it.
So what is compared with the limit is what the closed form says is required, less these two: tensors, and fragmentation within captured graphs. Free blocks of the padded step
are given back when the GPU is full. A GPU that really has 8 GiB would have to hold all.
Up to 97 % of the limit the verdict is "fits", from 103 % on "runs out"; between them there is none, and nothing is tested.

A case must be one configuration, not a family of which the step takes the one that fits. So every layer keeps everything, or every layer is recomputed, instead of `auto`;
4-bit layers are not compiled, since numbers that random weights decide may refuse that; and `measure.py ... fixed` takes from a step what it gives up on a full GPU.
What it gives up before its first step counts as run out as well: micro-batches that are not captured since the GPU is too full. One thing follows the limit and is known to
the closed form: how many labels the loss takes at a time. A row whose step was not as planned for any other reason says so and counts for nothing.

`gaps` says that the tensors alone are below the limit; `retries`, how often PyTorch gave memory back.
"""
import json, sys
from bisect import bisect_left, bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from itertools import product
from pathlib import Path
from threading import Semaphore

from homelab_ft.core import GiB
from homelab_ft.config import make_config
from homelab_ft.table import Table
from homelab_ft.io import now, write_json
from homelab_ft.train.engine.packing import BUCKET_SIZE
from homelab_ft.train.engine.features import OUT_OF_MEMORY
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.memory.estimate import EstimateSpec, estimate

import matrix
from predict import reserved_bytes, tensors
from traces import chunk

LIMITS = (24, 16, 12, 8)                # GiB; those that take longest first
FITS, RUNS_OUT, WINDOW = 0.97, 1.03, 0.02       # shares of the limit; how far beyond them a case may be
MODELS = ('SmolLM2-135M', 'SmolLM2-360M', 'Qwen3-0.6B', 'Llama-3.2-1B', 'Qwen3-1.7B', 'Llama-3.2-3B', 'Phi-3-mini', 'Llama-3.1-8B', 'Qwen3-8B', 'Llama-2-13B', 'Qwen3-14B')
FAST, PADDED, WHOLE = (dict(method='lora'), dict(method='qlora', torch_compile=False)), (dict(method='lora', padding_free=False),), (dict(method='full'),)
PAIRS = (FAST[:1], FAST[1:], FAST, PADDED, WHOLE)      # for each limit five times a case just inside and one just beyond, each time of one of these kinds
BATCHES, MOST_TOKENS = (1, 2, 4, 8), 16384
TOGETHER = 3                            # cases on more than 16 GiB that run at the same time


@lru_cache(None)
def _need(said, limit_gib):
    settings = json.loads(said)
    config = make_config(**settings)
    est = estimate(model_shape(config.model), EstimateSpec.from_config(config), gradient_checkpointing=config.gradient_checkpointing,
                   loss_chunk=chunk(config, limit_gib))
    return dict(allocated=tensors(est), reserved=reserved_bytes(est, config.torch_compile is not False) - est.reclaimable, step=est.step)


def need(settings, limit_gib):
    "Predicted bytes: allocated, and needed of PyTorch; and which step it is about."
    return _need(json.dumps(settings, sort_keys=True), limit_gib)


def share(settings, limit_gib):
    "Predicted reserved memory over the limit."
    return need(settings, limit_gib)['reserved'] / (limit_gib * GiB)


def verdict(share):
    "What the plan says."
    return 'fits' if share <= FITS else 'runs out' if share >= RUNS_OUT else 'too close'


def families(kinds):
    "All settings but the length."
    for model, kind, again, batch in product(MODELS, kinds, (False, True), BATCHES):
        yield dict(model=model, **kind, gradient_checkpointing=again, per_device_train_batch_size=batch)


def lengths(family):
    "From which a case may choose."
    batch = family['per_device_train_batch_size']
    most = min(MOST_TOKENS // batch, model_shape(family['model']).max_position_embeddings)
    return range(BUCKET_SIZE, most + 1, BUCKET_SIZE // batch)


def pair(family, limit_gib):
    "The longest rows of a family that fit and the shortest that run out, as settings; None if one of the two is not just there."
    sizes = lengths(family)
    of = lambda i: family | dict(max_length=sizes[i])
    shares = lambda i: share(of(i), limit_gib)
    inside, beyond = bisect_right(range(len(sizes)), FITS, key=shares) - 1, bisect_left(range(len(sizes)), RUNS_OUT, key=shares)
    if inside < 0 or beyond == len(sizes) or shares(inside) < FITS - WINDOW or shares(beyond) > RUNS_OUT + WINDOW: return None
    return of(inside), of(beyond)


def work(settings):
    "What a pass costs: parameters times tokens."
    return model_shape(settings['model']).n_params * settings['max_length'] * settings['per_device_train_batch_size']


def traits(family):
    "What cases should differ in."
    return [(k, str(family.get(k))) for k in ('model', 'method', 'padding_free', 'gradient_checkpointing', 'per_device_train_batch_size')]


def choose(limits=LIMITS, pairs=PAIRS):
    "(settings, limit in GiB) of all cases: pairs of the families whose traits were taken least so far, and of these the quickest."
    taken, found = Counter(), {}
    for kinds, limit in product(pairs, limits):
        able = {json.dumps(family): both for family in families(kinds) if (json.dumps(family), limit) not in found and (both := pair(family, limit))}
        often = lambda said: sum(taken[t] * (5 if t[0] == 'model' else 1) for t in traits(json.loads(said)))
        said = min(able, key=lambda said: (often(said), work(able[said][1])))
        taken.update(traits(json.loads(said)))
        found[said, limit] = able[said]
    return [(settings, limit) for (_, limit), both in found.items() for settings in both]


def outcome(row):
    "What happened, in words: `trained`, `ran out`, or why nothing can be said."
    why = row.get('failed', '')
    if why.startswith(('OutOfMemoryError', 'HardwareError: the card cannot hold', 'HardwareError: the GPU cannot hold')): return 'ran out'
    if why: return why
    return 'ran out' if row['features'].get('cuda_graph', {}).get('reason') == OUT_OF_MEMORY else 'trained'


def unlike(row):
    "In what the step that trained was not the one that was planned."
    config, features = make_config(**row['settings']), row['features']
    packed = need(row['settings'], row['limit_gib'])['step'] == 'packed'
    n, checkpointing = model_shape(config.model).num_hidden_layers, config.gradient_checkpointing
    if not packed: return ['packed'] * features['packed']['on'] + ['policies'] * (features['policies'] != ({'layer': n} if checkpointing else {}))
    wanted = dict(packed=True, cuda_graph=True, compile=config.torch_compile is not False, merged_layers=0, policies={'layer' if checkpointing else 'none': n})
    found = {k: features[k]['on'] for k in ('packed', 'cuda_graph', 'compile')} | dict(merged_layers=features.get('merged_layers', 0), policies=features['policies'])
    return [k for k, v in wanted.items() if found[k] != v] + ['chunk'] * (row['chunk'] != chunk(config, row['limit_gib']))


def judged(row):
    "The row with verdict and outcome; `agrees` is None where nothing can be said."
    said = need(row['settings'], row['limit_gib'])
    apart = said['reserved'] / (row['limit_gib'] * GiB)
    told, happened = verdict(apart), outcome(row)
    odd = unlike(row) if happened == 'trained' else []
    agrees = None if odd or told == 'too close' or happened not in ('trained', 'ran out') else (told == 'fits') == (happened == 'trained')
    gaps = told == 'runs out' and said['allocated'] < row['limit_gib'] * GiB
    return dict(settings=row['settings'], limit_gib=row['limit_gib'], predicted=said, share=round(apart, 4), verdict=told, gaps=gaps, outcome=happened, unlike=odd, agrees=agrees) | row


def name(settings):
    "A configuration in words."
    s = settings
    kind = ', padded' * (s.get('padding_free') is False) + ', uncompiled' * (s.get('torch_compile') is False) + ', all again' * s['gradient_checkpointing']
    return f"{s['model']} {s['method']} {s['per_device_train_batch_size']} x {s['max_length']}{kind}"


def table(rows):
    "Verdict against outcome; of a case that was not run, the verdict."
    said = lambda r: 'not as planned: ' + ', '.join(r['unlike']) if r.get('unlike') else r.get('outcome', '')[:60]
    right = {True: 'yes', False: 'NO', None: ''}
    size = lambda n: f'{n / GiB:.2f}' if n else ''
    return Table(['GiB', 'configuration', 'tensors', 'reserved', 'of limit', 'verdict', 'by gaps only', 'outcome', 'reserved then', 'retries', 'agrees'],
                 [[r['limit_gib'], name(r['settings']), size(r['predicted']['allocated']), size(r['predicted']['reserved']), f"{r['share']:.1%}", r['verdict'], 'x' * r['gaps'],
                   said(r), size(r.get('reserved')), r.get('retries', ''), right[r.get('agrees')]] for r in rows])


def planned():
    "All cases as rows without an outcome."
    return [judged(dict(settings=settings, limit_gib=limit, failed='not run')) | dict(outcome='') for settings, limit in choose()]


LARGE = Semaphore(TOGETHER)


def run(case):
    "The row of one case."
    settings, limit = case
    with LARGE if limit > 16 else nullcontext(): row = judged(matrix.measure((settings, limit), 'fixed'))
    print(limit, name(settings), '|', row['verdict'], '|', row['outcome'], *row['unlike'], '|', row['seconds'], 's', flush=True)
    return row


def main(out='', workers='6'):
    if not out: return print(table(planned()))
    rows, shared = [], {}
    with ThreadPoolExecutor(int(workers)) as pool:
        for row in pool.map(run, choose()):
            shared |= {k: row.pop(k) for k in matrix.SHARED if k in row}
            rows.append(row)
            write_json(Path(out), dict(date=now()[:10], command=f'python cliff.py OUT.json {workers}', **shared, fits=FITS, runs_out=RUNS_OUT, rows=rows))
    print(table(rows))
    counted = [r['agrees'] for r in rows if r['agrees'] is not None]
    print(len(rows), 'cases,', len(counted), 'with an answer,', sum(counted), 'as the plan said')
    return not all(counted)


if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
