"The registry on runs that lack something."
import json
import pytest
from homelab_ft.core import RunError
from homelab_ft.config import make_config
from homelab_ft.deploy.registry import entries, models, register
from homelab_ft.io import write_atomic, write_json
from homelab_ft.train.run_folder import create_run, log_event

def make_run(folder, name, gain=None, ends=None, **settings):
    run = create_run(make_config(run_name=name, **settings), folder)
    write_atomic(run.adapter_path / 'adapter_model.safetensors', b'weights')
    log_event(run, 'finished', seconds=60., joules=3.6e6, energy_source='NVML total energy counter')
    if gain is not None:
        nll = dict(name='NLL per token', base=2., fine_tuned=2. - gain, gain=gain, low=gain - .1, high=gain + .1, n_examples=50)
        low, high = ends or (gain - .05, gain + .05)
        accuracy = dict(name='accuracy', base=.1, fine_tuned=.1 + gain, gain=gain, low=low, high=high, n_examples=50, percent=True)
        write_json(run.evaluation_path, {'metrics': [nll, accuracy], 'n_examples': 50, 'tokens': 100})
    return run

def test_better_comes_first_then_the_gain_and_the_unevaluated_last(tmp_path):
    for name, gain, ends in (('a', 0.1, None), ('b', None, None), ('c', 0.5, None), ('form', 0.7, (-.1, .9)), ('worse', -0.6, None)): register(make_run(tmp_path, name, gain, ends))
    table = models(tmp_path)
    assert [row[0].split('\n')[0] for row in table.rows] == ['c', 'a', 'form', 'worse', 'b']
    assert [row[4] for row in models(tmp_path, details=True).rows] == ['better', 'better', 'more likely answers', 'worse', 'not evaluated']
    assert [e['name'] for e in entries(tmp_path)] == ['a', 'b', 'c', 'form', 'worse']
    assert 'accuracy 10.0 -> 60.0 %' in str(table) and 'not evaluated' in str(table)
    assert all(len(line) <= 80 for line in str(table).splitlines())


def test_entries_and_evaluations_of_older_versions_are_read(tmp_path):
    run = make_run(tmp_path, 'a')
    old = dict(base=.1, tuned=.9, gain=.8, low=.7, high=.9, rows=5)
    write_json(run.evaluation_path, {'measures': [dict(name='accuracy', percent=True, **old)], 'rows': 5, 'tokens': 9})
    entry = register(run)
    assert entry['metrics']['accuracy']['fine_tuned'] == .9
    write_json(run.entry_path, {k: v for k, v in entry.items() if k != 'verdict'} | {'metrics': {'accuracy': old | {'percent': True}}})
    assert entries(tmp_path)[0]['verdict'] == 'better'
    assert '10.0 -> 90.0 %' in str(models(tmp_path)) and entries(tmp_path)[0]['metrics']['accuracy']['n_examples'] == 5

def test_counted_energy_says_so(tmp_path):
    energy = register(make_run(tmp_path, 'a', electricity_price=0.25))['energy']
    assert energy == dict(kwh=1.0, cost=0.25, currency='EUR', price_per_kwh=0.25, source='NVML total energy counter')

def test_no_path_of_this_machine_in_the_entry(tmp_path):
    (tmp_path / 'base').mkdir()
    entry = register(make_run(tmp_path, 'a', model=str(tmp_path / 'base'), data=str(tmp_path / 'secret' / 'tickets.csv'), runs_dir=str(tmp_path),
                              test_data=str(tmp_path / 'test.csv'), chat_template=str(tmp_path / 'mine.jinja')))
    assert str(tmp_path) not in json.dumps(entry)
    assert entry['data']['name'] == 'tickets.csv' and entry['base_model']['name'] == 'base'

def test_parity_is_shown(tmp_path):
    for name, passed in (('good', True), ('bad', False)):
        run = make_run(tmp_path, name, 0.1)
        write_json(run.path / 'parity.json', {'passed': passed})
        register(run)
    shown = {row[0]: row[-1] for row in models(tmp_path, details=True).rows}
    assert shown == {'good': 'passed', 'bad': 'FAILED'}

def test_registering_again_replaces_the_entry(tmp_path):
    run = make_run(tmp_path, 'a')
    register(run)
    write_json(run.path / 'parity.json', {'passed': True})
    assert register(run)['parity'] == {'passed': True} == entries(tmp_path)[0]['parity']

@pytest.mark.parametrize('missing', ['adapter', 'finished'])
def test_an_unfinished_run_is_refused(tmp_path, missing):
    run = make_run(tmp_path, 'a')
    if missing == 'adapter': (run.adapter_path / 'adapter_model.safetensors').unlink()
    else: run.events_path.write_text('')
    with pytest.raises(RunError, match='only a finished run'): register(run)
    assert not run.entry_path.exists()

def test_a_half_written_entry_does_not_hide_the_others(tmp_path):
    register(make_run(tmp_path, 'a'))
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'entry.json').write_text('{"name": ')
    assert [e['name'] for e in entries(tmp_path)] == ['a']
