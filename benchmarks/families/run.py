"""Models without a formula of their own on a GPU, beside what the plan estimates: python run.py [--limit GIB] [--seconds N] [--only NAME ...]

Every case is a process of its own: random weights are made on the GPU, the step is built as in a run, six optimizer steps are taken.
Prints a table and writes measured.json: peaks allocated, reserved and of the process, what the plan says, steps per second.
The padded step is compared with the estimate, which is of that step; `auto` is what a run chooses by itself, for its speed.
No network, no files but this repository. `--limit` keeps PyTorch within so many GiB; `--seconds` (default 330) leaves out what would take longer.
"""
import argparse, json, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS = 6
COMMON = dict(max_length=1024, per_device_train_batch_size=2, gradient_accumulation_steps=1)
PADDED = dict(padding_free=False, gradient_checkpointing=False)

# Of families that are not in the catalogue: written down by hand, layers reduced
CONFIGS = {
    'OLMoE-1B-7B': dict(
        model_type='olmoe', hidden_size=2048, num_hidden_layers=16, intermediate_size=1024, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=50304, num_experts=64, num_experts_per_tok=8),
    'StarCoder2-3B': dict(
        model_type='starcoder2', hidden_size=3072, num_hidden_layers=30, intermediate_size=12288, num_attention_heads=24,
        num_key_value_heads=2, vocab_size=49152, use_bias=True, sliding_window=4096, max_position_embeddings=16384,
        bos_token_id=0, eos_token_id=0),
    'GLM-4-9B': dict(
        model_type='glm4', hidden_size=4096, num_hidden_layers=40, intermediate_size=13696, num_attention_heads=32,
        num_key_value_heads=2, head_dim=128, vocab_size=151552, max_position_embeddings=32768, pad_token_id=0,
        partial_rotary_factor=0.5),
}

# (model, layers or 0 for all, settings), the most wanted first
CASES = [
    ('SmolLM3-3B', 0, dict(method='lora', **PADDED)),
    ('OLMo-2-1B', 0, dict(method='lora', **PADDED)),
    ('Granite-3.3-2B', 0, dict(method='lora', **PADDED)),
    ('Qwen3-30B-A3B', 8, dict(method='lora', **PADDED)),
    ('Qwen3-30B-A3B', 8, dict(method='qlora', padding_free=False, gradient_checkpointing=True)),
    ('SmolLM3-3B', 0, dict(method='qlora', padding_free=False, gradient_checkpointing=True)),
    ('SmolLM3-3B', 0, dict(method='qlora', dtype='float32')),
    ('SmolLM3-3B', 0, dict(method='lora')),
    ('OLMo-2-1B', 0, dict(method='lora')),
    ('Granite-3.3-2B', 0, dict(method='qlora')),
    ('OLMoE-1B-7B', 0, dict(method='lora', **PADDED)),
    ('StarCoder2-3B', 0, dict(method='lora', **PADDED)),
    ('GLM-4-9B', 12, dict(method='qlora', **PADDED)),
    ('SmolLM3-3B', 12, dict(method='qlora', dtype='float32', **PADDED)),
    ('SmolLM3-3B', 12, dict(method='lora', dtype='float32', **PADDED)),
    ('Llama-3.2-1B', 0, dict(method='lora', dtype='float32', **PADDED)),
    ('Llama-3.2-1B', 0, dict(method='qlora', dtype='float32', **PADDED)),
    ('Llama-3.2-1B', 0, dict(method='qlora', dtype='float32', padding_free=False, gradient_checkpointing=True)),
    ('Llama-3.2-1B', 0, dict(method='lora', dtype='float32', padding_free=False, gradient_checkpointing=True)),
]


def hf_config(name, layers):
    "The model's configuration with fewer layers."
    from homelab_ft.plan.model_catalog import CATALOG, known_config
    config = known_config(name) if name in CATALOG else dict(CONFIGS[name])
    if layers: config['num_hidden_layers'] = layers
    return config


def predict(name, layers, settings, arch='hopper'):
    "What the plan says of a case, in bytes."
    from homelab_ft.config import make_config
    from homelab_ft.plan.memory.estimate import EstimateSpec, estimate
    from homelab_ft.plan.model_shape import model_shape
    config = make_config(model='embedded', **COMMON | settings)
    spec = EstimateSpec.from_config(config).replace(arch=arch)
    checkpointing = config.gradient_checkpointing is True
    est = estimate(model_shape(hf_config(name, layers)), spec, gradient_checkpointing=checkpointing)
    return dict(allocated=est.allocated, process=est.peak)


