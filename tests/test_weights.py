"""Checkpoints: other systems' names, shapes and keys, and every value bit for bit."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from specauf_jax.errors import SpecaufError
from specauf_jax.models.layers import cast
from specauf_jax.models.weights import (
    drafter_config,
    load_drafter,
    load_target,
    save_drafter,
    save_target,
    target_config,
)

TARGET = tiny.target_config()
DRAFTER = tiny.drafter_config()
LAYER = {  # D = 16, H·E = 32, G·E = 16, E = 8, F = 24
    "input_layernorm.weight": (16,),
    "post_attention_layernorm.weight": (16,),
    "self_attn.q_proj.weight": (32, 16),
    "self_attn.k_proj.weight": (16, 16),
    "self_attn.v_proj.weight": (16, 16),
    "self_attn.o_proj.weight": (16, 32),
    "self_attn.q_norm.weight": (8,),
    "self_attn.k_norm.weight": (8,),
    "mlp.gate_proj.weight": (24, 16),
    "mlp.up_proj.weight": (24, 16),
    "mlp.down_proj.weight": (16, 24),
}
"""Every system's names; PyTorch's shapes, [out, in]."""


def shapes(folder) -> dict:
    return {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture
def drafter(tmp_path):
    """A drafter's folder."""
    save_drafter(tiny.drafter_params(), DRAFTER, tmp_path / "drafter", provenance={"steps": 3})
    return tmp_path / "drafter"


@pytest.mark.parametrize("tied", [False, True])
def test_target_round_trip(tmp_path, tied):
    config = tiny.target_config(tie_word_embeddings=tied, rope_theta=5e5)
    params = tiny.target_params(config)
    save_target(params, config, tmp_path / "target", eos_token_id=2)
    loaded, found = load_target(tmp_path / "target")
    assert found == config == target_config(tmp_path / "target")
    assert tiny.same_bits(loaded, params)
    assert ("lm_head" in loaded) == (not tied)


def test_a_tied_head_written_twice_is_one_head(tmp_path):
    config = tiny.target_config(tie_word_embeddings=True)
    save_target(tiny.target_params(config), config, tmp_path / "target")
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "target/model.safetensors")
    assert tiny.same_bits(load_target(tmp_path / "target")[0], tiny.target_params(config))


def test_target_names(tmp_path):
    save_target(tiny.target_params(), TARGET, tmp_path / "target", eos_token_id=2)
    layers = {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in LAYER.items()}
    assert shapes(tmp_path / "target") == layers | {
        "model.embed_tokens.weight": (17, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (17, 16),
    }
    values = json.loads((tmp_path / "target" / "config.json").read_text())
    assert values["architectures"] == ["Qwen3ForCausalLM"] and values["eos_token_id"] == 2
    assert values["tie_word_embeddings"] is False


def test_drafter_round_trip(drafter):
    loaded, found = load_drafter(drafter)
    assert found == DRAFTER == drafter_config(drafter)
    assert tiny.same_bits(loaded, tiny.drafter_params())


def test_saved_again_is_the_same_file(drafter, tmp_path):
    params, config = load_drafter(drafter)
    save_drafter(params, config, tmp_path / "again", provenance={"steps": 3})
    for name in ("model.safetensors", "config.json", "specauf.json"):
        assert (tmp_path / "again" / name).read_bytes() == (drafter / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "drafter"]


def test_drafter_names(drafter):
    layers = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}
    expected = layers | {"fc.weight": (16, 32), "hidden_norm.weight": (16,), "norm.weight": (16,)}
    assert shapes(drafter) == expected and len(expected) == 3 + 11 * 2
    assert {tensor.dtype for tensor in load_file(drafter / "model.safetensors").values()} == {np.dtype(np.float32)}


def test_drafter_config_keys(drafter):
    assert json.loads((drafter / "config.json").read_text()) == {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": 4,
        "dflash_config": {"block_size": 4, "mask_token_id": 16, "target_layer_ids": [0, 1]},
        "num_target_layers": 3,
        "vocab_size": 17,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 32768,
        "layer_types": ["full_attention", "full_attention"],
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": None,
    }


