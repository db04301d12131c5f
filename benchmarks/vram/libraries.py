"""Constants of homelab_ft/plan/memory/process.yaml from the rows of measured.json that are not held back: python libraries.py. Prints them, and what is left over."""
import json
from pathlib import Path
from statistics import median

import numpy as np

from homelab_ft.plan.memory.overhead import process_constants
from traces import is_packed, key

HERE = Path(__file__).resolve().parent
NAMES = ('padded', 'graph', 'graph_compiled_layer', 'graph_eager_layer', 'graph_checkpointed_layer', 'int8_kernels')


def layers(row):
    "Whether rows are padded, and whether they are not; how many layers are then compiled, uncompiled with everything kept, uncompiled and computed again; 8-bit weights."
    eight = row['settings']['method'] == 'int8'
    if not is_packed(row): return [1, 0, 0, 0, 0, eight]
    policies, compiled = row['features']['policies'], row['features']['compile']['on']
    keep, n = policies.get('none', 0), sum(policies.values())
    return [0, 1, n * compiled, keep * (not compiled), (n - keep) * (not compiled), eight]


def main():
    told = json.loads((HERE / 'measured.json').read_text())
    beside = lambda r: r['process'] - told['context'] - r['reserved']
    rows = [r for r in told['rows'] if not r['held_back']]
    packed = [r for r in rows if is_packed(r)]
    print('context:', told['context'])
    x, y = np.array([layers(r) for r in rows], float), np.array([beside(r) for r in rows])
    found = np.linalg.lstsq(x, y, rcond=None)[0]
    for name, n in zip(NAMES, found): print(f'{name}:', round(n))
    traced = json.loads((HERE / 'traces.json').read_text())
    eight = [r for r in packed if r['settings']['method'] == 'int8']
    print('int8_reserved:', round(median(r['reserved'] - traced[key(r)]['reserved'] for r in eight)) + process_constants()['int8_reserved'])
    print('left over, MiB:', *(f'{n / 2**20:.0f}' for n in y - x @ found))


if __name__ == '__main__': main()
