"Likelihood where the GPU runs out of memory on the way."
import numpy as np, pytest, torch
from homelab_ft.core import DataError
from homelab_ft.data.tokenize import make_cache
from homelab_ft.evaluate.likelihood import perplexity, sequence_nll, token_nll
from homelab_ft.train.base_model import load_base

def test_nothing_to_measure_is_an_error():
    with pytest.raises(DataError, match='no answer tokens'): perplexity([1.], [0])

@pytest.mark.parametrize('k', [1, 3])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_changes(k):
    rng, model = np.random.default_rng(0), load_base('embedded').eval()
    cache = make_cache([(rng.integers(5, 4000, n), (rng.random(n) < 0.5).astype(np.uint8)) for n in rng.integers(2, 30, 13)], list(range(13)))
    (nll, tokens), each = sequence_nll(model, cache, 8, progress=False), token_nll(model, cache, 8, progress=False)
    sizes = []
    def full(module, args, kwargs):
        sizes.append(len(kwargs['input_ids']))
        if sizes[-1] > k: raise torch.OutOfMemoryError('CUDA out of memory.')
    model.base_model.register_forward_pre_hook(full, with_kwargs=True)
    halved, halved_tokens = sequence_nll(model, cache, 8, progress=False)
    np.testing.assert_allclose(halved, nll, atol=1e-4)
    assert (halved_tokens == tokens).all() and max(sizes) == 8 and sizes[-2] <= k and 8 not in sizes[1:]
    np.testing.assert_allclose(np.concatenate(token_nll(model, cache, 8, progress=False)), np.concatenate(each), atol=1e-4)
    assert [len(e) for e in each] == tokens.tolist()
