"""Every kind of target: rows, documents, blocks, trees and devices agree; files are read whatever their layout."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

from specauf_jax.commands.pretrain_settings import Pretrain
from specauf_jax.decoding.baselines import PromptLookup
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.errors import SpecaufError
from specauf_jax.flops import pretrain_flops
from specauf_jax.kernels.attention import cached_attention
from specauf_jax.kernels.block_attention import causal_attention
from specauf_jax.models.cpu import serving_params
from specauf_jax.models.experts import SparseMLP
from specauf_jax.models.families import FAMILIES
from specauf_jax.models.hf_target import read_target, text_config, write_target
from specauf_jax.models.layers import ExpertsMLP
from specauf_jax.models.rope import rope_frequencies
from specauf_jax.models.stored import MXFP4, stored
from specauf_jax.models.target import target_features, target_head, target_hidden, target_step
from specauf_jax.models.weights import load_target, save_target
from specauf_jax.parts import BLOCKS, Experts, Hybrid, RopeScaling

V, S = 17, 24
LINEAR = Hybrid(2, 2, 4, 6, 5, 3, 0.5)
SHARED = Experts(4, 2, 12, True, 10)
WINDOWS = {"num_hidden_layers": 4, "sliding_window": 5}
KINDS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"experts": Experts(4, 2, 12, False)},
    "qwen3_5": {"num_hidden_layers": 4, "hybrid": LINEAR},
    "qwen3_5_moe": {"num_hidden_layers": 4, "hybrid": LINEAR, "experts": SHARED},
    "qwen3_next": {"num_hidden_layers": 4, "hybrid": dataclasses.replace(LINEAR, interleaved=True), "experts": SHARED},
    "gemma3": {
        **WINDOWS,
        "layer_types": ("sliding_attention", "sliding_attention", "full_attention", "sliding_attention"),
        "rope_local_base_freq": 50.0,
        "rope_scaling": RopeScaling("linear", 8.0),
        "query_pre_attn_scalar": 12,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        **WINDOWS,
        "layer_types": ("sliding_attention", "full_attention") * 2,
        "experts": Experts(4, 2, 24, True, swiglu_limit=1.5),
        "rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=32, truncate=False),
    },
}
NEW = ("qwen3_5_moe", "qwen3_next", "gemma3", "gpt_oss")
CHAINS = {kind for kind in KINDS if "hybrid" in KINDS[kind]}


def config_of(kind, **changes):
    return tiny.target_config(model_type=kind, **(KINDS[kind] | changes))


def params_of(config, seed=0):
    """Random, with sinks and biases of some size, and states that fade slowly."""
    params = tiny.target_params(config, seed)
    if config.hybrid is not None:
        params["layers"]["linear"]["linear_attn"]["A_log"] -= 2.0
    return params


def drafted(config, seed=5):
    drafter = tiny.drafter_config(config, target_layer_ids=(0, 2))
    return drafter, tiny.drafter_params(drafter, seed=seed)


PROMPTS = [[1, 2, 3], [4, 1], [2, 2, 5, 1, 3], *(np.random.default_rng(n).integers(1, 6, n).tolist() for n in (33, 41))]


def test_every_kind_has_a_file_and_a_block():
    assert FAMILIES.keys() == BLOCKS.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", NEW)
def test_packed_rows_are_those_of_their_documents(kind):
    config = config_of(kind)
    params, batch = params_of(config), tiny.random_batch([(1, 9, 14)])
    rows = (batch.tokens, batch.positions, batch.document_ids)
    packed = target_hidden(params, *rows, config=config)
    for part in (slice(0, 1), slice(1, 10), slice(10, 24)):
        alone = target_hidden(params, *(x[:, part] for x in rows), config=config)
        assert tiny.largest_difference(packed[:, part], alone) < 5e-5


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("kind", NEW)
def test_blocks_read_what_rows_are(kind, serving):
    """Logits and taps of blocks of one and of five tokens are those of the row at one time."""
    config = config_of(kind)
    params, step = params_of(config), target_step(config, (0, 3))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, V, (2, S)), jnp.int32)
    positions, ones = jnp.broadcast_to(jnp.arange(S), (2, S)), jnp.ones_like(tokens)
    expected = target_head(params).logits(target_hidden(params, tokens, positions, ones, config=config))
    taps = target_features(params, tokens, positions, ones, config=config, layer_ids=(0, 3))
    if serving:
        params = serving_params(params)
    read, cache, edges = jax.jit(step), step.init_cache(2, S), (0, 5, 10, 11, 12, 17, 22, S)
    for i, j in zip(edges, edges[1:], strict=False):
        logits, seen, cache = read(params, tokens[:, i:j], positions[:, i:j], cache)
        cache = step.settle(cache, jnp.full(2, j - i)) if hasattr(step, "settle") else cache
        assert tiny.largest_difference((logits, seen), (expected[:, i:j], taps[:, i:j])) < 5e-5


EXACT = [(kind, how) for kind in NEW for how in ("chain", "lookup", "tree") if how != "tree" or kind not in CHAINS]


@pytest.mark.parametrize(("kind", "how"), EXACT)
def test_decoding_is_exact(kind, how):
    """Texts longer than a window, prompts of several chunks, rows that are refilled; right and wrong guesses."""
    config = config_of(kind)
    params, (drafter, draft) = params_of(config), drafted(config)
    step, common = target_step(config, (0, 2)), {"max_new_tokens": 24, "batch_size": 2}
    expected = generate(None, params, PROMPTS, config=Decoding(step), **common)
    decoding = Decoding(step, PromptLookup() if how == "lookup" else drafter, tree_nodes=7 if how == "tree" else None)
    found = generate(None if how == "lookup" else draft, params, PROMPTS, config=decoding, **common)
    assert [g.tokens for g in found] == [g.tokens for g in expected]
    assert how == "chain" or sum(sum(g.accepted) for g in found) > (20 if how == "lookup" else 4)


@pytest.mark.parametrize("kind", ["gemma3", "gpt_oss"])
def test_a_tree_is_read_as_its_paths(kind):
    """Logits of every node are those of the chain that leads to it: within windows that end inside the tree, too."""
    config = config_of(kind)
    params, step = params_of(config), target_step(config, (0,))
    rng = np.random.default_rng(3)
    prompt, nodes = rng.integers(1, V, (1, 9)), rng.integers(1, V, 8)
    parents, depths = [-1, 0, 0, 1, 3, 4, 5, 6], [0, 1, 1, 2, 3, 4, 5, 6]
    paths = []
    for node in range(8):
        path = [node]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        paths.append(path[::-1])
    sees = np.zeros((1, 8, 8), bool)
    for node, path in enumerate(paths):
        sees[0, node, path] = True
    _, _, cache = step(params, jnp.asarray(prompt), jnp.arange(9)[None], step.init_cache(1, 32))
    found, _, _ = step.read_tree(
        params, jnp.asarray(nodes)[None], jnp.full((1, 1), 9), jnp.asarray(depths)[None], jnp.asarray(sees), cache
    )
    for node, path in enumerate(paths):
        text = jnp.asarray([*prompt[0], *nodes[path]])[None]
        ones = jnp.ones_like(text)
        states = target_hidden(params, text, jnp.arange(text.shape[1])[None], ones, config=config)
        assert tiny.largest_difference(found[0, node], target_head(params).logits(states)[0, -1]) < 5e-5


def by_hand(params, config, tokens):
    """Final-normed states of one text by Gemma 3 or gpt-oss, in float64: each formula written out once."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    gemma, E = config.model_type == "gemma3", config.head_dim
    T, x = len(tokens), params["embed_tokens"]["embedding"][tokens] * (np.sqrt(config.hidden_size) if gemma else 1)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * (scale + (1 if gemma else 0))

    def rope(x, window):
        frequencies, amplitude = rope_frequencies(config)
        if gemma and window:
            frequencies, amplitude = config.rope_local_base_freq ** (-np.arange(0, E, 2) / E), 1.0
        angles = np.arange(T)[:, None, None] * frequencies
        left, right = x[..., : E // 2], x[..., E // 2 :]
        cos, sin = amplitude * np.cos(angles), amplitude * np.sin(angles)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    def mlp(layer, h):
        if gemma:
            gate, up = (h @ layer[name]["kernel"] for name in ("gate_proj", "up_proj"))
            gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            return gelu * up @ layer["down_proj"]["kernel"]
        experts, out = layer["experts"], np.zeros_like(h)
        scores, limit = h @ layer["router"]["kernel"] + layer["router"]["bias"], config.experts.swiglu_limit
        for t in range(T):
            chosen = np.argsort(-scores[t])[: config.experts.num_experts_per_tok]
            shares = np.exp(scores[t, chosen])
            for share, e in zip(shares / shares.sum(), chosen, strict=True):
                both = h[t] @ experts["gate_up_proj"][e] + experts["gate_up_proj_bias"][e]
                gate, up = np.minimum(both[::2], limit), np.clip(both[1::2], -limit, limit)
                inner = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
                out[t] += share * (inner @ experts["down_proj"][e] + experts["down_proj_bias"][e])
        return out

    for i, window in enumerate(config.windows):
        layer = jax.tree.map(lambda p, i=i: p[i], params["layers"])
        net, h = layer["self_attn"], norm(x, layer["input_layernorm"]["scale"])

        def projected(name, net=net, h=h):
            found = (h @ net[name]["kernel"] + net[name].get("bias", 0)).reshape(T, -1, E)
            part = net.get(f"{name[0]}_norm")
            return found if part is None else norm(found, part["scale"])

        q, k = rope(projected("q_proj"), window), rope(projected("k_proj"), window)
        q = q * np.sqrt(E / (config.query_pre_attn_scalar or E))
        seen = np.arange(T)[:, None] - np.arange(T)
        visible = (seen >= 0) & (seen < (window or T))
        sinks = net.get("sinks", np.full(config.num_attention_heads, -np.inf))
        mixed = by_scores(q[None], k[None], projected("v_proj")[None], visible[None], sinks)[0]
        output = mixed.reshape(T, -1) @ net["o_proj"]["kernel"] + net["o_proj"].get("bias", 0)
        if gemma:
            x = x + norm(output, layer["post_attention_layernorm"]["scale"])
            output = mlp(layer["mlp"], norm(x, layer["pre_feedforward_layernorm"]["scale"]))
            x = x + norm(output, layer["post_feedforward_layernorm"]["scale"])
        else:
            x = x + output
            x = x + mlp(layer["mlp"], norm(x, layer["post_attention_layernorm"]["scale"]))
    return norm(x, params["norm"]["scale"])


@pytest.mark.parametrize("kind", ["gemma3", "gpt_oss"])
def test_states_are_those_of_formulas(kind):
    config = config_of(kind)
    params = jax.tree.map(lambda x: 2 * x, params_of(config))  # so that limits and tanh matter
    tokens = np.random.default_rng(0).integers(1, V, 20)
    ones = jnp.ones((1, 20), jnp.int32)
    found = target_hidden(params, jnp.asarray(tokens)[None], jnp.arange(20)[None], ones, config=config)[0]
    expected = by_hand(params, config, tokens)
    assert tiny.largest_difference(found, expected) < 1e-4 * np.abs(expected).max()


def test_the_shared_expert_has_a_gate():
    config = config_of("qwen3_5_moe")
    part = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params_of(config)["layers"]["full"]["mlp"])
    x = np.random.default_rng(0).standard_normal((1, 5, 16))
    graphdef = nnx.split(nnx.eval_shape(lambda: ExpertsMLP(config, rngs=nnx.Rngs(0))))[0]
    mlp = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), part))
    alone = SparseMLP.__call__(mlp, jnp.asarray(x, jnp.float32))
    gate, up = (x @ part["shared_expert"][name]["kernel"] for name in ("gate_proj", "up_proj"))
    shared = gate / (1 + np.exp(-gate)) * up @ part["shared_expert"]["down_proj"]["kernel"]
    expected = alone + shared / (1 + np.exp(-x @ part["shared_expert_gate"]["kernel"]))
    assert tiny.largest_difference(mlp(jnp.asarray(x, jnp.float32)), expected) < 1e-5


