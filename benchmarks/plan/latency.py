"""How long plans take, beside their limits: python latency.py [repeats]. Prints a table, writes latency.json; exit code 1 if a limit is exceeded.

- Imports: every module of `homelab_ft.plan` but the tracers, in an interpreter of its own, and what it must not load: torch and others that take seconds.
- The estimate: `estimate` and `estimate_with_checkpointing` for many settings; of each the fastest of `repeats` calls, since other work on the machine only ever adds time.
  The first call of all reads the data file; it stands by itself and has no limit.
- The widget: every position of every control, from the change to the new picture.
- The trace: 8B and 70B at two lengths, three times, each in an interpreter of its own, with the processor time it took and the largest memory of the process of the dry run. The limit
  is for the median; the worst is reported. Three checkpoint policies need more dry runs than one; that row has no limit.

Times are those of the machine that the result names, which should be idle.
"""
import json, pkgutil, resource, subprocess, sys, time
from itertools import product
from pathlib import Path
from statistics import median

from homelab_ft import plan
from homelab_ft.core import GB
from homelab_ft.config import make_config
from homelab_ft.table import Table
from homelab_ft.io import now, write_json
from homelab_ft.hardware.machine import detect_machine
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.memory.estimate import EstimateSpec, estimate, estimate_with_checkpointing

HERE = Path(__file__).resolve().parent
HEAVY = ('torch', 'transformers', 'peft', 'bitsandbytes', 'datasets', 'matplotlib')
TRACERS = ('probe', 'ledger', 'fake_model', 'random_model', 'memory_tracer', 'inductor_memory', 'dry_run', 'torch_internals')     # run in a process of their own
MODULES = ['homelab_ft', *(m.name for m in pkgutil.walk_packages(plan.__path__, 'homelab_ft.plan.') if m.name.split('.')[-1] not in TRACERS)]
MODELS = ('Llama-3.2-1B', 'Llama-3.1-8B', 'Llama-3.1-70B')
SETTINGS = dict(method=('lora', 'qlora', 'full'), length=(512, 2048, 16384), batch_size=(1, 8), gradient_checkpointing=(False, True), padding_free=('auto', False))
TRACES = [(model, length, seconds, None) for model, seconds in (('Llama-3.1-8B', 10), ('Llama-3.1-70B', 20)) for length in (2048, 16384)]
TRACES += [('Llama-3.1-8B', 2048, None, dict(none=10, mlp=12, layer=10))]
CALL_MS, REDRAW_MS, TRACE_BYTES = 2, 50, 4 * GB


def in_new_process(code):
    "What a program prints, as JSON."
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def imported(module):
    "(seconds, which of HEAVY were loaded) of an import in a new interpreter."
    return in_new_process(f'import json, sys, time; t = time.perf_counter(); import {module}; t = time.perf_counter() - t; '
                          f'print(json.dumps([t, [m for m in {HEAVY} if m in sys.modules]]))')


def first_call():
    "Seconds of the first estimate in a new interpreter, which reads the data file."
    return in_new_process('import json, time; from homelab_ft.plan.memory.estimate import estimate, model_shape; s = model_shape("Llama-3.1-8B"); '
                          't = time.perf_counter(); estimate(s); print(json.dumps(time.perf_counter() - t))')


def fastest(call, repeats):
    "Milliseconds of the fastest of some calls."
    def once():
        "Milliseconds of one."
        began = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - began)
    return min(once() for _ in range(repeats))


def estimates(model, repeats):
    "Milliseconds of an estimate, for every combination of SETTINGS."
    shape = model_shape(model)
    estimate(shape)
    specs = [EstimateSpec(**dict(zip(SETTINGS, values))) for values in product(*SETTINGS.values())]
    return [fastest(lambda: estimate(shape, spec), repeats) for spec in specs]


def fits(model, repeats):
    "Milliseconds of choosing checkpoint policies, for GPUs of 8 to 80 GiB."
    shape = model_shape(model)
    cases = product((8, 12, 16, 24, 48, 80), ('lora', 'qlora'), (1, 8), (2048, 16384))
    return [fastest(lambda: estimate_with_checkpointing(shape, gib * 2**30, method=method, batch_size=n, length=length), repeats) for gib, method, n, length in cases]


