"""The longest row that trains, in a process of its own: QLoRA of rank 32 on all linear layers, one row a step, on a card limited to GIB.

python longest.py MODEL GIB TOKENS [tile=2048] [host_gib=0]           two optimizer steps over one row of TOKENS tokens
python longest.py MODEL GIB search SECONDS [tile=2048] [host_gib=0]   the longest such row, by bisection, as long as time allows

Without `tile`, the step decides by itself what its layers keep, and compares its paths with the plain ones first; with it, every layer's input
goes to host memory and layers work in tiles of so many tokens, which is how the search does it. `host_gib` is room for attention's results.
"""
import resource, sys, time

import numpy as np
import torch
from homelab_ft.config import make_config
from homelab_ft.train.engine import autotune as fast
from homelab_ft.train.engine.ops import chunked_loss as loss, checkpointing as recompute
from homelab_ft.train.engine.features import Feature, features_json
from homelab_ft.train.lora import attach_lora
from homelab_ft.train.base_model import load_base
from homelab_ft.train.engine.packed import PackedStep
from homelab_ft.train.engine.ops.offload import ActivationOffloader
from workload import fail, limit_card, say

GIB, RANK, GRAIN = 2**30, 32, 1024


class OneRow:
    "One row of random tokens, all learned."
    def __init__(self, tokens, vocab):
        self.lengths = np.array([tokens])
        self.ids = np.random.default_rng(0).integers(5, vocab - 300, tokens).astype(np.int32)

    def row(self, i): return self.ids, np.ones(len(self.ids), np.uint8)
    def __len__(self): return 1


def available():
    "Bytes of host memory that are free or could be. Not `host_memory`: a container's limit counts the pages of files that were read, as taken."
    lines = dict(line.split(':') for line in open('/proc/meminfo'))
    return int(lines['MemAvailable'].split()[0]) * 1024


def load(path):
    "The model with an adapter, and how many values are trained."
    config = make_config(method='qlora', lora_r=RANK, lora_alpha=2 * RANK)
    model = attach_lora(load_base(path, 'qlora', 'bfloat16', 'cuda'), config)
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def options(tokens, trained, host_bytes):
    "What the step is asked for: one row fills a pass; AdamW's two float32 states come later."
    return fast.StepOptions(max_seq_len=tokens, max_tokens_per_microbatch=tokens, graph=False, reserved_bytes=8 * trained, host_bytes=host_bytes)


def away(step, tokens, tile, room):
    "Every layer's input in host memory, layers in tiles, for one row of so many tokens."
    step.options.max_seq_len = step.options.max_tokens_per_microbatch = tokens
    recompute.apply_policies(step.layers, ['offload'] * len(step.layers), None, tile, ActivationOffloader(room))
    step.features.policies, step.features.mlp_chunk = dict(offload=len(step.layers)), tile


def by_hand(model, asked, tile, room):
    "A step with its policies given, unchecked."
    step = PackedStep(model, asked)
    step.chunk_loss, step.features.compile = torch.compile(loss.chunk_loss), Feature(False, 'loss only')
    away(step, asked.max_seq_len, tile, room)
    step.fit_loss_chunk(fast.free_bytes(step))
    return step


def one_step(step, optimizer, tokens):
    "One optimizer step over one row; `(seconds, loss)`."
    data, began = OneRow(tokens, step.head.weight.shape[0]), time.perf_counter()
    step.label_tokens.clear()
    total, _ = step.accumulate(data, [[0]])
    torch.nn.utils.clip_grad_norm_(step.parameters, 1.0)
    optimizer.step()
    step.zero_grad()
    total = float(total)
    return time.perf_counter() - began, total


def measured(before):
    "Memory of card and host since the counters began."
    pinned = torch.cuda.host_memory_stats() if hasattr(torch.cuda, 'host_memory_stats') else {}
    return dict(allocated_gib=round(torch.cuda.max_memory_allocated() / GIB, 2), reserved_gib=round(torch.cuda.max_memory_reserved() / GIB, 2),
                max_rss_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                pinned_gib=round(pinned.get('allocated_bytes.peak', 0) / GIB, 2), host_taken_gib=round((before - available()) / GIB, 2))


