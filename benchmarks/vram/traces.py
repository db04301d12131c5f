"""Every measured row through the traced mode: python traces.py [workers]. Writes traces.json; what is there already is not traced again.

A row is traced as it ran: with the policies, the tiles and the loss that its step chose, without compiled layers where the step refused them. Padded rows are traced with all
their layers, since their gaps grow with the layers: of a SmolLM2 with LoRA (1,024 tokens, not held back) few layers miss 45 MiB of reserved memory, all of them none.
"""
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from homelab_ft.core import GiB
from homelab_ft.config import make_config
from homelab_ft.io import write_json
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.trace.trace import trace
from homelab_ft.plan.memory.estimate import adapter_params, weight_bytes

HERE = Path(__file__).resolve().parent
KEPT = ('allocated', 'phase', 'parts', 'phases', 'first_microbatch', 'reserved', 'process', 'cuda_graph', 'ram_bytes', 'layers', 'features', 'seconds')    # of a `MemoryTrace`


def is_packed(row):
    "Whether sequences were packed."
    return row['features']['packed']['on']


def trained(config):
    "Trained values."
    shape = model_shape(config.model)
    return shape.n_params if config.method == 'full' else adapter_params(shape, config.lora_r, config.target_modules)


def chunk(config, limit_gib):
    "Positions of the loss at a time on a GPU with a limit, as `rows.fit_loss_chunk` takes them; 0: as many as usual."
    if not limit_gib: return 0
    shape, n = model_shape(config.model), trained(config)
    from homelab_ft.train.engine.ops.chunked_loss import chunk_size
    states = (2 if '8bit' in config.optim else 8) * n
    room = 0.96 * limit_gib * GiB - states - weight_bytes(shape, config.method, 2, config.bnb_4bit_use_double_quant) - 10 * n
    return min(chunk_size(shape.vocab_size), chunk_size(shape.vocab_size, int(room) // (4 * 16)))


def as_it_ran(row):
    "Settings and arguments of `trace`."
    features = row['features']
    if not is_packed(row): return make_config(**row['settings'] | dict(padding_free=False)), dict(policies=features['policies'] or None, all_layers=True) | (dict(after_failed_packing=True) if features.get('packing_failed') else {})
    config = make_config(**row['settings'] | ({} if features['compile']['on'] else dict(torch_compile=False)))
    return config, dict(policies=features['policies'], mlp_chunk=features['mlp_chunk'], loss_chunk=chunk(config, row['limit_gib']))


def key(row):
    "Everything that a trace depends on, in words."
    config, given = as_it_ran(row)
    return json.dumps([row['settings'], config.torch_compile, given], sort_keys=True)


def traced(row):
    "What the trace says of a row."
    config, given = as_it_ran(row)
    found = trace(config, **given)
    return {k: getattr(found, k) for k in KEPT}


def main(workers='1'):
    rows = json.loads((HERE / 'measured.json').read_text())['rows']
    path = HERE / 'traces.json'
    known = json.loads(path.read_text()) if path.exists() else {}
    todo = {key(r): r for r in rows if key(r) not in known}
    with ThreadPoolExecutor(int(workers)) as pool:
        for k, found in zip(todo, pool.map(traced, todo.values())):
            known[k] = found
            write_json(path, known)
            print(k, found['seconds'], flush=True)


if __name__ == '__main__': main(*sys.argv[1:])
