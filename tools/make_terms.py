"""Make homelab_ft/plan/memory/terms_*.json, which the closed form of the packed step evaluates.

    python tools/make_terms.py [METHOD/POLICY/FAMILY/LAYERS[/TARGETS] ...]    trace these modes, or all
    python tools/make_terms.py prune                                         only prune what is there

There is a file for each method, one for modes with targets, where not all matrices are adapted, and one for DoRA. Every mode is a
toy with two layers, traced with each of its sizes doubled, and again with a third layer (see the page on symbolic terms). Files are
written after each mode, so that the work can be continued.

Moments are pruned: those stay that are the largest of their phase somewhere on a wide grid of models, tokens, labels, ranks and
layers, within a tolerance of 1 in 20,000.
"""
import gc, json, sys, time
from itertools import product
from pathlib import Path

import numpy as np

from homelab_ft.io import write_atomic
from homelab_ft.plan.memory.packed_step import PHASES, unpack_mode
from homelab_ft.plan.model_catalog import known_config
from homelab_ft.plan.model_shape import known_shapes

FOLDER = Path(__file__).resolve().parents[1] / 'homelab_ft/plan/memory'
# A model of each family
FAMILIES = dict(llama='Llama-3.1-8B', qwen3='Qwen3-8B', qwen2='Qwen2.5-7B', phi3='Phi-3-mini', gemma3='gemma-3-1b')
SEPARATE_QV = [family for family in FAMILIES if family != 'phi3']
NO_DORA = 'gemma3'
TARGETS = 'q_proj+v_proj'       # other adapted matrices than all of them
POLICIES = 'none', 'mlp', 'layer'
MODES = [
    *product(('qlora', 'lora', 'int8'), (*POLICIES, 'offload'), FAMILIES, ('compiled', 'eager')),
    *product(('qlora', 'lora', 'int8'), POLICIES, SEPARATE_QV, ('compiled', 'eager'), [TARGETS]),
    # compiled, DoRA is another step if sizes are doubled
    *product(('dora-lora', 'dora-qlora'), POLICIES, [family for family in FAMILIES if family != NO_DORA], ['eager']),
]
KEYS = dict(h='hidden_size', A='num_attention_heads', G='num_key_value_heads', D='head_dim', i='intermediate_size', v='vocab_size')
# Beside those: sequences, their length, rank, tokens with a label
SIZES = dict(h=512, A=8, G=2, D=64, i=1536, v=12288, b=2, n=1024, r=16, p=1024)
SAMPLES, TOLERANCE = 10_000, 1 / 20_000


def toy(family, layers, sizes):
    "Content of `config.json`."
    raw = known_config(FAMILIES[family]) | {key: sizes[x] for x, key in KEYS.items()}
    raw |= dict(num_hidden_layers=layers, max_position_embeddings=2**20, pad_token_id=0, sliding_window=None)
    if 'layer_types' in raw: raw['layer_types'] = raw['layer_types'][:1] * layers
    if family == 'gemma3':      # the last layer is the same, with two and with three
        raw |= dict(sliding_window=512, layer_types=['sliding_attention'] * (layers - 1) + ['full_attention'])
    return raw


def ledger(mode, layers, sizes):
    "Two steps of a dry run. Storages must die in order, so nothing is garbage-collected meanwhile."
    from unittest.mock import patch
    import torch
    from homelab_ft.config import make_config
    from homelab_ft.plan.trace import dry_run, memory_tracer
    from homelab_ft.plan.trace.ledger import Ledger
    method, policy, family, layers_are, *targets = mode.split('/')
    config = make_config(
        model=FAMILIES[family], method=method.removeprefix('dora-'), use_dora='dora' in method, lora_r=sizes['r'], lora_alpha=32,
        max_length=sizes['n'], target_modules=targets[0].split('+') if targets else 'all-linear',
        per_device_train_batch_size=sizes['b'], torch_compile=layers_are == 'compiled', padding_free=True)
    # On Ampere attention is flash attention: every piece of its memory is a product
    spec = dry_run.DryRunSpec(hf_config=toy(family, layers, sizes), policies=[policy] * layers, bucket=(sizes['b'] * sizes['n'], sizes['p'], 8),
                              gradients=False, arch='ampere')
    torch._dynamo.reset()
    gc.collect()
    gc.disable()
    try:
        with patch.object(memory_tracer, 'sum_bytes', lambda *_: 0):      # no products of sizes; `packed_phases` adds them
            tracer, _ = dry_run.dry_run(config, spec)
        return Ledger(list(tracer.ledger.events), list(tracer.ledger.phases), dict(tracer.ledger.categories))
    finally: gc.enable()


def traced_moments(mode, layers):
    "Every moment of the toy as a sum of products."
    from homelab_ft.plan.trace import symbolic_terms as terms
    doubled = {x: ledger(mode, layers, SIZES | {x: 2 * n}) for x, n in SIZES.items()}
    book = ledger(mode, layers, SIZES)
    return terms.moments(book, terms.storage_products(book, doubled, SIZES))


def difference(a, b):
    "A sum without another."
    found = {k: a.get(k, 0) - b.get(k, 0) for k in sorted({*a, *b})}
    return {k: round(v, 9) for k, v in found.items() if abs(v) > 1e-9}


def formula(mode):
    "What a step takes beyond what is there before it: `kept` by a layer for the backward pass, and the moments of each phase."
    from homelab_ft.plan.trace import symbolic_terms as terms
    ledger(mode, 2, SIZES)                      # the first one loads libraries
    two, three = traced_moments(mode, 2), traced_moments(mode, 3)
    before, before_three = two[1, 'forward'][0], three[1, 'forward'][0]
    more = difference(before_three, before)
    pairs = {phase: terms.pair_moments(two[1, phase], three[1, phase]) for phase in PHASES}
    phases = {phase: terms.pareto_front([(difference(s, before), difference(m, more)) for s, m in found])
              for phase, found in pairs.items()}
    return dict(kept=difference(pairs['loss'][0][1], more), **phases)


