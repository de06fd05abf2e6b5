"""Checkpoints: other systems' names, shapes and keys, and every value bit for bit."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from specauf_jax.errors import SpecaufError, SpecaufWarning
from specauf_jax.models.heads import make_head
from specauf_jax.models.heads.dflash import DFlash
from specauf_jax.models.layers import cast
from specauf_jax.models.weights import (
    drafter_config,
    load_drafter,
    load_target,
    save_drafter,
    save_target,
    target_config,
)
from specauf_jax.parts import RopeScaling

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


@pytest.mark.parametrize("change", [lambda x: x + 1e-3, lambda x: np.concatenate([x, x])], ids=["values", "shape"])
def test_a_head_of_its_own_under_a_tied_config_is_refused(tmp_path, change, monkeypatch):
    monkeypatch.setattr("specauf_jax.models.weights._ROWS", 5)
    config = tiny.target_config(tie_word_embeddings=True)
    save_target(tiny.target_params(config), config, tmp_path / "target")
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    other = {"lm_head.weight": change(tensors["model.embed_tokens.weight"])}
    save_file(tensors | other, tmp_path / "target/model.safetensors")
    with pytest.raises(SpecaufError, match="says tie_word_embeddings, but lm_head.weight is not"):
        load_target(tmp_path / "target")


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
        ({"rope_parameters": {"rope_theta": 5000}, "rope_theta": 5e3}, 5000.0),  # both
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
    with pytest.raises(SpecaufError, match="rope_theta is missing"):
        target_config(tmp_path / "target")


def rewritten(folder, **changes):
    """config.json of `folder` with other values; None deletes a key."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: x for name, x in values.items() if x is not None}))
    return folder


LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8192)
YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=4096, beta_fast=16.0, truncate=False)


