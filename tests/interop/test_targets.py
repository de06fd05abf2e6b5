"""Targets: transformers and this project read the same files, compute the same numbers and write the same words."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import tiny
import torch
from peers import relative_error
from transformers import (
    AutoModelForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from specauf_jax.architecture import Drafter
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.rope import rope_frequencies
from specauf_jax.models.target import target_features, target_head, target_hidden, target_step
from specauf_jax.models.weights import load_target, save_target
from specauf_jax.parts import Experts, RopeScaling

TOLERANCE = 1e-5  # of the largest value
T = 32
LONG = 32_768


def yarn(factor, length, **more):
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length, **more}


def llama3(factor):
    return {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip


def heads(query, key_value, size):
    return {"num_attention_heads": query, "num_key_value_heads": key_value, "head_dim": size}


def experts(count, chosen, norm):
    return {"num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": 40, "norm_topk_prob": norm}


FILES = {
    "qwen3, 4 queries a key, shards": dict(**heads(8, 2, 128), rope={"rope_theta": 1e6}, tie_word_embeddings=False,
                                           shards=3),
    "qwen3, tied, 8 queries a key, bfloat16": dict(**heads(8, 1, 128), rope={"rope_theta": 5e6},
                                                   tie_word_embeddings=True, dtype="bfloat16"),
    "qwen3, yarn, tied, float16 shards": dict(**heads(4, 4, 128), rope={"rope_theta": 1e6, **yarn(4.0, LONG)},
                                              tie_word_embeddings=True, dtype="float16", shards=3,
                                              max_position_embeddings=4 * LONG),
    "qwen3, yarn not truncated": dict(**heads(4, 4, 64), rope={"rope_theta": 5e5, **yarn(4.0, 8192, truncate=False)},
                                      tie_word_embeddings=False),
    "qwen3, linear": dict(**heads(8, 1, 128), rope={"rope_theta": 5e6, "rope_type": "linear", "factor": 4.0},
                          tie_word_embeddings=False),
    "llama 3.1, bfloat16 shards": dict(model_type="llama", **heads(8, 2, 64), tie_word_embeddings=False,
                                       rope={"rope_theta": 5e5, **llama3(8.0)}, dtype="bfloat16", shards=3),
    "llama 3.2, tied": dict(model_type="llama", **heads(8, 1, 128), rope={"rope_theta": 5e5, **llama3(32.0)},
                            tie_word_embeddings=True),
    "llama, theta 1e4, float16": dict(model_type="llama", **heads(4, 4, 64), rope={"rope_theta": 1e4},
                                      tie_word_embeddings=False, dtype="float16"),
    "qwen2.5, tied, bfloat16": dict(model_type="qwen2", hidden_size=512, num_attention_heads=8, num_key_value_heads=1,
                                    rope={"rope_theta": 1e6}, tie_word_embeddings=True, dtype="bfloat16"),
    "qwen2.5, yarn": dict(model_type="qwen2", hidden_size=512, num_attention_heads=4, num_key_value_heads=1,
                          rope={"rope_theta": 1e6, **yarn(4.0, LONG)}, tie_word_embeddings=False,
                          max_position_embeddings=4 * LONG),
    "qwen3 moe, weights brought to 1, shards": dict(model_type="qwen3_moe", **heads(8, 2, 64), rope={"rope_theta": 1e6},
                                                    tie_word_embeddings=False, shards=3, **experts(8, 3, True)),
    "gemma 3, tied": dict(model_type="gemma3", **heads(4, 1, 64), rope={"rope_theta": 1e6}, tie_word_embeddings=True,
                          num_hidden_layers=7, sliding_window=9, query_pre_attn_scalar=48),
    "gemma 3, linear, tied, bfloat16": dict(model_type="gemma3", **heads(4, 2, 64), sliding_window=20,
                                            rope={"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                                            tie_word_embeddings=True, num_hidden_layers=6, dtype="bfloat16"),
    "gpt-oss, yarn": dict(model_type="gpt_oss", **heads(8, 2, 64), tie_word_embeddings=False, sliding_window=9,
                          rope={"rope_theta": 5e5, **yarn(32.0, 4096, truncate=False)}, num_local_experts=6,
                          num_experts_per_tok=2, num_hidden_layers=4, intermediate_size=48),
    "gpt-oss, shards": dict(model_type="gpt_oss", **heads(4, 4, 32), tie_word_embeddings=False, sliding_window=40,
                            rope={"rope_theta": 1.5e5}, num_local_experts=4, num_experts_per_tok=1,
                            intermediate_size=32, shards=3),
    "qwen3 moe, bfloat16, tied": dict(model_type="qwen3_moe", **heads(4, 1, 64), rope={"rope_theta": 1e7},
                                      tie_word_embeddings=True, dtype="bfloat16", **experts(6, 1, False)),
}  # fmt: skip


def rows():
    """Tokens and positions `[4, T]`: near 0, near 32k, and rows in which queries see keys up to 32k away."""
    rng = np.random.default_rng(0)
    near = np.arange(T)
    jumps = np.concatenate([start + np.arange(T // 4) for start in (0, 1000, 8191, 32_700)])
    scattered = np.sort(rng.choice(LONG, T, replace=False))
    tokens = rng.integers(1, peers.SIZES["vocab_size"], (4, T))
    return tokens, np.stack([near, 32_700 + near, jumps, scattered])


def asked_of_transformers(model, tokens, positions):
    """logits `[B, T, V]`; the embedding, the residual after each layer, and the normed end: N + 2 of `[B, T, D]`."""
    residuals = []
    hooks = [layer.register_forward_hook(lambda _, __, out: residuals.append(out)) for layer in model.model.layers]
    tokens, positions = torch.as_tensor(tokens), torch.as_tensor(positions)
    with torch.no_grad():  # without a mask it would take a jump in the positions for a new document
        found = model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return found.logits, [found.hidden_states[0], *residuals, found.hidden_states[-1]]


@functools.partial(jax.jit, static_argnames="config")
def asked_of_us(params, tokens, positions, *, config):
    """The same, of packed rows."""
    ones, layers = jnp.ones_like(tokens), tuple(range(config.num_hidden_layers))
    residuals = target_features(params, tokens, positions, ones, config=config, layer_ids=layers)
    normed = target_hidden(params, tokens, positions, ones, config=config)
    head = target_head(params)
    scale = config.hidden_size**0.5 if config.model_type == "gemma3" else 1.0
    states = [scale * head.embedding[tokens], *jnp.split(residuals, len(layers), axis=-1), normed]
    return normed @ head.lm_head, states


@functools.partial(jax.jit, static_argnames="config")
def asked_of_our_step(params, tokens, *, config):
    """logits and residuals of rows from position 0, in two calls over one cache."""
    step = target_step(config, tuple(range(config.num_hidden_layers)))
    cache, results = step.init_cache(*tokens.shape), []
    for part in (slice(0, T - 5), slice(T - 5, T)):
        positions = jnp.broadcast_to(jnp.arange(T)[part], tokens[:, part].shape)
        *result, cache = step(params, tokens[:, part], positions, cache)
        results.append(result)
    return [jnp.concatenate(parts, axis=1) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize("case", FILES.values(), ids=FILES)
def test_logits_and_hidden_states_equal_those_of_transformers(case, tmp_path):
    model = peers.write_target(tmp_path / "target", **case)
    params, config = load_target(tmp_path / "target")
    tokens, positions = rows()
    logits, states = asked_of_transformers(model, tokens, positions)
    ours, our_states = asked_of_us(params, tokens, positions, config=config)
    for row in range(len(tokens)):
        assert relative_error(ours[row], logits[row]) < TOLERANCE
        for mine, theirs in zip(our_states, states, strict=True):
            assert relative_error(mine[row], theirs[row]) < TOLERANCE
    stepped, residuals = asked_of_our_step(params, tokens, config=config)
    logits, states = asked_of_transformers(model, tokens, np.tile(np.arange(T), (4, 1)))
    assert relative_error(stepped, logits) < TOLERANCE
    for mine, theirs in zip(np.split(np.asarray(residuals), config.num_hidden_layers, -1), states[1:-1], strict=True):
        assert relative_error(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in FILES if "tied" in name or "3.1" in name])
def test_a_target_read_and_written_again_is_the_same_to_transformers(name, tmp_path):
    """Bit for bit; bfloat16 and float16 files come back as float32."""
    model = peers.write_target(tmp_path / "target", **FILES[name])
    params, config = load_target(tmp_path / "target")
    save_target(params, config, tmp_path / "again")
    again = peers.read_target(tmp_path / "again")
    assert type(again) is type(model) and again.state_dict().keys() == model.state_dict().keys()
    for key, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], x), key
    one, other = (asked_of_transformers(m, *rows())[0] for m in (model, again))
    assert torch.equal(one, other)


def linear(**changes):
    return dict(**heads(4, 2, 32), hidden_size=64, intermediate_size=96, num_hidden_layers=8, linear_key_head_dim=16,
                linear_value_head_dim=24, linear_num_key_heads=2, linear_num_value_heads=4, vocab_size=151,
                pad_token_id=0, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25,
                                 "mrope_section": [2, 1, 1], "mrope_interleaved": True}, **changes)  # fmt: skip


SPARSE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
          "shared_expert_intermediate_size": 40}  # fmt: skip


def hybrid_of_transformers(folder, kind, seed):
    """A random Qwen3.5 as transformers writes it, norms' scales around 0 and states that fade at different speeds."""
    if kind == "moe":
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**linear(**SPARSE)))
    elif kind == "next":
        model = Qwen3NextForCausalLM(Qwen3NextConfig(**linear(**SPARSE)))
    elif kind == "sees":
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64,
                  "num_position_embeddings": 16}  # fmt: skip
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=linear(), vision_config=vision))
    else:
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**linear()))
    peers.randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("A_log"):
                x.copy_(torch.log(8 * torch.rand(x.shape, generator=generator) + 0.1))
            elif name.endswith("norm.weight") and "linear_attn" not in name:
                x.sub_(1)
    model.save_pretrained(folder)
    if kind in ("moe", "next"):
        model.set_experts_implementation("eager")  # the only one in float64
    return model.eval()


