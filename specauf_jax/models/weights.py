"""Checkpoints that other systems read: Hugging Face targets, z-lab and speculators drafters, in and out."""

import functools
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open

from specauf_jax.architecture import ResolvedDrafter, Target
from specauf_jax.config import Dtype
from specauf_jax.distributed import is_primary
from specauf_jax.errors import SpecaufError
from specauf_jax.files import AnyPath, as_path, check_writable, existing_folder, local_copy, read_json, replace_folder
from specauf_jax.models import hf_drafter, hf_target
from specauf_jax.models.drafter import drafter_shapes
from specauf_jax.models.families import FAMILIES
from specauf_jax.models.target import target_shapes
from specauf_jax.models.tensors import Progress, file_shapes, flatten, read_tree, tensor_files, write_tensors
from specauf_jax.sharding import parameter_sharding

Layout = Literal["zlab", "specforge", "speculators"]
SHARD_BYTES = 4 * 2**30
_TAIL_BYTES = 2**20
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_ROWS = 8192  # of two tensors that are compared at one time
_NUMPY = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def load_target(
    folder, dtype: Dtype = "float32", mesh: jax.sharding.Mesh | None = None, progress: Progress | None = None
) -> tuple[dict, Target]:
    """Parameters and architecture of a Hugging Face checkpoint of one of `specauf_jax.models.families`.

    Args:
      folder: with config.json and model.safetensors, or model.safetensors.index.json and shards.
      dtype: of the parameters returned, whatever the files hold.
      mesh: to spread them over, each device's part read straight from the files; None for one device.
      progress: called as (numbers read, numbers in all).

    Raises:
      SpecaufError: naming the file, tensor or key that does not fit, before any device memory is used.
    """
    config, folder = target_config(folder), local_copy(folder)
    _check_tokenizer(folder, config)
    shapes, names = target_shapes(config), tensor_files(folder)
    family = FAMILIES[config.model_type]
    body = next((body for body in family.bodies if f"{body}{_EMBEDDING}" in names), family.bodies[0])
    head = f"language_model.{_HEAD}" if body.startswith("language_model.") else _HEAD
    if config.tie_word_embeddings:
        _check_tied_head(folder, head, f"{body}{_EMBEDDING}")
    unread = {name for name in names if name.startswith(family.unread)}
    params = read_tree(
        folder,
        shapes,
        functools.partial(_target_name, config=config, body=body, head=head),
        _NUMPY[np.dtype(dtype).name],
        shardings=None if mesh is None else parameter_sharding(shapes, mesh),
        progress=progress,
        ignored=unread | ({head} if config.tie_word_embeddings else set()),
    )
    return params, config


def target_config(folder) -> Target:
    """Architecture of the checkpoint in `folder`, from its config.json alone."""
    return hf_target.read_target(*_read_config(folder, "a target, of `specauf pretrain` or from Hugging Face"))


def target_tensors(config: Target) -> dict[str, tuple]:
    """Name → shape of every tensor in a checkpoint of this architecture."""
    shapes = file_shapes(target_shapes(config))
    return {_target_name(name, config): shape for name, shape in shapes.items()}


def weights_digest(folder) -> str:
    """SHA-256 that tells a model from another one: of config.json, and of each weights file's size and last bytes."""
    folder, digest = local_copy(folder), hashlib.sha256()
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(set(tensor_files(folder).values())):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL_BYTES, 0))
            digest.update(size.to_bytes(8, "little") + file.read())
    return digest.hexdigest()


def save_target(params: dict, config: Target, folder, *, eos_token_id: int | None = None) -> None:
    """Write a target in Hugging Face layout (float32); an existing folder is replaced whole."""
    tensors = {_target_name(name, config): x for name, x in flatten(params, np.float32).items()}
    values = hf_target.write_target(config, eos_token_id) | {"dtype": "float32"}
    check_target_folder(folder)
    _write(folder, tensors, {"config.json": values})


