"Merging: the numbers, the folder, and what happens when it cannot be written."
import copy, json, os, shutil
import numpy as np, pytest, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from homelab_ft.core import DataError, HardwareError, RunError, embedded_model
from homelab_ft.config import make_config
from homelab_ft.data.chat_template import load_tokenizer
from homelab_ft.deploy import merge as merging
from homelab_ft.deploy.merge import merge, parity, stored_dtype
from homelab_ft.io import write_atomic
from homelab_ft.train.lora import attach_lora, load_adapter, save_adapter
from homelab_ft.train.base_model import load_base
from homelab_ft.train.run_folder import create_run

TALK = [{'role': 'user', 'content': 'Who goes there?'}, {'role': 'assistant', 'content': 'A friend.'}]
IDS = torch.tensor([[0, 50, 60, 70, 80]])

def make_run(folder, name='r', **settings):
    run = create_run(make_config(run_name=name, lora_r=4, max_new_tokens=8, **settings), folder)
    config = run.config()
    model = attach_lora(load_base(config.model, config.method, bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant), config)
    torch.manual_seed(0)
    for key, p in model.named_parameters():
        if 'lora_B' in key: p.data.normal_(0, 0.02)
    save_adapter(model, run.adapter_path)
    write_atomic(run.data_path / 'test_examples.jsonl', json.dumps({'messages': TALK, 'label': None, 'row': 1}) + '\n')
    return run, model.eval()

def logits(model):
    with torch.inference_mode(): return model(IDS).logits.float()

def test_merged_weights_are_the_sum_rounded_once(tmp_path):
    run, model = make_run(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(merge(run))
    base = load_base('embedded', dtype='float32')
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    delta = layer.lora_B['default'].weight @ layer.lora_A['default'].weight * layer.scaling['default']
    expected = (base.model.layers[0].mlp.up_proj.weight + delta).bfloat16()
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, expected)
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight.bfloat16())

def test_a_float32_checkpoint_stays_float32_and_exact(tmp_path):
    source = tmp_path / 'model'
    load_base('embedded', dtype='float32').save_pretrained(source)
    load_tokenizer('embedded').save_pretrained(source)
    assert stored_dtype(str(source)) == 'float32'
    run, model = make_run(tmp_path, model=str(source))
    merged = AutoModelForCausalLM.from_pretrained(merge(run))
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)

@pytest.mark.parametrize('double', [True, False])
def test_qlora_merges_into_the_dequantized_weights(tmp_path, double):
    run, model = make_run(tmp_path, method='qlora', bnb_4bit_use_double_quant=double)
    in_memory = load_adapter(merging._plain_base(run.config()), run.adapter_path).merge_and_unload()
    torch.testing.assert_close(logits(in_memory), logits(model), atol=1e-3, rtol=0)
    config = json.loads((merge(run) / 'config.json').read_text())
    assert 'quantization_config' not in config and config['dtype'] == 'bfloat16'
    assert parity(run, progress=False).passed

@pytest.mark.parametrize('method', ['qlora', 'int8'])
@pytest.mark.parametrize('tied', [True, False])
def test_written_out_matrix_by_matrix_is_written_out(tmp_path, method, tied):
    "What transformers writes out all at once, in host memory."
    model = load_base('embedded', method)
    if not tied: model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1, requires_grad=False)
    ours, theirs = merging._written_out(copy.deepcopy(model)), model.dequantize(dtype=model.dtype)
    known = dict(theirs.named_parameters(remove_duplicate=False))
    assert {n for n, _ in ours.named_parameters(remove_duplicate=False)} == known.keys() and not hasattr(ours.config, 'quantization_config')
    assert all(p.device.type == 'cpu' and p.dtype == known[n].dtype and torch.equal(p, known[n]) for n, p in ours.named_parameters(remove_duplicate=False))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a card')
def test_card_holds_one_matrix_at_a_time_while_it_writes_out(tmp_path):
    model = load_base('embedded', 'qlora', 'bfloat16', 'cuda')
    before, largest = torch.cuda.memory_allocated(), 2 * max(m.in_features * m.out_features for m in model.modules() if type(m).__name__ == 'Linear4bit')
    torch.cuda.reset_peak_memory_stats()
    merging._written_out(model)
    assert torch.cuda.max_memory_allocated() - before < 4 * largest + 2**21

def test_int8_is_allowed_what_rounding_the_inputs_makes(tmp_path):
    run, model = make_run(tmp_path, method='int8')
    in_memory = load_adapter(merging._plain_base(run.config()), run.adapter_path).merge_and_unload()
    apart = load_adapter(merging._plain_base(run.config()), run.adapter_path)
    torch.testing.assert_close(logits(in_memory), logits(apart), atol=1e-3, rtol=0)                  # the merge itself is exact
    assert (logits(in_memory) - logits(model)).abs().max() > 1e-2                                    # 8-bit inputs are not
    config = json.loads((merge(run) / 'config.json').read_text())
    assert 'quantization_config' not in config and config['dtype'] == 'bfloat16'
    found = parity(run, progress=False)
    assert found.passed and found.inputs > 0
    assert found.distance <= found.inputs + max(merging.ALWAYS_ALLOWED, merging.TIMES_EXPLAINED * found.explained)
    assert json.loads((run.path / 'parity.json').read_text())['inputs'] == found.inputs

