"Sample answers on texts of every kind: they fit, they are shortened visibly, and nothing in them acts."
import re

from hypothesis import given, settings, strategies as st

from homelab_ft.evaluate.samples import N_SAMPLES, Sample, Samples, columns_of, draw_samples, one_line, wrap_text

texts = st.one_of(st.text(max_size=300), st.sampled_from(['<script>x</script>', '| a | b |', '\x1b[2J\x07', '返品' * 90, 'a' * 500, '\u202egnp.exe', '](http://x)', '**b** `c`', '']))


@settings(max_examples=80, deadline=None)
@given(texts, texts, texts, texts)
def test_any_text_fits_and_is_harmless(prompt, expected, base, fine_tuned):
    shown = Samples([Sample(7, prompt, expected, base, fine_tuned, worst=True)])
    text, page, markdown = str(shown), shown._repr_html_(), shown._repr_markdown_()
    assert all(columns_of(line) <= 80 for line in text.splitlines())
    assert not re.search('[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]', text)
    assert set(re.findall(r'<(/?[a-z]+)', page)) <= {'table', '/table', 'tr', '/tr', 'th', '/th', 'td', '/td'}
    assert len(markdown.splitlines()) == 3 or any(c in prompt + expected + base + fine_tuned for c in '\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029')
    assert '<' not in markdown and '](' not in markdown


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=200), st.integers(4, 30), st.integers(1, 5))
def test_wrapped_text_is_whole_or_ends_with_dots(text, width, max_lines):
    lines = wrap_text(text, width, max_lines)
    assert 1 <= len(lines) <= max_lines and all(columns_of(line) <= width for line in lines)
    whole = ''.join(one_line(text).split())
    if not lines[-1].endswith(' …'): assert ''.join(''.join(lines).split()) == whole
    else: assert whole.startswith(''.join(''.join(lines)[:-2].split())) or text.endswith('…')


def test_the_worst_is_the_one_that_lost_most_and_is_not_shown_twice():
    answers = [dict(row=i, prompt='p', expected='e', base='b', fine_tuned='f') for i in range(12)]
    base, fine_tuned = [.5] * 12, [.5, .6, .4, .1, .5, .9, .1, 1., .5, .5, .5, .5]
    for seed in range(5):
        samples = draw_samples(answers, base, fine_tuned, nll_gains=[1.] * 6 + [.5] + [1.] * 5, seed=seed)
        assert len(samples) == N_SAMPLES + 1 and len({s.row for s in samples}) == N_SAMPLES + 1
        assert samples[-1].row == 6 and [s.worst for s in samples] == [False] * N_SAMPLES + [True]
    assert [s.row for s in draw_samples(answers, base, fine_tuned, seed=0)] != [s.row for s in draw_samples(answers, base, fine_tuned, seed=1)]
    assert [s.row for s in draw_samples(answers[:2], base[:2], fine_tuned[:2])] == [1, 0]
