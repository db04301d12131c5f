"One case of one peer in a process of its own: python peers.py PEER MODEL METHOD KIND ROWS CHECKPOINTING GIB. PEER: trainer, trl, trl-liger, trl-packed or unsloth."
import sys

peer, path, method, kind, rows, checkpointing, gib = sys.argv[1:]
rows, checkpointing, gib = int(rows), checkpointing == 'on', float(gib)
about = dict(who=peer, method=method, kind=kind, rows=rows, checkpointing=checkpointing, limit_gib=gib)
if peer == 'unsloth': from unsloth import FastLanguageModel
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from workload import LENGTH, Data, Meter, fail, limit_card, say

TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


class Timer(TrainerCallback):
    "Feeds the meter."
    def __init__(self): self.meter, self.seen = Meter(), []
    def on_step_begin(self, *args, **kwargs): self.meter.begin()
    def on_step_end(self, args, state, control, **kwargs):
        tokens, self.seen = sum(self.seen), []
        control.should_training_stop = self.meter.end(tokens)


def stock_model():
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    model = AutoModelForCausalLM.from_pretrained(path, device_map={'': 0}, dtype=torch.bfloat16)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type='CAUSAL_LM')
    if peer.startswith('trl'): return model, settings
    if method == 'qlora': model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={'use_reentrant': False})
    return get_peft_model(model, settings), None


def unsloth_model():
    model, tokenizer = FastLanguageModel.from_pretrained(path, max_seq_length=LENGTH, dtype=torch.bfloat16, load_in_4bit=method == 'qlora')
    return FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, lora_dropout=0, bias='none', target_modules=TARGETS,
                                            use_gradient_checkpointing='unsloth' if checkpointing else False), tokenizer


def pad(examples):
    width = max(len(e['input_ids']) for e in examples)
    fill = lambda key, value: torch.tensor([e[key] + [value] * (width - len(e[key])) for e in examples])
    return dict(input_ids=fill('input_ids', 0), labels=fill('labels', -100), attention_mask=torch.tensor([[1] * len(e['input_ids']) + [0] * (width - len(e['input_ids'])) for e in examples]))


def trainer(dataset, timer):
    common = dict(output_dir='/tmp/out', per_device_train_batch_size=rows, gradient_accumulation_steps=1, max_steps=100, bf16=True, optim='adamw_8bit',
                  learning_rate=1e-5, logging_steps=1000, save_strategy='no', report_to='none', gradient_checkpointing=checkpointing,
                  gradient_checkpointing_kwargs={'use_reentrant': False}, seed=0)
    if peer == 'trainer':
        model, _ = stock_model()
        return Trainer(model=model, args=TrainingArguments(**common, remove_unused_columns=False), train_dataset=dataset, data_collator=pad, callbacks=[timer])
    from trl import SFTConfig, SFTTrainer
    packed = peer in ('trl-packed', 'unsloth') and kind == 'real'
    if peer == 'unsloth': common.pop('gradient_checkpointing_kwargs')
    settings = SFTConfig(**common, max_length=LENGTH, packing=packed, use_liger_kernel=peer in ('trl-liger', 'trl-packed'), dataset_num_proc=1)
    model, extra = unsloth_model() if peer == 'unsloth' else stock_model()
    more = dict(processing_class=extra) if peer == 'unsloth' else dict(processing_class=AutoTokenizer.from_pretrained(path), peft_config=extra)
    return SFTTrainer(model=model, args=settings, train_dataset=dataset, callbacks=[timer], **more)


def main():
    limit_card(gib)
    torch.manual_seed(0)
    data, timer = Data(kind, 128000), Timer()
    dataset = Dataset.from_list([dict(input_ids=ids.tolist(), labels=[int(t) if m else -100 for t, m in zip(ids, mask)]) for ids, mask in data.rows])
    made = trainer(dataset, timer)
    step = made.training_step
    def counted(model, inputs, *args, **kwargs):
        mask = inputs.get('attention_mask')
        timer.seen.append(mask.sum() if mask is not None and mask.dim() == 2 else inputs['input_ids'].numel())
        return step(model, inputs, *args, **kwargs)
    made.training_step = counted
    made.train()
    say(timer.meter.row(**about))


try: main()
except Exception as e:
    import traceback
    traceback.print_exc()
    fail(e, **about)
