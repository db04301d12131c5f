"The two workloads, the same for everybody: full rows, and realistic lengths."
import json, sys, time

import numpy as np

LENGTH, PROMPT_SHARE = 2048, 0.35


def realistic_lengths(n, seed=1):
    "Lognormal, mean 412, at most 2048."
    draw = np.random.default_rng(seed).lognormal(np.log(412) - 0.8**2 / 2, 0.8, n)
    return np.clip(draw, 16, LENGTH).astype(int)


class Data:
    "Rows of random tokens; the first 35 % of a realistic row are its prompt."
    def __init__(self, kind, vocab, n=600):
        draw = np.random.default_rng(0)
        self.lengths = np.full(n, LENGTH) if kind == 'full' else realistic_lengths(n)
        prompt = 0 if kind == 'full' else PROMPT_SHARE
        self.rows = [(draw.integers(5, vocab - 300, k).astype(np.int32), (np.arange(k) >= int(prompt * k)).astype(np.uint8)) for k in self.lengths]

    def row(self, i): return self.rows[i]
    def __len__(self): return len(self.rows)


class Meter:
    "Times optimizer steps: some to warm up, then `n` in one go, then two under the profiler."
    def __init__(self, warm=4, n=8):
        self.warm, self.n, self.step, self.tokens, self.losses, self.profiler = warm, n, 0, [], [], None

    def begin(self):
        import torch
        if self.step == self.warm:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()
        if self.step == self.warm + self.n:
            from torch.profiler import ProfilerActivity, profile
            self.profiler = profile(activities=[ProfilerActivity.CUDA])
            self.profiler.__enter__()

    def end(self, tokens, loss=None):
        "After a step; `True` when all is measured."
        import torch
        self.step += 1
        self.tokens.append(tokens)
        if self.step == self.warm + self.n:
            torch.cuda.synchronize()
            self.seconds, self.reserved = time.perf_counter() - self.began, torch.cuda.max_memory_reserved()
        if self.step < self.warm + self.n + 2: return False
        torch.cuda.synchronize()
        self.profiler.__exit__(None, None, None)
        return True

    def row(self, **about):
        "The measured figures as a dictionary."
        import torch
        kernels = [e for e in self.profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        busy, count = sum(e.time_range.elapsed_us() for e in kernels) / 1e6, lambda a, b: int(sum(int(t) for t in self.tokens[a:b]))
        timed, profiled = count(self.warm, self.warm + self.n), count(self.warm + self.n, self.warm + self.n + 2)
        return about | dict(tokens_per_second=round(timed / self.seconds), milliseconds_per_step=round(self.seconds / self.n * 1e3, 1),
                            busy_microseconds_per_token=round(busy / profiled * 1e6, 2), reserved_gib=round(self.reserved / 2**30, 2))


def limit_card(gib):
    "Make the card one of `gib` GiB."
    import torch
    if gib: torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)


def say(row):
    "One line of JSON for whoever started this."
    print('ROW ' + json.dumps(row), flush=True)


def fail(error, **about):
    "The same for a case that did not run."
    say(about | dict(failed=f'{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ""}'))
    sys.exit(1)
