"""Checkpoints that other systems read: Hugging Face targets and z-lab drafters, in and out.

One rule of names serves every model: our tree's path is the tensor's name, `kernel` (transposed),
`scale` and `embedding` are all called `weight` in files, and the leading axis of stacked layers
becomes the number after `layers.`.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from specauf_jax.architecture import Drafter, Target
from specauf_jax.errors import SpecaufError
from specauf_jax.files import existing_folder, read_json, replace_folder
from specauf_jax.models.drafter import drafter_shapes
from specauf_jax.models.target import target_shapes

TARGET_ARCHITECTURE = "Qwen3ForCausalLM"
DRAFTER_ARCHITECTURE = "DFlashDraftModel"


def load_target(folder, dtype=jnp.float32) -> tuple[dict, Target]:
    """Parameters and architecture of a Hugging Face checkpoint of a dense Qwen3.

    Args:
      folder: with config.json and model.safetensors, or model.safetensors.index.json and shards.
      dtype: of the parameters returned.

    Raises:
      SpecaufError: naming the file, tensor or key that does not fit.
    """
    folder, config = Path(folder), target_config(folder)
    # lm_head stands outside the body, which Hugging Face prefixes with "model.".
    return _read(
        folder, target_shapes(config), lambda name: name if name.startswith("lm_head") else f"model.{name}", dtype
    ), config


def target_config(folder) -> Target:
    """Architecture of the checkpoint in `folder`, from its config.json alone."""
    values, where = _read_config(folder, "a target, of `specauf pretrain` or from Hugging Face")
    _expect(values, where, "architectures", [TARGET_ARCHITECTURE])
    _refuse(values, where, "use_sliding_window", "attention_bias")
    return Target(**_shared_fields(values, where), tie_word_embeddings=bool(values.get("tie_word_embeddings", False)))


def save_target(params: dict, config: Target, folder, *, eos_token_id: int | None = None) -> None:
    """Write a target in Hugging Face layout (float32); an existing folder is replaced whole."""
    tensors = {name if name.startswith("lm_head") else f"model.{name}": x for name, x in _flatten(params).items()}
    values = _shared_json(config) | {
        "architectures": [TARGET_ARCHITECTURE],
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": eos_token_id,
    }
    _write(folder, tensors, {"config.json": values})


def load_drafter(folder, dtype=jnp.float32) -> tuple[dict, Drafter]:
    """Parameters and architecture of a DFlash drafter in z-lab layout.

    Raises:
      SpecaufError: naming the file, tensor or key that does not fit.
    """
    folder, config = Path(folder), drafter_config(folder)
    return _read(folder, drafter_shapes(config), lambda name: name, dtype), config


def drafter_config(folder) -> Drafter:
    """Architecture of the drafter in `folder`, from its config.json alone."""
    values, where = _read_config(folder, "a drafter, of `specauf train` or `specauf export`")
    _expect(values, where, "architectures", [DRAFTER_ARCHITECTURE])
    _refuse(values, where, "use_sliding_window", "attention_bias")
    dflash = _object(values, where, "dflash_config")
    if dflash.get("projector_type", "dflash") != "dflash":
        raise SpecaufError(
            f"{where}: projector_type {dflash['projector_type']!r}",
            "a plain DFlash drafter",
            "use a drafter without a projector",
        )
    for key in ("mask_token_id", "target_layer_ids"):
        if key not in dflash:
            raise SpecaufError(
                f"{where}: dflash_config has no {key!r}", "an explicit value", f"add dflash_config.{key}"
            )
    taps = dflash["target_layer_ids"]
    if not isinstance(taps, list) or not all(type(i) is int for i in taps):
        raise SpecaufError(f"{where}: target_layer_ids is {taps!r}", "a list of layers", "correct the value")
    block_size = dflash.get("block_size", values.get("block_size")) or _missing(where, "block_size")
    return Drafter(
        **_shared_fields(values, where),
        block_size=_number(block_size, where, "block_size"),
        mask_token_id=_number(dflash["mask_token_id"], where, "mask_token_id"),
        target_layer_ids=tuple(taps),
        num_target_layers=values.get("num_target_layers"),
    )


def save_drafter(params: dict, config: Drafter, folder, *, provenance: dict | None = None) -> None:
    """Write a drafter in z-lab layout (float32); an existing folder is replaced whole.

    Args:
      params: as from `init_drafter`.
      config: resolved.
      folder: to write.
      provenance: facts for people (objective, steps, …), stored in specauf.json beside.
    """
    dflash = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
    }
    values = _shared_json(config) | {
        "architectures": [DRAFTER_ARCHITECTURE],
        "block_size": config.block_size,
        "dflash_config": dflash,
        "num_target_layers": config.num_target_layers,
        "tie_word_embeddings": False,
    }
    files = {"config.json": values} | ({"specauf.json": provenance} if provenance is not None else {})
    _write(folder, _flatten(params), files)


# ---------------------------------------------------------------------------------------------
# config.json

_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
)


def _shared_fields(values: dict, where: str) -> dict:
    fields = {name: values[name] if name in values else _missing(where, name) for name in _SHARED}
    for name, value in fields.items():
        _number(value, where, name, (int, float) if name == "rms_norm_eps" else int)
    if values.get("hidden_act", "silu") != "silu":
        raise SpecaufError(
            f"{where}: hidden_act is {values['hidden_act']!r}", "'silu'", "use a model with SwiGLU layers"
        )
    return fields | {"rope_theta": _rope_theta(values, where)}


def _rope_theta(values: dict, where: str) -> float:
    """From `rope_parameters` (new) or `rope_theta` (old); there is no default, and no scaling yet."""
    rope = _object(values, where, "rope_parameters") or _object(values, where, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise SpecaufError(
            f"{where}: RoPE of type {kind!r}", "'default' (no scaling)", "use a model without RoPE scaling"
        )
    theta = rope.get("rope_theta", values.get("rope_theta"))
    if theta is None:
        _missing(where, "rope_theta (or rope_parameters.rope_theta)")
    return float(_number(theta, where, "rope_theta", (int, float)))


def _number(value, where: str, name: str, kind=int):
    if isinstance(value, bool) or not isinstance(value, kind):
        raise SpecaufError(f"{where}: {name} is {value!r}", "a number", "correct the value")
    return value


def _object(values: dict, where: str, name: str) -> dict:
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise SpecaufError(f"{where}: {name} is {found!r}", "an object of settings", "correct the value")
    return found


def _shared_json(config: Target | Drafter) -> dict:
    return {name: getattr(config, name) for name in _SHARED} | {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def _read_config(folder, what: str) -> tuple[dict, str]:
    path = existing_folder(folder, what) / "config.json"
    return read_json(path, "a model's configuration"), str(path)


def _missing(where: str, key: str):
    raise SpecaufError(f"{where} has no {key}", "every size of the architecture", f"add {key}")


def _expect(values: dict, where: str, key: str, wanted) -> None:
    if values.get(key) != wanted:
        raise SpecaufError(f"{where}: {key} is {values.get(key)!r}", f"{wanted!r}", "pass the folder of such a model")


def _refuse(values: dict, where: str, *keys: str) -> None:
    for key in keys:
        if values.get(key):
            raise SpecaufError(f"{where}: {key} is {values[key]!r}", "false", "use a model without it")


# ---------------------------------------------------------------------------------------------
# Tensors


def _file_names(path, shape) -> list[str]:
    """Names of the tensors behind one leaf of our tree: one, or one per stacked layer."""
    parts = [p.key for p in path[:-1]]
    if parts[0] != "layers":
        return [".".join([*parts, "weight"])]
    return [".".join(["layers", str(i), *parts[1:], "weight"]) for i in range(shape[0])]


def _is_stacked(path) -> bool:
    return path[0].key == "layers"


def _is_transposed(path) -> bool:
    return path[-1].key == "kernel"


def _flatten(params: dict) -> dict[str, np.ndarray]:
    """Our tree → float32 tensors by name, in PyTorch's orientation [out, in]."""
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        slices = leaf if _is_stacked(path) else [leaf]
        for name, x in zip(_file_names(path, leaf.shape), slices, strict=True):
            tensors[name] = np.ascontiguousarray(x.T if _is_transposed(path) else x, dtype=np.float32)
    return tensors


