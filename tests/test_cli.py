"""Whatever is wrong with the input: one clear message, exit code 2, no training, nothing overwritten."""
import json
import shutil
import subprocess
import sys

import pytest

from homelab_ft.cli import main, make_parser
from homelab_ft.core import embedded_model
from homelab_ft.hardware import machine as hardware

GOOD = 'subject,body,team\n' + ''.join(f'hello {i},the parcel number {i} is {w} late,{t}\n' for i, (w, t) in enumerate(
    [('very', 'delivery'), ('rather', 'delivery'), ('not', 'sales'), ('too', 'sales')] * 6))


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty working folder with one good file."
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'good.csv').write_text(GOOD)
    return tmp_path


@pytest.fixture
def refuse(here, capsys):
    "Call a command that must be refused; returns its message."
    def call(*argv):
        before = sorted(p.name for p in here.iterdir())
        code = main(['run', *argv])
        err = capsys.readouterr().err
        assert code == 2, err
        assert err.startswith('homelab-ft: ') and 'Traceback' not in err and err.count('homelab-ft:') == 1
        assert 'next step: ' in err
        runs = here / 'runs'
        assert not runs.exists() or not [p for p in runs.iterdir() if p.name != 'taken'], 'a refused run left something behind'
        assert sorted(p.name for p in here.iterdir() if p.name != 'runs') == [n for n in before if n != 'runs']
        return err
    return call


