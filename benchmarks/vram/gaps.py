"""Gaps of the allocator where all weights learn, for the closed form's rule: python gaps.py. Writes gaps.json, four minutes on two cores; needs no card.

Whole models in padded rows are traced with all their layers, and every block is replayed. What is reserved beyond the tensors depends on which hole happens to be large enough
for the head's gradient; the rule in homelab_ft/plan/process.yaml takes a share of that gradient, such that it is never far under.
"""
from itertools import product
from pathlib import Path

from homelab_ft.core import fmt_gib, make_config
from homelab_ft.files import Table, now, write_json
from homelab_ft.plan.shape import model_shape
from homelab_ft.plan.trace import trace

HERE = Path(__file__).resolve().parent
MODELS = 'SmolLM2-135M', 'Qwen3-0.6B', 'Llama-3.2-1B'


def traced(model, again, optim, batch, length):
    "What a trace says of a whole model."
    settings = dict(model=model, method='full', gradient_checkpointing=again, optim=optim, per_device_train_batch_size=batch, max_length=length)
    found, shape = trace(make_config(**settings), whole=True), model_shape(model)
    return dict(settings=settings, allocated=found.allocated, reserved=found.reserved, head=4 * shape.vocab_size * shape.hidden_size)


def main():
    "Every model with every case."
    rows = [traced(model, *case) for model in MODELS for case in [(a, o, *s) for a, o, s in product((False, True), ('adamw_torch', 'adamw_8bit'), ((1, 2048), (1, 512), (4, 1024)))]]
    write_json(HERE / 'gaps.json', dict(date=now()[:10], rows=rows))
    gap = lambda r: r['reserved'] - r['allocated']
    print(Table(['model', 'again', 'optimizer', 'rows', 'tensors', 'gaps', "of the head's gradient"],
                [[s['model'], 'yes' if s['gradient_checkpointing'] else 'no', s['optim'], f"{s['per_device_train_batch_size']} × {s['max_length']}", fmt_gib(r['allocated']),
                  fmt_gib(gap(r)), f"{gap(r) / r['head']:.2f}"] for r in rows for s in [r['settings']]]))


if __name__ == '__main__': main()