def load_drafter(
    folder, dtype: Dtype = "float32", mesh: jax.sharding.Mesh | None = None
) -> tuple[dict, ResolvedDrafter]:
    """Parameters and architecture of a drafter in the layout of z-lab, SpecForge or speculators.

    Args: as for `load_target`.

    Raises:
      SpecaufError: naming the file, tensor or key that does not fit.
    """
    config, folder = drafter_config(folder), local_copy(folder)
    prefix = config.head.early_prefix
    early = prefix is not None and any(name.startswith(prefix) for name in tensor_files(folder))

    def name_in_file(name: str) -> str:
        return f"{prefix}{name}" if early and name in config.head.tensors.values() else name

    shapes = drafter_shapes(config)
    shardings = None if mesh is None else parameter_sharding(shapes, mesh)
    return read_tree(folder, shapes, name_in_file, _NUMPY[np.dtype(dtype).name], shardings=shardings), config


def drafter_config(folder) -> ResolvedDrafter:
    """Architecture of the drafter in `folder`, from its config.json alone."""
    return hf_drafter.read_drafter(*_read_config(folder, "a drafter, of `specauf train` or `specauf export`"))


def save_drafter(
    params: dict,
    config: ResolvedDrafter,
    folder,
    *,
    provenance: dict | None = None,
    layout: Layout = "zlab",
    dtype: Dtype = "float32",
    verifier: str | None = None,
) -> None:
    """Write a drafter for other systems; an existing drafter's folder is replaced whole.

    Args:
      params: as from `init_drafter`.
      config: resolved.
      folder: to write.
      provenance: facts for people and checks (objective, steps, …), stored in specauf.json beside.
      layout: zlab (SGLang, vLLM, tpu-inference, sglang-jax, SpecForge), specforge (the same, but a head whose
        architecture has another name in SpecForge under that), or speculators.
      dtype: of the file.
      verifier: folder of the target, for speculators, which names it.

    Raises:
      SpecaufError: parameters and config are of different kinds, or the layout cannot hold them.
    """
    _check_kind(params, config)
    head = config.head
    if layout == "specforge" and "SpecForge" in head.engines:
        raise SpecaufError(f"a {head.title} drafter for the layout of SpecForge", "zlab or speculators",
                           "use --layout zlab")  # fmt: skip
    if layout == "speculators":
        if head.speculator is None:
            raise SpecaufError(f"a {head.title} drafter for the layout of speculators", "zlab or specforge",
                               "use --layout zlab")  # fmt: skip
        windows = any(config.windows)  # theirs starts at the anchor for all slots
        if windows or verifier is None:
            raise SpecaufError(
                f"{'sliding windows' if windows else 'no target'} for the layout of speculators",
                "a drafter with full attention, and the folder of its target",
                "use --layout zlab" if windows else "pass --target",
            )
        architecture = _read_config(verifier, "the drafter's target")[0]["architectures"][0]
        values = hf_drafter.write_speculators(config, str(verifier), architecture)
    else:
        values = hf_drafter.write_drafter(config, head.architectures[-1 if layout == "specforge" else 0])
    files = {"config.json": values | {"dtype": dtype}}
    if provenance is not None:
        files["specauf.json"] = provenance
    check_drafter_folder(folder)
    _write(folder, flatten(params, _NUMPY[dtype]), files)


def _check_kind(params: dict, config: ResolvedDrafter) -> None:
    """A body never leaves without its head, which its config describes."""
    found, expected = set(params), set(drafter_shapes(config))
    if found != expected:
        raise SpecaufError(
            f"parameters of {', '.join(sorted(found))}",
            f"those of a {config.head.title} drafter: {', '.join(sorted(expected))}",
            "save the drafter with the config that it was trained with",
        )


def _target_name(name: str, config: Target, body: str = "model.", head: str = _HEAD) -> str:
    """lm_head stands outside the body; of periods of layers every layer has its own number."""
    if name == _HEAD:
        return head
    if found := re.fullmatch(r"layers\.(\d+)\.(?:linear\.(\d+)|full)\.(.*)", name):
        inside = config.period - 1 if found[2] is None else int(found[2])
        name = f"layers.{int(found[1]) * config.period + inside}.{found[3]}"
    return f"{body}{name}"


def _read_config(folder, what: str) -> tuple[dict, str]:
    path = existing_folder(folder, what) / "config.json"
    return read_json(path, "a model's configuration"), str(path)