def write(here, name, content):
    (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def test_missing_file(refuse): assert 'nowhere.csv' in refuse('--data', 'nowhere.csv')
def test_no_file_at_all(refuse): assert 'data' in refuse()
def test_empty_file(refuse, here): assert 'empty' in refuse('--data', write(here, 'a.csv', ''))
def test_header_only(refuse, here): refuse('--data', write(here, 'a.csv', 'subject,body,team\n'))
def test_unknown_extension(refuse, here): assert '.docx' in refuse('--data', write(here, 'a.docx', 'x'))
def test_broken_json(refuse, here): assert '2' in refuse('--data', write(here, 'a.jsonl', '{"prompt": "a", "completion": "b"}\n{"prompt": \n'))


def test_wrong_encoding(refuse, here):
    message = refuse('--data', write(here, 'a.csv', GOOD.replace('hello 3', 'héllo 3').encode('cp1252')))
    assert 'encoding=' in message and 'cp1252' in message


def test_unknown_column(refuse): assert 'team' in refuse('--data', 'good.csv', '--set', 'label_column=teem')
def test_dataset_format_cannot_be_detected(refuse, here):
    rows = ''.join(f'{i},{i * 7}\n' for i in range(30))
    assert 'foo' in refuse('--data', write(here, 'a.csv', 'foo,bar\n' + rows))


def test_label_present_once(refuse, here):
    message = refuse('--data', write(here, 'a.csv', GOOD + 'hi,where is my refund please,billing\n'))
    assert 'billing' in message and 'rare_labels=drop' in message


def test_row_longer_than_max_length(refuse, here):
    message = refuse('--data', write(here, 'a.csv', GOOD + f'hi,{"late again " * 400},sales\n'), '--set', 'max_length=64')
    assert 'max_length' in message and 'overlong_rows=drop' in message


def test_unknown_setting(refuse): assert 'learning_rate' in refuse('--data', 'good.csv', '--set', 'lerning_rate=1e-4')
def test_setting_out_of_range(refuse): assert 'lora_r' in refuse('--data', 'good.csv', '--set', 'lora_r=0')
def test_unknown_setting_in_file(refuse, here): assert 'lora_renk' in refuse('--data', 'good.csv', '--config', write(here, 'c.yaml', 'lora_renk: 8\n'))
def test_setting_of_other_libraries(refuse): assert 'method=qlora' in refuse('--data', 'good.csv', '--set', 'load_in_4bit=true')
def test_unknown_target_module(refuse): assert 'q_proj' in refuse('--data', 'good.csv', '--set', 'target_modules=[q_prj]')


def model_folder(here, leave_out):
    shutil.copytree(embedded_model(), here / 'model', ignore=shutil.ignore_patterns(*leave_out))
    return 'model'


def test_model_without_weights(refuse, here): assert 'no weights' in refuse('--data', 'good.csv', '--model', model_folder(here, ['*.safetensors']))
def test_model_without_config(refuse, here): assert 'config.json' in refuse('--data', 'good.csv', '--model', model_folder(here, ['config.json']))
def test_model_without_tokenizer(refuse, here): assert 'tokenizer' in refuse('--data', 'good.csv', '--model', model_folder(here, ['tokenizer*']))
def test_model_without_template(refuse, here): assert 'chat_template=' in refuse('--data', 'good.csv', '--model', model_folder(here, ['*.jinja']))
def test_model_missing(refuse): assert './no-model' in refuse('--data', 'good.csv', '--model', './no-model')


def test_no_disk_space(refuse, monkeypatch):
    monkeypatch.setattr(hardware.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    assert 'space' in refuse('--data', 'good.csv').lower()


def test_no_permission(refuse, here):
    write(here, 'a_file', 'x')
    assert 'a_file' in refuse('--data', 'good.csv', '--runs-dir', 'a_file/runs')


def test_run_name_taken(refuse, here):
    (here / 'runs' / 'taken').mkdir(parents=True)
    (here / 'runs' / 'taken' / 'mine.txt').write_text('precious')
    assert '--resume' in refuse('--data', 'good.csv', '--name', 'taken')
    assert (here / 'runs' / 'taken' / 'mine.txt').read_text() == 'precious'


def test_resume_of_nothing(refuse): refuse('--resume', 'nothing')


def test_debug_shows_the_traceback(here, capsys):
    assert main(['run', '--data', 'nowhere.csv', '--debug']) == 2
    assert 'Traceback' in capsys.readouterr().err


@pytest.mark.parametrize('command', ['quickstart', 'run', 'plan', 'data', 'train', 'eval', 'merge', 'chat', 'models', 'control'])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as e: make_parser().parse_args([command, '--help'])
    assert e.value.code == 0 and len(capsys.readouterr().out) > 100


def test_other_rooms_refuse_an_unknown_run(here, capsys):
    for command in ('eval', 'merge', 'control'):
        assert main([command, 'nothing']) == 2
        assert 'next step' in capsys.readouterr().err


def test_plan_needs_no_data_and_data_writes_nothing(here, capsys):
    assert main(['plan', '--model', 'Llama-3.2-1B', '--gib', '40', '--set', 'method=qlora']) == 0
    assert main(['data', '--data', 'good.csv']) == 0
    assert 'delivery' in capsys.readouterr().out
    assert [p.name for p in here.iterdir()] == ['good.csv']


@pytest.fixture
def nobodys_cards(monkeypatch, tmp_path):
    "No card, and no file of cards of one's own."
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    monkeypatch.delenv('HOMELAB_FT_GPUS', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))


@pytest.mark.parametrize('card, code', [(['--gpu', 'RTX 4090'], 0), (['--gpu', 'nvidia h200'], 0), (['--gpu', 't4'], 3), (['--gib', '24'], 0), (['--gib', '4'], 3)])
def test_plan_tells_by_its_exit_code_whether_it_fits(nobodys_cards, capsys, card, code):
    plan = ['plan', '--model', 'Llama-3.1-8B', '--set', 'max_length=256', '--set', 'method=lora', *card]   # 15 GiB of weights
    assert main(plan) == code
    assert ('Fits' in capsys.readouterr().out) == (code == 0)
    assert main([*plan, '--json']) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer['fits'] == (code == 0) and answer['peak_bytes'] == sum(answer['parts'].values()) and answer['peak_phase'] in answer['phases']


def test_plan_chooses_what_nobody_set(nobodys_cards, capsys):
    plan = ['plan', '--model', 'Llama-3.1-8B', '--set', 'max_length=2048', '--json', '--gib']
    chosen = lambda *more: (main([*plan, *more]), json.loads(capsys.readouterr().out))
    assert [(code, found['method']) for code, found in (chosen('24'), chosen('12'))] == [(0, 'lora'), (0, 'qlora')]
    code, found = chosen('12', '--set', 'method=lora', '--set', 'per_device_train_batch_size=3')
    assert (code, found['method'], found['batch_size'], found['gradient_accumulation_steps']) == (3, 'lora', 3, 1)
    main([*plan[:-2], '--gib', '24'])
    out = capsys.readouterr().out
    assert 'settings       lora' in out and 'chosen         method' in out


def test_plan_takes_what_a_program_gets(nobodys_cards, capsys):
    main(['plan', '--gpu', '4090', '--json'])
    assert json.loads(capsys.readouterr().out)['limit_bytes'] == 24081 * 2**20


@pytest.mark.parametrize('wrong, said', [(['--gpu', 'RTX 4900'], 'rtx-4090'), (['--gpu', '3080'], 'rtx-3080-10gb'), (['--gpu', ''], 'next step'), (['--gib', '0'], '--gib'),
                                         (['--gib', '-3'], '--gib'), (['--gib', 'nan'], '--gib')])
def test_plan_for_no_card(nobodys_cards, capsys, wrong, said):
    assert main(['plan', *wrong]) == 2
    out, err = capsys.readouterr()
    assert out == '' and said in err and 'Traceback' not in err


@pytest.mark.parametrize('both', [['--gpu', '4090', '--gib', '24'], ['--json', '--pilot']])
def test_plan_refuses_two_answers(both, capsys):
    with pytest.raises(SystemExit) as e: main(['plan', *both])
    assert e.value.code == 2 and 'not allowed' in capsys.readouterr().err


def test_plan_on_a_card_shows_what_it_does_now(monkeypatch, capsys):
    from types import SimpleNamespace
    nvml = SimpleNamespace(NVMLError=RuntimeError, nvmlMemory_v2=1, nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda i: 'card', nvmlDeviceGetName=lambda c: 'Card',
                           nvmlSystemGetDriverVersion=lambda: '1', nvmlDeviceGetTemperature=lambda c, sensor: 81,
                           nvmlDeviceGetMemoryInfo=lambda c, version=None: SimpleNamespace(total=16376 * 2**20, free=2**30, reserved=434 * 2**20))
    monkeypatch.setitem(sys.modules, 'pynvml', nvml)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert main(['plan', '--verbose']) == 0
    assert '81 °C' in capsys.readouterr().out
    assert main(['plan']) == 0
    assert '81 °C' not in capsys.readouterr().out
    main(['plan', '--json'])
    answer = json.loads(capsys.readouterr().out)
    assert answer['gpu'] == 'Card' and answer['limit_bytes'] == 15942 * 2**20


def test_plan_names_settings_that_fit(here, capsys):
    asked = ['plan', '--fit', '--gpu', '4090', '--model', 'Llama-3.1-8B', '--set', 'max_length=2048', '--set', 'optim=adamw_8bit']
    assert main([*asked, '--set', 'method=qlora']) == 0
    out = capsys.readouterr().out
    assert 'qlora' in out and 'adamw_8bit' in out and 'adamw_torch' not in out and not any(line.startswith('lora') for line in out.splitlines())
    assert main([*asked[:2], '--gib', '3', *asked[4:]]) == 3 and 'Nothing fits' in capsys.readouterr().out
    assert main([*asked, '--set', 'target_modules=q_porj']) == 2 and 'q_proj' in capsys.readouterr().err


def test_a_probe_needs_a_card(here, capfd):
    torch = pytest.importorskip('torch')
    if torch.cuda.is_available(): pytest.skip('there is a card')
    assert main(['plan', '--probe', '--model', 'SmolLM2-135M']) == 2
    assert 'to probe' in capfd.readouterr().err


def test_a_full_card_is_the_persons_to_mend(monkeypatch, capsys):
    torch = pytest.importorskip('torch')
    from homelab_ft import cli_data

    def full(*_):
        "As PyTorch says it."
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.')

    monkeypatch.setattr(cli_data, 'read_settings', full)
    assert main(['data', '--data', 'x.csv']) == 2
    said = capsys.readouterr().err
    assert 'the GPU is out of memory' in said and 'next step' in said and '--debug' not in said


def test_no_command_shows_the_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith('usage: homelab-ft') and 'quickstart' in out


@pytest.mark.parametrize('argv, said', [(['quikstart'], 'did you mean quickstart?'), (['run', '--max-lenght', '64'], 'did you mean --max-length?'),
                                        (['run', '--lora-alpha', '8'], '--set lora_alpha=8'), (['run', '--load-in-4bit'], 'method=qlora'),
                                        (['eval'], 'homelab-ft eval --help'), (['settings', 'lerning_rate'], 'did you mean learning_rate?')])
def test_a_typo_names_what_was_meant(argv, said, capsys):
    try: code = main(argv)
    except SystemExit as e: code = e.code
    assert code == 2 and said in capsys.readouterr().err


def test_an_option_beats_set_which_beats_the_file(here, capsys):
    from homelab_ft.cli import read_settings
    write(here, 'c.yaml', 'seed: 1\nlora_r: 2\nmax_length: 99\nruns_dir: elsewhere')
    config = read_settings(make_parser().parse_args(['run', '--config', 'c.yaml', '--set', 'lora_r=4', '--set', 'seed=3', '--seed', '5']))
    assert (config.seed, config.lora_r, config.max_length, config.runs_dir) == (5, 4, 99, 'elsewhere')
    assert 'the option counts, not --set seed=3' in capsys.readouterr().err


def test_init_writes_settings_that_run_reads(here, capsys):
    from homelab_ft.config import load_config
    assert main(['init', '--data', 'good.csv', '--epochs', '2']) == 0
    assert load_config('homelab-ft.yaml') == load_config(data='good.csv', num_train_epochs=2)
    assert main(['init']) == 2 and 'nothing is overwritten' in capsys.readouterr().err


def test_output_into_head_is_quiet():
    command = [sys.executable, '-c', "from homelab_ft.cli import main; raise SystemExit(main(['settings']))"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()      # as `head` does when it has seen enough
    assert process.stderr.read() == b'' and process.wait() == 141


def test_a_name_of_the_catalogue_says_where_to_get_it(here, capsys):
    for argv in (['run', '--data', 'good.csv', '--model', 'Llama-3.2-1B'], ['data', '--data', 'good.csv', '--model', 'llama-3.2-1b'], ['chat', 'Llama-3.2-1B']):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert 'hf download meta-llama/Llama-3.2-1B-Instruct' in said and 'hf auth login' in said


def test_without_a_network_nothing_waits(here, capsys, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setenv('HF_ENDPOINT', 'http://localhost:9')      # where nobody listens
    monkeypatch.setattr('time.sleep', lambda seconds: pytest.fail('something waits for a network'))
    assert main(['data', '--data', 'good.csv', '--model', 'owner/model']) == 2
    said = ' '.join(capsys.readouterr().err.split())
    assert 'cannot be reached' in said and 'hf download owner/model' in said


def test_every_model_of_the_catalogue_has_an_address():
    from homelab_ft.core import hub_id
    from homelab_ft.plan.model_catalog import CATALOG
    assert [name for name in CATALOG if not hub_id(name) and not name.endswith('-text')] == []


def test_a_hub_model_is_downloaded_before_any_work(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants
    from homelab_ft import core, pipeline
    from homelab_ft.core import ModelError
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(core, 'hub_reachable', lambda: True)
    asked, said = [], []
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda model, **options: asked.append(model))
    pipeline.download_model('owner/model', said.append)
    pipeline.download_model('embedded', said.append)
    assert asked == ['owner/model'] and len(said) == 1 and 'owner/model' in said[0]

    def gated(model, **options): raise OSError('403 Client Error: access is restricted')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', gated)
    with pytest.raises(ModelError, match='hf auth login'): pipeline.download_model('meta-llama/Llama-3.2-1B-Instruct', said.append)