@pytest.mark.parametrize("scaling", [RopeScaling("linear", factor=2.0), LLAMA3, YARN], ids=lambda s: s.rope_type)
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_every_architecture_and_scaling_round_trips(tmp_path, model_type, scaling):
    config = tiny.target_config(model_type=model_type, rope_scaling=scaling)
    params = tiny.target_params(config)
    save_target(params, config, tmp_path / "target")
    loaded, found = load_target(tmp_path / "target")
    assert found == config and tiny.same_bits(loaded, params)
    names = shapes(tmp_path / "target")
    assert ("model.layers.2.self_attn.q_norm.weight" in names) == (model_type == "qwen3")
    assert ("model.layers.2.self_attn.k_proj.bias" in names) == (model_type == "qwen2")
    assert names.get("model.layers.0.self_attn.q_proj.bias", (32,)) == (32,)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        },
    ],
)
def test_rope_scaling_of_either_style(tmp_path, keys):
    save_target(tiny.target_params(), TARGET, tmp_path / "target")
    rewritten(tmp_path / "target", **dict.fromkeys(("rope_theta", "rope_parameters", "rope_scaling")) | keys)
    found = target_config(tmp_path / "target")
    assert (found.rope_theta, found.rope_scaling) == (1e6, RopeScaling("linear", factor=2.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": 2e4}, "rope_theta is 10000.0 and 20000.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "disagree"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "RoPE of type 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "has no factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "short_factor": [1]}}, "short_factor"),
        ({"architectures": ["MixtralForCausalLM"]}, "architecture 'MixtralForCausalLM'"),
        ({"architectures": ["LlamaForCausalLM"]}, "model_type 'qwen3' under LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"vocab_size": 18}, "lm_head.weight has shape (17, 16)"),
        ({"num_hidden_layers": 2}, "11 unknown, first model.layers.2"),
        ({"tie_word_embeddings": None, "model_type": None, "num_hidden_layers": 4}, "11 missing, first model.layers.3"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, changes, said):
    save_target(tiny.target_params(), TARGET, tmp_path / "target")
    with pytest.raises(SpecaufError) as refused:
        load_target(rewritten(tmp_path / "target", **changes))
    assert said in refused.value.found and str(tmp_path) in refused.value.found


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    save_target(tiny.target_params(), TARGET, tmp_path / "target")
    tokenizer = {"model": {"vocab": {"a": 0, "b": 16}}, "added_tokens": [{"id": 16}]}
    (tmp_path / "target" / "tokenizer.json").write_text(json.dumps(tokenizer))
    load_target(tmp_path / "target")
    tokenizer["added_tokens"] = [{"id": 17}]  # a padding token, which no text holds
    (tmp_path / "target" / "tokenizer.json").write_text(json.dumps(tokenizer))
    load_target(tmp_path / "target")
    tokenizer = {"model": {"vocab": {"a": 0, "b": 17}}}
    (tmp_path / "target" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SpecaufError, match="ids up to 17, the model 17 embeddings"):
        load_target(tmp_path / "target")


def test_nothing_is_put_on_a_device_before_all_is_checked(tmp_path, monkeypatch):
    save_target(tiny.target_params(), TARGET, tmp_path / "target")
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    save_file(tensors | {"model.norm.weight": np.ones(16, np.int8)}, tmp_path / "target" / "model.safetensors")
    placed = []
    monkeypatch.setattr("specauf_jax.models.tensors._Leaf.place", lambda *args: placed.append(args))
    with pytest.raises(SpecaufError, match="norm.weight is stored as I8"):
        load_target(tmp_path / "target")
    assert not placed


@pytest.mark.parametrize("piece", [1, 100, 1000, 10_000])
def test_pieces_of_any_size_are_one_model(tmp_path, monkeypatch, piece):
    save_target(tiny.target_params(), TARGET, tmp_path / "target")
    monkeypatch.setattr("specauf_jax.models.tensors.PIECE_BYTES", piece)
    told = []
    loaded, _ = load_target(tmp_path / "target", progress=lambda *numbers: told.append(numbers))
    assert tiny.same_bits(loaded, tiny.target_params())
    count = sum(x.size for x in jax.tree.leaves(loaded))
    assert told[-1] == (count, count) and len(told) > 1


DOMINO = tiny.domino_config(gru_hidden_dim=5, pure_draft_prefix_len=2)


@pytest.mark.parametrize(("layout", "name"), [("zlab", "DFlashDraftModel"), ("specforge", "DominoDraftModel")])
def test_domino_round_trip(tmp_path, layout, name):
    params = tiny.drafter_params(DOMINO)
    save_drafter(params, DOMINO, tmp_path / "domino", layout=layout)
    loaded, found = load_drafter(tmp_path / "domino")
    assert found == DOMINO and tiny.same_bits(loaded, params)
    found = shapes(tmp_path / "domino")
    assert {name: shape for name, shape in found.items() if name.startswith(("prefix_gru", "embed_proj"))} == {
        "prefix_gru.weight_ih_l0": (15, 16),
        "prefix_gru.weight_hh_l0": (15, 5),
        "embed_proj.0.weight": (6, 21),
        "embed_proj.2.weight": (17, 6),
    }
    values = json.loads((tmp_path / "domino" / "config.json").read_text())
    assert values["architectures"] == [name] and values["emb_dim"] == 6
    assert values["dflash_config"] == {
        "block_size": 4,
        "mask_token_id": 16,
        "target_layer_ids": [0, 1],
        "projector_type": "domino",
        "emb_dim": 6,
        "gru_hidden_dim": 5,
        "pure_draft_prefix_len": 2,
        "shift_label": True,
    }


def test_an_early_domino_file_keeps_its_head_under_a_prefix(tmp_path):
    save_drafter(tiny.drafter_params(DOMINO), DOMINO, tmp_path / "domino")
    path = tmp_path / "domino" / "model.safetensors"
    head = ("prefix_gru", "embed_proj")
    renamed = {f"logit_head.{n}" if n.startswith(head) else n: x for n, x in load_file(path).items()}
    save_file(renamed, path)
    assert tiny.same_bits(load_drafter(tmp_path / "domino")[0], tiny.drafter_params(DOMINO))


def test_domino_never_becomes_a_plain_drafter(tmp_path):
    params = tiny.drafter_params(DOMINO)
    with pytest.raises(SpecaufError, match="(?s)prefix_gru.*those of a DFlash drafter"):
        save_drafter(params, DRAFTER, tmp_path / "plain")
    body = {name: x for name, x in params.items() if name in tiny.drafter_params()}
    with pytest.raises(SpecaufError, match="(?s)those of a Domino drafter.*prefix_gru"):
        save_drafter(body, DOMINO, tmp_path / "plain")
    with pytest.raises(SpecaufError, match="unknown field 'emb_dim' of DFlash"):
        make_head("dflash", ("emb_dim=6",))
    with pytest.raises(SpecaufError, match="a Domino drafter for the layout of speculators"):
        save_drafter(params, DOMINO, tmp_path / "plain", layout="speculators", verifier="target")
    assert not (tmp_path / "plain").exists()
    save_drafter(params, DOMINO, tmp_path / "domino")
    values = json.loads((tmp_path / "domino" / "config.json").read_text())
    # What is left reads as plain DFlash: the head gives it away.
    values["dflash_config"] = {key: values["dflash_config"][key] for key in ("mask_token_id", "target_layer_ids")}
    with pytest.raises(SpecaufError, match="4 unknown, first embed_proj.0.weight"):
        load_drafter(rewritten(tmp_path / "domino", **values))


# ---------------------------------------------------------------------------------------------
# Keys of config.json


def edited(folder, changes: dict, inside: dict | None = None):
    """config.json of `folder` with other values, and others in dflash_config; `...` deletes a key."""
    values = json.loads((folder / "config.json").read_text())
    for place, new in ((values, changes), (values.get("dflash_config") or {}, inside or {})):
        place |= new
        for key in [key for key, value in place.items() if value is ...]:
            del place[key]
    (folder / "config.json").write_text(json.dumps(values))
    return folder


WINDOWS = {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    ("changes", "inside", "said"),
    [
        ({}, {"causal": True}, "dflash_config: causal is True"),
        ({"causal": True}, {}, "config.json: causal is True"),
        ({}, {"use_swa": True, "swa_window_size": 8}, "use_swa is True"),
        ({"is_causal": True}, {}, "is_causal is True"),
        (WINDOWS | {"is_causal": False}, {}, "is_causal is False"),
        (WINDOWS, {"is_causal": False}, "dflash_config: is_causal is False"),
        (WINDOWS | {"sliding_window_non_causal": True}, {}, "sliding_window_non_causal is True"),
        ({"final_logit_softcapping": 30.0}, {}, "final_logit_softcapping is 30.0"),
        ({"attn_logit_softcapping": 50.0}, {}, "attn_logit_softcapping is 50.0"),
        ({"output_multiplier": 2.0}, {}, "output_multiplier is 2.0"),
        ({}, {"output_multiplier": 2.0}, "dflash_config: output_multiplier is 2.0"),
        ({"is_neox_style": False}, {}, "is_neox_style is False"),
        ({"partial_rotary_factor": 0.5}, {}, "partial_rotary_factor is 0.5"),
        ({"attention_sink_bias": True}, {}, "attention_sink_bias is True"),
        ({"draft_vocab_size": 9}, {}, "draft_vocab_size is 9"),
        ({"target_hidden_size": 32}, {}, "target_hidden_size is 32"),
        ({}, {"shift_labels": True}, "dflash_config: unknown key 'shift_labels' (did you mean 'shift_label'?)"),
        ({}, {"emb_dim": 6}, "dflash_config: unknown key 'emb_dim'"),
        ({"mask_token_id": 5}, {}, "mask_token_id is 16 in dflash_config, and mask_token_id 5 at the top level"),
        ({"target_layer_ids": [0, 2]}, {}, "target_layer_ids is [0, 1] in dflash_config"),
        ({"block_size": 8}, {}, "block_size is 4 in dflash_config, and block_size 8 at the top level"),
        ({}, {"num_target_layers": 4}, "num_target_layers is 4 in dflash_config"),
        ({"shift_label": False}, {"sample_from_anchor": True}, "sample_from_anchor is True in dflash_config"),
        ({}, {"shift_label": True, "query_zero_predicts_next": False}, "query_zero_predicts_next is False"),
        ({}, {"shift_label": 1}, "shift_label is 1"),
        ({}, {"projector_type": "dspark"}, "projector_type 'dspark'"),
    ],
)
def test_keys_that_ask_for_something_else_are_refused_by_name(drafter, changes, inside, said):
    with pytest.raises(SpecaufError) as refused:
        drafter_config(edited(drafter, changes, inside))
    assert said in refused.value.found and str(drafter) in refused.value.found


NEUTRAL = {
    "causal": False, "is_causal": False, "final_logit_softcapping": None, "output_multiplier": 1.0,
    "is_neox_style": True, "attention_sink_bias": False, "draft_vocab_size": 17, "target_hidden_size": 16,
    "torch_dtype": "bfloat16", "transformers_version": "5.8.1", "use_cache": True, "initializer_range": 0.02,
    "_name_or_path": "x", "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "pad_token_id": 1, "foo": None,
    "use_foo": False, "foo_factor": 1.0,
}  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_keys_that_ask_for_nothing_are_read_over(drafter, tmp_path):
    inside = {"use_swa": False, "swa_window_size": 4096, "causal": False, "mask_token": "<|mask|>", "foo": False}
    assert drafter_config(edited(drafter, NEUTRAL, inside)) == DRAFTER
    save_target(tiny.target_params(), TARGET, tmp_path / "target")
    assert target_config(edited(tmp_path / "target", NEUTRAL | {"causal": None, "is_causal": True})) == TARGET
    rewritten(drafter, **WINDOWS, is_causal=True)
    assert drafter_config(drafter).windows == (8, 8)


def test_unknown_keys_are_named_once(drafter):
    with pytest.warns(SpecaufWarning) as warned:
        assert load_drafter(edited(drafter, {"foo_scale": 3, "hiden_size": 16}))[1] == DRAFTER
    [one] = warned
    assert str(one.message) == (f"{drafter}/config.json has keys that nothing here reads: "
                                "foo_scale, hiden_size (did you mean 'hidden_size'?)")  # fmt: skip


def test_targets_too(tmp_path):
    save_target(tiny.target_params(), TARGET, tmp_path / "target")
    with pytest.warns(SpecaufWarning, match="foo_scale"):
        target_config(edited(tmp_path / "target", {"foo_scale": 3}))
    edited(tmp_path / "target", {"foo_scale": ...})
    for key, value in {"logits_scaling": 8.0, "is_causal": False, "embedding_multiplier": 12.0}.items():
        with pytest.raises(SpecaufError, match=f"{key} is {value}"):
            target_config(edited(tmp_path / "target", {key: value}))
        edited(tmp_path / "target", {key: ...})


def test_settings_at_the_top_level(drafter):
    inside = json.loads((drafter / "config.json").read_text())["dflash_config"]
    edited(drafter, inside, dict.fromkeys(inside, ...))
    assert drafter_config(drafter) == DRAFTER
    edited(drafter, {"dflash_config": None})
    assert drafter_config(drafter) == DRAFTER
    with pytest.raises(SpecaufError, match="dflash_config has no mask_token_id"):
        drafter_config(edited(drafter, {"mask_token_id": None}))


def test_settings_of_domino_at_the_top_level_and_its_older_name(tmp_path):
    save_drafter(tiny.drafter_params(DOMINO), DOMINO, tmp_path / "domino")
    edited(tmp_path / "domino", {}, {"projector_type": "causal_v5"})
    assert drafter_config(tmp_path / "domino") == DOMINO
    names = ("projector_type", "emb_dim", "gru_hidden_dim", "pure_draft_prefix_len", "shift_label")
    inside = json.loads((tmp_path / "domino" / "config.json").read_text())["dflash_config"]
    edited(tmp_path / "domino", {name: inside[name] for name in names}, dict.fromkeys(names, ...))
    assert tiny.same_bits(load_drafter(tmp_path / "domino")[0], tiny.drafter_params(DOMINO))
    with pytest.raises(SpecaufError, match="has no pure_draft_prefix_len"):
        drafter_config(edited(tmp_path / "domino", {"pure_draft_prefix_len": ...}))


@pytest.mark.parametrize("name", ["shift_label", "sample_from_anchor", "query_zero_predicts_next"])
@pytest.mark.parametrize("top", [False, True])
def test_shifted_labels_under_any_name(drafter, name, top):
    expected = dataclasses.replace(DRAFTER, head=DFlash(shift_label=True))
    assert drafter_config(edited(drafter, *(({name: True}, {}) if top else ({}, {name: True})))) == expected
    assert expected.first_slot == 0 and expected.num_labels == 4
    assert drafter_config(edited(drafter, {name: False} if top else {}, {} if top else {name: False})) == DRAFTER


def test_a_shifted_plain_drafter_round_trips(tmp_path):
    config = dataclasses.replace(DRAFTER, head=make_head("dflash", ("shift_label=true",)))
    save_drafter(tiny.drafter_params(), config, tmp_path / "drafter")
    assert json.loads((tmp_path / "drafter" / "config.json").read_text())["dflash_config"]["shift_label"] is True
    params, found = load_drafter(tmp_path / "drafter")
    assert found == config and tiny.same_bits(params, tiny.drafter_params())
    save_target(tiny.target_params(), TARGET, tmp_path / "target")
    save_drafter(params, config, tmp_path / "out", layout="speculators", verifier=str(tmp_path / "target"))
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    [proposal] = values["speculators_config"]["proposal_methods"]
    assert values["sample_from_anchor"] is True and proposal["speculative_tokens"] == 4


@pytest.mark.parametrize(("scaling", "most", "length"), [
    (RopeScaling("yarn", 4.0, 64), 64, 256),
    (RopeScaling("yarn", 4.0), 64, 256),
    (RopeScaling("yarn", 4.0, 32_768), 40_960, 131_072),  # Qwen3's own advice
    (RopeScaling("yarn", 4.0, 64), 256, 256),
    (RopeScaling("linear", 2.5), 64, 160),
    (RopeScaling("llama3", 32.0, 8192), 131_072, 131_072),
    (RopeScaling("llama3", 8.0, 64), 64, 512),
    (RopeScaling(), 64, 64),
])  # fmt: skip
def test_how_long_texts_may_be(scaling, most, length):
    assert tiny.target_config(rope_scaling=scaling, max_position_embeddings=most).context_length == length


def test_sliding_windows_of_a_file(drafter):
    types = ["full_attention", "sliding_attention"]
    rewritten(drafter, layer_types=types, use_sliding_window=True, sliding_window=7)
    assert drafter_config(drafter).windows == (None, 7)
    rewritten(drafter, layer_types=None, max_window_layers=1)
    assert drafter_config(drafter).windows == (None, 7)
    rewritten(drafter, layer_types=types, use_sliding_window=False)
    with pytest.raises(SpecaufError, match="use_sliding_window is False"):
        drafter_config(drafter)


def test_windows_round_trip(tmp_path):
    config = tiny.drafter_config(layer_types=("sliding_attention", "full_attention"), sliding_window=5)
    save_drafter(tiny.drafter_params(config), config, tmp_path / "drafter")
    assert drafter_config(tmp_path / "drafter") == config
    with pytest.raises(SpecaufError, match="sliding windows for the layout of speculators"):
        save_drafter(tiny.drafter_params(), config, tmp_path / "other", layout="speculators", verifier="target")
    with pytest.raises(SpecaufError, match="sliding_window is 3, shorter than a block"):
        dataclasses.replace(config, sliding_window=3)


def test_half_precision_export(tmp_path):
    save_drafter(tiny.drafter_params(), DRAFTER, tmp_path / "drafter", dtype="bfloat16")
    stored = load_file(tmp_path / "drafter" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "drafter" / "config.json").read_text())["dtype"] == "bfloat16"
    assert tiny.same_bits(load_drafter(tmp_path / "drafter", "bfloat16")[0], cast(tiny.drafter_params(), "bfloat16"))


