"""Our chunked loss beside liger's fused linear cross-entropy: a frozen output head, forward and backward, in bfloat16, ours compiled.

python benchmarks/train/loss.py     (needs a card and the package liger-kernel)
One line of JSON per case: milliseconds, MiB beside what was there before, and how far loss and gradient are from those in float32."""
import sys, time

import torch
from homelab_ft.train.engine.ops import chunked_loss as loss
from workload import say

CASES = [(4096, 128256, 4096), (2048, 128256, 4096), (4096, 32768, 8192)]      # hidden size, vocabulary, positions
WARM, RUNS = 3, 10


def inputs(hidden, vocab, positions):
    "Hidden states, the head, and the next tokens; all random."
    states, head = (torch.randn(n, hidden, device='cuda', dtype=torch.bfloat16) for n in (positions, vocab))
    return states, head * .02, torch.randint(0, vocab, (positions,), device='cuda')


def of_float32(states, head, targets):
    "The mean loss of float32 hidden states, 512 positions at a time."
    head, rows = head.float(), zip(states.split(512), targets.split(512))
    return sum(torch.nn.functional.cross_entropy(s @ head.t(), t, reduction='sum') for s, t in rows) / len(targets)


def ours(math):
    "The chunked loss with the mean's weights."
    def run(states, head, targets):
        weights = torch.full((len(targets),), 1 / len(targets), device=states.device)
        return loss.chunked_loss(states, head, targets, weights, math=math)
    return run


def liger():
    "The function beneath liger's loss."
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as fused
    return lambda *given: fused.apply(*given)[0]


def with_gradient(function, states, head, targets):
    "`(loss, gradient of the hidden states)`"
    states = states.detach().requires_grad_()
    found = function(states, head, targets)
    found.backward()
    return found.detach(), states.grad


def apart(found, wanted):
    "How far loss and gradient are from what they should be; the gradient relative to its norm."
    return dict(loss_off=float(abs(found[0] - wanted[0])), gradient_off=float((found[1].float() - wanted[1]).norm() / wanted[1].norm()))


def timed(run):
    "What a function gives, its milliseconds, and the MiB it takes at most beside what was there."
    for _ in range(WARM): found = run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    for _ in range(RUNS): found = run()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / RUNS
    return found, dict(milliseconds=round(seconds * 1e3, 2), mib=round((torch.cuda.max_memory_allocated() - before) / 2**20))


def main():
    if not torch.cuda.is_available(): sys.exit('loss.py measures on a card, and PyTorch sees none here')
    who = dict(homelab_ft=ours(torch.compile(loss.chunk_loss)), liger=liger())
    for hidden, vocab, positions in CASES:
        given = inputs(hidden, vocab, positions)
        wanted = with_gradient(of_float32, given[0].float(), *given[1:])
        for name, function in who.items():
            found, figures = timed(lambda: with_gradient(function, *given))
            say(dict(who=name, hidden=hidden, vocab=vocab, positions=positions) | figures | apart(found, wanted))


if __name__ == '__main__': main()
