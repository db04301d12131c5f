"The same answers from the adapter and from the merged folder, and text that comes in pieces."
import pytest, torch
from hypothesis import given, settings, strategies as st
from homelab_ft.core import DataError, ModelError, RunError
from homelab_ft.config import make_config
from homelab_ft.data.chat_template import end_of_turn_ids, load_tokenizer, prompt_ids
from homelab_ft.deploy.merge import merge
from homelab_ft.deploy.chat import Chat, decode_pieces, load_chat
from homelab_ft.evaluate.inference import generate_greedy
from homelab_ft.train.lora import attach_lora, save_adapter
from homelab_ft.train.base_model import load_base
from homelab_ft.train.run_folder import create_run

TOK = load_tokenizer('embedded')
ASK = [{'role': 'user', 'content': 'Who goes there?'}]

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    run = create_run(make_config(run_name='r', lora_r=4), tmp_path_factory.mktemp('runs'))
    model = attach_lora(load_base('embedded'), run.config())
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if 'lora_B' in name: p.data.normal_(0, 0.02)
    save_adapter(model, run.adapter_path)
    merge(run)
    return run

def test_run_and_merged_folder_answer_alike(run):
    base, adapter, merged = (load_chat(t).generate(ASK, max_new_tokens=12) for t in ('embedded', run, run.merged_path))
    assert adapter == merged != base

def test_a_run_can_be_named_by_path_or_folder(run):
    assert Chat(run.path).generate('Hello', 4) == Chat(str(run.path)).generate('Hello', 4)

def test_chat_says_what_greedy_decoding_says(run):
    chat = load_chat(run)
    ids = generate_greedy(chat.model, [prompt_ids(ASK, TOK)], end_of_turn_ids(TOK), 16, progress=False)[0]
    assert chat.generate(ASK, max_new_tokens=16) == TOK.decode(ids, skip_special_tokens=True)

@settings(max_examples=100, deadline=None)
@given(st.text())
def test_pieces_add_up_to_the_text(text):
    ids = TOK(text, add_special_tokens=False).input_ids
    assert ''.join(decode_pieces(ids, TOK)) == TOK.decode(ids, skip_special_tokens=True)

def test_an_answer_cut_inside_a_letter_is_still_shown():
    ids = TOK('☕', add_special_tokens=False).input_ids
    assert len(ids) > 1 and ''.join(decode_pieces(ids[:-1], TOK)) == TOK.decode(ids[:-1])

def test_the_context_is_a_limit(run):
    chat = load_chat('embedded')
    with pytest.raises(DataError, match='does not fit'): chat.stream('word ' * 2000)

def test_targets_that_are_nothing(tmp_path):
    with pytest.raises(RunError, match='no such run'): load_chat(tmp_path / 'none')
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(ModelError): load_chat(tmp_path)
