"""Families beside Llama: each trains on a CPU with the step that it gets, its first loss is that of transformers, and only the layers that may be adapted are.

A tiny random model per family, built from a config. The quick ones stand for a kind each; `slow` has the rest."""
import pytest

from homelab_ft.config import make_config
from homelab_ft.plan.memory.estimate import estimate
from homelab_ft.plan.memory.static import adapter_params
from homelab_ft.plan.model_shape import model_shape

torch, transformers, peft = (pytest.importorskip(name) for name in ('torch', 'transformers', 'peft'))
pytestmark = pytest.mark.filterwarnings('ignore')

SIZES = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
NO_HEAD_DIM = {k: v for k, v in SIZES.items() if k != 'head_dim'}
FEW = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
GPT2 = dict(vocab_size=512, n_embd=64, n_layer=4, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
DEEPSEEK = NO_HEAD_DIM | dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=32,
                              kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, num_key_value_heads=4)
ATTENTION = 'k_proj o_proj q_proj v_proj'
LLAMA = 'down_proj gate_proj k_proj o_proj q_proj up_proj v_proj'

# family -> (config, whether packed sequences give the same gradient, names of adapted layers)
QUICK = {
    'smollm3': (SIZES, True, LLAMA),
    'olmo2': (SIZES, True, LLAMA),
    'granite': (SIZES | dict(logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=.22, attention_multiplier=.0156), False, LLAMA),
    'qwen3_moe': (SIZES | FEW, False, ATTENTION),
    'gpt2': (GPT2, False, 'c_attn c_fc c_proj'),                         # other names, no list of layers where others have it
    'falcon_h1': (SIZES | dict(mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, lm_head_multiplier=.5), False,
                  'down_proj gate_proj in_proj k_proj o_proj q_proj up_proj v_proj'),       # logits that no known setting announces
    'falcon': (NO_HEAD_DIM, False, 'dense dense_4h_to_h dense_h_to_4h query_key_value'),
    'deepseek_v3': (DEEPSEEK, False, 'kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj'),      # peft takes the names of its MLPs for experts
}
SLOW = {
    'olmo3': (SIZES, True, LLAMA),
    'phi3': (SIZES, True, 'down_proj gate_up_proj o_proj qkv_proj'),
    'gemma2': (SIZES, False, LLAMA),
    'cohere2': (SIZES, False, LLAMA),
    'glm4': (SIZES | dict(partial_rotary_factor=.5), True, 'down_proj gate_up_proj k_proj o_proj q_proj v_proj'),
    'starcoder2': (SIZES, True, 'c_fc c_proj k_proj o_proj q_proj v_proj'),
    'internlm3': (SIZES, True, LLAMA),
    'gpt_neox': (NO_HEAD_DIM, True, 'dense dense_4h_to_h dense_h_to_4h query_key_value'),
    'mixtral': (SIZES | LOCAL, False, ATTENTION),
    'phimoe': (SIZES | LOCAL, False, ATTENTION),
    'granitemoe': (SIZES | LOCAL, False, ATTENTION),
    'qwen2_moe': (SIZES | FEW | dict(shared_expert_intermediate_size=48), False, LLAMA),        # shared experts see every token
    'lfm2': (SIZES | dict(layer_types=['conv', 'full_attention'] * 2), False, 'in_proj k_proj out_proj q_proj v_proj w1 w2 w3'),
    'mamba': (dict(vocab_size=512, hidden_size=64, num_hidden_layers=4), False, 'dt_proj in_proj x_proj'),
    'gemma3': (dict(text_config=SIZES), False, LLAMA),                    # its layers for pictures stay as they are
}
FAMILIES = QUICK | SLOW


def build(family):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family][0])
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()


def plain_loss(model, batch):
    "What transformers says, over all labels."
    with torch.no_grad(): logits = model(input_ids=batch['input_ids'], use_cache=False).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch['labels'][:, 1:].flatten(), ignore_index=-100))


@pytest.mark.parametrize('family', [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_family_trains(family):
    from homelab_ft.train.engine import autotune, batching, packing, padded
    from homelab_ft.train.lora import attach_lora
    _, packs, names = FAMILIES[family]
    sequences = packing.RandomSequences([20, 33, 27, 9], .6, 512)
    model = build(family)
    expected = plain_loss(model, batching.collate(sequences, [0, 1, 2, 3], 0))
    model = attach_lora(model, make_config(lora_r=4))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split('.lora_')[0].split('.')[-1] for name in trained} == {*names.split()}
    assert not any('.experts' in name or 'vision' in name for name in trained)
    loss, _ = padded.PaddedStep(model, 'test').accumulate(sequences, [[0, 1], [2, 3]])
    assert float(loss) == pytest.approx(expected, abs=1e-4)
    moved = [name for name, p in trained.items() if 'lora_B' in name and p.grad is not None and p.grad.abs().sum() > 0]
    assert len(moved) >= len(trained) // 3          # mamba's kernel reads one projection by itself
    model.zero_grad()
    step = autotune.autotune(model, autotune.StepOptions(33, 96))
    assert step.features.packed.on == packs and (packs or step.features.packed.reason)
    if packs: assert float(step.accumulate(sequences, [[0, 1, 2, 3]])[0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize('family', [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_family_is_counted(family):
    "Parameters and adapter from the configuration alone, against the model itself."
    from homelab_ft.train.lora import attach_lora
    shape, model = model_shape(dict(FAMILIES[family][0], model_type=family)), build(family)
    assert shape.n_params == sum(p.numel() for p in model.parameters())
    est = estimate(shape, length=64, padding_free=False)
    assert est.peak > 0 and bool(est.estimated) == (family not in ('phi3', 'gemma2'))
    if family in ('deepseek_v3', 'lfm2'): return          # their layers differ: the most common one stands for all
    trained = sum(p.numel() for p in attach_lora(model, make_config(lora_r=4)).parameters() if p.requires_grad)
    refused = {'mamba': 'out_proj', 'falcon_h1': 'out_proj'}.get(family)
    kept = [name for name in shape.linears if name != refused]
    assert adapter_params(shape, 4, kept if refused else 'all-linear') == trained