def test_speculators_layout(tmp_path):
    save_target(tiny.target_params(), TARGET, tmp_path / "target")
    save_drafter(
        tiny.drafter_params(), DRAFTER, tmp_path / "out", layout="speculators", verifier=str(tmp_path / "target")
    )
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["aux_hidden_state_layer_ids"] == [1, 2] and values["draft_vocab_size"] == 17
    assert values["speculators_config"]["verifier"]["architectures"] == ["Qwen3ForCausalLM"]
    params, config = load_drafter(tmp_path / "out")
    assert config == dataclasses.replace(DRAFTER, num_target_layers=None)
    assert tiny.same_bits(params, tiny.drafter_params())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"speculators_model_type": "eagle3"}, "speculators_model_type 'eagle3'"),
        ({"speculators_model_type": ["dflash"]}, "speculators_model_type"),
        ({"draft_vocab_size": 9}, "draft_vocab_size is 9"),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids"),
        ({"sample_from_anchor": 1}, "sample_from_anchor is 1"),
        ({"transformer_layer_config": []}, "transformer_layer_config is []"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"is_causal": True}, "is_causal is True"),
        ({"architectures": ["DSparkSpeculator"]}, "architecture 'DSparkSpeculator' of a dflash"),
        ({"dflash_config": {"shift_label": True}}, "dflash_config beside speculators_model_type"),
        ({"target_layer_ids": [0]}, "target_layer_ids beside"),
    ],
)
def test_what_speculators_layout_can_hold_and_we_cannot_read(tmp_path, values, said):
    save_target(tiny.target_params(), TARGET, tmp_path / "target")
    out = tmp_path / "out"
    save_drafter(tiny.drafter_params(), DRAFTER, out, layout="speculators", verifier=str(tmp_path / "target"))
    found = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(found | values))
    with pytest.raises(SpecaufError, match=re.escape(said)):
        load_drafter(out)
    found["transformer_layer_config"]["sliding_window"] = 8
    (out / "config.json").write_text(json.dumps(found))
    with pytest.raises(SpecaufError, match="sliding_window is 8"):
        load_drafter(out)


def test_only_its_own_kind_is_replaced(drafter):
    before = (drafter / "model.safetensors").read_bytes()
    with pytest.raises(SpecaufError, match="already holds something else than a Qwen3ForCausalLM"):
        save_target(tiny.target_params(), TARGET, drafter)
    assert (drafter / "model.safetensors").read_bytes() == before
    save_drafter(tiny.drafter_params(seed=5), DRAFTER, drafter)
    assert tiny.same_bits(load_drafter(drafter)[0], tiny.drafter_params(seed=5))
    assert not (drafter / "specauf.json").exists()