@pytest.mark.parametrize(("kind", "seed"), [("text", 0), ("sees", 0), ("moe", 2), ("next", 0)])
def test_linear_attention_is_that_of_transformers(kind, seed, tmp_path):
    """Logits of 150 tokens as near to those in float64 as transformers' own float32 is.

    Seeds with which no token has two experts so near to each other that rounding chooses between them.
    """
    model = hybrid_of_transformers(tmp_path / "target", kind, seed)
    params, config = load_target(tmp_path / "target")
    tokens = np.random.default_rng(0).integers(1, 151, (4, 150))
    positions = np.stack([start + np.arange(150) for start in (0, 700, 8191, 32_600)])
    asked = {"input_ids": torch.as_tensor(tokens), "position_ids": torch.as_tensor(positions)}
    single = model(**asked).logits
    double = copy.deepcopy(model).double()(**asked).logits
    ours, _ = asked_of_us(params, tokens, positions, config=config)
    assert relative_error(single, double) < 2e-4
    assert relative_error(ours, double) < 2 * relative_error(single, double)
    save_target(params, config, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    if kind in ("moe", "next"):
        again.set_experts_implementation("eager")
    np.testing.assert_array_equal(again(**asked).logits.detach(), single.detach())


SCALINGS = {
    "default": RopeScaling(),
    "linear": RopeScaling("linear", factor=2.0),
    "llama3": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8192),
    "yarn": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=8192, beta_fast=16.0, truncate=False),
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "qwen3_moe"])
def test_our_own_target_loads_in_transformers(model_type, scaling, tmp_path):
    tied = scaling in ("linear", "yarn")
    config = tiny.target_config(
        model_type=model_type,
        rope_scaling=SCALINGS[scaling],
        tie_word_embeddings=tied,
        num_hidden_layers=2,
        experts=Experts(**experts(6, 2, tied)) if model_type == "qwen3_moe" else None,
    )
    params = tiny.target_params(config)
    save_target(params, config, tmp_path / "target", eos_token_id=3)
    model = peers.read_target(tmp_path / "target")
    assert model.config.model_type == model_type and model.config.eos_token_id == 3
    tokens, positions = rows()
    logits, states = asked_of_transformers(model, tokens % 17, positions)
    ours, our_states = asked_of_us(params, tokens % 17, positions, config=config)
    assert relative_error(ours, logits) < TOLERANCE
    for mine, theirs in zip(our_states, states, strict=True):
        assert relative_error(mine, theirs) < TOLERANCE


