"Preference tuning: TRL's loss is the paper's, on every kind of base; runs survive kill -9; what cannot be is refused before weights are loaded."
import json
import math
import os
import time

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from homelab_ft.core import ConfigError, DataError
from homelab_ft.config import make_config
from homelab_ft.data.chat_template import load_tokenizer
from homelab_ft.data.preference import PreferencePairs
from homelab_ft.data.sample.tickets import make_tickets
from homelab_ft.data.tokenize import make_cache, save_cache
from homelab_ft.evaluate.compare import load_evaluation
from homelab_ft.pipeline import new_run as journey_run, run_pipeline
from homelab_ft.train import trainer as training
from homelab_ft.train.lora import adapter_tensors, attach_lora, set_adapter
from homelab_ft.train.dpo import dpo_loss, pair_logps, preference_step
from homelab_ft.train.launcher import start
from homelab_ft.train.base_model import load_base
from homelab_ft.train.run_folder import create_run, history, status

pytest.importorskip('trl', reason='needs TRL: pip install -e ".[dpo]"')


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path, tok = tmp_path_factory.mktemp('model'), load_tokenizer('embedded')
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                 tie_word_embeddings=True, initializer_range=0.1)).save_pretrained(path)
    tok.save_pretrained(path)
    return str(path)


def pairs_of(n, seed=0, talk=False):
    "Random prompts; the better answer ends with token 50, the worse with 60. `talk`: an earlier answer, and something behind the end of the turn."
    draw, sides = np.random.default_rng(seed), ([], [])
    for _ in range(n):
        prompt = draw.integers(100, 500, draw.integers(3, 12)).tolist()
        for side, end in zip(sides, (50, 60)):
            answer = [*draw.integers(100, 500, draw.integers(1, 6)).tolist(), end, 4]
            begun, learned = ([7, 8, 9, *prompt], [0, 1, 1] + [0] * len(prompt)) if talk else (prompt, [0] * len(prompt))
            side.append((begun + answer + [5] * talk, learned + [1] * len(answer) + [0] * talk))
    return PreferencePairs(*(make_cache(side, range(n)) for side in sides))


def engine(folder, pairs, dtype='float32', moved=True, **settings):
    config = make_config(**dict(model=folder, objective='dpo', device='cpu', lora_r=4, dpo_beta=0.5) | settings)
    model = attach_lora(load_base(folder, config.method, dtype, 'cpu'), config)
    steps = preference_step(model, config, pairs, 'cpu')
    torch.manual_seed(1)
    if moved: set_adapter(model, {k: torch.randn_like(v) * 0.2 if 'lora_B' in k else v for k, v in adapter_tensors(model).items()})
    return steps


def gradient(model):
    found = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.parametrize('settings', [dict(), dict(use_dora=True), dict(use_rslora=True, dpo_beta=0.2), dict(method='qlora'), dict(gradient_checkpointing=True)],
                         ids=['lora', 'dora', 'rslora', 'qlora', 'checkpointing'])
@pytest.mark.parametrize('talk', [False, True])
def test_loss_and_gradient_are_equation_7(folder, settings, talk):
    pairs = pairs_of(7, talk=talk)
    steps = engine(folder, pairs, **settings)
    loss, n = steps.accumulate(pairs, [[0, 1, 2, 3], [4, 5], [6]])
    found, rows = gradient(steps.model), list(range(7))
    with torch.no_grad(), steps.model.disable_adapter(): reference = pair_logps(steps.model, pairs, rows)
    wanted = dpo_loss(*pair_logps(steps.model, pairs, rows), *reference, beta=settings.get('dpo_beta', 0.5)).mean()
    wanted.backward()
    by_hand = gradient(steps.model)
    assert n == 7 and abs(float(loss) - math.log(2)) > 1e-3            # the adapter does something
    assert abs(float(loss) - wanted.item()) <= 1e-5 * wanted.item()
    assert (found - by_hand).norm() <= 1e-5 * by_hand.norm() and by_hand.norm() > 0


