"""Memory of our own training step on a card, one configuration per process: python measure.py '{"model": ..., "method": ..., ...}' [GiB].

Settings are those of a run. Weights are random and made on the card, packed ones as well; the step is prepared as in a run and takes three optimizer steps.
Prints one line, `ROW` and JSON: bytes allocated, reserved and of the process at their peaks, what the layers kept, versions. Others may use the card meanwhile,
if NVML says what each process takes.
"""
import fcntl, json, os, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace

import torch

from homelab_ft.core import make_config
from homelab_ft.plan.models import known_config
from homelab_ft.train import fast, hollow, packing, steps
from homelab_ft.train.watch import versions

STEPS, DEVICE = 3, 'cuda'
LOCK = Path(tempfile.gettempdir()) / 'homelab_ft_context.lock'
SCALE = 0.02        # of packed weights. The rows of measured.json had 0.05, where compiled layers of most packed models were refused: rounding alone changed gradients too much


def on_card():
    "Bytes used on the card by everybody, and by each process that NVML names (by the number it has there)."
    import pynvml
    pynvml.nvmlInit()
    card = pynvml.nvmlDeviceGetHandleByIndex(0)
    return pynvml.nvmlDeviceGetMemoryInfo(card).used, {p.pid: p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(card)}


def open_context():
    "Open this process's context while no other opens one: `(number that NVML gives it or None, bytes used before by everybody, bytes of its context)`."
    with open(LOCK, 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        used, before = on_card()
        torch.zeros(1, device=DEVICE)
        after_used, after = on_card()
        time.sleep(0.2)
    new = [n for n in after if n not in before]
    mine = new[0] if len(new) == 1 else None
    return mine, used, after[mine] if mine else after_used - used


def four_bits(layer, config, code, code2):
    "A random weight in 4 bits: random indices, and nearly the same scale everywhere."
    shape = torch.Size((layer.out_features, layer.in_features))
    new = torch.nn.Parameter(torch.randint(0, 256, (-(-shape.numel() // 2), 1), dtype=torch.uint8, device=DEVICE), requires_grad=False)
    q = hollow.four_bit_constants(shape, layer.compute_dtype, config)
    q.code = code
    if q.nested:
        q.absmax.random_(100, 150)
        q.state2.code, q.offset = code2, torch.tensor(SCALE)
        q.state2.absmax.fill_(SCALE / 10)
    else: q.absmax.fill_(SCALE)
    q.to(DEVICE)
    new.quant_state = q
    return new


def eight_bits(layer):
    "A random weight in 8 bits, its scales where the first pass would put them."
    new = torch.nn.Parameter(torch.randint(-127, 128, layer.weight.shape, dtype=torch.int8, device=DEVICE), requires_grad=False)
    new.CB, new.SCB = None, None
    layer.state.CB, layer.state.SCB = new.data, torch.full((new.shape[0],), SCALE, device=DEVICE)
    return new


def dense(name, p):
    "A random parameter as training would find it."
    new = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=DEVICE), requires_grad=p.requires_grad)
    with torch.no_grad(): new.fill_(1.) if 'norm' in name else new.zero_() if 'lora_B' in name else new.normal_(0, 0.02)
    return new


def make_parameters(model, config):
    "Every parameter on the card; what was tied stays tied."
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type
    tables, made = (get_4bit_type(config.bnb_4bit_quant_type, 'cpu'), create_dynamic_map()), {}
    for name, m in model.named_modules():
        for key, p in m._parameters.items():
            if p is None: continue
            kind = type(m).__name__ if key == 'weight' else ''
            if id(p) not in made: made[id(p)] = four_bits(m, config, *tables) if kind == 'Linear4bit' else eight_bits(m) if kind == 'Linear8bitLt' else dense(name, p), p
            m._parameters[key] = made[id(p)][0]


def make_buffers(model):
    "Frequencies as their module computes them, ones for all else."
    for m in model.modules():
        if any('inv_freq' in key for key in m._buffers):
            fresh = type(m)(m.config).to(DEVICE)
            m._buffers.update(fresh._buffers)
            vars(m).update({k: v for k, v in vars(fresh).items() if isinstance(v, torch.Tensor)})
        for key, b in m._buffers.items():
            if b is not None and b.device.type == 'meta': m._buffers[key] = torch.ones(b.shape, dtype=b.dtype, device=DEVICE)


def make_job(settings):
    "What `take_step` wants, prepared as in a run, with rows of full length."
    config = make_config(**settings)
    model = hollow.hollow_model(config, known_config(config.model), 0)
    make_parameters(model, config)
    make_buffers(model)
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * (STEPS + 1)
    cache = packing.RandomRows([config.max_length] * rows, 1., model.config.vocab_size)
    engine = fast.engine_for(model.train(), config, cache, 'cuda', 'bfloat16')
    run = SimpleNamespace(metrics_path=Path(tempfile.mkdtemp()) / 'metrics.jsonl')
    return steps.Job(run, config.model_copy(update=dict(warmup_steps=0)), model, engine, steps.make_optimizer(model, config), cache, None,
                     steps.State(total_steps=STEPS + 1, peak=1e-5), None)


def measure(settings, limit_gib):
    "The row of one configuration."
    if limit_gib: torch.cuda.set_per_process_memory_fraction(limit_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    mine, used, context = open_context()
    began, job = time.monotonic(), make_job(settings)
    prepared, at_rest, highest = time.monotonic() - began, torch.cuda.memory_allocated(), 0
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        steps.take_step(job)
        torch.cuda.synchronize()
        total, each = on_card()
        highest = max(highest, (each.get(mine) or 0) if mine else total - used)
    return dict(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved(), process=highest, alone=mine is not None, context=context,
                at_rest=at_rest, prepare_seconds=round(prepared, 1), paths=dict(job.engine.paths), allocator=os.environ.get('PYTORCH_ALLOC_CONF', ''),
                card=torch.cuda.get_device_name(), versions=versions())


def main(settings, limit_gib='0'):
    asked = dict(settings=json.loads(settings), limit_gib=float(limit_gib))
    try: found = measure(**asked)
    except Exception as e: found = dict(failed=f'{type(e).__name__}: {str(e)[:300]}')
    print('ROW ' + json.dumps(asked | found), flush=True)


if __name__ == '__main__': main(*sys.argv[1:])
