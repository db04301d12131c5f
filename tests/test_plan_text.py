"What `homelab-ft plan` prints: the answer first, 80 columns, commands that fit, data that are counted."
import json
import shlex
import sys

import pytest

from homelab_ft.api import full_plan, plan
from homelab_ft.cli import main
from homelab_ft.config import make_config
from homelab_ft.core import GiB
from homelab_ft.hardware.gpu_catalog import find_gpu
from homelab_ft.plan.cost import DataSize, estimate_data, measure_data, run_cost
from homelab_ft.plan.search import plan_target
from homelab_ft.plan.summary import plan_json, plan_text

LLAMA = ['--model', 'Llama-3.1-8B']
CASES = [
    [*LLAMA, '--gpu', '4090'], [*LLAMA, '--gpu', 'rtx-3060-12gb', '--set', 'method=lora', '--set', 'max_length=4096'], ['--model', 'Llama-3.1-70B', '--gib', '24'], ['--gib', '8'],
    [*LLAMA, '--gpu', 'h200', '--set', 'method=full'], [*LLAMA, '--gib', '24', '--set', 'per_device_train_batch_size=64', '--set', 'objective=dpo'], [],
]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    "No GPU here, an empty working folder, and a terminal that says nothing of its width."
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    monkeypatch.delenv('COLUMNS', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def questions(tmp_path):
    "A small file with short questions and answers, one of them long."
    rows = [dict(prompt=f'What is {i} plus {i}, please?', completion=f'It is {2 * i}.') for i in range(59)]
    rows.append(dict(prompt='And all of it, please? ' * 8, completion='Much more than a person would like to say here.'))
    (tmp_path / 'questions.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return 'questions.jsonl'


def printed(capsys, *argv):
    "(exit code, what a command prints)."
    code = main(['plan', *argv])
    return code, capsys.readouterr().out


@pytest.mark.parametrize('verbose', [[], ['--verbose']], ids=['short', 'verbose'])
@pytest.mark.parametrize('case', CASES, ids=' '.join)
def test_the_answer_comes_first_and_everything_fits_80_columns(capsys, case, verbose):
    code, text = printed(capsys, *case, *verbose)
    lines = text.splitlines()
    assert lines[0].startswith('Fits: peak ' if code == 0 else 'Does not fit: peak ') and ' GiB' in lines[0]
    assert [line for line in lines if len(line) > 80] == []
    assert ('GPU memory' in text or 'bandwidth' in text) <= bool(verbose)


@pytest.mark.parametrize('case', [case for case in CASES if '64' in ' '.join(case) or '70B' in ' '.join(case) or '3060' in case], ids=' '.join)
def test_every_command_that_would_fit_does(capsys, case):
    code, text = printed(capsys, *case)
    commands = text.replace(' \\\n', ' ').split('would fit:')[1].splitlines()
    commands = [shlex.split(line) for line in commands if 'homelab-ft' in line]
    assert code == 3 and 1 <= len(commands) <= 3
    for command in commands:
        assert command[0] == 'homelab-ft' and main(command[1:]) == 0
        assert capsys.readouterr().out.startswith('Fits')


def test_settings_from_a_file_stay_in_the_file(capsys, tmp_path):
    (tmp_path / 'run.yaml').write_text('method: lora\nper_device_train_batch_size: 8\nlora_r: 32\n')
    code, text = printed(capsys, *LLAMA, '--config', 'run.yaml', '--gib', '24', '--set', 'max_length=4096')
    command = shlex.split(text.replace(' \\\n', ' ').split('would fit:')[1].split('\n\n')[1].splitlines()[-1])
    assert code == 3 and command[2:4] == ['--config', 'run.yaml'] and not any('lora_r' in piece for piece in command)
    assert main(command[1:]) == 0


def test_only_what_was_chosen_is_named(capsys):
    def chosen(*more):
        "The names in the line about what was chosen."
        lines = printed(capsys, *LLAMA, '--gpu', '4090', *more)[1].splitlines()
        return next((line.split(':')[0].split()[1:] for line in lines if line.startswith('chosen')), [])
    assert chosen() == ['method,', 'optimizer,', 'batch']
    assert chosen('--set', 'method=qlora') == ['optimizer,', 'batch']
    assert chosen('--set', 'method=qlora', '--set', 'optim=adamw_8bit', '--set', 'per_device_train_batch_size=2') == []
    verbose = printed(capsys, *LLAMA, '--gpu', 'rtx-3060-12gb', '--set', 'method=qlora', '--verbose')[1]
    assert 'not all weights' not in verbose and 'micro-batches' in verbose


def test_the_data_are_counted(capsys, questions):
    code, text = printed(capsys, '--data', questions, '--gib', '8')
    size = measure_data(make_config(data=questions))
    assert code == 0 and f'{size.rows:,} rows × {size.mean:,.0f} tokens' in text and f'all rows of {size.longest} tokens' in text
    assert 0 < size.label_share < 1 and size.longest < 512
    about = json.loads(printed(capsys, '--data', questions, '--gib', '8', '--json')[1])
    assert about['data'] == dict(rows=size.rows, tokens=size.tokens, longest=size.longest, label_share=size.label_share, counted=True)
    assert about['parameters'] == dict(total=5_180_672, trainable=430_080) and about['cost']['hours'] is None
    without = json.loads(printed(capsys, '--gib', '8', '--json')[1])
    assert about['peak_bytes'] < without['peak_bytes'] and without['data'] is without['cost'] is None


def test_data_of_a_model_that_is_not_here_are_estimated(capsys, questions):
    code, text = printed(capsys, *LLAMA, '--data', questions, '--gpu', '4090')
    first, *rest = text.splitlines()
    assert code == 0 and ' s (' in first and 'kWh' in first and 'EUR' in first and len(first) <= 80
    assert 'there is no tokenizer of this model here' in text and 'projected from NVIDIA H200' in text
    about = json.loads(printed(capsys, *LLAMA, '--data', questions, '--gpu', '4090', '--json')[1])
    assert about['cost']['hours_low'] < about['cost']['hours'] < about['cost']['hours_high'] and about['data']['counted'] is False
    counted, guessed = measure_data(make_config(data=questions)), estimate_data(make_config(data=questions))
    assert guessed.rows == counted.rows and 0.4 < guessed.tokens / counted.tokens < 2.5


def test_data_that_a_run_would_refuse_are_refused(capsys, tmp_path):
    (tmp_path / 'empty.csv').write_text('')
    assert main(['plan', '--data', 'empty.csv']) == 2 and 'empty' in capsys.readouterr().err
    assert main(['plan', '--data', 'no.csv']) == 2 and 'no such file' in capsys.readouterr().err


@pytest.mark.parametrize('model', [(), LLAMA], ids=['counted', 'estimated'])
def test_data_of_near_duplicates_are_planned_as_a_run_would_divide_them(capsys, tmp_path, model):
    asked = ['Wo ist mein Paket {}?', 'Wie ändere ich mein Passwort, Konto {}?', 'Warum wurde zweimal abgebucht, Rechnung {}?', 'Wann öffnet der Laden {}?']
    answers = ['Es liegt im Lager {}.', 'Unter Konto, dann Sicherheit, Nummer {}.', 'Wir erstatten Rechnung {}.', 'Um neun Uhr, Laden {}.']
    rows = [dict(prompt=asked[i % 4].format(i), completion=answers[i % 4].format(i)) for i in range(240)]
    path = tmp_path / 'near.jsonl'
    path.write_text('\n'.join(map(json.dumps, rows)))
    options = ['plan', *model, '--gib', '24', '--data', str(path)]
    assert main(options) == 2
    assert '--set near_duplicates=apart' in capsys.readouterr().err
    assert main([*options, '--set', 'near_duplicates=apart']) == 0
    assert ' rows × ' in capsys.readouterr().out


def test_total_and_free_ram_are_told_apart(capsys):
    code, text = printed(capsys)
    assert code == 0 and ' GiB RAM' in text.splitlines()[0]
    assert ' GiB now, of ' in text and 'GiB RAM that the plan counts on' in text
    target = plan_target()
    tight = full_plan(make_config(), type(target)(target.name, 24 * GiB, 'cpu', free=GiB // 2))
    assert tight.fits and 'close other programs first' in ' '.join(str(tight).split())


def test_python_and_the_command_line_say_the_same(capsys):
    planned = plan('Llama-3.1-8B', gpu='rtx-3060-12gb', method='lora', max_length=1024)
    assert str(planned) == printed(capsys, *LLAMA, '--gpu', 'rtx-3060-12gb', '--set', 'method=lora', '--set', 'max_length=1024')[1].rstrip('\n')
    page = planned._repr_html_()
    assert '<svg' in page and 'Does not fit' in page and 'homelab-ft plan --model' in page


def test_a_warning_has_its_place_and_is_escaped():
    planned = plan('Llama-3.1-8B', gib=24)
    planned.warnings.append('this <b>model</b> has no formula of its own, so the figures are those of one like it')
    lines = plan_text(planned).splitlines()
    assert any(line.startswith('Warning: this <b>') for line in lines[:6]) and max(map(len, lines)) <= 80
    assert '<b>model' not in planned._repr_html_() and json.loads(plan_json(planned))['warnings'] == planned.warnings


def test_hours_follow_the_tokens_and_say_what_they_are():
    import numpy as np
    planned = plan('Llama-3.1-8B', gpu='4090', method='qlora', per_device_train_batch_size=2)
    size = DataSize(np.full(1000, 100), np.full(1000, 20))
    twice = DataSize(np.full(2000, 100), np.full(2000, 20))
    def cost(size, gpu='4090', **changes):
        "Of the plan's settings with others."
        config = planned.config.model_copy(update=changes)
        return run_cost(config, planned.shape, planned.estimate, size, find_gpu(gpu))
    assert cost(twice).hours == pytest.approx(2 * cost(size).hours) == pytest.approx(cost(size, num_train_epochs=6).hours)
    assert cost(size, max_steps=10).hours == pytest.approx(cost(size).hours * 10 * 2 / 3000)
    assert cost(size, max_minutes=1).hours_high == pytest.approx(1 / 60)
    wide, narrow = cost(size), cost(size, 'h200')
    assert wide.hours_high / wide.hours_low == 4 and narrow.hours_high / narrow.hours_low < 1.4
    assert cost(size, method='full').hours is None and 'full was not measured' in cost(size, method='full').source
    assert cost(size, 't4').hours is None and cost(size, 't4').cost is None
