"""What the trace says beside what was measured on a card: python traced.py [name of a part of a case]. Prints a table and writes traced.json.

Measured are the peaks of one pass without the optimizer's states, from ../train/results.json and ../train/longest.json. Nothing here is fitted to them.
"""
import json, sys
from pathlib import Path

from homelab_ft.config import make_config
from homelab_ft.table import Table
from homelab_ft.io import now, write_json
from homelab_ft.plan.trace.trace import trace
from homelab_ft.plan.memory.estimate import adapter_params
from homelab_ft.plan.model_shape import model_shape

HERE = Path(__file__).resolve().parent
SHAPES = {('full', 2): (4096, 4096, 8), ('full', 8): (16384, 16384, 16), ('real', 1): (2048, 1408, 24), ('real', 2): (4096, 2688, 32),
          ('real', 4): (8192, 5376, 48), ('real', 8): (16384, 10752, 88)}    # `packed_steps` of ../train/ours.py
HELD = '548f85c'     # in this commit passes were measured after others, whose float32 and 16-bit gradients were still there
BARE = ('41bf0ad', 'befa7dc')    # in these the first pass that fits was measured without gradients, later ones with; since then all are measured with


def found_gradients(code, policies):
    "Whether a pass was measured with gradients there: mixed policies are chosen after passes that did fit."
    return code != HELD and (code not in BARE or len(policies) > 1)


def ours():
    "Every measured pass of ours: (name, settings, arguments of `trace`, commit, measured bytes, measured reserved GiB)."
    for run in json.loads((HERE.parent / 'train' / 'results.json').read_text())['runs']:
        for row in run['rows']:
            if row['who'] != 'homelab_ft' or not (row.get('features') or {}).get('peak_bytes'): continue
            policies, name = row['features']['policies'], f"{row['model']} {row['method']} {row['kind']} {row['rows']}"
            given = dict(policies=policies, shape=SHAPES[row['kind'], row['rows']], gradients=found_gradients(run['code'], policies))
            yield name, dict(model=row['model'], method=row['method'], max_length=2048, per_device_train_batch_size=row['rows']), given, run['code'], row['features']['peak_bytes'], row['reserved_gib']
    for row in json.loads((HERE.parent / 'train' / 'longest.json').read_text())['rows']:
        if 'peak_bytes' not in row['features']: continue
        given = dict(policies=row['features']['policies'], tile=row['features']['mlp_chunk'], gradients=found_gradients(row['code'], row['features']['policies']), host_bytes=int(row['host_gib'] * 2**30))
        settings = dict(model='Llama-3.1-8B', method='qlora', lora_r=row['rank'], lora_alpha=2 * row['rank'], max_length=row['tokens'], per_device_train_batch_size=1)
        yield f"Llama-3.1-8B qlora one row of {row['tokens']}", settings, given, row['code'], row['features']['peak_bytes'], row['reserved_gib']


def main(part=''):
    rows = []
    for name, settings, given, code, measured, reserved in ours():
        if part not in name: continue
        config = make_config(**settings)
        found = trace(config, **given)
        more = 6 * adapter_params(model_shape(config.model), config.lora_r) if code == HELD else 0
        rows.append(dict(case=name, code=code, measured=measured, traced=found.first_pass + more, apart=found.first_pass + more - measured, held_gradients=more,
                         layers=found.layers, seconds=found.seconds, measured_reserved_gib=reserved))
        print(rows[-1], flush=True)
    print(Table(['case', 'code', 'measured', 'traced', 'apart', '%', 's'], [[r['case'], r['code'], f"{r['measured']:,}", f"{r['traced']:,}", f"{r['apart']:+,}",
          f"{r['apart'] / r['measured']:+.4%}", r['seconds']] for r in rows]))
    if not part: write_json(HERE / 'traced.json', dict(date=now()[:10], what='peak of one pass in bytes', rows=rows))


if __name__ == '__main__': main(*sys.argv[1:])
