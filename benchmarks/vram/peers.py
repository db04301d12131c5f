"""What others say of the measured rows: python peers.py PYTHON, an interpreter that has fitcheck-llm. Writes peers.json.

- `sum`: weights, gradients, optimizer and activations added up. Weights, gradients and states as in https://blog.eleuther.ai/transformer-math/;
  activations per layer as in Korthikanti et al., https://arxiv.org/abs/2205.05198: 34 bytes per token and hidden value, 2 if every layer is computed again,
  without the scores, which flash attention never stores. Nothing for the loss, nothing for the process.
- `accelerate`: the functions of its command `estimate-memory`, on a config instead of a name on the hub. Full fine-tuning: its column 'Training using Adam'.
  It knows no adapters: for those its 'Total Size', in the dtype of the frozen weights, is all it says.
- `fitcheck`: fitcheck-llm, see with_fitcheck.py. Layers are all computed again, or none: on where any is.
"""
import json, subprocess, sys
from importlib.metadata import version
from pathlib import Path

from homelab_ft.config import make_config
from homelab_ft.io import write_json
from homelab_ft.plan.model_catalog import known_config
from homelab_ft.plan.model_shape import model_shape
from homelab_ft.plan.trace.fake_model import model_config

from traces import trained

HERE = Path(__file__).resolve().parent
FROZEN_BYTES = dict(full=4, lora=2, int8=1, qlora=0.5)
OPTIMIZERS = dict(adamw_torch='adamw', adamw_8bit='adam8bit', paged_adamw_8bit='adam8bit', paged_adamw_32bit='adamw')
TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


def again(row):
    "The share of the layers that are computed again, in part or as a whole."
    policies = row['features']['policies']
    return 1 - policies.get('none', 0) / sum(policies.values()) if policies else 0


def plain_sum(row):
    "Bytes of tensors."
    config = make_config(**row['settings'])
    shape, n, tokens = model_shape(config.model), trained(config), config.max_length * config.per_device_train_batch_size
    fixed = shape.n_params * FROZEN_BYTES[config.method] + 4 * n * (config.method != 'full') + 4 * n + (2 if '8bit' in config.optim else 8) * n
    share = again(row)
    return round(fixed + tokens * shape.hidden_size * shape.num_hidden_layers * (34 * (1 - share) + 2 * share))


def accelerate_says(row):
    "Bytes, by the functions of `accelerate estimate-memory`."
    import torch
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModel
    with init_empty_weights(): model = AutoModel.from_config(model_config(known_config(row['settings']['model'])), dtype=torch.float32)
    size, method = calculate_maximum_sizes(model)[0], row['settings']['method']
    return max(estimate_training_usage(size, 'float16').values()) if method == 'full' else round(size * FROZEN_BYTES[method] / 4)


def fitcheck_asks(row):
    "A request for with_fitcheck.py."
    config, raw = make_config(**row['settings']), known_config(row['settings']['model'])
    return dict(raw=raw, name=config.model, precision='bf16', quantization=dict(qlora='nf4', int8='int8').get(config.method, 'none'),
                double_quant=config.method == 'qlora' and config.bnb_4bit_use_double_quant, optimizer=OPTIMIZERS[config.optim], batch_size=config.per_device_train_batch_size,
                seq_len=config.max_length, lora_rank=None if config.method == 'full' else config.lora_r,
                lora_targets=TARGETS if config.target_modules == 'all-linear' else config.target_modules, grad_checkpoint=again(row) > 0, flash_attn=True,
                grad_accum_steps=config.gradient_accumulation_steps)


def main(python):
    rows = json.loads((HERE / 'measured.json').read_text())['rows']
    done = subprocess.run([python, str(HERE / 'with_fitcheck.py')], input=json.dumps([fitcheck_asks(r) for r in rows]), capture_output=True, text=True, check=True)
    fitcheck = json.loads(done.stdout)
    found = [dict(case=r['case'], sum=plain_sum(r), accelerate=accelerate_says(r), fitcheck=f) for r, f in zip(rows, fitcheck['found'])]
    write_json(HERE / 'peers.json', dict(versions=dict(accelerate=version('accelerate'), fitcheck=fitcheck['version']), rows=found))
    print(len(found), 'rows', sum(isinstance(r['fitcheck'], str) for r in found), 'refused by fitcheck')


if __name__ == '__main__': main(*sys.argv[1:])
