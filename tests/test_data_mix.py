"data.mix, and several sources through config, prepare, evaluation and command line: shares, seeds, no row in two places, one source as before."
import json, random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.cli import main
from homelab_ft.config import DataSource, dump_config, load_config, make_config, sources_of
from homelab_ft.core import ConfigError, DataError
from homelab_ft.data.chat_template import load_tokenizer
from homelab_ft.data.mix import draw_rows, source_of_row, target_tokens
from homelab_ft.data.prepare import input_fingerprint, load_prepared, prepare
from homelab_ft.evaluate.compare import SourceResult, load_evaluation
from homelab_ft.train.run_folder import RunFolder, create_run

WORDS = 'apple river stone cloud winter engine paper violin garden copper lantern meadow orbit pepper quartz saddle thunder'.split()
TOK = load_tokenizer('embedded')


def words(rng, n=7): return ' '.join(rng.sample(WORDS, n))


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return str(path)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A file of questions and answers, and a longer one of conversations."
    folder, rng = tmp_path_factory.mktemp('sources'), random.Random(0)
    pairs = [dict(frage=f'{words(rng)} a{i}', antwort=words(rng)) for i in range(100)]
    chats = [dict(messages=[dict(role='user', content=f'{words(rng)} b{i}'), dict(role='assistant', content=words(rng) * 3)]) for i in range(200)]
    return write(folder / 'new.jsonl', pairs), write(folder / 'old.jsonl', chats)


# ---------------------------------------------------------------- shares


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.floats(0.01, 5), st.integers(0, 10))
@settings(max_examples=80, deadline=None)
def test_drawn_rows_meet_the_target(lengths, times, seed):
    "Within half of the longest row; every row as often as any other, or once more; the same seed draws the same."
    lengths = np.array(lengths)
    target = times * lengths.sum()
    drawn = draw_rows(lengths, target, seed)
    assert len(drawn) and list(drawn) == list(draw_rows(lengths, target, seed))
    counts = np.bincount(drawn, minlength=len(lengths))
    assert counts.max() - counts.min() <= 1
    assert abs(lengths[drawn].sum() - target) <= max(lengths.max(), lengths.min())


@pytest.mark.parametrize('weights', [(3, 1), (0.1, 0.9)])
def test_a_source_has_its_share_of_the_tokens(files, tmp_path, weights):
    config = make_config(data=[dict(path=path, weight=weight) for path, weight in zip(files, weights)])
    prepared = prepare(config, TOK, tmp_path / 'p')
    tokens = {}
    for row, n in zip(prepared.train.rows.tolist(), prepared.train.lengths.tolist()):
        name = source_of_row(row, prepared.sources)
        tokens[name] = tokens.get(name, 0) + n
    assert tokens['new'] / sum(tokens.values()) == pytest.approx(weights[0] / sum(weights), abs=0.01)
    first = [row for row in prepared.train.rows.tolist() if row <= 100]
    assert len(first) == len(set(first))                       # the first source: each row once
    again = prepare(config, TOK, tmp_path / 'again')
    assert again.train.fingerprint == prepared.train.fingerprint
    assert prepare(config.model_copy(update=dict(seed=1)), TOK, tmp_path / 'other').train.fingerprint != prepared.train.fingerprint


def test_without_weights_every_row_is_read_once(files, tmp_path):
    prepared = prepare(make_config(data=list(files)), TOK, tmp_path / 'p')
    rows = sorted(np.concatenate([prepared.train.rows, prepared.validation.rows, prepared.test.rows]).tolist())
    assert rows == list(range(1, 301))
    table = {row[0]: row for row in prepared.report[0].rows}
    assert table['new'][5] == table['old'][5] == 'each row once'
    assert table['new'][2] + table['old'][2] == len(prepared.train)


def test_a_source_that_is_repeated_too_often_is_named(files, tmp_path):
    config = make_config(data=[dict(path=files[1], weight=1), dict(path=files[0], weight=20)])
    assert any('worth little' in str(cell) for row in prepare(config, TOK, tmp_path / 'p').report[0].rows for cell in row)


# ---------------------------------------------------------------- one source, many settings


def test_one_source_in_a_list_is_as_before(files, tmp_path):
    plain = make_config(data=files[0])
    listed = make_config(data=[files[0]])
    with_settings = make_config(data=[dict(path=files[0], prompt_column='frage', completion_column='antwort')])
    named = make_config(data=files[0], prompt_column='frage', completion_column='antwort')
    assert listed == plain and input_fingerprint(with_settings, TOK) == input_fingerprint(named, TOK)
    results = [prepare(config, TOK, tmp_path / str(i)) for i, config in enumerate((plain, listed, with_settings))]
    assert len({prepared.train.fingerprint for prepared in results}) == 1 and not results[2].sources


