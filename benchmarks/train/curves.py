"""The same 500 steps of the embedded base model on the sample dataset with the fast paths on and off: python benchmarks/train/curves.py [OUT]

Writes the loss of every step of every case, with versions and date, as JSON. On a CPU the fast paths are packed sequences, fused LoRA,
the chunked loss and checkpointed layers; on a GPU also compiled layers and CUDA graphs.
"""
import json, platform, sys, tempfile, time
from pathlib import Path

import torch
from homelab_ft.config import make_config
from homelab_ft.data.sample.tickets import write_tickets
from homelab_ft.io import read_jsonl
from homelab_ft.pipeline import new_run
from homelab_ft.train.run_folder import versions
from homelab_ft.train.trainer import train

CASES = {
    'padded': dict(padding_free=False, gradient_checkpointing=False),
    'packed': dict(padding_free=True, gradient_checkpointing=False),
    'packed, every layer recomputed': dict(padding_free=True, gradient_checkpointing=True),
}
ON_A_GPU = {
    'packed, neither compiled nor captured': dict(padding_free=True, torch_compile=False, cuda_graph=False),
    'packed, 4 bits': dict(method='qlora', padding_free=True),
    'padded, 4 bits': dict(method='qlora', padding_free=False),
}


def losses(name, settings, folder, data, steps):
    "Training loss of every step, and which features the step used."
    given = dict(data=str(data), max_steps=steps, eval_steps=steps, overlong_rows='drop', **settings)
    run = new_run(make_config(run_name=name.replace(' ', '-').replace(',', ''), runs_dir=str(folder), **given), log=lambda *_: None)
    began = time.perf_counter()
    train(run)
    seconds = round(time.perf_counter() - began, 1)
    loss = [round(record['loss'], 6) for record in read_jsonl(run.metrics_path) if record['kind'] == 'train']
    return dict(loss=loss, seconds=seconds, engine=json.loads(run.manifest_path.read_text())['engine'])


def main(out=Path(__file__).with_name('curves.json'), steps=500):
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        data, _ = write_tickets(Path(folder))
        runs = Path(folder) / 'runs'
        chosen = CASES | ON_A_GPU if on_gpu else CASES
        cases = {name: losses(name, settings, runs, data, int(steps)) for name, settings in chosen.items()}
    about = dict(date=time.strftime('%Y-%m-%d'), card=torch.cuda.get_device_name() if on_gpu else None,
                 processor=platform.processor() or platform.machine(), versions=versions())
    Path(out).write_text(json.dumps(about | dict(cases=cases), indent=1) + '\n')
    for name, case in cases.items():
        differences = [abs(a - b) for a, b in zip(case['loss'], cases['padded']['loss'])]
        last = case['loss'][-50:]
        print(f"{name:40} last 50 steps {sum(last) / len(last):.4f}, largest difference {max(differences):.1e}, {case['seconds']} s")


if __name__ == '__main__': main(*sys.argv[1:])