def test_frequencies_differ_by_no_more_than_torchs_rounding_of_a_power(tmp_path):
    """theta 5e4, where torch's float32 power is seen to be a unit off: 5e-4 radians at 32k, 5e-5 of the logits."""
    model = peers.write_target(tmp_path / "target", "llama", **heads(4, 4, 64), rope={"rope_theta": 5e4})
    params, config = load_target(tmp_path / "target")
    exponent = np.arange(0, 64, 2, dtype=np.float32) / 64
    power = (5e4 ** torch.tensor(exponent)).numpy()
    nearest = (np.float64(5e4) ** exponent).astype(np.float32)
    assert np.abs(power.view(np.int32) - nearest.view(np.int32)).max() <= 1
    rotary, (ours, _) = model.model.rotary_emb, rope_frequencies(config)
    np.testing.assert_array_equal(rotary.inv_freq, 1 / power)
    np.testing.assert_array_equal(ours, 1 / nearest)
    tokens, positions = rows()
    found, _ = asked_of_us(params, tokens, positions, config=config)
    assert relative_error(found, asked_of_transformers(model, tokens, positions)[0]) < 1e-4
    rotary.inv_freq = torch.tensor(ours)
    assert relative_error(found, asked_of_transformers(model, tokens, positions)[0]) < TOLERANCE