def test_projections_side_by_side_are_those_apart():
    """Qwen3-Next's two products are Qwen3.5's four, in the order of the key heads."""
    apart = config_of("qwen3_5_moe")
    params, merged = params_of(apart), config_of("qwen3_next")
    net = params["layers"]["linear"]["linear_attn"]
    keys, Dk = apart.hybrid.linear_num_key_heads, apart.hybrid.linear_key_head_dim

    def of_key(x):
        return x.reshape(*x.shape[:-1], keys, -1)

    q, k, v = jnp.split(net["in_proj_qkv"]["kernel"], (keys * Dk, 2 * keys * Dk), axis=-1)
    one = jnp.concatenate([of_key(x) for x in (q, k, v, net["in_proj_z"]["kernel"])], axis=-1)
    two = jnp.concatenate([of_key(net[name]["kernel"]) for name in ("in_proj_b", "in_proj_a")], axis=-1)
    others = {name: x for name, x in net.items() if not name.startswith("in_proj")}
    found = {name: {"kernel": x.reshape(*x.shape[:-2], -1)} for name, x in (("in_proj_qkvz", one), ("in_proj_ba", two))}
    linear = params["layers"]["linear"] | {"linear_attn": others | found}
    again = params | {"layers": params["layers"] | {"linear": linear}}
    batch = tiny.random_batch([(9, 15)])
    rows = (batch.tokens, batch.positions, batch.document_ids)
    expected = target_hidden(params, *rows, config=apart)
    assert tiny.largest_difference(target_hidden(again, *rows, config=merged), expected) < 1e-5


