"""The formula compared with traces of random settings: python agree.py [number] [seed] [workers]. Writes agree.json and needs no GPU.

`python agree.py 0` compares today's formula with the traces on file; `python agree.py 0 METHOD` traces the rows of one method again.

A row is a model, a method, a batch, checkpoint policies, an optimizer and options, drawn at random. Models whose layers are all traced, and 70B, are drawn
seldom or not at all, since they take long. Half of the rows with packed sequences have two checkpoint policies, or a share of labels. Nothing is fitted to these rows.
"""
import json, random, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm
from homelab_ft.config import make_config
from homelab_ft.table import Table
from homelab_ft.io import now, write_json
from homelab_ft.plan.memory.estimate import EstimateSpec, estimate
from homelab_ft.plan.memory.packed_step import FAMILIES
from homelab_ft.plan.model_catalog import KNOWN
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.trace.trace import ALTERNATING, trace
from homelab_ft.train.engine.packing import BUCKET_SIZE, bucket_shape, round_up
from homelab_ft.train.run_folder import versions

HERE = Path(__file__).resolve().parent
SLOW = 5e9      # parameters; larger models of `ALTERNATING` are not drawn
METHODS = ['qlora'] * 5 + ['lora'] * 3 + ['int8']
LENGTHS = [256, 333, 512, 1000, 1024, 2048, 3000, 4096, 8192]
TARGETS = ['all-linear'] * 3 + [['q_proj', 'v_proj']]


def draw(rng):
    "Settings of a run."
    def is_quick(name): return model_shape(name).model_type not in ALTERNATING or model_shape(name).n_params < SLOW
    model = rng.choice([name for name in KNOWN if is_quick(name)])
    shape = model_shape(model)
    method = rng.choice(METHODS + ['full'] * 2 * (shape.n_params < 3e9))
    settings = dict(
        model=model,
        method=method,
        per_device_train_batch_size=rng.choice([1, 1, 2, 3, 4, 8]),
        max_length=min(rng.choice(LENGTHS), shape.max_position_embeddings),
        optim=rng.choice(['adamw_torch', 'adamw_8bit', 'paged_adamw_8bit']),
        gradient_checkpointing=rng.choice([True, False]),
        gradient_accumulation_steps=rng.choice([1, 4]),
        torch_compile=rng.choice(['auto', 'auto', False]))
    if method == 'qlora': settings['bnb_4bit_use_double_quant'] = rng.choice([True, False])
    if method == 'full': return settings
    targets = rng.choice(TARGETS) if 'q_proj' in shape.linears else 'all-linear'
    settings |= dict(lora_r=rng.choice([4, 8, 16, 32, 64]), target_modules=targets, padding_free=rng.choice(['auto', 'auto', False]))
    compiled = settings['torch_compile'] == 'auto' and method == 'lora'        # no formula for DoRA then
    dora = rng.random() < 0.15 and method != 'int8' and not compiled
    return settings | dict(use_dora=dora and targets == 'all-linear' and settings['padding_free'] == 'auto')


def is_padded(settings):
    "Whether batches are padded."
    family = model_shape(settings['model']).model_type
    return settings['method'] == 'full' or settings['padding_free'] is False or family not in FAMILIES


def draw_microbatch(rng, settings):
    "Two checkpoint policies, or a number of labels; None: as usual."
    n = model_shape(settings['model']).num_hidden_layers
    tokens = settings['per_device_train_batch_size'] * settings['max_length']
    if settings['method'] == 'int8' or is_padded(settings) or rng.random() < 0.5: return dict(policies=None, labels=None)
    first, second = rng.choice([('none', 'mlp'), ('mlp', 'layer')])
    k = rng.randrange(3, n - 2)
    _, labels, _ = bucket_shape([tokens], [rng.randrange(1, tokens)], [0], BUCKET_SIZE, tokens)
    return rng.choice([dict(policies={first: k, second: n - k}, labels=None), dict(policies=None, labels=labels)])


def estimated(row):
    "Bytes of tensors and of the process, by the formula."
    config, drawn = make_config(**row['settings']), row['drawn']
    label_share = drawn['labels'] / (config.per_device_train_batch_size * config.max_length) if drawn['labels'] else 1.
    found = estimate(model_shape(config.model), EstimateSpec.from_config(config, label_share),
                     gradient_checkpointing=config.gradient_checkpointing, policies=drawn['policies'])
    return dict(allocated=max(sum(parts.values()) - parts['overhead'] for parts in found.phases.values()), process=found.peak)


def traced(settings, drawn):
    "The same by a trace; padded batches with all layers, since their fragmentation depends on all."
    config = make_config(**settings)
    n_sequences, bucket = config.per_device_train_batch_size, ()
    tokens = round_up(n_sequences * config.max_length, BUCKET_SIZE)
    if drawn['labels']: bucket = tokens, min(tokens, drawn['labels']), max(8, n_sequences + 4)
    found = trace(config, policies=drawn['policies'], bucket=bucket, all_layers=is_padded(settings))
    return dict(allocated=found.allocated, process=found.process, phase=found.phase, packed=found.features['packed']['on'], seconds=found.seconds)


def error(row, kind):
    "The formula over the trace, less 1."
    return row['closed'][kind] / row['trace'][kind] - 1


def new_rows(number, seed, workers):
    "Rows in the order in which they are drawn, traced."
    rng = random.Random(seed)
    pairs = [(settings := draw(rng), draw_microbatch(rng, settings)) for _ in range(number)]
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda pair: traced(*pair), pairs)
        for (settings, drawn), found in zip(tqdm(pairs), results): yield dict(settings=settings, drawn=drawn, trace=found)


def main(number='100', seed='2', workers='2'):
    path, rows = HERE / 'agree.json', []
    if int(number):
        header, source = dict(date=now()[:10], seed=int(seed), versions=versions()), new_rows(int(number), int(seed), int(workers))
    else:
        header = json.loads(path.read_text())
        source = header.pop('rows')
    for row in source:
        if not int(number) and row['settings']['method'] == seed: row['trace'] = traced(row['settings'], row['drawn'])
        rows.append(row | dict(closed=estimated(row)))
        if int(number): write_json(path, header | dict(rows=rows))
    write_json(path, header | dict(rows=rows))
    for kind in ('allocated', 'process'):
        worst = sorted(rows, key=lambda row: -abs(error(row, kind)))[:12]
        cells = [[f'{error(r, kind):+.2%}', f"{r['trace'][kind] / 2**30:.1f}", r['trace']['phase'], json.dumps(r['settings']), json.dumps(r['drawn'])] for r in worst]
        print(kind, Table(['error', 'GiB', 'phase', 'settings', 'drawn'], cells), sep='\n')


if __name__ == '__main__': main(*sys.argv[1:])