def measure(name, layers, settings, limit):
    "One case, in this process."
    import torch
    from homelab_ft.config import make_config
    from homelab_ft.plan.probe import probe_context
    from homelab_ft.train import trainer
    from homelab_ft.train.base_model import gpu_process_bytes
    from homelab_ft.train.engine.features import describe_step
    torch.zeros(1, device='cuda')
    if limit: torch.cuda.set_per_process_memory_fraction(limit * 2**30 / torch.cuda.mem_get_info()[1])
    config = make_config(model='embedded', **COMMON | settings)
    hf, began = hf_config(name, layers), time.monotonic()
    ctx = probe_context(config, hf)
    for group in ctx.optimizer.param_groups: group['lr'] = 0
    loading = time.monotonic() - began
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(STEPS):
        ctx.state.step = 0
        began = time.monotonic()
        trainer.train_step(ctx)
        torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    measured = dict(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved(),
                    process=gpu_process_bytes())
    arch = 'hopper' if torch.cuda.get_device_capability() >= (9, 0) else 'ampere'
    return dict(model=name, layers=layers or hf['num_hidden_layers'], settings=settings, measured=measured,
                estimated=predict(name, layers, settings, arch), step=describe_step(ctx.step.features),
                loading_seconds=round(loading, 1), steps_per_second=round(1 / sorted(times)[STEPS // 2], 2),
                tokens_per_second=round(2048 / sorted(times)[STEPS // 2]), loss=round(ctx.state.loss or 0, 4),
                gpu=torch.cuda.get_device_name(), torch=torch.__version__)


def row_text(row):
    "A line of the table."
    settings = ' '.join(str(v) for k, v in row['settings'].items() if k in ('method', 'dtype'))
    kind = 'padded' if row['settings'].get('padding_free') is False else 'auto'
    if row['settings'].get('gradient_checkpointing') is True: kind += ', checkpointed'
    cells = [f'{row["model"]:15}{row["layers"]:3} layers', f'{settings:14}', f'{kind:21}']
    if 'error' in row: return ' '.join(cells) + row['error']
    for name in ('allocated', 'process'):
        found, said = row['measured'][name], row['estimated'][name]
        cells.append(f'{found / 2**30:6.2f} ({said / found - 1:+6.1%})' if found else f'unknown ({said / 2**30:.2f})')
    return ' '.join([*cells, f'{row["steps_per_second"]:6.2f} steps/s', row['step'][:60]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--limit', type=float, default=0, help='GiB that PyTorch may take')
    parser.add_argument('--seconds', type=float, default=330, help='no case begins after this time')
    parser.add_argument('--only', nargs='*', help='names of models')
    parser.add_argument('--out', default=str(HERE / 'measured.json'))
    parser.add_argument('--case', type=int, help='one case in this process')
    args = parser.parse_args()
    if args.case is not None:
        print('ROW', json.dumps(measure(*CASES[args.case], args.limit)))
        return
    began, rows = time.monotonic(), []
    print('model, settings, step; GiB allocated and of the process (how far the estimate is off); speed', flush=True)
    for i, (name, layers, settings) in enumerate(CASES):
        left = args.seconds - (time.monotonic() - began)
        if left < 5 or args.only and name not in args.only: continue
        command = [sys.executable, __file__, '--case', str(i), '--limit', str(args.limit)]
        try: done = subprocess.run(command, capture_output=True, text=True, timeout=max(20, left))
        except subprocess.TimeoutExpired: done = None
        lines = [line for line in done.stdout.splitlines() if line.startswith('ROW ')] if done else []
        last = (done.stderr.strip().splitlines() or ['no message'])[-1] if done else 'took too long'
        rows.append(json.loads(lines[0][4:]) if lines else dict(model=name, layers=layers, settings=settings, error=last))
        print(row_text(rows[-1]), flush=True)
        Path(args.out).write_text(json.dumps(dict(rows=rows), indent=1) + '\n')


if __name__ == '__main__': main()
