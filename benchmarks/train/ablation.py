"""What each technique of the fast step gains: one case at a time switched off, on one model in one process.

python benchmarks/train/ablation.py MODEL METHOD GIB [full] [real] [CASE ...]   (MODEL from model.py; GIB 0: the whole card; no workload: both; no CASE: all)
One line of JSON per case: tokens per second, milliseconds per step, time the card was busy, peak memory."""
import gc, sys
from contextlib import ExitStack
from unittest.mock import patch

import torch
from homelab_ft.config import make_config
from homelab_ft.train.engine.ops import varlen_attention as attention, fused_lora as linear, chunked_loss as loss
from homelab_ft.train.engine import autotune as fast
from homelab_ft.train.engine.padded import PaddedStep
from homelab_ft.train.lora import attach_lora
from homelab_ft.train.base_model import load_base
from ours import measure, packed_steps
from workload import LENGTH, Data, limit_card, say

ROWS = 2      # packed rows in a step
STOCK = lambda model: (linear.unfuse(model), {'switched off': 1})[1]
CASES = {  # name: (options, patches)
    'everything': ({}, []),
    'no CUDA graphs': (dict(graph=False), []),
    'no compiled layers': (dict(compile=False), []),
    'neither': (dict(compile=False, graph=False), []),
    'adapters as peft runs them, neither': (dict(compile=False, graph=False), [(linear, 'fuse', STOCK)]),
    'merged matrices made in every pass': ({}, [(fast.GpuTuner, 'cache_merged_weights', lambda self: None)]),
    'adapters not merged into 4-bit weights': ({}, [(linear, 'can_merge', lambda *_: False), (fast.GpuTuner, 'cache_merged_weights', lambda self: None)]),
    'every layer recomputed': (dict(checkpointing=True), []),
    'flash attention instead of the fastest': ({}, [(attention, 'time_kernels', lambda *_: {'FLASH_ATTENTION': 0.})]),
    'loss over all logits at once': ({}, [(loss, 'chunk_size', lambda *_, **__: 2**20)]),
}


def close(step):
    "Give everything back to the card."
    step.restore()
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def main(path, method, gib, *names):
    limit_card(float(gib))
    model = attach_lora(load_base(path, method, 'bfloat16', 'cuda'), make_config(method=method))
    kinds, names = [k for k in ('full', 'real') if k in names], [n for n in names if n not in ('full', 'real')]
    for kind in kinds or ('full', 'real'):
        data = Data(kind, 128000)
        steps, shape = packed_steps(data, ROWS)
        for name in names or [*CASES, 'plain step']:
            about = dict(case=name, method=method, kind=kind, rows=ROWS, limit_gib=float(gib))
            try:
                if name == 'plain step':
                    measure(PaddedStep(model, 'measured'), data, steps, **about)
                    continue
                options, patches = CASES[name]
                with ExitStack() as stack:
                    for where, what, instead in patches: stack.enter_context(patch.object(where, what, instead))
                    step = fast.autotune(model, fast.StepOptions(**dict(max_seq_len=LENGTH, max_tokens_per_microbatch=ROWS * LENGTH, fixed_bucket=shape) | options))
                    measure(step, data, steps, **about)
                    close(step)
            except Exception as e: say(about | dict(failed=f'{type(e).__name__}: {str(e)[:200]}'))


if __name__ == '__main__': main(*sys.argv[1:])
