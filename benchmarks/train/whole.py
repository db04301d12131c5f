"""Time of steps in which all weights learn: python whole.py ['{"model": ..., ...}']. Random weights and rows; one line of JSON for each configuration, from a process of its own.

The median of eleven optimizer steps after three. To compare two versions, put the other one first on PYTHONPATH.
"""
import json, subprocess, sys, time
from statistics import median

import torch

from homelab_ft.config import make_config
from homelab_ft.plan.model_catalog import known_config
from homelab_ft.plan import probe
from homelab_ft.train import trainer

CASES = (dict(model='SmolLM2-135M', per_device_train_batch_size=8, max_length=1024, gradient_checkpointing=False),
         dict(model='Qwen3-0.6B', per_device_train_batch_size=2, max_length=2048, gradient_checkpointing=False, optim='adamw_8bit'),
         dict(model='Llama-3.2-1B', per_device_train_batch_size=2, max_length=2048, gradient_checkpointing=True, optim='adamw_8bit', gradient_accumulation_steps=2))
WARM, TIMED = 3, 11


def timed(settings):
    "Seconds of each step."
    probe.STEPS = WARM + TIMED
    job, found = probe.probe_context(make_config(**settings, method='full'), known_config(settings['model'])), []
    for _ in range(WARM + TIMED):
        torch.cuda.synchronize()
        began = time.perf_counter()
        trainer.train_step(job)
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found[WARM:]


def main(settings=''):
    if not settings:
        for case in CASES: subprocess.run([sys.executable, __file__, json.dumps(case)], check=True)
        return
    settings = json.loads(settings)
    seconds = timed(settings)
    tokens = settings['max_length'] * settings['per_device_train_batch_size'] * settings.get('gradient_accumulation_steps', 1)
    print(json.dumps(dict(settings=settings, milliseconds=round(median(seconds) * 1000, 1), tokens_per_second=round(tokens / median(seconds)), card=torch.cuda.get_device_name(),
                          peak_bytes=torch.cuda.max_memory_allocated())), flush=True)


if __name__ == '__main__': main(*sys.argv[1:])
