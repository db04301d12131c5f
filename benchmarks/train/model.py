"A model with the shape of a config and random weights, as a folder that every trainer can load: python model.py CONFIG TOKENIZER OUT METHOD"
import shutil, sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig


def tensors(config, method):
    "Weights made on the card; linear layers in NF4 with double quantization for qlora."
    with torch.device('meta'): model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != 'lm_head'}
    found = {}
    for name, p in model.named_parameters():
        value = torch.ones(p.shape, dtype=torch.bfloat16, device='cuda') if 'norm' in name else torch.randn(p.shape, device='cuda', dtype=torch.bfloat16) * 0.02
        found[name] = value.cpu()
        if method == 'qlora' and name.removesuffix('.weight') in linear:
            packed, state = bnb.functional.quantize_4bit(value, compress_statistics=True, quant_type='nf4', quant_storage=torch.uint8)
            found[name] = packed.cpu()
            found |= {f'{name}.{k}': v.cpu() for k, v in state.as_dict(packed=True).items()}
    return found


def main(source, tokenizer, out, method):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source)
    config.dtype = torch.bfloat16
    found = tensors(config, method)
    if config.tie_word_embeddings: found.pop('lm_head.weight', None)
    if method == 'qlora':
        config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True,
                                                        bnb_4bit_compute_dtype=torch.bfloat16).to_dict()
    config.save_pretrained(out)
    save_file(found, Path(out) / 'model.safetensors', metadata={'format': 'pt'})
    for file in Path(tokenizer).glob('*token*'): shutil.copy(file, out)
    for file in Path(tokenizer).glob('chat_template*'): shutil.copy(file, out)


if __name__ == '__main__': main(*sys.argv[1:])
