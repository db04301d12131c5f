"""Traces compared with what was measured on a GPU: python traced.py [part of a case's name]. Prints a table and writes traced.json.

Measured are the peaks of one micro-batch without optimizer states, from ../train/results.json and ../train/longest.json. Nothing here is fitted to them.
"""
import json, sys
from dataclasses import dataclass
from pathlib import Path

from homelab_ft.config import make_config
from homelab_ft.table import Table
from homelab_ft.io import now, write_json
from homelab_ft.plan.memory.estimate import adapter_params
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.trace.trace import trace

HERE = Path(__file__).resolve().parent
BUCKETS = {('full', 2): (4096, 4096, 8), ('full', 8): (16384, 16384, 16), ('real', 1): (2048, 1408, 24), ('real', 2): (4096, 2688, 32),
           ('real', 4): (8192, 5376, 48), ('real', 8): (16384, 10752, 88)}    # `packed_steps` of ../train/ours.py
OLD_GRADIENTS = '548f85c'           # in this commit micro-batches were measured after others, whose float32 and 16-bit gradients were still there
NO_GRADIENTS = ('41bf0ad', 'befa7dc')    # in these the first one that fits was measured without gradients, later ones with; since then all are measured with


@dataclass
class Case:
    "A measured micro-batch."
    name: str
    settings: dict          # of the run
    arguments: dict         # of `trace`
    code: str               # commit
    peak_bytes: int
    reserved_gib: float


def found_gradients(code, policies):
    "Whether gradients were there when a micro-batch was measured: mixed policies are chosen after others that did fit."
    return code != OLD_GRADIENTS and (code not in NO_GRADIENTS or len(policies) > 1)


def measured_cases():
    "Every measured micro-batch of this project."
    for run in json.loads((HERE.parent / 'train' / 'results.json').read_text())['runs']:
        for row in run['rows']:
            features = row.get('features') or {}
            if row['who'] != 'homelab_ft' or not features.get('peak_bytes'): continue
            policies = features['policies']
            arguments = dict(policies=policies, bucket=BUCKETS[row['kind'], row['rows']], gradients=found_gradients(run['code'], policies))
            settings = dict(model=row['model'], method=row['method'], max_length=2048, per_device_train_batch_size=row['rows'])
            name = f"{row['model']} {row['method']} {row['kind']} {row['rows']}"
            yield Case(name, settings, arguments, run['code'], features['peak_bytes'], row['reserved_gib'])
    for row in json.loads((HERE.parent / 'train' / 'longest.json').read_text())['rows']:
        features = row['features']
        if 'peak_bytes' not in features: continue
        arguments = dict(policies=features['policies'], mlp_chunk=features['mlp_chunk'], gradients=found_gradients(row['code'], features['policies']),
                         host_bytes=int(row['host_gib'] * 2**30))
        settings = dict(model='Llama-3.1-8B', method='qlora', lora_r=row['rank'], lora_alpha=2 * row['rank'], max_length=row['tokens'], per_device_train_batch_size=1)
        yield Case(f"Llama-3.1-8B qlora one row of {row['tokens']}", settings, arguments, row['code'], features['peak_bytes'], row['reserved_gib'])


def main(part=''):
    rows = []
    for case in measured_cases():
        if part not in case.name: continue
        config = make_config(**case.settings)
        found = trace(config, **case.arguments)
        old_gradients = 6 * adapter_params(model_shape(config.model), config.lora_r) if case.code == OLD_GRADIENTS else 0
        traced = found.first_microbatch + old_gradients
        rows.append(dict(case=case.name, code=case.code, measured=case.peak_bytes, traced=traced, apart=traced - case.peak_bytes, held_gradients=old_gradients,
                         layers=found.layers, seconds=found.seconds, measured_reserved_gib=case.reserved_gib))
        print(rows[-1], flush=True)
    cells = [[r['case'], r['code'], f"{r['measured']:,}", f"{r['traced']:,}", f"{r['apart']:+,}", f"{r['apart'] / r['measured']:+.4%}", r['seconds']] for r in rows]
    print(Table(['case', 'code', 'measured', 'traced', 'difference', '%', 's'], cells))
    if not part: write_json(HERE / 'traced.json', dict(date=now()[:10], what='peak of one micro-batch in bytes', rows=rows))


if __name__ == '__main__': main(*sys.argv[1:])
