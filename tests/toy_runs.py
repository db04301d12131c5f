"A Llama of toy size, random rows and a run folder around them, for tests that train."
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from homelab_ft.config import make_config
from homelab_ft.data.tokenize import make_cache, save_cache
from homelab_ft.train.run_folder import create_run

SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def rows(n=14, vocab=320, seed=0):
    draw = np.random.default_rng(seed)
    return make_cache([(draw.integers(1, vocab, k).tolist(), [0] + [1] * (k - 1)) for k in draw.integers(3, 20, n)], range(n))


def save_toy_model(path):
    "A folder with the toy model, as `from_pretrained` loads it."
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(path)
    return str(path)


def new_run(tmp_path, folder, name, **settings):
    config = make_config(**dict(model=folder, run_name=name, device='cpu', lora_r=4, learning_rate=1e-2, per_device_train_batch_size=4, max_length=64, max_steps=10,
                                eval_steps=5, save_steps=4) | settings)
    run = create_run(config, tmp_path)
    run.data_path.mkdir()
    save_cache(rows(40), run.data_path / 'train.safetensors')
    save_cache(rows(10, seed=1), run.data_path / 'validation.safetensors')
    return run


def train_briefly(run, tok, steps, batch_size=8):
    "Prepare the run's data and train its adapter for some steps in this process; the model with its adapter."
    from homelab_ft.data.prepare import prepare
    from homelab_ft.train.base_model import load_base
    from homelab_ft.train.engine.batching import batch_order, collate
    from homelab_ft.train.engine.padded import accumulate
    from homelab_ft.train.lora import attach_lora, save_adapter
    config = run.config()
    torch.manual_seed(config.seed)
    cache = prepare(config, tok, run.data_path).train
    model = attach_lora(load_base(config.model), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate)
    batches = [rows for epoch in range(steps) for rows in batch_order(cache.lengths, batch_size, config.seed, epoch)]
    for rows in batches[:steps]:
        accumulate(model, [collate(cache, rows, 0)])
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, run.adapter_path)
    return model.eval()
