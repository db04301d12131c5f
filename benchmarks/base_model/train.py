"""Train the embedded base model on the public-domain corpus and write its model card.

    python benchmarks/base_model/train.py --corpus CORPUS.tar.xz --out homelab_ft/assets/base_model --minutes 8

Needs one GPU and the tokenizer that `tokenizer.py` wrote to `--out`. Training lasts `--minutes`: the learning rate follows the
clock, so the run always ends annealed. Four windows in five are plain book text; the fifth holds short exchanges in the chat
format, made from the books alone (go on with a passage, name its author, repeat its first sentence), so that the special tokens
mean something before anyone fine-tunes.
"""
import argparse, json, math, platform, random, re, time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from corpus import split_books

SEED, LENGTH, BATCH = 17, 1024, 128      # tokens in a window, windows in a step
CHAT_SHARE = 0.2
PEAK_LR, WEIGHT_DECAY, WARMUP_STEPS = 3e-3, 0.1, 200


def model_config(tok):
    "About 5 million parameters: 6 layers of width 256, 8 heads over 4 key-value heads, tied embeddings."
    return LlamaConfig(vocab_size=len(tok), hidden_size=256, intermediate_size=640, num_hidden_layers=6, num_attention_heads=8,
                       num_key_value_heads=4, max_position_embeddings=LENGTH, rope_theta=10000.0, tie_word_embeddings=True,
                       bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)


def exchanges(author, text, rng):
    "Chat exchanges from one book: `(user, assistant)` pairs over passages of three to eight sentences."
    sentences = re.split(r'(?<=[.!?]) +|(?<=[.!?]["”]) +', text)
    for start in range(0, len(sentences) - 10, 12):
        n = rng.randint(2, 7)
        passage, following = sentences[start:start + n], sentences[start + n]
        if not 40 < len(' '.join(passage)) < 1500 or len(following) > 400: continue
        kind = rng.choice(['continue', 'author', 'repeat'])
        if kind == 'continue': yield ' '.join(passage), following
        elif kind == 'author': yield ' '.join(passage) + '\n\nWho wrote this?', author
        else: yield ' '.join(passage) + '\n\nWhat is the first sentence?', passage[0]


def chat_ids(job):
    "One book's exchanges as one stream of token ids, each conversation beginning with the begin-of-text token."
    tok, author, text, seed = job
    ids = []
    for user, assistant in exchanges(author, text, random.Random(seed)):
        rendered = tok.apply_chat_template([{'role': 'user', 'content': user}, {'role': 'assistant', 'content': assistant}], tokenize=False)
        ids += tok(rendered, add_special_tokens=False).input_ids
    return np.array(ids, np.uint16)


def book_ids(job):
    "One book as token ids, beginning with the begin-of-text token."
    tok, _, text, _ = job
    return np.array([tok.bos_token_id] + tok(text, add_special_tokens=False).input_ids, np.uint16)


def encode(tok, books, encoder):
    "The token streams of all `books`, joined."
    with Pool() as pool: return np.concatenate(pool.map(encoder, [(tok, a, t, i) for i, (a, _, t) in enumerate(books)], chunksize=1))


def draw(plain, chat, rng, device):
    "A batch of windows at random places, the first `CHAT_SHARE` of them from the chat stream: shape (BATCH, LENGTH + 1)."
    n_chat = round(BATCH * CHAT_SHARE)
    def windows(stream, n): return [stream[i:i + LENGTH + 1] for i in rng.integers(0, len(stream) - LENGTH - 1, n)]
    batch = np.stack(windows(chat, n_chat) + windows(plain, BATCH - n_chat)).astype(np.int64)
    return torch.from_numpy(batch).pin_memory().to(device, non_blocking=True)


def learning_rate(step, progress):
    "Linear warm-up, then a cosine to a hundredth of the peak over the share `progress` of the time."
    floor = PEAK_LR / 100
    return PEAK_LR * min(1, (step + 1) / WARMUP_STEPS) if step < WARMUP_STEPS else floor + (PEAK_LR - floor) * (1 + math.cos(math.pi * progress)) / 2