def _check_tied_head(folder: Path, head_name: str, embedding_name: str) -> None:
    """A head beside an embedding that config.json ties to it must be the embedding; else one of the two is wrong."""
    files = tensor_files(folder)
    if not {head_name, embedding_name} <= files.keys():
        return
    with (
        safe_open(files[head_name], framework="numpy") as one,
        safe_open(files[embedding_name], framework="numpy") as other,
    ):
        head, embedding = one.get_slice(head_name), other.get_slice(embedding_name)
        shape = head.get_shape()
        same = len(shape) == 2 and embedding.get_shape() == shape
        for start in range(0, shape[0] if same else 0, _ROWS):
            rows = slice(start, min(start + _ROWS, shape[0]))
            same = same and np.array_equal(head[rows], embedding[rows])
    if not same:
        raise SpecaufError(
            f"{folder}: config.json says tie_word_embeddings, but {head_name} is not {embedding_name}",
            "the same numbers in both, or tie_word_embeddings false",
            f"write false if the model was trained with this head, else remove {head_name}",
        )


def _check_tokenizer(folder: Path, config: Target) -> None:
    """Every id of the tokenizer that lies beside must have an embedding, but for added tokens, which texts may lack.

    More embeddings are padding.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    values = read_json(path, "a tokenizer")
    model, added = values.get("model"), values.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list):
        return  # what it is worth is for the tokenizer's own reader to say
    known = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
    extra = {token.get("id") for token in added if isinstance(token, dict)} if isinstance(added, list) else set()
    ids = [i for i in known if isinstance(i, int) and i not in extra]
    if max(ids, default=0) >= config.vocab_size:
        raise SpecaufError(
            f"{path} has ids up to {max(ids)}, the model {config.vocab_size} embeddings",
            "an embedding for every token",
            "use the tokenizer that the model was trained with",
        )


def _write(folder, tensors: dict, json_files: dict[str, dict]) -> None:
    """All files beside, then one rename, so that a reader sees the old folder or the new one."""
    if not is_primary():
        return
    with replace_folder(folder) as new:
        write_tensors(tensors, new / "model.safetensors")
        for name, values in json_files.items():
            (new / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def write_shards(
    shapes: dict[str, tuple],
    read: Callable[[str], np.ndarray],
    folder: Path,
    dtype: Dtype,
    track: Callable[[Iterable[str]], Iterable[str]],
) -> None:
    """Write tensors, read one by one: model.safetensors, or shards of SHARD_BYTES and more, of which one is held.

    Args:
      shapes: name → shape.
      read: name → tensor.
      folder: local, to write into.
      dtype: of the files.
      track: goes through the names, and shows how far it is.
    """
    kind = _NUMPY[dtype]
    ends = np.cumsum([kind.itemsize * math.prod(shape) for shape in shapes.values()])
    numbers = np.unique(ends // SHARD_BYTES, return_inverse=True)[1]
    count = int(numbers[-1]) + 1
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors" for i in range(count)]
    weight_map = {name: files[i] for name, i in zip(shapes, numbers, strict=True)}
    left, held = Counter(weight_map.values()), {}
    for name in track(shapes):
        file = weight_map[name]
        held[name] = read(name).astype(kind)
        if len(held) == left[file]:
            write_tensors(held, folder / file)
            held = {}
    if count > 1:
        index = {"metadata": {"total_size": int(ends[-1])}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def check_target_folder(folder) -> None:
    """Refuse a folder whose place a target cannot take."""
    _check_replaceable(as_path(folder), tuple(hf_target.TARGET_ARCHITECTURES))


def check_drafter_folder(folder) -> None:
    """Refuse a folder whose place a drafter cannot take."""
    _check_replaceable(as_path(folder), (*hf_drafter.DRAFTER_ARCHITECTURES, *hf_drafter.SPECULATORS))


def _check_replaceable(folder: AnyPath, architectures: tuple[str, ...]) -> None:
    """Only a model of the same kind, or an empty folder, gives way to a new one."""
    check_writable(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / "config.json"
    found = read_json(config, "a model").get("architectures") if config.is_file() else None
    if found not in [[name] for name in architectures]:
        raise SpecaufError(
            f"{folder} already holds something else than a {' or '.join(architectures)}",
            "a folder that does not exist yet, or one to replace",
            "choose another --out",
        )