def test_block_size_of_older_files(drafter):
    values = json.loads((drafter / "config.json").read_text())
    del values["dflash_config"]["block_size"]
    (drafter / "config.json").write_text(json.dumps(values))
    assert drafter_config(drafter).block_size == 4
    del values["block_size"]
    (drafter / "config.json").write_text(json.dumps(values))
    with pytest.raises(SpecaufError, match="has no block_size"):
        drafter_config(drafter)


def test_kernels_are_transposed_in_files(drafter):
    file = load_file(drafter / "model.safetensors")
    params, _ = load_drafter(drafter)
    x = np.arange(24, dtype=np.float32)
    up = file["layers.1.mlp.down_proj.weight"]  # PyTorch: y = W x, with W [out, in]
    by_hand = [sum(float(up[o, i]) * i for i in range(24)) for o in range(16)]
    np.testing.assert_allclose(x @ params["layers"]["mlp"]["down_proj"]["kernel"][1], by_hand, rtol=1e-5)
    taps = np.concatenate([np.full(16, 1.0), np.full(16, -2.0)])  # layer 0's features first
    by_hand = [sum(float(file["fc.weight"][o, i]) * taps[i] for i in range(32)) for o in range(16)]
    np.testing.assert_allclose(taps @ params["fc"]["kernel"], by_hand, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        params["layers"]["self_attn"]["q_norm"]["scale"][1], file["layers.1.self_attn.q_norm.weight"]
    )


def test_shards_are_one_model(tmp_path):
    save_target(tiny.target_params(), TARGET, tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    (tmp_path / "many").mkdir()
    shutil.copyfile(tmp_path / "one" / "config.json", tmp_path / "many" / "config.json")
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: x for name, x in tensors.items() if weight_map[name] == shard}
        save_file(part, tmp_path / "many" / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "many" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tiny.same_bits(load_target(tmp_path / "many")[0], load_target(tmp_path / "one")[0])


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files(drafter, stored):
    tensors = load_file(drafter / "model.safetensors")
    save_file({name: x.astype(stored) for name, x in tensors.items()}, drafter / "model.safetensors")
    loaded, _ = load_drafter(drafter)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(stored).astype(np.float32), tiny.drafter_params())
    assert tiny.same_bits(loaded, rounded)
    assert not tiny.same_bits(loaded, tiny.drafter_params())


def test_loaded_at_half_precision(drafter):
    loaded, _ = load_drafter(drafter, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype("bfloat16")}
    assert tiny.same_bits(loaded, cast(tiny.drafter_params(), "bfloat16"))


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_theta": 1e6}, 1e6),  # old
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),  # new
        ({"rope_parameters": {"rope_theta": 5000}, "rope_theta": 1.0}, 5000.0),  # the new one counts
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6}, 1e6),
    ],
)
def test_rope_of_either_style(tmp_path, rope, theta):
    save_target(tiny.target_params(), TARGET, tmp_path / "target")
    path = tmp_path / "target" / "config.json"
    values = {name: x for name, x in json.loads(path.read_text()).items() if not name.startswith("rope")}
    path.write_text(json.dumps(values | rope))
    assert target_config(tmp_path / "target").rope_theta == theta
    path.write_text(json.dumps(values))
    with pytest.raises(SpecaufError, match="has no rope_theta"):
        target_config(tmp_path / "target")


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
    ],
)
def test_rope_scaling_is_refused(tmp_path, scaling):
    save_target(tiny.target_params(), TARGET, tmp_path / "target")
    path = tmp_path / "target" / "config.json"
    values = {name: x for name, x in json.loads(path.read_text()).items() if not name.startswith("rope")}
    path.write_text(json.dumps(values | scaling))
    with pytest.raises(SpecaufError, match="RoPE of type"):
        target_config(tmp_path / "target")


def test_only_its_own_kind_is_replaced(drafter):
    before = (drafter / "model.safetensors").read_bytes()
    with pytest.raises(SpecaufError, match="already holds something else than a Qwen3ForCausalLM"):
        save_target(tiny.target_params(), TARGET, drafter)
    assert (drafter / "model.safetensors").read_bytes() == before
    save_drafter(tiny.drafter_params(seed=5), DRAFTER, drafter)
    assert tiny.same_bits(load_drafter(drafter)[0], tiny.drafter_params(seed=5))
    assert not (drafter / "specauf.json").exists()
