"""Every measured row beside its predictions: python predict.py, after traces.py and peers.py. Writes predicted.json and prints the errors of both halves.

Ours are two, the closed form and the trace. Both get what the step chose on the GPU: policies, positions of the loss at a time, whether layers were compiled.

What is compared: where sequences are packed, the peak of the largest micro-batch when the step was fitted, with gradients and without states, since later peaks are within captured
graphs, which PyTorch does not count as allocated; in padded batches, the peak of three steps. Reserved and process bytes are those of the steps, captured graphs included.
"""
import json
from pathlib import Path
from statistics import median

from homelab_ft.core import GiB
from homelab_ft.config import make_config
from homelab_ft.table import Table
from homelab_ft.io import now, write_json
from homelab_ft.plan.memory.overhead import process_bytes
from homelab_ft.plan.trace.memory_pools import merged_bytes
from homelab_ft.train.engine.packing import BUCKET_SIZE, round_up
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.memory.estimate import EstimateSpec, estimate

from traces import as_it_ran, is_packed, key, trained

HERE = Path(__file__).resolve().parent
GPU_BYTES = 139.8 * GiB      # what the measured GPU has
KINDS = ('allocated', 'reserved', 'process')
WHO = dict(closed=KINDS, trace=KINDS, sum=('allocated', 'process'), accelerate=('allocated', 'process'), fitcheck=('allocated', 'process'))


def room(row, config):
    "Bytes that tensors may take, as the step reckons it: four percent left free, and the optimizer's states."
    return int(0.96 * (row['limit_gib'] * GiB or GPU_BYTES)) - (2 if '8bit' in config.optim else 8) * trained(config)


def merged_layers(limit, peak, each, layers):
    "How many layers have their merged weights cached, as the step decides it."
    return max(0, min(layers, (limit - peak - GiB) // each))


def merged(row, found):
    "Bytes of merged matrices that the step will hold."
    config = make_config(**row['settings'])
    if config.method != 'qlora' or config.use_dora or not is_packed(row) or set(row['features']['policies']) != {'none'}: return 0
    shape = model_shape(config.model)
    each = merged_bytes(shape, config.target_modules)
    return each * merged_layers(room(row, config), found['first_microbatch'], each, shape.num_hidden_layers)


def measured(row):
    "The three figures."
    return dict(allocated=row['features']['peak_bytes'] if is_packed(row) else row['allocated'], reserved=row['reserved'], process=row['process'])


def reserved_bytes(est, compiled=True, eight_bits=False):
    "Of the process in an estimate, what PyTorch has: all but context and libraries."
    return est.peak - process_bytes(0, est.policies, est.step == 'packed', compiled, int8=eight_bits)


def tensors(est):
    "The peak of the steps in an estimate, without context, libraries and gaps."
    return max(sum(parts.values()) - parts['overhead'] for parts in est.phases.values())


def first_pass(est):
    "The largest pass in an estimate, without the optimizer's states."
    return max(sum(parts.values()) - parts['overhead'] - parts['optimizer'] for name, parts in est.phases.items() if name != 'optimizer step')


def repeated(row, est):
    "Bytes of keys and values that PyTorch before 2.12 repeats for every query head, where rows of a pass differ in length; uncompiled layers keep them. The closed form is for later ones. Values that are part of a fused result keep it alive if they are not repeated."
    shape, config = model_shape(row['settings']['model']), make_config(**row['settings'])
    tokens = config.per_device_train_batch_size * config.max_length
    if not is_packed(row) or row['features']['compile']['on'] or tokens % BUCKET_SIZE == 0: return 0
    q, k = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    more = q - 3 * k if 'qkv_proj' in shape.linears else 2 * (q - k)
    return 2 * round_up(tokens, BUCKET_SIZE) * more * (est.policies.get('none', 0) + est.policies.get('mlp', 0))


def closed(row):
    "The three figures of the closed form; None where it has no terms for packed sequences."
    config, given = as_it_ran(row)
    est = estimate(model_shape(config.model), EstimateSpec.from_config(config), policies=given['policies'], loss_chunk=given.get('chunk', 0),
                   full_logits=not row['features'].get('chunked_loss', {}).get('on'))
    if is_packed(row) and est.step != 'packed': return None
    more, compiled = repeated(row, est), config.torch_compile is not False
    first = first_pass(est) + more
    more += merged(row, dict(first_microbatch=first))
    return dict(allocated=first if is_packed(row) else tensors(est), reserved=reserved_bytes(est, compiled, config.method == 'int8') + more, process=est.peak + more)


def traced(row, found):
    "The three figures of the trace."
    more = merged(row, found)
    return dict(allocated=found['first_microbatch'] if is_packed(row) else found['allocated'], reserved=found['reserved'] + more, process=found['process'] + more)


def theirs(told):
    "The two figures of each peer; who says one only, says it of both."
    pair = lambda v: dict(zip(('allocated', 'process'), v if isinstance(v, list) else (v, v)))
    return {who: pair(told[who]) for who in ('sum', 'accelerate', 'fitcheck') if not isinstance(told[who], str)}


def predicted():
    "One entry per row."
    read = lambda name: json.loads((HERE / name).read_text())
    found, peers = read('traces.json'), {r['case']: r for r in read('peers.json')['rows']}
    return [dict(case=r['case'], held_back=r['held_back'], settings=r['settings'], limit_gib=r['limit_gib'], padded=not is_packed(r), recompute=r['features']['policies'],
                 measured=measured(r), predicted=dict(trace=traced(r, found[key(r)]), **({'closed': said} if (said := closed(r)) else {}), **theirs(peers[r['case']]))) for r in read('measured.json')['rows']]


def errors(rows, who, kind):
    "Predicted over measured, less 1."
    return [r['predicted'][who][kind] / r['measured'][kind] - 1 for r in rows if kind in r['predicted'].get(who, {})]


def error_table(rows):
    "Median and worst error, and the most that anything was under, of both halves."
    lines = []
    for who, kinds in WHO.items():
        for kind in kinds:
            for half in (False, True):
                e = errors([r for r in rows if r['held_back'] == half], who, kind)
                worst = f'{max(e, key=abs):+.2%}'
                lines.append([who, kind, 'held back' if half else 'others', len(e), f'{median(map(abs, e)):.3%}', worst, f'{min(0, *e):.2%}'])
    return Table(['who', 'what', 'rows', 'number', 'median error', 'worst', 'most under'], lines)


def main():
    rows = predicted()
    write_json(HERE / 'predicted.json', dict(date=now()[:10], what='bytes', versions=json.loads((HERE / 'peers.json').read_text())['versions'], rows=rows))
    print(error_table(rows))


if __name__ == '__main__': main()