def optimizer_for(model):
    "AdamW, with weight decay on matrices only."
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{'params': matrices, 'weight_decay': WEIGHT_DECAY}, {'params': rest, 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def batch_loss(model, batch):
    "Mean cross-entropy in nats of every next token."
    with torch.autocast('cuda', torch.bfloat16): logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def fit(model, plain, chat, minutes):
    "Train for `minutes`; returns the logged history of `step`, `loss` and `seconds`."
    optimizer, rng, history = optimizer_for(model), np.random.default_rng(SEED), []
    step_loss = torch.compile(batch_loss)
    start, step, progress = time.time(), 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups: group['lr'] = learning_rate(step, progress)
        loss = step_loss(model, draw(plain, chat, rng, model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(); optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1: start = time.time()      # compilation is over
        if step % 100 == 0:
            history.append({'step': step, 'loss': round(loss.item(), 4), 'seconds': round(time.time() - start, 1)})
            print(history[-1], flush=True)
        progress = (time.time() - start) / (60 * minutes)
    return history, step


@torch.no_grad()
def bits_per_byte(model, tok, books):
    "NLL in bits over UTF-8 bytes: each book in windows of LENGTH tokens that do not overlap, begin-of-text before each."
    nats = n_bytes = 0
    for _, _, text in books:
        ids = tok(text, add_special_tokens=False).input_ids
        n_bytes += len(text.encode())
        windows = [[tok.bos_token_id] + ids[i:i + LENGTH - 1] for i in range(0, len(ids), LENGTH - 1)]
        for w in windows:
            x = torch.tensor([w], device=model.device)
            logits = model(input_ids=x[:, :-1]).logits.float()
            nats += torch.nn.functional.cross_entropy(logits[0], x[0, 1:], reduction='sum').item()
    return nats / math.log(2) / n_bytes


CARD = """\
---
license: apache-2.0
language: en
tags: [llama, text-generation]
---
# The embedded base model of homelab_ft

A Llama-architecture language model of {parameters:,} parameters with a byte-policy BPE tokenizer of {vocab:,} entries. It is small
enough to fine-tune on a laptop's processor in minutes and exists to be fine-tuned: in the quickstart, the tutorials and the tests.
It is no assistant and knows nothing of the world after 1930.

| | |
|---|---|
| architecture | {layers} layers, width {width}, {heads} heads over {kv_heads} key-value heads, SwiGLU {mlp}, tied embeddings, context {length} |
| data | {n_train} English books published before 1930, in the public domain, {train_bytes:.1f} MB as plain text; {n_held} further books held out |
| mixture | {plain_share:.0%} windows of book text; {chat_share:.0%} chat exchanges made from the same books (go on, name the author, repeat the first sentence) |
| training | {steps:,} steps of {batch} windows of {length} tokens ({tokens:,.0f} million tokens), AdamW, peak learning rate {lr}, seed {seed} |
| hardware and time | one {gpu}, {minutes:.1f} minutes, {date}; PyTorch {torch}, transformers {transformers} |
| held-out bits per byte | **{bpb:.3f}** in the shipped bfloat16 weights ({n_held} books, {held_bytes:.1f} MB: windows of {length} tokens that do not overlap) |
| weights | bfloat16 safetensors |

Made by `python benchmarks/base_model/tokenizer.py` and `python benchmarks/base_model/train.py`; the loss of every hundredth step is in
`benchmarks/base_model/history.json`. The wording and the opinions of the books are those of their time.

Held-out books: {held_titles}.
"""


def write_card(out, **facts):
    "The model card, from measured facts alone."
    (out / 'README.md').write_text(CARD.format(**facts))


def main(corpus, out, minutes, history):
    torch.manual_seed(SEED); torch.set_float32_matmul_precision('high')
    tok = AutoTokenizer.from_pretrained(out)
    train, held = split_books(corpus)
    began = time.time()
    plain, chat = encode(tok, train, book_ids), encode(tok, train, chat_ids)
    print(f'{len(plain):,} book tokens, {len(chat):,} chat tokens, encoded in {time.time() - began:.0f} s', flush=True)
    model = LlamaForCausalLM(model_config(tok)).cuda()
    log, steps = fit(model, plain, chat, minutes)
    model.to(torch.bfloat16).save_pretrained(out)
    shipped = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).cuda().eval()
    bpb = bits_per_byte(shipped, tok, held)
    history.write_text(json.dumps({'loss': log, 'bits_per_byte': bpb}) + '\n')
    c, size = shipped.config, lambda books: sum(len(t.encode()) for _, _, t in books) / 1e6
    import transformers
    write_card(out, parameters=shipped.num_parameters(), vocab=len(tok), layers=c.num_hidden_layers, width=c.hidden_size, heads=c.num_attention_heads,
               kv_heads=c.num_key_value_heads, mlp=c.intermediate_size, length=LENGTH, n_train=len(train), train_bytes=size(train), n_held=len(held),
               held_bytes=size(held), plain_share=1 - CHAT_SHARE, chat_share=CHAT_SHARE, steps=steps, batch=BATCH, tokens=steps * BATCH * LENGTH / 1e6,
               lr=PEAK_LR, seed=SEED, gpu=torch.cuda.get_device_name(), minutes=log[-1]['seconds'] / 60, date=time.strftime('%Y-%m-%d'),
               torch=torch.__version__, transformers=transformers.__version__, bpb=bpb, held_titles='; '.join(f'{a}, *{t}*' for a, t, _ in held))
    print(f'held-out bits per byte {bpb:.4f}; {shipped.num_parameters():,} parameters; {platform.python_version()}', flush=True)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--corpus', required=True, help='tar archive of Markdown books')
    p.add_argument('--out', type=Path, default=Path('homelab_ft/assets/base_model'), help='folder with the tokenizer; receives the weights and the card')
    p.add_argument('--minutes', type=float, default=8, help='training time')
    p.add_argument('--history', type=Path, default=Path('benchmarks/base_model/history.json'))
    main(**vars(p.parse_args()))