def redraws(repeats):
    "Milliseconds from a change of one of the planner's controls to its new picture, for every position of every control."
    from homelab_ft.ui.planner import PlannerState, planner_widget
    widget, found = planner_widget(PlannerState()), []
    for control in widget.controls.values():
        start = control.value
        places = [v for v in getattr(control, 'options', (True, False)) if v != start]
        def move(value):
            "There, from where it was at first."
            control.value = start
            return fastest(lambda: setattr(control, 'value', value), 1)
        found += [min(move(value) for _ in range(repeats)) for value in places]
        control.value = start
    return found


def traced(model, length, policies=None):
    "{seconds, processor seconds, most bytes of the dry run} of a trace of one sequence in 4 bits; in an interpreter that traces nothing else."
    from homelab_ft.plan.trace.trace import trace
    began = time.perf_counter()
    trace(make_config(model=model, method='qlora', max_length=length, per_device_train_batch_size=1), policies)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return dict(seconds=time.perf_counter() - began, busy=used.ru_utime + used.ru_stime, bytes=1024 * used.ru_maxrss)


def trace_rows():
    "Rows of all TRACES."
    for model, length, seconds, policies in TRACES:
        code = f'import json, sys; sys.path.insert(0, {str(HERE)!r}); import latency; print(json.dumps(latency.traced({model!r}, {length}, {policies})))'
        found = [in_new_process(code) for _ in range(3)]
        name = f'trace {model}, {length:,} tokens' + f', {len(policies or ())} policies' * bool(policies)
        def values(key): return [f[key] for f in found]
        yield row(name, values('seconds'), 's', seconds, of=median)
        yield row(f'{name}: processor time', values('busy'), 's')
        yield row(f'{name}: memory', [n / GB for n in values('bytes')], 'GB', TRACE_BYTES / GB)


def row(what, values, unit, limit=None, loaded=(), of=max):
    "One line of the result; the limit is for the largest value, or for what `of` makes of them; a heavy import exceeds any."
    within_limit = not loaded and (limit is None or of(values) <= limit)
    return dict(what=what, number=len(values), median=round(median(values), 4), worst=round(max(values), 4), unit=unit, limit=limit, loaded=sorted(loaded), within_limit=within_limit)


def import_row(module, repeats):
    "An import, and the heavy modules that it loads."
    found = [imported(module) for _ in range(repeats)]
    return row(f'import {module}', [1000 * seconds for seconds, _ in found], 'ms', loaded={m for _, heavy in found for m in heavy})


def quick_rows(repeats):
    "All rows but the traces."
    for module in MODULES: yield import_row(module, repeats)
    yield row('first estimate, reads its data', [1000 * first_call() for _ in range(repeats)], 'ms')
    for model in MODELS: yield row(f'estimate {model}', estimates(model, repeats), 'ms', CALL_MS)
    for model in MODELS: yield row(f'fitted {model}', fits(model, repeats), 'ms')
    yield row("planner's picture", redraws(repeats), 'ms', REDRAW_MS)


def table(rows):
    "Every row with its limit and whether it is exceeded."
    def limit(r): return f"{r['limit']:g} {r['unit']}" if r['limit'] else 'nothing heavy' if r['what'].startswith('import') else ''
    def result(r):
        if r['loaded']: return 'loads ' + ', '.join(r['loaded'])
        return '' if not limit(r) else 'ok' if r['within_limit'] else 'EXCEEDED'
    return Table(['what', 'number', 'median', 'worst', 'unit', 'limit', ''], [[r['what'], r['number'], f"{r['median']:.2f}", f"{r['worst']:.2f}", r['unit'], limit(r), result(r)] for r in rows])


def main(repeats='5'):
    machine, rows = detect_machine(), []
    for found in (quick_rows(int(repeats)), trace_rows()): rows += found
    versions = in_new_process('import json; from homelab_ft.train.run_folder import versions; print(json.dumps(versions()))')
    write_json(HERE / 'latency.json', dict(date=now()[:10], machine=f'{machine.cpu_name}, {machine.cpu_count} cores', versions=versions, command=f'python latency.py {repeats}', rows=rows))
    print(table(rows))
    return not all(r['within_limit'] for r in rows)


if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
