"One case of homelab_ft in a process of its own: python ours.py MODEL METHOD KIND ROWS GIB [option=value ...]"
import sys

import torch
from homelab_ft.config import make_config
from homelab_ft.train.engine import autotune as fast, packing
from homelab_ft.train.engine.features import features_json
from homelab_ft.train.lora import attach_lora
from homelab_ft.train.base_model import load_base
from workload import LENGTH, Data, Meter, fail, limit_card, say


def packed_steps(data, rows):
    "Packed rows of 2048 tokens, `rows` of them a step, and the one shape that holds every step."
    packs = [[i] for i in range(len(data))] if (data.lengths == LENGTH).all() else packing.epoch_packing(data.lengths, LENGTH, 0, 0)
    steps = [[r for pack in packs[i:i + rows] for r in pack] for i in range(0, len(packs) - rows + 1, rows)]
    learned = max(sum(int(data.row(r)[1][1:].sum()) for r in step) for step in steps)
    return steps, (rows * LENGTH, packing.round_up(learned, 128), packing.round_up(max(map(len, steps)) + rows, 8))


def measure(step, data, steps, **about):
    "Eight steps, timed, and two under the profiler; says the row of figures."
    parameters = [p for p in step.model.parameters() if p.requires_grad]
    meter, optimizer = Meter(), torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    for rows in steps * 100:
        meter.begin()
        step.accumulate(data, [rows])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step.zero_grad()
        if meter.end(int(data.lengths[rows].sum())): break
    say(meter.row(**about, features=features_json(step.features)))


def main(path, method, kind, rows, gib, *options):
    settings = dict(o.split('=') for o in options)
    about = dict(who='homelab_ft', method=method, kind=kind, rows=rows, limit_gib=gib, **settings)
    try:
        limit_card(gib)
        data = Data(kind, 128000)
        steps, shape = packed_steps(data, rows)
        model = attach_lora(load_base(path, method, 'bfloat16', 'cuda'), make_config(method=method))
        states = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        chosen = fast.StepOptions(max_seq_len=LENGTH, max_tokens_per_microbatch=rows * LENGTH, fixed_bucket=shape, reserved_bytes=states, **{k: {'True': True, 'False': False}.get(v, v) for k, v in settings.items()})
        measure(fast.autotune(model, chosen), data, steps, **about)
    except Exception as e:
        import traceback
        traceback.print_exc()
        fail(e, **about)


if __name__ == '__main__':
    path, method, kind, rows, gib, *options = sys.argv[1:]
    main(path, method, kind, int(rows), float(gib), *options)
