"""The closed form beside the trace, in random settings: python agree.py [rows] [seed] [workers]. Writes agree.json; needs no card. Nothing in it is fitted to anything.
`python agree.py 0` puts the closed form of today beside the traces that are there; `python agree.py 0 METHOD` traces those of one method again.

A row is a model, a method, a shape of passes, what layers keep, an optimizer and switches, drawn at random; models whose layers are all traced, and 70B, are drawn seldom or not at all,
since they take long. Half of the rows that lay rows end to end have several policies of recomputation, or a share of learned positions.
"""
import json, random, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm
from homelab_ft.config import make_config
from homelab_ft.table import Table
from homelab_ft.io import now, write_json
from homelab_ft.plan.memory.packed_step import FAMILIES
from homelab_ft.plan.model_catalog import KNOWN
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.trace.trace import ALTERNATING, trace
from homelab_ft.plan.memory.estimate import EstimateSpec, estimate
from homelab_ft.train.engine.packing import BUCKET_SIZE, bucket_shape, round_up
from homelab_ft.train.run_folder import versions

HERE = Path(__file__).resolve().parent
SLOW = 5e9      # parameters; larger models of `ALTERNATING` are not drawn
TARGETS = ['all-linear', 'all-linear', 'all-linear', ['q_proj', 'v_proj']]


def draw(rng):
    "Settings of a run."
    model = rng.choice([m for m in KNOWN if model_shape(m).model_type not in ALTERNATING or model_shape(m).n_params < SLOW])
    shape = model_shape(model)
    method = rng.choice(['qlora'] * 5 + ['lora'] * 3 + ['int8'] + ['full'] * 2 * (shape.n_params < 3e9))
    found = dict(model=model, method=method, per_device_train_batch_size=rng.choice([1, 1, 2, 3, 4, 8]), max_length=min(rng.choice([256, 333, 512, 1000, 1024, 2048, 3000, 4096, 8192]), shape.max_position_embeddings),
                 optim=rng.choice(['adamw_torch', 'adamw_8bit', 'paged_adamw_8bit']), gradient_checkpointing=rng.choice([True, False]),
                 gradient_accumulation_steps=rng.choice([1, 4]), torch_compile=rng.choice(['auto', 'auto', False]))
    if method == 'qlora': found |= dict(bnb_4bit_use_double_quant=rng.choice([True, False]))
    if method == 'full': return found
    targets = rng.choice(TARGETS) if 'q_proj' in shape.linears else 'all-linear'
    found |= dict(lora_r=rng.choice([4, 8, 16, 32, 64]), target_modules=targets, padding_free=rng.choice(['auto', 'auto', False]))
    compiled = found['torch_compile'] == 'auto' and method == 'lora'        # DoRA has no terms then
    return found | dict(use_dora=rng.random() < 0.15 and method != 'int8' and not compiled and targets == 'all-linear' and found['padding_free'] == 'auto')


def plain(settings):
    "Whether rows are padded."
    return settings['method'] == 'full' or settings['padding_free'] is False or model_shape(settings['model']).model_type not in FAMILIES


def draw_pass(rng, settings):
    "Levels and the share of learned positions, where rows lie end to end."
    n, tokens = model_shape(settings['model']).num_hidden_layers, settings['per_device_train_batch_size'] * settings['max_length']
    if settings['method'] == 'int8' or plain(settings) or rng.random() < 0.5: return dict(policies=None, learned=None)
    first, second = rng.choice([('none', 'mlp'), ('mlp', 'layer')])
    k = rng.randrange(3, n - 2)
    size, learned, _ = bucket_shape([tokens], [rng.randrange(1, tokens)], [0], BUCKET_SIZE, tokens)
    return rng.choice([dict(policies={first: k, second: n - k}, learned=None), dict(policies=None, learned=learned)])


def closed(row):
    "Tensors and the process in the closed form's steps."
    config, wanted = make_config(**row['settings']), row['drawn']
    share = wanted['learned'] / (config.per_device_train_batch_size * config.max_length) if wanted['learned'] else 1.
    est = estimate(model_shape(config.model), EstimateSpec.from_config(config, share), gradient_checkpointing=config.gradient_checkpointing, policies=wanted['policies'])
    return dict(allocated=max(sum(parts.values()) - parts['overhead'] for parts in est.phases.values()), process=est.peak)


def traced(settings, drawn):
    "The same in a trace; where rows are padded, with all layers, since gaps depend on all."
    config = make_config(**settings)
    size = round_up(config.per_device_train_batch_size * config.max_length, BUCKET_SIZE)
    shape = (size, min(size, drawn['learned']), max(8, config.per_device_train_batch_size + 4)) if drawn['learned'] else ()
    found = trace(config, policies=drawn['policies'], shape=shape, whole=plain(settings))
    return dict(allocated=found.allocated, process=found.process, phase=found.phase, rows='on' if (packed := found.features['packed'])['on'] else packed['reason'], seconds=found.seconds)


def apart(row, kind):
    "The closed form over the trace, less 1."
    return row['closed'][kind] / row['trace'][kind] - 1


def drawn_rows(rows, seed, workers):
    "Rows in the order of their drawing, traced."
    rng = random.Random(seed)
    asked = [(settings := draw(rng), draw_pass(rng, settings)) for _ in range(rows)]
    with ThreadPoolExecutor(workers) as pool:
        for (settings, drawn), found in zip(tqdm(asked), pool.map(lambda pair: traced(*pair), asked)): yield dict(settings=settings, drawn=drawn, trace=found)


def again(rows, method):
    "Rows that are there, those of a method traced again."
    for row in rows: yield row | (dict(trace=traced(row['settings'], row['drawn'])) if row['settings']['method'] == method else {})


def main(rows='100', seed='2', workers='2'):
    path, found = HERE / 'agree.json', []
    there = json.loads(path.read_text())
    told = dict(date=now()[:10], seed=int(seed), versions=versions()) if int(rows) else there
    for row in drawn_rows(int(rows), int(seed), int(workers)) if int(rows) else again(there['rows'], seed):
        found.append(row | dict(closed=closed(row)))
        if int(rows): write_json(path, told | dict(rows=found))
    write_json(path, told | dict(rows=found))
    for kind in ('allocated', 'process'):
        print(kind, Table(['apart', 'GiB', 'phase', 'settings', 'drawn'], [[f'{apart(r, kind):+.2%}', f"{r['trace'][kind] / 2**30:.1f}", r['trace']['phase'], json.dumps(r['settings']), json.dumps(r['drawn'])]
                                                                           for r in sorted(found, key=lambda r: -abs(apart(r, kind)))[:12]]), sep='\n')


if __name__ == '__main__': main(*sys.argv[1:])
