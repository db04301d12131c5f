"Chat templates: the loss covers the assistant's words and the end of its turn, for the templates and tokenizers people use."
import base64, json
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from homelab_ft.core import ConfigError, DataError, ModelError
from homelab_ft.data.chat_template import Encoded, check_template, encode, end_of_turn, end_of_turn_ids, load_tokenizer, show_loss_mask, prompt_ids, render

SHARED = Path(__file__).resolve().parents[2] / 'shared' / 'data'
needs_shared = pytest.mark.skipif(not (SHARED / 'chat_templates').is_dir(), reason='needs the real templates and tokenizers in ../shared/data')
quick = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


# -- real tokenizers, built from their published files -------------------------------------------------------------------------------------

def merges_of(vocab, show=lambda t: t):
    "BPE merges in order of rank, from a vocabulary whose numbers are ranks."
    merges = []
    for token, rank in vocab.items():
        parts = [(vocab[token[:i]], vocab[token[i:]], token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        merges += [(rank, *p) for p in sorted(parts)]
    return [(show(a), show(b)) for *_, a, b in sorted(merges, key=lambda m: m[0])]


def gpt2():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    folder = SHARED / 'tokenizers' / 'gpt2'
    tok = Tokenizer(models.BPE.from_file(str(folder / 'vocab.json'), str(folder / 'merges.txt')))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tok


def llama3():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    letters = bytes_to_unicode()
    show = lambda token: ''.join(letters[b] for b in token)
    lines = (SHARED / 'tokenizers' / 'llama3' / 'tokenizer.model').read_bytes().split()
    ranks = {base64.b64decode(t): int(r) for t, r in zip(lines[::2], lines[1::2])}
    tok = Tokenizer(models.BPE({show(t): r for t, r in ranks.items()}, merges_of(ranks, show), ignore_merges=True))
    rule = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    return tok


def protobuf_fields(data):
    "`(field number, value)` of a protobuf message."
    def varint(at):
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128: return value, at
    at = 0
    while at < len(data):
        key, at = varint(at)
        if key & 7 == 0: value, at = varint(at)
        else:
            n, at = varint(at) if key & 7 == 2 else ({5: 4, 1: 8}[key & 7], at)
            value, at = data[at:at + n], at + n
        yield key >> 3, value


def sentencepiece(always):
    "Mistral's SentencePiece model; `always`: a space before the text behind every special token, as Llama 2's tokenizer has it."
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    content = (SHARED / 'tokenizers' / 'mistral' / 'mistral_instruct_tokenizer_240323.model.v3').read_bytes()
    vocab = {dict(protobuf_fields(piece))[1].decode(): i for i, piece in enumerate(v for k, v in protobuf_fields(content) if k == 1)}
    tok = Tokenizer(models.BPE(vocab, merges_of(vocab), unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    if always: tok.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    else: tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    tok.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    return tok


BACKENDS = dict(gpt2=gpt2, llama3=llama3, mistral=lambda: sentencepiece(always=False), llama2=lambda: sentencepiece(always=True))


@lru_cache
def embedded(): return load_tokenizer('embedded')


@lru_cache
def backend(name): return BACKENDS[name]().to_str()


@lru_cache
def tokenizer(name, template, bos, eos, special=()):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    marks = dict(eos_token=eos, bos_token=bos, extra_special_tokens=list(special))
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend(name)), **{k: v for k, v in marks.items() if v})
    tok.chat_template = template
    return tok


# -- real templates ------------------------------------------------------------------------------------------------------------------------

HEADERS, IM = ('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'), ('<|im_start|>', '<|im_end|>')
as_it_is, trimmed, no_break = (lambda text: text), (lambda text: text.strip()), (lambda text: text.lstrip('\n'))
# file: (begin of text, eos, further special tokens, end of turn, what the template makes of an answer, whether earlier answers have loss)
TEMPLATES = {
    'HuggingFaceTB-SmolLM3-3B': ('', '<|im_end|>', IM, '<|im_end|>', no_break, True),
    'Qwen-Qwen2.5-7B-Instruct': ('', '<|im_end|>', IM, '<|im_end|>', as_it_is, True),
    'Qwen-Qwen3-0.6B': ('', '<|im_end|>', IM, '<|im_end|>', lambda text: '<think>\n\n</think>\n\n' + no_break(text), False),
    'google-gemma-2-2b-it': ('<bos>', '<eos>', ('<start_of_turn>', '<end_of_turn>'), '<end_of_turn>', trimmed, True),
    'meta-llama-Llama-3.1-8B-Instruct': ('<|begin_of_text|>', '<|eot_id|>', HEADERS, '<|eot_id|>', trimmed, True),
    'meta-llama-Llama-3.2-3B-Instruct': ('<|begin_of_text|>', '<|eot_id|>', HEADERS, '<|eot_id|>', trimmed, True),
    'microsoft-Phi-3.5-mini-instruct': ('<s>', '<|endoftext|>', ('<|system|>', '<|user|>', '<|assistant|>', '<|end|>'), '<|end|>', as_it_is, True),
    'mistralai-Mistral-Nemo-Instruct-2407': ('<s>', '</s>', ('[INST]', '[/INST]'), '</s>', as_it_is, True),
    'openai-gpt-oss-120b': ('<|startoftext|>', '<|return|>', ('<|start|>', '<|end|>', '<|message|>', '<|channel|>', '<|call|>'), '<|return|>',
                            lambda text: '<|channel|>final<|message|>' + text, False),
}
NO_SYSTEM = ['google-gemma-2-2b-it', 'mistralai-Mistral-Nemo-Instruct-2407']   # Gemma refuses it, Mistral forgets it


def real(name, file):
    bos, eos, special, *_ = TEMPLATES[file]
    return tokenizer(name, (SHARED / 'chat_templates' / f'{file}.jinja').read_text(encoding='utf-8'), bos, eos, special)


PAIRS = [(name, file) for file in TEMPLATES for name in ('gpt2', 'mistral')]
PAIRS += [('llama3', file) for file in TEMPLATES if 'Llama' in file or 'Qwen3' in file]
REPRESENTATIVE = [('gpt2', 'Qwen-Qwen3-0.6B'), ('mistral', 'google-gemma-2-2b-it'), ('llama3', 'meta-llama-Llama-3.1-8B-Instruct')]


def mostly_slow(cases, ordinary): return [case if case in ordinary else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


words = st.text(st.sampled_from(list('abcXYZ019 .,!?\n\t<>|/[]{}éß語🙂')), max_size=30)


@st.composite
def conversations(draw, system=True, turns=3):
    "A conversation of user and assistant in turn, the assistant last."
    talk = [{'role': 'system', 'content': draw(words)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, turns))):
        talk += [{'role': 'user', 'content': draw(words)}, {'role': 'assistant', 'content': draw(words)}]
    return talk


def masked_parts(enc, tok):
    "The texts of the masked parts, each read where it stands."
    ids, mask = enc
    at = [i for i in range(len(ids) + 1) if i in (0, len(ids)) or mask[i] != mask[i - 1]]
    until = [tok.decode(ids[:i]) for i in at]
    return [until[k + 1][len(until[k]):] for k in range(len(at) - 1) if mask[at[k]]]


def no_special(talk, tok):
    "No message spells a special token."
    return not any(t.content in m['content'] for m in talk for t in tok.added_tokens_decoder.values())


def check_conversation(talk, tok, expected):
    "What must hold of every encoding."
    enc = encode(talk, tok)
    assert len(enc.input_ids) == len(enc.mask) and set(enc.mask) <= {0, 1}
    assert masked_parts(enc, tok) == expected
    start = prompt_ids(talk[:-1], tok)
    assert enc.input_ids[:len(start)] == start and enc.mask[len(start) - 1:len(start) + 1] == [0, 1]
    assert enc.input_ids[-1] in end_of_turn_ids(tok) and enc.mask[-1] == 1
    text = render(talk, tok)
    assert tok.decode(enc.input_ids) == text[:text.rindex(end_of_turn(tok)) + len(end_of_turn(tok))]


def expected_parts(talk, file):
    "The assistant's turns that must have loss, as text."
    *_, close, writes, history = TEMPLATES[file]
    answers = [m['content'] for m in talk if m['role'] == 'assistant']
    if not history: answers = answers[-1:]
    return [writes(a) + close for a in answers]


@needs_shared
@pytest.mark.parametrize('name, file', mostly_slow(PAIRS, REPRESENTATIVE))
@quick
@given(data=st.data())
def test_loss_covers_the_answers_and_nothing_else(name, file, data):
    tok = real(name, file)
    talk = data.draw(conversations(system=file not in NO_SYSTEM))
    assume(no_special(talk, tok))
    check_conversation(talk, tok, expected_parts(talk, file))


@needs_shared
@pytest.mark.parametrize('file', ['Qwen-Qwen2.5-7B-Instruct', *(pytest.param(f, marks=pytest.mark.slow) for f in TEMPLATES if 'Qwen2.5' not in f)])
@quick
@given(talk=conversations(system=False))
def test_a_tokenizer_that_puts_spaces_everywhere(file, talk):
    tok = real('llama2', file)
    talk = [m | {'content': ' '.join(m['content'].split()) or 'x'} for m in talk]
    assume(no_special(talk, tok))
    enc = encode(talk, tok)
    assert [s.replace(' ', '') for s in masked_parts(enc, tok)] == [s.replace(' ', '') for s in expected_parts(talk, file)]
    assert enc.input_ids[:len(prompt_ids(talk[:-1], tok))] == prompt_ids(talk[:-1], tok)


@quick
@given(talk=conversations())
def test_embedded_tokenizer(talk):
    tok = embedded()
    assume(no_special(talk, tok))
    check_conversation(talk, tok, [m['content'].strip() + '<|eot_id|>' for m in talk if m['role'] == 'assistant'])


@quick
@given(talk=conversations(turns=1))
def test_a_single_prompt_is_what_any_engine_reads(talk):
    tok = embedded()
    text = tok.apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt_ids(talk[:-1], tok) == tok(text, add_special_tokens=False).input_ids


# -- golden renderings, and what a check says ----------------------------------------------------------------------------------------------

def golden():
    path = SHARED / 'chat_templates' / 'golden_renders.json'
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else []


@needs_shared
@pytest.mark.parametrize('case', golden(), ids=lambda c: c['name'][:40])
def test_golden_renderings(case):
    tok = tokenizer('gpt2', case['template'], case['bos_token'], case['eos_token'])
    assert render(case['messages'], tok, case['add_generation_prompt']) == case['expected_jinja']


CLOSED = {'teknium/OpenHermes': '<|im_end|>', 'bofenghuang/vigogne': '</s>', 'openchat': '<|end_of_turn|>', 'eachadea/vicuna': '</s>',
          'CohereForAI': '<|END_OF_TURN_TOKEN|>', 'Phi-3-small': '<|end|>', 'DeepSeek-V2': '<｜end▁of▁sentence｜>', 'mistralai/Mistral-7B': '</s>',
          'Mistral-Nemo': '</s>', 'Infinigence': '<|turn_end|>'}
OPEN = {'ChatGLM3': '<|user|>', 'GLMEdge': '<|assistant|>', 'inclusionAI': '<|role_end|>'}


@needs_shared
@pytest.mark.parametrize('case', golden(), ids=lambda c: c['name'][:40])
def test_golden_templates_are_closed_or_refused(case):
    eos, closed = next((e, e in CLOSED.values()) for known in (CLOSED, OPEN) for start, e in known.items() if case['name'].startswith(start))
    tok = tokenizer('gpt2', case['template'], '<s>', '<|the_end|>', (eos,))
    tok.eos_token = eos
    if closed: assert check_template(tok).end_of_turn == eos
    else:
        with pytest.raises(ModelError, match='does not close'): check_template(tok)


@needs_shared
@pytest.mark.parametrize('file', TEMPLATES)
def test_check_of_real_templates(file):
    bos, _, _, close, _, history = TEMPLATES[file]
    report = check_template(real('gpt2', file))
    assert (report.end_of_turn, report.history) == (close, history)
    assert report.system == ('refused' if file in NO_SYSTEM else 'kept')
    assert report.dated == (file.startswith(('meta-llama-Llama-3.2', 'openai')))
    assert report.bos == (0 if file.startswith(('microsoft', 'openai')) else len(bos[:1]))


@needs_shared
def test_a_generation_prompt_of_its_own_is_refused():
    template = (SHARED / 'chat_templates' / 'deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja').read_text(encoding='utf-8')
    tok = tokenizer('gpt2', template, '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>', ('<｜User｜>', '<｜Assistant｜>'))
    with pytest.raises(ModelError, match='generation prompt') as e: check_template(tok)
    assert '<think>' in e.value.value and 'chat_template=FILE' in e.value.next_step


@needs_shared
def test_a_refused_system_role_says_so():
    talk = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    with pytest.raises(ModelError, match='System role not supported') as e: encode(talk, real('gpt2', 'google-gemma-2-2b-it'))
    assert 'system_prompt' in e.value.next_step
    with pytest.raises(ModelError, match='generation prompt') as e: encode(talk, real('gpt2', 'mistralai-Mistral-Nemo-Instruct-2407'))
    assert 'system_prompt' in e.value.next_step


# -- bad input ----------------------------------------------------------------------------------------------------------------------------

def test_folders_without_what_is_needed(tmp_path):
    with pytest.raises(ModelError, match='has no tokenizer'): load_tokenizer(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(ModelError, match='cannot be loaded'): load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match='chat_template'): load_tokenizer('embedded', chat_template=tmp_path)
    (tmp_path / 'binary.jinja').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ConfigError, match='UTF-8'): load_tokenizer('embedded', chat_template=tmp_path / 'binary.jinja')


def test_a_template_with_a_slip_of_the_pen(tmp_path):
    (tmp_path / 'broken.jinja').write_text('{% for m in messages %}{{ m.content }}')
    with pytest.raises(ModelError, match='refuses these messages') as e: check_template(load_tokenizer('embedded', tmp_path / 'broken.jinja'))
    assert 'chat_template=FILE' in e.value.next_step


def test_a_tokenizer_without_pad_token_gets_one(tmp_path):
    load_tokenizer('embedded').save_pretrained(tmp_path)
    about = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    del about['pad_token']
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(about))
    tok = load_tokenizer(tmp_path)
    assert tok.pad_token_id == tok.eos_token_id


@pytest.mark.parametrize('roles', [[], ['user'], ['assistant'], ['user', 'assistant', 'user']])
def test_conversations_without_an_answer(roles):
    with pytest.raises(DataError, match='ends with an answer'): encode([{'role': r, 'content': 'x'} for r in roles], load_tokenizer('embedded'))


def test_show_loss_mask_brackets_the_tokens_with_loss():
    tok = load_tokenizer('embedded')
    ids = tok('ab cd', add_special_tokens=False).input_ids
    assert show_loss_mask(Encoded(ids, [0] * len(ids)), tok) == 'ab cd'
    assert show_loss_mask(Encoded(ids, [1] * len(ids)), tok) == '⟦ab cd⟧'