def test_only_int8_is_allowed_more(tmp_path):
    run, _ = make_run(tmp_path)
    merge(run)
    found = parity(run, progress=False)
    assert found.inputs == 0 and '8-bit' not in str(found)

def test_what_the_inputs_explain_is_added_once():
    seen = lambda distance, inputs: merging.Parity(32, 100, 1., 1., 0., distance, 0.2, 1., explained=0.003, inputs=inputs)
    assert seen(0.0149, 0.).passed and not seen(0.0151, 0.).passed
    assert seen(0.0349, 0.02).passed and not seen(0.0351, 0.02).passed and '8-bit inputs 0.02000' in str(seen(0.03, 0.02))

def test_adapter_on_some_layers_only(tmp_path):
    run, _ = make_run(tmp_path, target_modules=['q_proj', 'v_proj'], method='qlora')
    merge(run)
    assert parity(run, progress=False).passed

def test_the_folder_is_plain_and_says_nothing_about_this_machine(tmp_path):
    out = merge(make_run(tmp_path)[0], tmp_path / 'elsewhere' / 'model')
    assert {p.suffix for p in out.iterdir()} <= {'.json', '.jinja', '.safetensors'}
    for p in out.glob('*.json'): assert str(embedded_model().parent) not in p.read_text() and str(tmp_path) not in p.read_text()
    tok = AutoTokenizer.from_pretrained(out)
    assert tok.apply_chat_template(TALK, tokenize=False) == load_tokenizer('embedded').apply_chat_template(TALK, tokenize=False)
    assert [p.name for p in out.parent.iterdir()] == ['model']

def test_a_template_from_a_file_travels_with_the_model(tmp_path):
    template = tmp_path / 'mine.jinja'
    template.write_text((embedded_model() / 'chat_template.jinja').read_text().replace("'\\n\\n'", "'\\n'").replace('\\n\\n', '\\n'))
    run, _ = make_run(tmp_path, chat_template=str(template))
    out = merge(run)
    assert AutoTokenizer.from_pretrained(out).chat_template == template.read_text()
    assert parity(run, progress=False).passed

def test_nothing_is_overwritten(tmp_path):
    run, _ = make_run(tmp_path)
    run.merged_path.mkdir()
    (run.merged_path / 'mine.txt').write_text('keep')
    with pytest.raises(RunError, match='nothing is overwritten'): merge(run)
    assert [p.name for p in run.merged_path.iterdir()] == ['mine.txt']

def test_a_folder_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path)
    plain = merging._merged_model
    def slow(*args):
        run.merged_path.mkdir()
        (run.merged_path / 'mine.txt').write_text('keep')
        return plain(*args)
    monkeypatch.setattr(merging, '_merged_model', slow)
    with pytest.raises(RunError, match='appeared meanwhile'): merge(run)
    assert [p.name for p in run.merged_path.iterdir()] == ['mine.txt']

@pytest.mark.parametrize('what', ['save_file', 'rename'])
def test_a_failed_write_leaves_no_folder(tmp_path, monkeypatch, what):
    run, _ = make_run(tmp_path)
    before = sorted(p.name for p in run.path.iterdir())
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    if what == 'rename': monkeypatch.setattr(os, 'rename', full)
    else: monkeypatch.setattr('transformers.modeling_utils.safe_save_file', full)
    with pytest.raises(OSError): merge(run)
    assert sorted(p.name for p in run.path.iterdir()) == before

def test_no_space_is_said_before_writing(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(HardwareError, match='disk space'): merge(run)
    assert not run.merged_path.exists()

def test_parity_needs_rows(tmp_path):
    run, _ = make_run(tmp_path)
    merge(run)
    (run.data_path / 'test_examples.jsonl').write_text('')
    with pytest.raises(DataError, match='no test rows'): parity(run)


@pytest.mark.parametrize('k', [1, 3])
def test_answers_are_compared_row_after_row_however_few_the_card_holds(k):
    rng, model = np.random.default_rng(0), load_base('embedded').eval()
    encoded = [(rng.integers(5, 4000, n).tolist(), [0] + [1] * (n - 1)) for n in (9, 4, 12, 3, 7, 5, 2)]
    whole = merging._answer_nll(model, encoded, 4, False)
    def full(module, args, kwargs):
        if len(kwargs['input_ids']) > k: raise torch.OutOfMemoryError('CUDA out of memory.')
    model.base_model.register_forward_pre_hook(full, with_kwargs=True)
    np.testing.assert_allclose(merging._answer_nll(model, encoded, 4, False), whole, atol=1e-5)
    assert len(whole) == sum(len(ids) - 1 for ids, _ in encoded)
