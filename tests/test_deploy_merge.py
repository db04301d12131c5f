"Merging: the numbers, the folder, and what happens when it cannot be written."
import copy, json, os, shutil
import pytest, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from homelab_ft.core import HardwareError, RunError, embedded_model
from homelab_ft.config import make_config
from homelab_ft.data.chat_template import load_tokenizer
from homelab_ft.deploy import merge as merging
from homelab_ft.deploy.merge import checkpoint_dtype, dequantize_to_cpu, load_dense_base, merge
from homelab_ft.io import write_atomic
from homelab_ft.train.lora import attach_lora, load_adapter, save_adapter
from homelab_ft.train.base_model import load_base
from homelab_ft.train.run_folder import create_run

CONVERSATION = [{'role': 'user', 'content': 'Who goes there?'}, {'role': 'assistant', 'content': 'A friend.'}]
IDS = torch.tensor([[0, 50, 60, 70, 80]])

def make_run(folder, name='r', **settings):
    run = create_run(make_config(run_name=name, lora_r=4, max_new_tokens=8, **settings), folder)
    config = run.config()
    model = attach_lora(load_base(config.model, config.method, bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant), config)
    torch.manual_seed(0)
    for key, p in model.named_parameters():
        if 'lora_B' in key: p.data.normal_(0, 0.02)
    save_adapter(model, run.adapter_path)
    write_atomic(run.data_path / 'test_examples.jsonl', json.dumps({'messages': CONVERSATION, 'label': None, 'row': 1}) + '\n')
    return run, model.eval()

def logits(model):
    with torch.inference_mode(): return model(IDS).logits.float()

def test_a_float32_checkpoint_stays_float32_and_exact(tmp_path):
    source = tmp_path / 'model'
    load_base('embedded', dtype='float32').save_pretrained(source)
    load_tokenizer('embedded').save_pretrained(source)
    assert checkpoint_dtype(str(source)) == 'float32'
    run, model = make_run(tmp_path, model=str(source))
    merged = AutoModelForCausalLM.from_pretrained(merge(run))
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)

@pytest.mark.parametrize('double', [True, False])
def test_qlora_merges_into_the_dequantized_weights(tmp_path, double):
    run, model = make_run(tmp_path, method='qlora', bnb_4bit_use_double_quant=double)
    in_memory = load_adapter(load_dense_base(run.config()), run.adapter_path).merge_and_unload()
    torch.testing.assert_close(logits(in_memory), logits(model), atol=1e-3, rtol=0)
    config = json.loads((merge(run) / 'config.json').read_text())
    assert 'quantization_config' not in config and config['dtype'] == 'bfloat16'

@pytest.mark.parametrize('method', ['qlora', 'int8'])
@pytest.mark.parametrize('tied', [True, False])
def test_dequantized_layer_by_layer_is_the_same_as_at_once(tmp_path, method, tied):
    "The same as transformers' `dequantize`, in CPU RAM."
    model = load_base('embedded', method)
    if not tied: model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1, requires_grad=False)
    one_by_one, at_once = dequantize_to_cpu(copy.deepcopy(model)), model.dequantize(dtype=model.dtype)
    known = dict(at_once.named_parameters(remove_duplicate=False))
    assert {n for n, _ in one_by_one.named_parameters(remove_duplicate=False)} == known.keys() and not hasattr(one_by_one.config, 'quantization_config')
    assert all(p.device.type == 'cpu' and p.dtype == known[n].dtype and torch.equal(p, known[n]) for n, p in one_by_one.named_parameters(remove_duplicate=False))
    assert (one_by_one.lm_head.weight is one_by_one.model.embed_tokens.weight) == tied

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_the_gpu_holds_one_dense_matrix_at_a_time(tmp_path):
    model = load_base('embedded', 'qlora', 'bfloat16', 'cuda')
    before, largest = torch.cuda.memory_allocated(), 2 * max(m.in_features * m.out_features for m in model.modules() if type(m).__name__ == 'Linear4bit')
    torch.cuda.reset_peak_memory_stats()
    dequantize_to_cpu(model)
    assert torch.cuda.max_memory_allocated() - before < 4 * largest + 2**21

def test_the_folder_is_plain_and_says_nothing_about_this_machine(tmp_path):
    out = merge(make_run(tmp_path)[0], tmp_path / 'elsewhere' / 'model')
    assert {p.suffix for p in out.iterdir()} <= {'.json', '.jinja', '.safetensors'}
    for p in out.glob('*.json'): assert str(embedded_model().parent) not in p.read_text() and str(tmp_path) not in p.read_text()
    tok = AutoTokenizer.from_pretrained(out)
    assert tok.apply_chat_template(CONVERSATION, tokenize=False) == load_tokenizer('embedded').apply_chat_template(CONVERSATION, tokenize=False)
    assert [p.name for p in out.parent.iterdir()] == ['model']

def test_nothing_is_overwritten(tmp_path):
    run, _ = make_run(tmp_path)
    run.merged_path.mkdir()
    (run.merged_path / 'mine.txt').write_text('keep')
    with pytest.raises(RunError, match='nothing is overwritten'): merge(run)
    assert [p.name for p in run.merged_path.iterdir()] == ['mine.txt']

def test_a_folder_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path)
    plain = merging.load_merged
    def slow(*args):
        run.merged_path.mkdir()
        (run.merged_path / 'mine.txt').write_text('keep')
        return plain(*args)
    monkeypatch.setattr(merging, 'load_merged', slow)
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

def test_missing_disk_space_is_reported_before_writing(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(HardwareError, match='disk space'): merge(run)
    assert not run.merged_path.exists()