def by_scores(q, k, v, visible, sinks):
    """Softmax attention in float64, with a score that leads nowhere."""
    q, k, v, sinks = (np.asarray(x, np.float64) for x in (q, k, v, sinks))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        seen = np.flatnonzero(visible[b, t])
        scores = np.append(k[b, seen, g] @ q[b, t, h] / np.sqrt(q.shape[-1]), sinks[h])
        shares = np.exp(scores - scores.max())
        out[b, t, h] = (shares / shares.sum())[:-1] @ v[b, seen, g]
    return out


def test_sinks_take_their_share():
    rng = np.random.default_rng(0)
    B, T, H, G, E = 2, 37, 4, 2, 8
    q, k, v = (rng.standard_normal((B, T, heads, E)).astype(np.float32) for heads in (H, G, G))
    sinks = np.array([-30.0, 0.0, 1.0, 4.0], np.float32)
    index = np.arange(T)
    start = np.maximum(index - 8, np.where(index >= 20, 20, 0)) * np.ones((B, 1), int)
    visible = (index >= start[..., None]) & (index <= index[:, None])
    expected = by_scores(q, k, v, visible, sinks)
    assert tiny.largest_difference(causal_attention(q, k, v, jnp.asarray(start), jnp.asarray(sinks)), expected) < 1e-5
    k_cache, v_cache = (np.zeros((3, B, G, 96, E), np.float32) for _ in range(2))
    k_cache[1, :, :, :T], v_cache[1, :, :, :T] = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    stop = np.broadcast_to(index + 1, (B, T))
    found = cached_attention(q, k_cache, v_cache, 1, start, stop, sinks=jnp.asarray(sinks))
    assert tiny.largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_what_was_written(kind, tmp_path):
    config = config_of(kind)
    params = params_of(config)
    save_target(params, config, tmp_path / "target")
    read, found = load_target(tmp_path / "target")
    assert found == config and tiny.same_bits(read, params)
    assert read_target(write_target(config), "config.json") == config