def _read(folder, shapes: dict, prefixed, dtype) -> dict:
    """Fill the tree `shapes` from the folder's tensors, after checking every name and shape."""
    wanted = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        shape = leaf.shape[1:] if _is_stacked(path) else leaf.shape
        for name in _file_names(path, leaf.shape):
            wanted[prefixed(name)] = shape[::-1] if _is_transposed(path) else shape
    files = _tensor_files(folder)
    _check_tensors(folder, files, wanted)

    def fill(path, leaf):
        read = [_get(files, prefixed(name)) for name in _file_names(path, leaf.shape)]
        read = [x.T if _is_transposed(path) else x for x in read]
        return jnp.asarray(np.stack(read) if _is_stacked(path) else read[0], dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def _tensor_files(folder) -> dict:
    """Tensor name → open, memory-mapped file that holds it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        shards = [single]
    elif index.exists():
        weight_map = read_json(index, "an index of shards").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise SpecaufError(f"{index} has no weight_map", "tensor names and their files", "restore the file")
        shards = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        raise SpecaufError(f"{folder} has no weights", f"{single.name} or {index.name}", "check the folder's name")
    return {name: file for shard in shards for file in [_open(shard)] for name in file.keys()}  # noqa: SIM118


def _open(path):
    if not path.exists():
        raise SpecaufError(f"{path} does not exist", "every shard that the index names", "restore the file")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise SpecaufError(f"{path} cannot be read: {error}", "a whole safetensors file", "restore the file") from error


def _check_tensors(folder, files: dict, wanted: dict) -> None:
    missing, extra = sorted(wanted.keys() - files.keys()), sorted(files.keys() - wanted.keys())
    # A tied head, written a second time as some trainers do.
    if extra == ["lm_head.weight"] and "model.embed_tokens.weight" in wanted:
        extra = []
    if missing or extra:
        found = "; ".join(
            f"{len(names)} {kind}, first {names[0]}"
            for kind, names in (("missing", missing), ("unknown", extra))
            if names
        )
        raise SpecaufError(
            f"{folder}: tensors do not fit config.json: {found}",
            f"exactly {len(wanted)} tensors",
            "use the config.json that belongs to these weights",
        )
    for name, shape in wanted.items():
        found = tuple(files[name].get_slice(name).get_shape())
        if found != shape:
            raise SpecaufError(
                f"{folder}: {name} has shape {found}",
                f"{shape} by config.json",
                "use the config.json that belongs to these weights",
            )


def _get(files: dict, name: str) -> np.ndarray:
    return files[name].get_tensor(name)


def _check_replaceable(folder: Path, architectures: list[str]) -> None:
    """Only a model of the same kind, or an empty folder, gives way to a new one."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / "config.json"
    if not (config.is_file() and read_json(config, "a model").get("architectures") == architectures):
        raise SpecaufError(
            f"{folder} already holds something else than a {architectures[0]}",
            "a folder that does not exist yet, or one to replace",
            "choose another --out",
        )


def _write(folder, tensors: dict, json_files: dict[str, dict]) -> None:
    """All files beside, then one rename, so that a reader sees the old folder or the new one."""
    _check_replaceable(Path(folder), json_files["config.json"]["architectures"])
    with replace_folder(folder) as new:
        try:
            save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # how safetensors tells of a full disk
            raise OSError(str(error)) from error
        for name, values in json_files.items():
            (new / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