class Grid:
    "Random models, known ones and others, with random micro-batches."
    def __init__(self, samples=SAMPLES, seed=1):
        rng, shapes, rows = np.random.default_rng(seed), [s for s in known_shapes().values() if not s.num_experts], []
        for _ in range(samples):
            s = shapes[rng.integers(len(shapes))]
            sizes = dict(h=s.hidden_size, A=s.num_attention_heads, G=s.num_key_value_heads, D=s.head_dim, i=s.intermediate_size, v=s.vocab_size)
            layers = s.num_hidden_layers
            if rng.random() < 0.5:              # a model that nobody has made yet
                A, D = int(rng.integers(1, 129)), int(rng.choice([32, 64, 80, 96, 128, 192, 256]))
                h = int(rng.choice([0.5, 1, 1, 2]) * A * D)
                sizes = dict(h=h, A=A, G=max(1, A // int(rng.choice([1, 2, 4, 7, 8, 16]))), D=D, i=int(h * rng.uniform(1, 9)), v=int(2**rng.uniform(9, 18)))
                layers = int(rng.integers(2, 130))
            n = 256 * int(2**(9 * rng.random()**1.5))
            p = max(1, int(n * rng.choice([1, rng.random(), rng.random()**4])))
            chunk = max(128, 2**int(rng.integers(17, 28)) // sizes['v'] // 128 * 128)
            others = rng.uniform(-1, 1) if rng.random() < 0.5 else 0         # what layers of other policies keep, as a share
            rows.append(sizes | dict(b=1, n=n, p=p, r=int(2**rng.uniform(0, 10)), layers=layers, logits=min(p, chunk) * sizes['v'], others=others))
        self.columns = {k: np.array([row[k] for row in rows], float) for k in rows[0]}
        self.products = {}

    def value(self, terms):
        "Bytes of a sum of products in all samples; logits are counted by chunks."
        for letters in terms:
            if letters not in self.products:
                self.products[letters] = np.prod([self.columns[x] for x in letters], axis=0) if letters else 1.
        total = sum((n * self.products[letters] for letters, n in terms.items() if letters != 'pv'), np.zeros(len(self.columns['n'])))
        return total + terms.get('pv', 0) * self.columns['logits']

    def phase(self, mode, phase):
        "Bytes of all moments of a phase, as `packed_phases` counts them: an array of moments × samples."
        kept, layers = self.value(mode['kept']), self.columns['layers']
        found = []
        for two, more in mode[phase]:
            per_layer = self.value(more)
            holds = (per_layer >= 0.9 * kept) & (kept > 0)
            found.append(self.value(two) + (layers - 2) * per_layer + holds * self.columns['others'] * layers * kept)
        return np.array(found)


def prune(mode, grid):
    "The mode with those moments only that are ever the largest."
    found = dict(kept=mode['kept'])
    for phase in PHASES:
        values = grid.phase(mode, phase)
        largest = values.max(axis=0)
        near = values >= largest - TOLERANCE * abs(largest)
        stay, covered = [], np.zeros(near.shape[1], bool)
        while not covered.all():
            stay.append(int((near & ~covered).sum(axis=1).argmax()))
            covered |= near[stay[-1]]
        found[phase] = [mode[phase][i] for i in sorted(stay)]
    return found


def read(path):
    "A file with its sums as dicts."
    if not path.exists(): return dict(modes={})
    content = json.loads(path.read_text())
    return content | dict(modes={name: unpack_mode(mode) for name, mode in content['modes'].items()})


def write(path, content):
    "The same with every sum as a list of numbers, in the order of the mode's products."
    modes = {}
    for name, mode in content['modes'].items():
        products = sorted({letters for phase in PHASES for moment in mode[phase] for terms in moment for letters in terms} | {*mode['kept']})
        numbers = lambda terms: [int(n) if n == int(n) else float(f'{n:.7g}') for n in (terms.get(letters, 0) for letters in products)]
        moments = {phase: [[numbers(terms) for terms in moment] for moment in mode[phase]] for phase in PHASES}
        modes[name] = dict(products=products, kept=numbers(mode['kept']), **moments)
    write_atomic(path, json.dumps(content | dict(modes=modes), separators=(',', ':')) + '\n')


def main(*modes):
    grid = Grid()
    if modes == ('prune',):
        for path in sorted(FOLDER.glob('terms_*.json')):
            content = read(path)
            write(path, content | dict(modes={name: prune(mode, grid) for name, mode in content['modes'].items()}))
            print(f'{path.name}: {path.stat().st_size / 1e3:.0f} kB', flush=True)
        return
    from homelab_ft.train.run_folder import versions
    for mode in modes or map('/'.join, MODES):
        began = time.time()
        try: made = prune(formula(mode), grid)
        except Exception as e:
            print(f'{mode}: {type(e).__name__}: {str(e)[:200]}', flush=True)
            continue
        name = 'few' if mode.count('/') > 3 else 'dora' if 'dora' in mode else mode.partition('/')[0]
        path = FOLDER / f'terms_{name}.json'
        content = read(path)
        content['modes'][mode] = made
        write(path, content | dict(made=dict(date=time.strftime('%Y-%m-%d'), versions=versions())))
        print(f'{mode}: {time.time() - began:.0f} s', flush=True)


if __name__ == '__main__': main(*sys.argv[1:])
