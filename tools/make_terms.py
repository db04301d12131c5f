"""Make homelab_ft/plan/memory/terms_*.json, what the closed form of the fast step knows: python tools/make_terms.py [METHOD/LEVEL/FAMILY/LAYERS[/TARGETS] ...]
There is a file for each method, one for modes with targets, those where not all matrices are adapted, and one for DoRA.

Every mode is a toy with two layers, rehearsed with each of its sizes doubled, and again with a third layer (see the page on terms).
Modes that are named are made again, all if none is; files are written after each, so that the work can go on where it was left."""
import gc, json, sys, time
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from tqdm.auto import tqdm
from homelab_ft.config import make_config
from homelab_ft.io import write_atomic
from homelab_ft.plan.trace import symbolic_terms as terms
from homelab_ft.plan.trace.ledger import Ledger
from homelab_ft.plan.model_catalog import known_config
from homelab_ft.plan.trace import dry_run, memory_tracer
from homelab_ft.train.run_folder import versions

PLAN = Path(__file__).resolve().parents[1] / 'homelab_ft/plan'
FAMILIES = dict(llama='Llama-3.1-8B', qwen3='Qwen3-8B', qwen2='Qwen2.5-7B', phi3='Phi-3-mini', gemma3='gemma-3-1b')    # a model of each
LAYERS = 'compiled', 'eager'
MODES = ['/'.join(m) for m in product(('qlora', 'lora', 'int8'), ('none', 'mlp', 'layer', 'offload'), FAMILIES, LAYERS)]
FEW = 'q_proj+v_proj',       # other adapted matrices than all of them
MODES += ['/'.join(m) for m in product(('qlora', 'lora', 'int8'), ('none', 'mlp', 'layer'), ['llama', 'qwen3', 'qwen2', 'gemma3'], LAYERS, FEW)]
MODES += ['/'.join(m) for m in product(('dora-lora', 'dora-qlora'), ('none', 'mlp', 'layer'), ['llama', 'qwen3', 'qwen2', 'phi3'], LAYERS[1:])]    # compiled, it is another step if sizes are doubled
KEYS = dict(h='hidden_size', A='num_attention_heads', G='num_key_value_heads', D='head_dim', i='intermediate_size', v='vocab_size')
SIZES = dict(h=512, A=8, G=2, D=64, i=1536, v=12288, b=2, n=1024, r=16, p=1024)     # beside those: rows, their length, rank, learned positions
PHASES = ('forward', 'loss', 'backward', 'collect')


def toy(family, layers, sizes):
    "Content of `config.json`."
    raw = known_config(FAMILIES[family]) | {k: sizes[x] for x, k in KEYS.items()} | dict(num_hidden_layers=layers, max_position_embeddings=2**20, pad_token_id=0, sliding_window=None)
    if 'layer_types' in raw: raw['layer_types'] = raw['layer_types'][:1] * layers
    if family == 'gemma3': raw |= dict(sliding_window=512, layer_types=['sliding_attention'] * (layers - 1) + ['full_attention'])      # the last layer is the same, with two and with three
    return raw


def ledger(mode, layers, sizes):
    "Two rehearsed steps; storages must die in order, so nothing is collected meanwhile."
    method, policy, family, layers_are, *few = mode.split('/')
    config = make_config(model=FAMILIES[family], method=method.removeprefix('dora-'), use_dora='dora' in method, lora_r=sizes['r'], lora_alpha=32, max_length=sizes['n'], target_modules=few[0].split('+') if few else 'all-linear',
                         per_device_train_batch_size=sizes['b'], torch_compile=layers_are == 'compiled', padding_free=True)
    scene = dry_run.DryRunSpec(hf_config=toy(family, layers, sizes), policies=[policy] * layers, bucket=(sizes['b'] * sizes['n'], sizes['p'], 8), gradients=False, arch='ampere')      # flash attention: every piece of memory is a product
    torch._dynamo.reset()
    gc.collect()
    gc.disable()
    try:
        with patch.object(memory_tracer, 'sum_bytes', lambda *_: 0): seen, _ = dry_run.dry_run(config, scene)      # no products of sizes; `estimate` adds them
        return Ledger(list(seen.ledger.events), list(seen.ledger.phases), dict(seen.ledger.categories))
    finally: gc.enable()


def story(mode, layers):
    "Every moment of the toy as a sum of products."
    doubled = {x: ledger(mode, layers, SIZES | {x: 2 * n}) for x, n in SIZES.items()}
    book = ledger(mode, layers, SIZES)
    return terms.moments(book, terms.births(book, doubled, SIZES))


def less(a, b):
    "A sum without another."
    return {k: v for k in sorted({*a, *b}) if abs(v := a.get(k, 0) - b.get(k, 0)) > 1e-9}


def formula(mode):
    "What a step takes beyond what is there before it: `kept` by a layer for the backward pass, and the moments of each phase that could be the largest."
    ledger(mode, 2, SIZES)                      # the first one loads libraries
    two, three = story(mode, 2), story(mode, 3)
    before = two[1, 'forward'][0], three[1, 'forward'][0]
    more = less(before[1], before[0])
    pairs = {p: terms.paired(two[1, p], three[1, p]) for p in PHASES}
    phases = {p: terms.largest([(less(s, before[0]), less(m, more)) for s, m in found]) for p, found in pairs.items()}
    return dict(rest=[before[0], more], kept=less(pairs['loss'][0][1], more), **phases)


def main(*modes):
    for mode in tqdm(modes or MODES):
        began = time.time()
        try: made = formula(mode)
        except Exception as e:
            print(f'{mode}: {type(e).__name__}: {str(e)[:200]}', flush=True)
            continue
        what = 'few' if mode.count('/') > 3 else 'dora' if 'dora' in mode else mode.partition('/')[0]
        out = PLAN / f'terms_{what}.json'
        found = json.loads(out.read_text()) if out.exists() else dict(modes={})
        found['modes'][mode] = made
        found |= dict(made=dict(date=time.strftime('%Y-%m-%d'), versions=versions()))
        write_atomic(out, json.dumps(found, separators=(',', ':')) + '\n')
        print(f'{mode}: {time.time() - began:.0f} s', flush=True)


if __name__ == '__main__': main(*sys.argv[1:])
