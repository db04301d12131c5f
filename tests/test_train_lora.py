"train.lora: every variant of LoRA changes what it says, is saved and loaded, and can be continued."
import numpy as np
import pytest
import torch

from toy_runs import new_run
from homelab_ft.config import make_config
from homelab_ft.io import append_jsonl, read_jsonl
from homelab_ft.train import trainer as training
from homelab_ft.train.base_model import load_base
from homelab_ft.train.lora import attach_lora, load_adapter, save_adapter
from homelab_ft.train.schedule import make_optimizer

IDS = torch.arange(24).reshape(2, 12) + 20
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
pytestmark = pytest.mark.usefixtures('one_thread')


def losses(run): return [r['loss'] for r in read_jsonl(run.metrics_path)]


def test_lora_plus_moves_b_sixteen_times_as_far(toy_model):
    def moved(ratio):
        model = attach_lora(load_base(toy_model), make_config(lora_r=4))
        optimizer = make_optimizer(model, make_config(loraplus_lr_ratio=ratio))
        for g in optimizer.param_groups: g['lr'] = 1e-3 * g['lr_ratio']
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        return max(p.abs().max().item() for n, p in model.named_parameters() if 'lora_B' in n)
    assert moved(16.) == pytest.approx(16 * moved(1.), rel=1e-3) and moved(1.) == pytest.approx(1e-3, rel=1e-2)


def test_a_checkpoint_from_before_lora_plus_can_be_continued(tmp_path, toy_model):
    run = new_run(tmp_path, toy_model, 'old')
    append_jsonl(run.control_path, {'command': 'stop', 'value': None})
    training.train(run)
    path = next(run.checkpoints_path.glob('step-*')) / 'optimizer.pt'
    state = torch.load(path, weights_only=True)
    for g in state['param_groups']: del g['lr_ratio']
    torch.save(state, path)
    assert training.train(run, resume=True).state == 'finished'


VARIANTS = {'lora': {}, 'rslora': dict(use_rslora=True), 'dora': dict(use_dora=True), 'lora plus': dict(loraplus_lr_ratio=16.), 'noise': dict(neftune_noise_alpha=5.),
            'int8': dict(method='int8'), 'dora in 4 bits': dict(method='qlora', use_dora=True),
            'schedule': dict(lr_scheduler_type='inverse_sqrt', warmup_steps=4), 'adam': dict(adam_beta2=0.9)}


RESUMED = ('lora', 'dora in 4 bits', 'lora plus')


def test_every_variant_trains_to_something_else_and_can_be_continued(tmp_path, toy_model):
    found = {}
    for name, settings in VARIANTS.items():
        straight = new_run(tmp_path, toy_model, f'{name}-straight'.replace(' ', '-'), lora_dropout=0.1, **settings)
        assert training.train(straight).state == 'finished'
        found[name] = losses(straight)
        assert found[name][-1] < found[name][0], name
        if name not in RESUMED: continue
        part = new_run(tmp_path, toy_model, f'{name}-part'.replace(' ', '-'), lora_dropout=0.1, **settings)
        append_jsonl(part.control_path, {'command': 'stop', 'value': None})
        assert training.train(part).state == 'stopped' and training.train(part, resume=True).state == 'finished'
        np.testing.assert_allclose(losses(part), losses(straight), atol=1e-6)
    numbers = [tuple(np.round(v, 7)) for v in found.values()]
    assert len(set(numbers)) == len(VARIANTS)


@pytest.mark.parametrize('settings', [dict(use_dora=True), dict(use_rslora=True), dict(use_dora=True, method='qlora'), dict(method='int8')], ids=str)
def test_variants_are_saved_and_loaded_whole(tmp_path, toy_model, settings):
    config = make_config(lora_r=4, **settings)
    model = attach_lora(load_base(toy_model, config.method), config)
    for n, p in model.named_parameters():
        if p.requires_grad: p.data += 0.05 * torch.randn_like(p)
    wanted = model.eval()(IDS).logits
    saved = save_adapter(model, tmp_path / 'adapter')
    torch.testing.assert_close(load_adapter(load_base(toy_model, config.method), saved)(IDS).logits, wanted)


@needs_gpu
@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_trains_on_a_gpu(tmp_path, toy_model, name):
    run = new_run(tmp_path, toy_model, 'gpu', device='auto', optim='paged_adamw_32bit', **VARIANTS[name])
    assert training.train(run).state == 'finished' and losses(run)[-1] < losses(run)[0]