def test_fingerprints_of_older_runs_hold(tmp_path):
    "The fingerprint of a file with today's default settings, as it was before sources existed."
    path = write(tmp_path / 'a.jsonl', [dict(prompt=f'What is {i}?', completion=f'It is {i}.') for i in range(20)])
    assert input_fingerprint(make_config(data=path), TOK) == '2d6a3d863879cb2d37b9628fcb61b89117c561dc13db5b1e77540dc64e331c99'


def test_whatever_changes_the_mixture_changes_the_fingerprint(files):
    weights = lambda a, b: make_config(data=[dict(path=files[0], weight=a), dict(path=files[1], weight=b)])
    configs = [weights(1, 1), weights(1, 2), make_config(data=list(files)), make_config(data=list(files[::-1])),
               make_config(data=[files[0], dict(path=files[1], max_rows=50)])]
    assert len({input_fingerprint(config, TOK) for config in configs}) == len(configs)


def test_settings_of_a_source_do_not_reach_the_others(files):
    config = make_config(system_prompt='Be brief.', prompt_column='frage', data=[files[0], dict(path=files[1], messages_column='messages')])
    (_, first), (_, second) = sources_of(config)
    assert first.prompt_column == 'frage' and second.prompt_column is None and second.messages_column == 'messages'
    assert first.system_prompt == second.system_prompt == 'Be brief.'


def test_yaml_gives_the_same_settings_back(files, tmp_path):
    config = make_config(data=[dict(path=files[0], weight=2, name='tickets'), dict(path=files[1], weight=1, max_rows=50)],
                         replay=dict(run='runs/old', share=0.4))
    (tmp_path / 'c.yaml').write_text(dump_config(config))
    assert load_config(tmp_path / 'c.yaml') == config and [s.name for s in config.data] == ['tickets', 'old']


@pytest.mark.parametrize('data, says', [
    ([dict(weight=1)], 'no path'),
    ([dict(path='a.csv', wieght=1), 'b.csv'], 'weight'),
    ([dict(path='a.csv', weight=0), 'b.csv'], 'above 0'),
    ([dict(path='a.csv', weight='much'), 'b.csv'], 'above 0'),
    ([dict(path='a.csv', weight=1), 'b.csv'], 'none'),
    ([dict(path='a.csv', learning_rate=1e-4), 'b.csv'], 'learning_rate'),
    ([dict(path='a.csv', dataset_format='poem'), 'b.csv'], 'poem'),
    ([dict(path='a.csv', name='x'), dict(path='b.csv', name='x')], 'same name'),
    ([5], 'no path'),
    (7, 'data'),
])
def test_a_wrong_source_is_refused(data, says):
    with pytest.raises(ConfigError, match=says): make_config(data=data)


def test_two_files_of_one_name_get_two_names():
    assert [s.name for s in make_config(data=['a/x.csv', 'b/x.csv']).data] == ['x-1', 'x-2']


# ---------------------------------------------------------------- no row in two places


def test_what_one_source_holds_out_leaves_the_others(files, tmp_path):
    "A source that repeats the held-out questions of another, with a word changed."
    alone = prepare(make_config(data=files[0]), TOK, tmp_path / 'alone')
    rows = [json.loads(line) for line in open(files[0])]
    held = [rows[row - 1] for row in [*alone.test.rows, *alone.validation.rows]]
    rng = random.Random(3)
    leak = [dict(prompt=row['frage'] + ' please', completion='x ' + words(rng)) for row in held]
    leak += [dict(prompt=f'{words(rng)} c{i}', completion=words(rng)) for i in range(60)]
    prepared = prepare(make_config(data=[files[0], write(tmp_path / 'leak.jsonl', leak)]), TOK, tmp_path / 'both')
    trained = {row - 100 for row in prepared.train.rows.tolist() if row > 100}
    assert not trained & set(range(1, len(held) + 1))
    assert any('held out by another' in row[0] for row in prepared.report[0].rows)


