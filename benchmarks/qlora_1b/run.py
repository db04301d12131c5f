"""QLoRA on a model of Llama 3.2 1B's shape with random weights: memory and speed of 50 steps, as the training process measures them.

    python benchmarks/qlora_1b/run.py --config CONFIG.json --tokenizer FOLDER --data gsm8k.jsonl --out results.json

Memory and speed do not depend on the values of the weights. Three runs: as `homelab-ft train` does it, with an allocator whose
segments cannot grow, and with gradient checkpointing. Needs one CUDA card.
"""
import argparse, json, os, shutil, subprocess, sys, tempfile
from pathlib import Path

COMMON = ['--max-rows', '2000', '--set', 'method=qlora', '--set', 'max_steps=50', '--set', 'max_length=512', '--set', 'per_device_train_batch_size=8']
CASES = {'default': ([], {}), 'fixed segments': ([], {'PYTORCH_ALLOC_CONF': 'expandable_segments:False'}),
         'gradient checkpointing': (['--set', 'gradient_checkpointing=true'], {})}


def random_model(config, tokenizer, folder):
    "Save a model of that shape with random bfloat16 weights and the tokenizer's files."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device('cuda'): model = LlamaForCausalLM(LlamaConfig(**json.loads(Path(config).read_text())))
    model.save_pretrained(folder)
    for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'): shutil.copy(Path(tokenizer) / name, folder)


def train(data, model, runs, name, options, environment):
    "The last event and the versions of one run."
    program = 'import sys; from homelab_ft.cli import main; sys.exit(main())'
    command = [sys.executable, '-c', program, 'train', '--data', data, '--model', model, '--runs-dir', runs, '--name', name, *COMMON, *options]
    subprocess.run(command, check=True, env=os.environ | environment)
    folder = Path(runs) / name
    manifest = json.loads((folder / 'manifest.json').read_text())
    return dict(finished=json.loads((folder / 'events.jsonl').read_text().splitlines()[-1]), versions=manifest['versions'], machine=manifest['machine'],
                predicted_peak_bytes=manifest['predicted_peak_bytes'])


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ('config', 'tokenizer', 'data', 'out'): p.add_argument(f'--{name}', required=True)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        random_model(a.config, a.tokenizer, f'{folder}/model')
        results = {case: train(a.data, f'{folder}/model', f'{folder}/runs', case.replace(' ', '_'), *how) for case, how in CASES.items()}
    Path(a.out).write_text(json.dumps(results, indent=1) + '\n')
