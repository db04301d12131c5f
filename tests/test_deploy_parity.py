"The parity test: what it allows, and what it reads."
import json
import pytest, torch
from homelab_ft.core import DataError, embedded_model
from homelab_ft.deploy.merge import load_dense_base, merge
from homelab_ft.deploy.parity import Parity, load_parity, parity
from homelab_ft.io import write_json
from homelab_ft.train.lora import load_adapter
from test_deploy_merge import logits, make_run

@pytest.mark.parametrize('settings', [dict(method='qlora', bnb_4bit_use_double_quant=False), dict(method='qlora', target_modules=['q_proj', 'v_proj'])])
def test_qlora_passes(tmp_path, settings):
    run, _ = make_run(tmp_path, **settings)
    merge(run)
    assert parity(run, progress=False).passed

def test_int8_is_allowed_what_rounding_the_inputs_makes(tmp_path):
    run, model = make_run(tmp_path, method='int8')
    in_memory = load_adapter(load_dense_base(run.config()), run.adapter_path).merge_and_unload()
    beside = load_adapter(load_dense_base(run.config()), run.adapter_path)
    torch.testing.assert_close(logits(in_memory), logits(beside), atol=1e-3, rtol=0)        # the merge itself is exact
    assert (logits(in_memory) - logits(model)).abs().max() > 1e-2                          # 8-bit inputs are not
    config = json.loads((merge(run) / 'config.json').read_text())
    assert 'quantization_config' not in config and config['dtype'] == 'bfloat16'
    result = parity(run, progress=False)
    assert result.passed and result.input_distance > 0 and load_parity(run) == result

def test_only_int8_is_allowed_more(tmp_path):
    run, _ = make_run(tmp_path)
    merge(run)
    result = parity(run, progress=False)
    assert result.input_distance == 0 and '8-bit' not in str(result)
    (run.data_path / 'test_examples.jsonl').write_text('')
    with pytest.raises(DataError, match='no test rows'): parity(run)

def test_what_rounding_the_inputs_explains_is_added_once():
    def measured(distance, inputs): return Parity(32, 100, 1., 1., 0., distance, 0.2, 1., rounding_distance=0.003, input_distance=inputs)
    assert measured(0.0149, 0.).passed and not measured(0.0151, 0.).passed
    assert measured(0.0349, 0.02).passed and not measured(0.0351, 0.02).passed
    assert '8-bit inputs 0.02000' in str(measured(0.03, 0.02).table().rows)

def test_results_of_older_versions_are_read(tmp_path):
    run, _ = make_run(tmp_path)
    write_json(run.path / 'parity.json', dict(rows=32, tokens=132, prompts_equal=1., ids_equal=1., shift=0., distance=.0149, largest=.05, greedy_equal=1.,
                                              explained=.003, inputs=0., merged='merged', time='then', passed=True))
    assert load_parity(run) == Parity(32, 132, 1., 1., 0., .0149, .05, 1., .003, 0., 'merged', 'then') and load_parity(run).passed

def test_a_template_from_a_file_travels_with_the_model(tmp_path):
    template = tmp_path / 'mine.jinja'
    template.write_text((embedded_model() / 'chat_template.jinja').read_text().replace("'\\n\\n'", "'\\n'").replace('\\n\\n', '\\n'))
    run, _ = make_run(tmp_path, chat_template=str(template))
    merge(run)
    assert parity(run, progress=False).passed
