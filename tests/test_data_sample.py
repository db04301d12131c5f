"data.sample.tickets: the same tickets everywhere, noise where `injected_noise` says, clean test tickets with words of their own."
import csv, hashlib, os, subprocess, sys
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from homelab_ft.core import DataError
from homelab_ft.data.sample.tickets import TEAMS, injected_noise, load_wording, make_test_tickets, make_tickets, write_tickets
from homelab_ft.io import fingerprint


def test_the_tickets_are_these():
    "A change of wording or of the generator changes the sample task: results measured on it must then be measured again."
    assert fingerprint(make_tickets())[:16] == '6d14ceb845abec43'
    assert fingerprint(make_test_tickets())[:16] == 'a397a3eca3657046'


def test_the_files_are_these(tmp_path):
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in write_tickets(tmp_path)]
    assert [d[:16] for d in digests] == ['53e1bfaee51af509', 'dc0d004f3039604c']


def test_hash_seed_does_not_matter():
    code = 'from homelab_ft.data.sample.tickets import make_tickets; from homelab_ft.io import fingerprint; print(fingerprint(make_tickets(100)))'
    runs = [subprocess.run([sys.executable, '-c', code], env=os.environ | {'PYTHONHASHSEED': s}, capture_output=True, text=True, check=True) for s in '12']
    assert runs[0].stdout == runs[1].stdout != ''


def test_global_random_state_is_left_alone():
    import random
    random.seed(3)
    before = random.getstate()
    make_tickets(50)
    assert random.getstate() == before


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_any_size(n, seed):
    rows = make_tickets(n, seed)
    assert len(rows) == n
    assert all(list(r) == ['subject', 'body', 'team'] and (r['team'] in TEAMS or r['team'] == '') for r in rows)
    assert not any('{' in r['subject'] + r['body'] or '[' in r['subject'] + r['body'] for r in rows)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_noise_is_where_injected_noise_says(seed):
    rows, noise = make_tickets(600, seed), injected_noise(600, seed)
    at = lambda kind: [rows[i - 1] for i in noise[kind]]
    texts = Counter((r['subject'], r['body'], r['team']) for r in rows if r['team'] and r['body'].strip())
    assert sum(k - 1 for k in texts.values()) == len(noise['duplicate']) == 15
    assert all('<' in r['body'] or '&nbsp;' in r['body'] for r in at('html')) and len(noise['html']) == 24
    assert all('â€™' in r['body'] for r in at('mojibake')) and len(noise['mojibake']) == 18
    assert all(not r['team'] or not (r['subject'] + r['body']).strip() for r in at('blank')) and len(noise['blank']) == 9
    assert all(len(r['body'].split()) > 300 for r in at('overlong')) and len(noise['overlong']) == 3
    conflicts = Counter((r['subject'], r['body']) for r in at('conflict'))
    assert list(conflicts.values()) == [2] * 6
    numbers = sum(noise.values(), [])
    assert len(numbers) == len(set(numbers))


def test_test_set_is_clean_and_disjoint():
    train, test = make_tickets(), make_test_tickets()
    text = ' '.join(r['body'] for r in test)
    assert '<' not in text and '&' not in text and 'â€' not in text
    assert not {r['body'] for r in train} & {r['body'] for r in test}
    assert len({r['body'] for r in test}) == 200
    assert all(r['subject'].strip() and r['body'].strip() for r in test)
    seen = ' '.join(r['subject'] + r['body'] for r in train)
    assert not any(name in seen for names in (load_wording()['entities'][kind]['test'] for kind in ('city', 'name')) for name in names)


def test_no_team_is_rare():
    for rows in (make_tickets(), make_test_tickets()):
        count = Counter(r['team'] for r in rows if r['team'])
        assert min(count.values()) > 0.05 * len(rows)


def test_lengths_in_tokens():
    transformers = pytest.importorskip('transformers')
    from homelab_ft.core import embedded_model
    if not (embedded_model() / 'tokenizer.json').exists(): pytest.skip('the embedded tokenizer is not built')
    tok = transformers.AutoTokenizer.from_pretrained(embedded_model())
    rows, noise = make_tickets(), injected_noise()
    lengths = [len(ids) for ids in tok([f"{r['subject']}\n{r['body']}" for r in rows])['input_ids']]
    assert all(lengths[i - 1] > 400 for i in noise['overlong'])
    short = [n for i, n in enumerate(lengths, 1) if i not in noise['overlong']]
    assert max(short) < 200 and sum(short) / len(short) < 90


def test_files_read_back(tmp_path):
    paths = write_tickets(tmp_path / 'new' / 'folder')
    for path, rows in zip(paths, (make_tickets(), make_test_tickets())):
        with open(path, newline='', encoding='utf-8') as f: assert list(csv.DictReader(f)) == rows
    assert sorted(p.name for p in (tmp_path / 'new' / 'folder').iterdir()) == ['tickets.csv', 'tickets_test.csv']


def test_an_existing_file_stays(tmp_path):
    (tmp_path / 'tickets_test.csv').write_text('mine')
    with pytest.raises(DataError, match='other content'): write_tickets(tmp_path)
    assert (tmp_path / 'tickets_test.csv').read_text() == 'mine'


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError): write_tickets(tmp_path)
    assert list(tmp_path.iterdir()) == []