def test_reference_is_the_base_and_not_the_adapter_as_it_was(folder):
    pairs = pairs_of(4)
    steps = engine(folder, pairs)
    moved = adapter_tensors(steps.model)
    first = steps.loss(pairs, [0, 1, 2, 3])[1]
    config = make_config(model=folder, objective='dpo', device='cpu', lora_r=4, dpo_beta=0.5)
    again = preference_step(steps.model, config, pairs, 'cpu')         # as when a run goes on with a trained adapter
    assert again.loss(pairs, [0, 1, 2, 3])[1] == pytest.approx(first, rel=1e-5)
    assert all(torch.equal(moved[k], v) for k, v in adapter_tensors(steps.model).items())


@pytest.mark.parametrize('k', [1, 2])
def test_validation_on_a_gpu_that_is_too_full(folder, k):
    pairs = pairs_of(7)
    steps, tried = engine(folder, pairs), []
    loss, seen = steps.mean_loss(pairs, 4)
    def full(module, args, kwargs):
        tried.append(len(kwargs['input_ids']) // 2)
        if tried[-1] > k: raise torch.OutOfMemoryError('CUDA out of memory.')
    steps.model.get_base_model().base_model.register_forward_pre_hook(full, with_kwargs=True)
    again, watched = steps.mean_loss(pairs, 4)
    assert again == pytest.approx(loss, rel=1e-5) and watched == pytest.approx(seen, rel=1e-5, abs=1e-6)
    assert tried[:2] == [4, 2] and max(tried[1:]) == 2 and steps.model.training


def test_adapter_of_a_quantized_model_stays_in_float32(folder):
    steps = engine(folder, pairs_of(3), method='qlora', moved=False)
    trained = {n: p for n, p in steps.model.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 and '.default.' in n for n, p in trained.items())


def test_bfloat16_is_near(folder):
    pairs = pairs_of(6)
    exact, rounded = (float(engine(folder, pairs, dtype).accumulate(pairs, [list(range(6))])[0]) for dtype in ('float32', 'bfloat16'))
    assert rounded == pytest.approx(exact, rel=0.05)


def new_run(tmp_path, folder, name='r', **settings):
    defaults = dict(model=folder, run_name=name, objective='dpo', device='cpu', lora_r=4, learning_rate=1e-2, dpo_beta=0.3, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                    num_train_epochs=4, eval_steps=6, save_steps=5)
    run = create_run(make_config(**defaults | settings), tmp_path)
    run.data_path.mkdir()
    for part, pairs in (('train', pairs_of(40)), ('validation', pairs_of(12, seed=1))):
        save_cache(pairs.chosen, run.data_path / f'{part}.safetensors')
        save_cache(pairs.rejected, run.data_path / f'{part}_rejected.safetensors')
    return run


WATCHED = ('step', 'loss', 'reward_margin', 'reward_accuracy')


def numbers(run): return {kind: [[r[k] for k in WATCHED] for r in lines] for kind, lines in history(run).items()}


def test_run_learns_and_a_killed_one_goes_on_with_the_same_numbers(tmp_path, folder):
    whole, killed = new_run(tmp_path, folder, 'whole'), new_run(tmp_path, folder, 'killed')
    training.train(whole)
    train, held_out = history(whole)['train'], history(whole)['eval']
    assert train[0]['loss'] == pytest.approx(math.log(2), rel=1e-5) and train[-1]['loss'] < 0.3
    assert held_out[-1]['loss'] < 0.5 and held_out[-1]['reward_accuracy'] > 0.8 and held_out[-1]['loss'] < held_out[0]['loss']
    process = start(killed)
    while process.poll() is None and status(killed).step < 8: time.sleep(0.02)
    process.kill()
    process.wait()
    assert status(killed).state == 'interrupted'
    training.train(killed, resume=True)
    assert numbers(killed) == numbers(whole)
    assert (killed.adapter_path / 'adapter_model.safetensors').read_bytes() == (whole.adapter_path / 'adapter_model.safetensors').read_bytes()


def test_beta_holds_the_model_to_the_base(tmp_path, folder):
    distance = {}
    for beta in (0.05, 2.):
        run = new_run(tmp_path, folder, f'b{beta}', dpo_beta=beta, num_train_epochs=2)
        training.train(run)
        last = history(run)['train'][-1]
        distance[beta] = last['reward_margin'] / beta      # how far the likelihoods moved apart, in nats
    assert 0 < distance[2.] < distance[0.05]


def test_no_pairs_no_training(tmp_path, folder):
    run = new_run(tmp_path, folder)
    (run.data_path / 'train_rejected.safetensors').unlink()
    with pytest.raises(DataError, match='holds no pairs'): training.train(run)
    assert status(run).state == 'failed'


@pytest.mark.parametrize('settings', [dict(packing=True), dict(lora_dropout=0.1), dict(label_smoothing_factor=0.1)])
def test_settings_that_would_be_left_out_are_refused_before_weights_are_loaded(tmp_path, folder, settings, monkeypatch):
    monkeypatch.setattr(training, 'load_base', lambda *a, **k: pytest.fail('weights were loaded'))
    with pytest.raises(ConfigError, match=f'{next(iter(settings))} does not go with objective=dpo'): training.train(new_run(tmp_path, folder, **settings))


def preferences(n):
    tickets = [t for t in make_tickets(n) if t['team'].strip() and t['body'].strip()]
    wrong = ['I do not know.', 'somebody else', 'no idea, sorry']
    return [dict(prompt=f"{t['subject']}\n{t['body']}\n\nWhich team?", chosen=t['team'], rejected=wrong[i % 3]) for i, t in enumerate(tickets)]


def journey_config(tmp_path, rows, **settings):
    (tmp_path / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    defaults = dict(data=str(tmp_path / 'pairs.jsonl'), objective='dpo', device='cpu', overlong_rows='drop', max_length=192, runs_dir=str(tmp_path / 'runs'), run_name='p')
    return make_config(**defaults | settings)


def test_whole_journey(tmp_path):
    config = journey_config(tmp_path, preferences(200), learning_rate=1e-3, max_steps=12, eval_steps=12, save_steps=12, eval_fraction=0.3,
                            eval_max_rows=30, generate_max_rows=2, max_new_tokens=4, n_bootstrap=500)
    run = run_pipeline(config, log=lambda line: None)
    train, judged = history(run)['train'], load_evaluation(run)
    assert train[0]['loss'] == pytest.approx(math.log(2), rel=1e-5) and train[-1]['loss'] < 0.4
    assert judged.metrics[0].name == 'preference accuracy' and judged['reward accuracy'].fine_tuned > 0.9 and judged['reward accuracy'].low > 0
    assert judged['preference accuracy'].fine_tuned > judged['preference accuracy'].base
    assert 'preference accuracy' in run.report_path.read_text(encoding='utf-8') and run.entry_path.exists() and run.merged_path.exists()
    assert json.loads(run.manifest_path.read_text())['engine']['packed'] == dict(on=False, reason='pairs, through TRL')


def test_wrong_layout_and_wrong_settings_leave_nothing(tmp_path):
    one_answer = [{k: r[k] for k in ('prompt', 'chosen')} | {'answer': r['chosen']} for r in preferences(60)]
    with pytest.raises(DataError, match='needs pairs of answers'): journey_run(journey_config(tmp_path, one_answer), log=lambda line: None)
    with pytest.raises(ConfigError, match='neftune_noise_alpha does not go'): journey_run(journey_config(tmp_path, preferences(60), neftune_noise_alpha=5), log=lambda line: None)
    assert not os.path.exists(tmp_path / 'runs')


def test_sft_on_preferences_learns_the_chosen_answers(tmp_path):
    rows = preferences(60)
    run = journey_run(journey_config(tmp_path, rows, objective='sft'), log=lambda line: None)
    plain = [dict(prompt=r['prompt'], completion=r['chosen']) for r in rows]
    other = journey_run(journey_config(tmp_path, plain, objective='sft', run_name='q'), log=lambda line: None)
    assert (run.data_path / 'train.safetensors').read_bytes() == (other.data_path / 'train.safetensors').read_bytes()