def test_the_test_file_belongs_to_no_source(files, tmp_path):
    rng = random.Random(5)
    first = json.loads(open(files[0]).readline())
    test = [first] + [dict(frage=f'{words(rng)} t{i}', antwort=words(rng)) for i in range(19)]
    config = make_config(data=list(files), test_data=write(tmp_path / 'test.jsonl', test))
    prepared = prepare(config, TOK, tmp_path / 'p')
    assert len(prepared.test) == 20 and len(prepared.test_examples) == 20
    assert {source_of_row(row, prepared.sources) for row in prepared.test.rows.tolist()} == {'test_data'}
    assert 1 not in prepared.train.rows.tolist() + prepared.validation.rows.tolist()
    assert [e.row for e in prepared.test_examples] == prepared.test.rows.tolist()


def test_reading_back_and_the_error_of_a_source(files, tmp_path):
    prepared = prepare(make_config(data=list(files)), TOK, tmp_path / 'p')
    back = load_prepared(tmp_path / 'p')
    assert back.sources == prepared.sources and back.test_examples == prepared.test_examples
    broken = write(tmp_path / 'broken.jsonl', [dict(foo=1, bar=2)] * 30)
    with pytest.raises(DataError, match='broken'): prepare(make_config(data=[files[0], broken]), TOK, tmp_path / 'q')


# ---------------------------------------------------------------- replay


@pytest.fixture
def old_run(files, tmp_path):
    "A run folder with prepared rows."
    config = make_config(data=files[1], run_name='old', runs_dir=str(tmp_path / 'runs'))
    run = create_run(config)
    prepare(config, TOK, run.data_path)
    return run


@pytest.mark.parametrize('share', [0.1, 0.8])
def test_replayed_rows_have_their_share(files, tmp_path, old_run, share):
    config = make_config(data=files[0], replay=dict(run=str(old_run.path), share=share))
    prepared, old = prepare(config, TOK, tmp_path / 'p'), load_prepared(old_run.data_path)
    replayed = prepared.train.rows > 100
    assert prepared.train.lengths[replayed].sum() / prepared.train.lengths.sum() == pytest.approx(share, abs=0.01)
    sequences = {old.train.row(i)[0].tobytes() for i in range(len(old.train))}
    assert all(prepared.train.row(i)[0].tobytes() in sequences for i in np.flatnonzero(replayed))
    assert (prepared.test.rows > 100).sum() == len(old.test)            # what was forgotten can be seen
    assert (prepared.train.rows <= 100).sum() == prepare(make_config(data=files[0]), TOK, tmp_path / 'alone').rows['train']


def test_a_replay_needs_rows_and_the_same_tokenizer(files, tmp_path, old_run):
    with pytest.raises(DataError, match='no prepared rows'): prepare(make_config(data=files[0], replay='runs/none'), TOK, tmp_path / 'p')
    template = tmp_path / 'other.jinja'
    template.write_text(TOK.get_chat_template() + '{# another #}')
    config = make_config(data=files[0], replay=str(old_run.path), chat_template=str(template))
    with pytest.raises(DataError, match='another tokenizer'): prepare(config, load_tokenizer('embedded', str(template)), tmp_path / 'q')
    long = make_config(data=files[0], replay=str(old_run.path), max_length=64, overlong_rows='error')
    longest = int(load_prepared(old_run.data_path).train.lengths.max())
    assert longest > 64
    with pytest.raises(DataError, match='longer than max_length'): prepare(long, TOK, tmp_path / 'r')
    cut = prepare(long.model_copy(update=dict(overlong_rows='truncate')), TOK, tmp_path / 's')
    assert cut.train.lengths.max() <= 64


def test_the_evaluation_shows_every_source(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ['--max-steps', '2', '--set', 'eval_max_rows=24', '--set', 'generate_max_rows=8', '--set', 'n_bootstrap=100', '--set', 'max_new_tokens=4']
    assert main(['run', '--data', files[0], '--data', files[1], '--name', 'both', *small]) == 0
    printed = capsys.readouterr().out
    assert 'By source' in printed and 'source    new' in printed
    evaluation = load_evaluation(RunFolder('runs/both'))
    assert [type(result) for result in evaluation.by_source] == [SourceResult] * 2
    assert sum(result.metric.n_examples for result in evaluation.by_source) in (8, 24)
    entry = json.loads((tmp_path / 'runs/both/entry.json').read_text())
    assert entry['data']['name'] == 'new.jsonl, old.jsonl'


def test_a_source_can_be_an_object():
    assert DataSource(path='a.csv', name='a') in make_config(data=[DataSource(path='a.csv', name='a'), 'b.csv']).data
    assert target_tokens([10, 20], [1, 1]) == [10, 10]