@pytest.mark.parametrize(("model_type", "seed"), [("qwen3", 0), ("qwen2", 4), ("llama", 1), ("qwen3_moe", 3)])
def test_greedy_texts_equal_those_of_transformers(model_type, seed, tmp_path):
    """50 prompts of 1 to 40 tokens, 256 new tokens, one batch: alone, and with a drafter that guesses at random.

    Seeds whose 12,800 choices are all clear: of most, one or two hang on the sixth digit.
    """
    rope = {"rope_theta": 5e5, **(llama3(8.0) if model_type == "llama" else {})}
    sizes = {"hidden_size": 64, "intermediate_size": 96, **heads(4, 2, 16)}
    sizes |= experts(8, 2, True) if model_type == "qwen3_moe" else {}
    model = peers.write_target(
        tmp_path / "target", model_type, seed=seed, rope=rope, tie_word_embeddings=False, **sizes
    )
    params, config = load_target(tmp_path / "target")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 151, length).tolist() for length in rng.integers(1, 41, 50)]
    padded = torch.tensor([[0] * (40 - len(prompt)) + prompt for prompt in prompts])
    found = model.generate(padded, attention_mask=(padded > 0).long(), do_sample=False, max_new_tokens=256,
                           output_logits=True, return_dict_in_generate=True)  # fmt: skip
    texts = found.sequences[:, 40:].tolist()
    best, second = torch.stack(found.logits).topk(2).values.unbind(-1)
    assert (best - second).min().item() > TOLERANCE * best.max().item()
    assert np.mean([len(set(text)) for text in texts]) > 6
    common = {"max_new_tokens": 256, "batch_size": 50}
    step = target_step(config, (0, 2))
    alone = generate(None, params, prompts, config=Decoding(step), **common)
    assert [g.tokens for g in alone] == texts
    drafter = resolve_drafter(
        Drafter(block_size=4, num_hidden_layers=1, mask_token_id=0, target_layer_ids=(0, 2)), config
    )
    guesses = init_drafter(drafter, jax.random.key(0))
    together = generate(guesses, params, prompts, config=Decoding(step, drafter), **common)
    assert [g.tokens for g in together] == texts


WINDOWS = {"hidden_size": 64, **heads(4, 2, 16), "sliding_window": 24, "num_hidden_layers": 8,
           "tie_word_embeddings": False, "rope": {"rope_theta": 5e5}}  # fmt: skip
SMALL = {
    "gemma3": {**WINDOWS, "intermediate_size": 96, "query_pre_attn_scalar": 12},
    "gpt_oss": {**WINDOWS, "intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", ["text", "moe", "next", *SMALL])
def test_clear_choices_equal_those_of_transformers(kind, tmp_path):
    """20 prompts, 256 new tokens, up to each one's first choice that rounding might turn: nearly all of them."""
    if kind in SMALL:
        model = peers.write_target(tmp_path / "target", kind, **SMALL[kind])
    else:
        model = hybrid_of_transformers(tmp_path / "target", kind, 0)
    params, config = load_target(tmp_path / "target")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 151, length).tolist() for length in rng.integers(1, 41, 20)]
    step, common = target_step(config, (0, 5)), {"max_new_tokens": 256, "batch_size": 20}
    alone = [g.tokens for g in generate(None, params, prompts, config=Decoding(step), **common)]
    drafter = resolve_drafter(
        Drafter(block_size=4, num_hidden_layers=1, mask_token_id=0, target_layer_ids=(0, 5)), config
    )
    guesses = init_drafter(drafter, jax.random.key(0))
    together = [g.tokens for g in generate(guesses, params, prompts, config=Decoding(step, drafter), **common)]
    compared = 0
    for prompt, *texts in zip(prompts, alone, together, strict=True):
        found = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=256, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
        best, second = torch.cat(found.logits).topk(2).values.unbind(-1)
        unclear = torch.nonzero(best - second < 1e-4 * best.max())
        count = int(unclear[0]) if len(unclear) else 256
        expected = found.sequences[0, len(prompt) :].tolist()
        assert all(text[:count] == expected[:count] for text in texts)
        compared += count
    assert compared > 0.7 * 20 * 256