def rewritten(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: np.ascontiguousarray(x) for name, x in change(tensors).items()}, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_moe"])
def test_experts_in_one_tensor_are_read(kind, tmp_path):
    config = config_of(kind)
    params = params_of(config)
    save_target(params, config, tmp_path / "target")

    def fused(tensors):
        found = {name: x for name, x in tensors.items() if ".experts." not in name}
        for i in range(config.num_hidden_layers):
            at, X = f"model.layers.{i}.mlp.experts", config.experts.num_experts
            parts = {
                n: np.stack([tensors[f"{at}.{x}.{n}_proj.weight"] for x in range(X)]) for n in ("gate", "up", "down")
            }
            found[f"{at}.gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
            found[f"{at}.down_proj"] = parts["down"]
        return found

    rewritten(tmp_path / "target", fused)
    assert tiny.same_bits(load_target(tmp_path / "target")[0], params)

    def short(tensors):
        name = "model.layers.0.mlp.experts.gate_up_proj"
        return tensors | {name: tensors[name][:, :-1]}

    rewritten(tmp_path / "target", short)
    with pytest.raises(SpecaufError, match=r"gate_up_proj has shape \(4, 23, 16\)"):
        load_target(tmp_path / "target")


def test_mxfp4_is_read(tmp_path):
    """Numbers of four bits (a sign, two of exponent, one of mantissa) by an exponent of 32 of them, as by hand."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "experts": Experts(4, 2, 32, True, swiglu_limit=7.0)}
    config = config_of("gpt_oss", **sizes)
    params = params_of(config)
    save_target(params, config, tmp_path / "target")
    rng, expected = np.random.default_rng(0), {}

    def quantised(tensors):
        found = {}
        for name, x in tensors.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                found[name] = x
                continue
            X, inputs, outputs = x.shape
            blocks = rng.integers(0, 256, (X, outputs, inputs // 32, 16), dtype=np.uint8)
            scales = rng.integers(119, 126, blocks.shape[:3], dtype=np.uint8)
            found |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            whole = np.zeros(x.shape)
            for place in np.ndindex(blocks.shape):
                expert, row, block, byte = place
                for half in (0, 1):
                    bits = (int(blocks[place]) >> (4 * half)) & 15
                    sign, exponent, mantissa = bits >> 3, (bits >> 1) & 3, bits & 1
                    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
                    scale = 2.0 ** (int(scales[place[:3]]) - 127)
                    whole[expert, 32 * block + 2 * byte + half, row] = (-1) ** sign * size * scale
            expected[name] = whole
        return found

    rewritten(tmp_path / "target", quantised)
    values = json.loads((tmp_path / "target/config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "target/config.json").write_text(json.dumps(values))
    read, found = load_target(tmp_path / "target")
    assert found == config
    experts = read["layers"]["mlp"]["experts"]
    for i in range(config.num_hidden_layers):
        for name in ("gate_up_proj", "down_proj"):
            np.testing.assert_array_equal(experts[name][i], expected[f"model.layers.{i}.mlp.experts.{name}"])
    with pytest.raises(SpecaufError, match="of 48 inputs in MXFP4"):
        stored("a", (4, 48, 64), {"a_blocks", "a_scales"})
    part = MXFP4("a", (4, 64, 64))
    blocks, scales = rng.integers(0, 256, (4, 64, 2, 16), dtype=np.uint8), np.full((4, 64, 2), 120, np.uint8)
    held = {"a_blocks": blocks, "a_scales": scales}
    every, cut = slice(0, 4), (slice(1, 3), slice(40, 63), slice(5, 9))
    whole = part.read(lambda name, box: held[name][box], (every, slice(0, 64), slice(0, 64)))
    np.testing.assert_array_equal(part.read(lambda name, box: held[name][box], cut), whole[cut])
    values["quantization_config"] = {"quant_method": "fp8"}
    with pytest.raises(SpecaufError, match="quantization_config of 'fp8'"):
        read_target(values, "config.json")


def published(name):
    """Keys of published config.json files that concern the architecture."""
    gemma = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32_768,
             "model_type": "gemma3_text", "rms_norm_eps": 1e-6, "rope_local_base_freq": 1e4, "rope_theta": 1e6,
             "query_pre_attn_scalar": 256, "sliding_window": 512, "vocab_size": 262_144,
             "rope_scaling": None}  # fmt: skip
    return {
        "gemma-3-1b": {**gemma, "architectures": ["Gemma3ForCausalLM"], "hidden_size": 1152,
                       "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
                       "num_hidden_layers": 26, "sliding_window_pattern": 6, "attn_logit_softcapping": None},
        "gemma-3-4b": {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
                       "text_config": {"hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text",
                                       "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                                       "sliding_window": 1024}},
        "gpt-oss-20b": {"architectures": ["GptOssForCausalLM"], "attention_bias": True, "experts_per_token": 4,
                        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
                        "intermediate_size": 2880, "max_position_embeddings": 131_072, "model_type": "gpt_oss",
                        "layer_types": ["sliding_attention", "full_attention"] * 12, "num_attention_heads": 64,
                        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
                        "num_local_experts": 32, "quantization_config": {"quant_method": "mxfp4"}, "rms_norm_eps": 1e-5,
                        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
                                         "original_max_position_embeddings": 4096, "truncate": False},
                        "rope_theta": 150_000, "sliding_window": 128, "swiglu_limit": 7.0, "vocab_size": 201_088,
                        "tie_word_embeddings": False},
    }[name]  # fmt: skip


def test_published_files_are_read():
    """Layers and numbers of parameters of what is published."""
    one = read_target(published("gemma-3-1b"), "config.json")
    assert [i for i, window in enumerate(one.windows) if window is None] == [5, 11, 17, 23]
    assert one.windows[0] == 512 and one.tie_word_embeddings and one.rope_local_base_freq == 1e4
    four = read_target(published("gemma-3-4b"), "config.json")
    assert (four.vocab_size, four.num_key_value_heads, four.head_dim) == (262_208, 4, 256)
    assert four.rope_scaling == RopeScaling("linear", 8.0) and four.windows[:6] == (1024,) * 5 + (None,)
    assert text_config(published("gemma-3-4b"))["sliding_window"] == 1024
    oss = read_target(published("gpt-oss-20b"), "config.json")
    assert oss.windows == (128, None) * 12 and oss.experts == Experts(32, 4, 2880, True, swiglu_limit=7.0)
    assert oss.rope_scaling.factor == 32 and not oss.rope_scaling.truncate


REFUSED = {
    "another activation": ("gemma3", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
    "capped scores": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "capped logits": ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    "both directions": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "no window": ("gemma3", {"sliding_window": None}, "has no sliding_window"),
    "two local bases": ("gemma3", {"rope_local_base_freq": 7.0}, "rope_local_base_freq is 7.0"),
    "a stretched local base": ("gemma3", {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}}}, "a base alone"),
    "an unknown layer": ("gemma3", {"layer_types": ["chunked_attention"] * 4}, "layer_types has 'chunked_attention'"),
    "too few layers": ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "3 layer_types for 4 layers"),
    "no layers": ("gpt_oss", {"layer_types": []}, "0 layer_types for 4 layers"),
    "two numbers of experts": ("gpt_oss", {"experts_per_token": 3}, "experts_per_token and num_experts_per_tok differ"),
    "weights as they are": ("qwen3_5_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
    "two patterns": ("gemma3", {"layer_types": None, "sliding_window_pattern": 2, "_sliding_window_pattern": 3},
                     "differ"),
    "no biases": ("gpt_oss", {"attention_bias": False}, "attention_bias is False"),
    "another quantisation": ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "of 'awq'"),
    "no shared expert": ("qwen3_5_moe", {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
    "dense layers": ("qwen3_next", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    "a window of Qwen": ("qwen3_next", {"use_sliding_window": True}, "use_sliding_window"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_computed_is_refused(kind, changes, message):
    values = write_target(config_of(kind))
    assert read_target(values, "config.json") == config_of(kind)
    with pytest.raises(SpecaufError, match=message):
        read_target(values | changes, "config.json")


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_gemma_that_sees_is_read_by_its_text(prefix, tmp_path):
    config = config_of("gemma3")
    params = params_of(config)
    save_target(params, config, tmp_path / "target")
    beside = {"vision_tower.x.weight": np.ones(3, np.float32), "multi_modal_projector.y": np.ones(2, np.float32)}
    rewritten(
        tmp_path / "target",
        lambda tensors: {name.replace("model.", prefix, 1): x for name, x in tensors.items()} | beside,
    )
    text = json.loads((tmp_path / "target/config.json").read_text())
    del text["architectures"]
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (tmp_path / "target/config.json").write_text(json.dumps(whole))
    read, found = load_target(tmp_path / "target")
    assert found == config and tiny.same_bits(read, params)


def test_a_target_has_what_its_kind_has():
    for kind, changes in {
        "qwen3": {"query_pre_attn_scalar": 8},
        "qwen3_5": {"layer_types": ("full_attention",) * 4},
        "gpt_oss": {"rope_local_base_freq": 50.0},
        "gemma3": {"rope_local_base_freq": None},
        "qwen3_moe": {"experts": SHARED},
        "qwen3_5_moe": {"experts": Experts(4, 2, 12, False, 10)},
        "qwen3_next": {"hybrid": LINEAR},
        "llama": {"sliding_window": 5},
    }.items():
        with pytest.raises(SpecaufError, match="|".join([*changes, "norm_topk", "shared", "interleaved"])):
            config_of(kind, **changes)


def test_positions_of_gemma_are_told_stretched():
    assert read_target(published("gemma-3-4b"), "config.json").context_length == 131_072


def test_windows_are_counted_by_what_they_see():
    """Operations of scores, over all positions of a row."""
    wide, narrow = (config_of("gpt_oss", sliding_window=window) for window in (10_000, 128))
    flops = [pretrain_flops(config, rows=1, sequence_length=3072)["target"] for config in (wide, narrow)]
    index = np.arange(3072)
    hidden = 2 * (index - np.minimum(index, 128)).sum()  # of the two layers with a window
    per_score = 3 * 4 * wide.num_attention_heads * wide.head_dim
    assert flops[0] - flops[1] == pytest.approx(per_score * hidden, rel=1e-3)


def test_what_files_leave_out():
    """gpt-oss without layer_types and limit; Qwen3.5-MoE without a dense width and norm_topk_prob."""
    values = write_target(config_of("gpt_oss", experts=Experts(4, 2, 24, True, swiglu_limit=7.0)))
    del values["layer_types"], values["swiglu_limit"]
    found = read_target(values, "config.json")
    assert found.windows == (5, None, 5, None) and found.experts.swiglu_limit == 7.0
    values = write_target(config_of("qwen3_5_moe"))
    del values["intermediate_size"], values["norm_topk_prob"]
    found = read_target(values, "config.json")
    assert found.intermediate_size == 2 * 12 + 10 and found.experts.norm_topk_prob


def test_embeddings_are_scaled_in_their_own_precision():
    """Gemma's factor is a number of the parameters' precision."""
    config = config_of("gemma3", hidden_size=15)
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params_of(config))
    scaled = dict(params, embed_tokens={"embedding": params["embed_tokens"]["embedding"] * 0 + 1})
    tokens, ones = jnp.ones((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32)
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: -jnp.ones_like(x) if "post_" in str(path) else x, scaled["layers"]
    )  # what layers write counts for nothing
    found = target_features(scaled | {"layers": silent}, tokens, 0 * ones, ones, config=config, layer_ids=(0,))
    assert float(found[0, 0, 0]) == float(jnp.asarray(15**0.5, jnp.bfloat16)) != 15**0.5


def test_targets_with_sinks_are_not_pretrained():
    with pytest.raises(SpecaufError, match="gpt_oss"):
        Pretrain(data="d", out="o", target=config_of("gpt_oss"))


MESHES = """
import json, jax, test_families as t, tiny
from specauf_jax.config import Mesh
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.models.target import target_features, target_step
from specauf_jax.sharding import batch_sharding, make_mesh, parameter_sharding

batch = tiny.random_batch([(9, 15), (24,), (20,), (3, 3)] * 2)
rows = (batch.tokens, batch.positions, batch.document_ids)
for kind in t.NEW:
    config = t.config_of(kind)
    params, (drafter, draft) = t.params_of(config), t.drafted(config)
    features = jax.jit(lambda p, *rows: target_features(p, *rows, config=config, layer_ids=(0, 3)))
    expected = features(params, *rows)
    step = target_step(config, (0, 2))
    common = {"max_new_tokens": 8, "batch_size": 8}
    texts = [g.tokens for g in generate(None, params, t.PROMPTS, config=Decoding(step), **common)]
    mesh = make_mesh(Mesh(fsdp=2, tensor=4))
    place = lambda tree: jax.device_put(tree, parameter_sharding(tree, mesh))
    found = features(place(params), *jax.device_put(rows, batch_sharding(mesh)))
    decoding = Decoding(step, drafter, tree_nodes=None if kind in t.CHAINS else 6)
    written = generate(place(draft), place(params), t.PROMPTS, config=decoding, mesh=mesh, **common)
    print(json.dumps({"kind": kind, "difference": tiny.largest_difference(found, expected),
                      "same": [g.tokens for g in written] == texts}))
"""


@pytest.mark.long
def test_meshes_compute_the_same():
    lines = [json.loads(line) for line in tiny.on_eight_devices(MESHES).splitlines()]
    assert [line["kind"] for line in lines] == list(NEW)
    assert all(line["difference"] < 5e-5 and line["same"] for line in lines), lines
