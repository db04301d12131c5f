"""Constants of homelab_ft/plan/process.yaml from the rows of measured.json that are not held back: python libraries.py. Prints them, and what is left over."""
import json
from pathlib import Path
from statistics import median

import numpy as np

from homelab_ft.core import make_config
from homelab_ft.plan.fast import chunk_for
from homelab_ft.plan.outside import process_constants
from homelab_ft.plan.plain import loss_bytes
from homelab_ft.plan.shape import model_shape
from predict import merged
from traces import fast, key, trained

HERE = Path(__file__).resolve().parent
NAMES = ('plain', 'recorded', 'recorded_compiled', 'recorded_keep', 'recorded_again', 'eight_bits')


def layers(row):
    "Whether rows are padded, and whether they are not; how many layers are then compiled, uncompiled with everything kept, uncompiled and computed again; 8-bit weights."
    eight = row['settings']['method'] == 'int8'
    if not fast(row): return [1, 0, 0, 0, 0, eight]
    levels, compiled = row['paths']['recompute'], row['paths']['compile'] == 'on'
    keep, n = levels.get('keep', 0), sum(levels.values())
    return [0, 1, n * compiled, keep * (not compiled), (n - keep) * (not compiled), eight]


def blocks(row, config):
    "What the rule names beside its constants: workspaces, adapters, a chunk's logits without compilation, layers' inputs where they are computed again."
    shape, tokens, c = model_shape(config.model), config.max_length * config.per_device_train_batch_size, process_constants()
    logits = 14 * shape.vocab_size * min(tokens, row['chunk'] or chunk_for(shape.vocab_size)) * (row['paths']['compile'] != 'on')
    inputs = 2 * tokens * shape.hidden_size * bool(set(row['paths']['recompute']) - {'keep'})
    return 64 * 2**20 + 4 * trained(config) + c['gaps_eager_logits'] * logits + c['gaps_again_share'] * inputs


def gap(row, found):
    "Reserved bytes beyond those allocated, states and merged matrices included, less what the rule names: as `outside.usual_gaps`."
    config = make_config(**row['settings'])
    more = row['reserved'] - merged(row, found) - found['allocated']
    if fast(row): return more - blocks(row, config)
    return more / loss_bytes(model_shape(config.model), config.max_length * config.per_device_train_batch_size)[1]


def main():
    told = json.loads((HERE / 'measured.json').read_text())
    beside = lambda r: r['process'] - told['context'] - r['reserved']
    rows = [r for r in told['rows'] if not r['held_back']]
    recorded = [r for r in rows if fast(r)]
    print('context:', told['context'])
    x, y = np.array([layers(r) for r in rows], float), np.array([beside(r) for r in rows])
    found = np.linalg.lstsq(x, y, rcond=None)[0]
    for name, n in zip(NAMES, found): print(f'{name}:', round(n))
    traced = json.loads((HERE / 'traces.json').read_text())
    gaps = lambda rows: median(gap(r, traced[key(r)]) for r in rows)
    eight = [r for r in recorded if r['settings']['method'] == 'int8']
    compiled = [r for r in recorded if r['paths']['compile'] == 'on' and r not in eight and not r['settings'].get('use_dora')]
    for how, few in dict(compiled=[r for r in compiled if not r['limit_gib']], eager=[r for r in recorded if r['paths']['compile'] != 'on' and r not in eight]).items():
        matrices = [2 * max(i * o for i, o, _ in model_shape(r['settings']['model']).linears.values()) for r in few]
        const, share = np.linalg.lstsq(np.array([[1, x] for x in matrices], float), np.array([gap(r, traced[key(r)]) for r in few]), rcond=None)[0]
        print(f'gaps_{how}: {const:.0f}\ngaps_{how}_matrix: {share:.3f}')
    print('gaps_eight_bits:', round(median(r['reserved'] - traced[key(r)]['reserved'] for r in eight)) + process_constants()['gaps_eight_bits'])
    print('gaps_plain_share:', round(gaps([r for r in rows if not fast(r)]), 3))
    print('left over, MiB:', *(f'{n / 2**20:.0f}' for n in y - x @ found))


if __name__ == '__main__': main()
