"""The same 500 steps of the embedded base model on the sample dataset with the fast paths on and off: python benchmarks/train/curves.py [OUT]

Writes the loss of every step of every case, with versions and date, as JSON. On a processor the fast paths are rows end to end, fused
adapters, the chunked loss and recomputed layers; on a card compiled layers and recorded passes come to them."""
import json, platform, sys, tempfile, time
from pathlib import Path

import torch
from homelab_ft.config import make_config
from homelab_ft.data.sample.tickets import write_tickets
from homelab_ft.io import read_jsonl
from homelab_ft.pipeline import new_run
from homelab_ft.train.trainer import train
from homelab_ft.train.run_folder import versions

CASES = {'plain': dict(padding_free=False, gradient_checkpointing=False), 'rows end to end': dict(padding_free=True, gradient_checkpointing=False),
         'rows, every layer recomputed': dict(padding_free=True, gradient_checkpointing=True)}
if torch.cuda.is_available():
    CASES |= {'rows, neither compiled nor recorded': dict(padding_free=True, torch_compile=False, cuda_graph=False)}
    CASES |= {'rows, all paths, 4 bits': dict(method='qlora', padding_free=True), 'plain, 4 bits': dict(method='qlora', padding_free=False)}


def losses(name, folder, data, steps):
    "Training loss of every step, and what the run says of its step."
    run = new_run(make_config(data=str(data), run_name=name.replace(' ', '-').replace(',', ''), runs_dir=str(folder), max_steps=steps, eval_steps=steps,
                              overlong_rows='drop', **CASES[name]), say=lambda *_: None)
    began = time.perf_counter()
    train(run)
    return dict(loss=[round(r['loss'], 6) for r in read_jsonl(run.metrics_path) if r['kind'] == 'train'], seconds=round(time.perf_counter() - began, 1),
                engine=json.loads(run.manifest_path.read_text())['engine'])


def main(out=Path(__file__).with_name('curves.json'), steps=500):
    with tempfile.TemporaryDirectory() as folder:
        data, _ = write_tickets(Path(folder))
        cases = {name: losses(name, Path(folder) / 'runs', data, int(steps)) for name in CASES}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = dict(date=time.strftime('%Y-%m-%d'), card=card, processor=platform.processor() or platform.machine(), versions=versions(), cases=cases)
    Path(out).write_text(json.dumps(result, indent=1) + '\n')
    plain = cases['plain']['loss']
    for name, case in cases.items():
        print(f"{name:40} last 50 steps {sum(case['loss'][-50:]) / 50:.4f}, largest difference {max(abs(a - b) for a, b in zip(case['loss'], plain)):.1e}, {case['seconds']} s")


if __name__ == '__main__': main(*sys.argv[1:])