def train(path, gib, tokens, tile, room):
    "Two real steps, as a row of figures."
    before, (model, trained) = available(), load(path)
    asked, began = options(tokens, trained, room), time.perf_counter()
    step = fast.autotune(model, asked) if tile is None else by_hand(model, asked, tile, room)
    prepared, optimizer = time.perf_counter() - began, torch.optim.AdamW(step.parameters, lr=1e-5, fused=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    steps = [one_step(step, optimizer, tokens) for _ in range(2)]
    seconds = steps[1][0]
    return dict(prepare_seconds=round(prepared, 1), seconds_per_step=[round(s, 2) for s, _ in steps], losses=[round(l, 4) for _, l in steps],
                microseconds_per_token=round(seconds / tokens * 1e6, 1), **measured(before), features=features_json(step.features))


def attempt(step, optimizer, tokens, tile, room):
    "Seconds of one step, or 0 if the card was full."
    away(step, tokens, tile, room)
    torch.cuda.empty_cache()
    try: return one_step(step, optimizer, tokens)[0]
    except torch.OutOfMemoryError: return 0


def recover(step):
    "Forget what a step that broke off left."
    step.drop_gradients()
    torch.cuda.empty_cache()


def guess(gib, step):
    "Where to begin: 14.2 hidden states per token beside what is held now, as counted in the notebook on the shelf."
    return int((gib * GIB * 0.97 - torch.cuda.memory_allocated()) / (14.2 * 2 * step.head.weight.shape[1]))


def next_tokens(low, high):
    "What to try next: a tenth more while nothing failed, a tenth less while nothing fitted, else the middle. Multiples of GRAIN."
    if not high: return max(int(low * 1.1), low + GRAIN) // GRAIN * GRAIN
    return (int(high * 0.9) if not low else (low + high) // 2) // GRAIN * GRAIN


def narrowed(low, high): return bool(low and high) and high - low <= max(GRAIN, low // 50)


def search(path, gib, seconds, tile, room):
    "Bisection: every try is a real step."
    before, began, (model, trained) = available(), time.monotonic(), load(path)
    step = by_hand(model, options(2 * GRAIN, trained, room), tile, room)
    optimizer = torch.optim.AdamW(step.parameters, lr=1e-5, fused=True)
    attempt(step, optimizer, 2 * GRAIN, tile, room)             # brings AdamW's states
    low, high, tried, pace = 0, 0, {}, 0.
    tokens = max(GRAIN, guess(gib, step) // GRAIN * GRAIN)
    while tokens and not narrowed(low, high) and time.monotonic() - began + pace * tokens**2 < seconds:
        torch.cuda.reset_peak_memory_stats()
        tried[tokens] = taken = attempt(step, optimizer, tokens, tile, room)
        if taken: low, pace, figures = tokens, taken / tokens**2, measured(before) | dict(seconds_per_step=round(taken, 2))
        else: high = tokens; recover(step)
        say(dict(tokens=tokens, seconds=round(taken, 2)))
        tokens = next_tokens(low, high)
    found = figures | dict(microseconds_per_token=round(tried[low] / low * 1e6, 1)) if low else {}
    return dict(longest=low, too_long=high, tries={k: round(v, 2) for k, v in tried.items()}, seconds=round(time.monotonic() - began), **found)


def main(path, gib, what, *rest):
    given = dict(o.split('=') for o in rest if '=' in o)
    tile, room = given.get('tile'), int(float(given.get('host_gib', 0)) * GIB)
    about = dict(who='homelab_ft', what='longest', limit_gib=gib, tokens=what, rank=RANK, tile=tile, host_gib=room / GIB)
    try:
        limit_card(gib)
        if what == 'search': row = search(path, gib, float(rest[0]), int(tile or 2048), room)
        else: row = train(path, gib, int(what), tile and int(tile), room)
        say(about | row)
    except Exception as e:
        import traceback
        traceback.print_exc()
        fail(e, **about)


if __name__ == '__main__': main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
