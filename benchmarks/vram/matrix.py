"""What is measured: every configuration in a process of its own, a few at a time: python matrix.py OUT.jsonl [workers] [first last].

`python matrix.py --collect OUT.jsonl DATE` makes measured.json of such lines; which rows are held back was decided by their place in CASES, before any error was looked at.
The last 26 were drawn at random (`python matrix.py --draw`), all held back; the page on predicted and measured memory says which rules were changed after they had been seen.
"""
import json, os, random, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from homelab_ft.config import make_config
from homelab_ft.io import read_jsonl, write_json
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.memory.estimate import estimate_for

HERE = Path(__file__).resolve().parent
SECONDS = 170       # a process may take


def case(model, method, length, batch, limit_gib=0., **more):
    "Settings of a run, and the GPU memory that it may use; 0: all."
    return dict(model=model, method=method, max_length=length, per_device_train_batch_size=batch, **more), limit_gib


def whole_card():
    "Packed sequences on a GPU with room: everything kept, or every layer recomputed."
    for model in ('SmolLM2-135M', 'Qwen3-0.6B', 'Llama-3.2-1B', 'Qwen3-1.7B'):
        yield from (case(model, 'lora', 1024, 4), case(model, 'qlora', 2048, 2), case(model, 'lora', 256, 16, optim='adamw_8bit'),
                    case(model, 'qlora', 4096, 1, gradient_accumulation_steps=4))
    yield from (case('Llama-3.2-1B', 'lora', 16384, 1), case('Llama-3.2-1B', 'qlora', 8192, 2, lora_r=64, lora_alpha=128),
                case('Llama-3.2-1B', 'qlora', 512, 8, bnb_4bit_use_double_quant=False), case('Llama-3.2-1B', 'lora', 2048, 4, target_modules=['q_proj', 'v_proj']),
                case('Llama-3.2-1B', 'qlora', 2048, 4, optim='paged_adamw_8bit', lora_r=128, lora_alpha=256))
    for model in ('Llama-3.2-3B', 'Phi-3-mini', 'Qwen2.5-7B', 'Llama-3.1-8B', 'Qwen3-8B'):
        yield from (case(model, 'qlora', 2048, 1), case(model, 'qlora', 2048, 2, gradient_checkpointing=True), case(model, 'lora', 1024, 2))
    yield case('Llama-3.1-8B', 'qlora', 2048, 2)


def limited():
    "Less memory than the GPU has: as few layers recomputed as that allows."
    yield from (case('Llama-3.1-8B', 'qlora', 2048, 4, 24.), case('Llama-3.1-8B', 'qlora', 8192, 1, 24.), case('Llama-3.1-8B', 'qlora', 16384, 1, 24.),
                case('Llama-3.1-8B', 'qlora', 4096, 2, 16.), case('Llama-3.1-8B', 'qlora', 1024, 4, 12.), case('Qwen3-8B', 'qlora', 4096, 2, 24.),
                case('Qwen2.5-14B', 'qlora', 2048, 1, 24.), case('Qwen3-14B', 'qlora', 4096, 1, 24.), case('Llama-2-13B', 'qlora', 2048, 2, 24.),
                case('Qwen3-32B', 'qlora', 1024, 1, 32.), case('Qwen3-32B', 'qlora', 2048, 1, gradient_checkpointing=True))


def padded():
    "Padded batches, full fine-tuning, other kinds of model."
    for model in ('SmolLM2-135M', 'Llama-3.2-1B'):
        yield from (case(model, 'lora', 1024, 2, padding_free=False), case(model, 'full', 512, 4), case(model, 'full', 1024, 2, gradient_checkpointing=True, optim='adamw_8bit'),
                    case(model, 'qlora', 2048, 1, padding_free=False, gradient_checkpointing=True))
    yield from (case('gemma-3-1b', 'lora', 1024, 2), case('Llama-3.2-1B', 'int8', 1024, 2))


def further():
    "8-bit weights, DoRA, Gemma, layers that are small and not compiled."
    yield from (case('SmolLM2-360M', 'int8', 512, 4), case('Llama-3.2-3B', 'int8', 1024, 2, gradient_checkpointing=True), case('Qwen3-0.6B', 'int8', 2048, 1, padding_free=False),
                case('Llama-3.2-1B', 'int8', 2048, 1), case('gemma-3-1b', 'qlora', 1024, 2, gradient_checkpointing=True), case('gemma-2-2b', 'qlora', 1024, 1),
                case('Llama-3.2-1B', 'qlora', 1024, 2, use_dora=True), case('Qwen3-0.6B', 'lora', 1024, 2, use_dora=True),
                case('SmolLM2-360M', 'full', 512, 2, optim='paged_adamw_8bit'), case('Llama-3.2-1B', 'qlora', 2048, 4, target_modules=['q_proj', 'v_proj']),
                case('SmolLM2-135M', 'qlora', 512, 2, torch_compile=False), case('SmolLM2-360M', 'qlora', 333, 3, torch_compile=False, gradient_checkpointing=True),
                case('TinyLlama-1.1B', 'lora', 1024, 1, torch_compile=False))


