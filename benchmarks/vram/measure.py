"""Memory of our own training step on a GPU, one configuration per process: python measure.py '{"model": ..., "method": ..., ...}' [GiB [fixed]].

Settings are those of a run. Weights are random and made on the GPU, quantized ones as well; the step is prepared as in a run and takes three optimizer steps.
Prints one line, `ROW` and JSON: bytes allocated, reserved and of the process at their peaks, what the layers kept, versions. With `fixed`, a card that is full in a step
ends the run, where it would give something up otherwise. Others may use the GPU meanwhile, if NVML says what each process takes.
"""
import fcntl, json, os, sys, tempfile, time
from pathlib import Path

import torch

from homelab_ft.config import make_config
from homelab_ft.plan.model_catalog import known_config
from homelab_ft.train import trainer
from homelab_ft.train.engine.features import features_json
from homelab_ft.plan.probe import STEPS, probe_context
from homelab_ft.train.run_folder import versions

LOCK = Path(tempfile.gettempdir()) / 'homelab_ft_context.lock'


def on_card():
    "Bytes used on the GPU by everybody, and by each process that NVML names (by the number it has there)."
    import pynvml
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    return pynvml.nvmlDeviceGetMemoryInfo(gpu).used, {p.pid: p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)}


def open_context():
    "Open this process's context while no other opens one: `(number that NVML gives it or None, bytes used before by everybody, bytes of its context)`."
    with open(LOCK, 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        used, before = on_card()
        torch.zeros(1, device='cuda')
        after_used, after = on_card()
        time.sleep(0.2)
    new = [n for n in after if n not in before]
    mine = new[0] if len(new) == 1 else None
    return mine, used, after[mine] if mine else after_used - used


def keep_all(job):
    "From now on a GPU that is full ends the run: captured graphs, cached merged weights and policies stay as they were prepared."
    job.step.downgrade_after_oom = lambda: False


def measure(settings, limit_gib, fixed=False):
    "The row of one configuration."
    if limit_gib: torch.cuda.set_per_process_memory_fraction(limit_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    mine, used, context = open_context()
    config = make_config(**settings)
    began, job = time.monotonic(), probe_context(config, known_config(config.model))
    if fixed: keep_all(job)
    prepared, at_rest, highest = time.monotonic() - began, torch.cuda.memory_allocated(), 0
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        trainer.train_step(job)
        torch.cuda.synchronize()
        total, each = on_card()
        highest = max(highest, (each.get(mine) or 0) if mine else total - used)
    return dict(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved(), process=highest, alone=mine is not None, context=context,
                at_rest=at_rest, prepare_seconds=round(prepared, 1), features=features_json(job.step.features), chunk=getattr(job.step, 'loss_chunk', 0),
                retries=torch.cuda.memory_stats()['num_alloc_retries'], allocator=os.environ.get('PYTORCH_ALLOC_CONF', ''),
                card=torch.cuda.get_device_name(), versions=versions())


def main(settings, limit_gib='0', fixed=''):
    asked = dict(settings=json.loads(settings), limit_gib=float(limit_gib))
    try: found = measure(**asked, fixed=fixed == 'fixed')
    except Exception as e: found = dict(failed=f'{type(e).__name__}: {str(e)[:300]}')
    print('ROW ' + json.dumps(asked | found), flush=True)


if __name__ == '__main__': main(*sys.argv[1:])