def fresh_settings():
    "What was drawn so far."
    return json.loads((HERE / 'fresh.json').read_text())


def drawn(number='26', seed='1123', most_gib=26):
    "Add to fresh.json: settings drawn at random, none larger than a share of the GPU."
    sys.path.insert(0, str(HERE.parent / 'plan'))
    from agree import draw
    rng, found = random.Random(int(seed)), fresh_settings()
    wanted = len(found) + int(number)
    while len(found) < wanted:
        settings = draw(rng)
        shape = model_shape(settings['model'])
        small = settings['method'] == 'full' or shape.n_params < 15e9
        if not small or settings['model'] in NOT_THAT_MODEL or shape.model_type == 'gemma2': continue
        est = estimate_for(make_config(**settings), shape)
        if est.peak < most_gib * 2**30 and settings not in found: found.append(settings)
    write_json(HERE / 'fresh.json', found)


def fresh():
    "Settings that were drawn, on the whole GPU."
    return [(settings, 0.) for settings in fresh_settings()]


NOT_THAT_MODEL = {'gemma-2-2b': 'transformers 5.17 computes its attention with a fused kernel, without the cap on scores'}
CASES = [*whole_card(), *limited(), *padded(), *further(), *fresh()]      # new ones go to the end


def held_back():
    """For every case, whether nothing may be fitted to it: every second one of its model and method, and all that were drawn.

    The first of a group is held back in every second group, so that small groups are shared out as well; cases added at the end change nothing."""
    groups, found = {}, []
    for settings, _ in CASES:
        group, n = groups.get((settings['model'], settings['method']), (len(groups), 0))
        groups[settings['model'], settings['method']] = group, n + 1
        found.append((group + n) % 2 == 1)
    return found[:len(CASES) - len(fresh())] + [True] * len(fresh())


def measure(asked, *more):
    "The row of one case: from a process of its own, or why there is none; `more` goes to measure.py."
    (settings, limit_gib), began = asked, time.time()
    env, row = os.environ | dict(PYTORCH_ALLOC_CONF='expandable_segments:True', OMP_NUM_THREADS='2'), dict(settings=settings, limit_gib=limit_gib)
    command = [sys.executable, str(HERE / 'measure.py'), json.dumps(settings), str(limit_gib), *more]
    try: done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=env)
    except subprocess.TimeoutExpired: return row | dict(failed=f'more than {SECONDS} s')
    said = [line[4:] for line in done.stdout.splitlines() if line.startswith('ROW ')]
    row |= json.loads(said[0]) if said else dict(failed=(done.stderr.strip().splitlines() or ['nothing said'])[-1][:300])
    return row | dict(seconds=round(time.time() - began, 1))


def main(out, workers='5', first='0', last=str(len(CASES))):
    with ThreadPoolExecutor(int(workers)) as pool, open(out, 'a') as file:
        for row in pool.map(measure, CASES[int(first):int(last)]):
            file.write(json.dumps(row) + '\n')
            file.flush()
            print(row['settings'], row.get('failed') or f"{row['allocated'] / 2**30:.3f} {row['reserved'] / 2**30:.3f} {row['process'] / 2**30:.3f} GiB", flush=True)


SHARED = ('card', 'versions', 'allocator', 'context')

def collect(path, date):
    "measured.json: what all rows have in common once, then the rows in the order of CASES. Rows of processes that did not have their bytes to themselves are left out."
    rows = [dict(settings=r['settings'], failed=why) if (why := NOT_THAT_MODEL.get(r['settings']['model'])) else r for r in read_jsonl(path)]
    at = {json.dumps(settings, sort_keys=True): i for i, (settings, _) in enumerate(CASES)}
    number = lambda row: at[json.dumps(row['settings'], sort_keys=True)]
    good = sorted((r for r in rows if not r.get('failed') and r['alone']), key=number)
    if len({json.dumps([r[k] for k in SHARED]) for r in good}) > 1: raise SystemExit('rows of different GPUs, versions or contexts')
    kept = [dict(case=number(r), held_back=held_back()[number(r)]) | {k: v for k, v in r.items() if k not in SHARED} for r in good]
    write_json(HERE / 'measured.json', dict(date=date, **{k: good[0][k] for k in SHARED}, command=f'python matrix.py OUT.jsonl; python matrix.py --collect OUT.jsonl {date}',
                                            missing=[dict(settings=r['settings'], why=r['failed']) for r in rows if r.get('failed')], rows=kept))
    print(len(kept), 'rows,', sum(r['held_back'] for r in kept), 'held back')


if __name__ == '__main__': {'--collect': collect, '--draw': drawn}[sys.argv[1]](*sys.argv[2:]) if sys.argv[1].startswith('--') else main(*sys.argv[1:])
