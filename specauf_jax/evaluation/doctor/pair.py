"""A drafter folder and its target as they lie on disk, before anything is made of them."""

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
from safetensors import SafetensorError, safe_open

from specauf_jax.architecture import Drafter, Target, default_target_layer_ids
from specauf_jax.errors import SpecaufError
from specauf_jax.files import existing_folder, read_json
from specauf_jax.models.drafter import drafter_shapes
from specauf_jax.models.hf_config import DRAFTER_ARCHITECTURES
from specauf_jax.models.tensors import file_names, tensor_files

Level = Literal["error", "warning", "note"]
DOMINO_KEYS = ("emb_dim", "gru_hidden_dim", "pure_draft_prefix_len", "shift_label")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a check has to say."""

    topic: str
    level: Level
    found: str
    expected: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """What the checks read."""

    drafter: Path
    target: Path
    values: dict
    """The drafter's config.json."""
    target_values: dict
    architecture: Target
    tokenizer: object | None
    origin: dict
    """specauf.json; empty for drafters of others."""
    tensors: dict[str, tuple[int, ...]]
    """Name → shape of the drafter's tensors; empty if they cannot be read."""
    unreadable: SpecaufError | None
    """Why they cannot."""

    @property
    def dflash(self) -> dict:
        """dflash_config, or nothing."""
        found = self.values.get("dflash_config")
        return found if isinstance(found, dict) else {}

    @property
    def named(self) -> str | None:
        """The architecture that config.json names."""
        found = self.values.get("architectures")
        return found[0] if isinstance(found, list) and len(found) == 1 and isinstance(found[0], str) else None

    @property
    def domino(self) -> bool:
        """A Domino drafter, by either of the two ways to say so."""
        return self.dflash.get("projector_type") == "domino" or self.named == "DominoDraftModel"

    @property
    def layer_ids(self) -> list[int] | None:
        """dflash_config.target_layer_ids if it is a list of numbers."""
        found = self.dflash.get("target_layer_ids")
        return found if isinstance(found, list) and found and all(type(i) is int for i in found) else None

    @property
    def block_sizes(self) -> dict[str, object]:
        """Where block_size is written, and what it says."""
        places = {"the top level": self.values, "dflash_config": self.dflash}
        return {name: place["block_size"] for name, place in places.items() if "block_size" in place}

    @property
    def thetas(self) -> dict[str, object]:
        """Where RoPE's base is written, and what it says."""
        places = {"the top level": self.values} | {
            name: self.rope(name) for name in ("rope_parameters", "rope_scaling")
        }
        return {n: place["rope_theta"] for n, place in places.items() if place.get("rope_theta") is not None}

    def rope(self, name: str) -> dict:
        """An object of RoPE settings, or nothing."""
        found = self.values.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def sliding(self) -> bool:
        """Some layers have a sliding window: by layer_types or, without them, by Hugging Face's older keys."""
        types = self.values.get("layer_types")
        if isinstance(types, list):
            return "sliding_attention" in types
        return bool(self.values.get("use_sliding_window")) and self.values.get("sliding_window") is not None

    @functools.cached_property
    def names(self) -> "Names":
        """The tensors' names, sorted by what is to be said of them."""
        return _names(self)


@dataclasses.dataclass(frozen=True)
class Names:
    """Tensor names of a drafter folder."""

    shared: list[str]  # embedding and LM head, which are the target's
    prefixed: list[str]  # with "model." in front
    early: list[str]  # Domino's head under "logit_head."
    head: list[str]  # Domino's, in a folder that says it is plain
    unknown: list[str]
    missing: list[str]  # not under any prefix either


def read_pair(drafter, target, architecture: Target, tokenizer) -> Pair:
    """Read both folders' JSON and the drafter's tensor names.

    Raises:
      SpecaufError: there is no drafter to check.
    """
    drafter, target = existing_folder(drafter, "a drafter"), Path(target)
    path, origin = drafter / "config.json", drafter / "specauf.json"
    values = read_json(path, "a drafter's configuration")
    if "speculators_model_type" in values or not (
        "dflash_config" in values or set(DRAFTER_ARCHITECTURES) & set(map(str, values.get("architectures") or []))
    ):
        layout = "speculators' layout" if "speculators_model_type" in values else f"{values.get('architectures')}"
        raise SpecaufError(
            f"{path}: {layout}",
            f"a drafter in z-lab's layout: {' or '.join(DRAFTER_ARCHITECTURES)}, with dflash_config",
            "pass a drafter's folder, or convert it (layer ids of speculators are one higher)",
        )
    tensors, unreadable = {}, None
    try:
        tensors = _shapes(drafter)
    except SpecaufError as error:
        unreadable = error
    return Pair(
        drafter,
        target,
        values,
        read_json(target / "config.json", "a model's configuration"),
        architecture,
        tokenizer,
        read_json(origin, "a drafter's origin") if origin.is_file() else {},
        tensors,
        unreadable,
    )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, path in tensor_files(folder).items():
        try:
            with safe_open(path, framework="numpy") as file:
                shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise SpecaufError(f"{path} cannot be read: {error}", "a whole file", "restore the file") from error
    return shapes


def wanted_names(drafter: Drafter) -> list[str]:
    """Names of the tensors of a drafter."""
    leaves = jax.tree_util.tree_leaves_with_path(drafter_shapes(drafter))
    return [name for path, leaf in leaves for name in file_names(path, leaf.shape)]


def _names(pair: Pair) -> Names:
    layers = pair.values.get("num_hidden_layers")
    shape = Drafter(num_hidden_layers=layers if type(layers) is int and 0 < layers < 4096 else 1)
    small = {
        name: 2 for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings")
    }
    small |= {"num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "target_layer_ids": (0,)}
    plain, domino = (
        set(wanted_names(dataclasses.replace(shape, **small, projector_type=kind))) for kind in ("dflash", "domino")
    )
    wanted = domino if pair.domino else plain
    bare = {name: name.removeprefix("model.").removeprefix("logit_head.") for name in pair.tensors}
    shared = [name for name, x in bare.items() if x.startswith(("embed_tokens.", "lm_head."))]
    head = [name for name, x in bare.items() if not pair.domino and x in domino - plain]
    return Names(
        shared=sorted(shared),
        prefixed=sorted(name for name in bare if name.startswith("model.") and name not in shared),
        early=sorted(name for name in bare if name.startswith("logit_head.") and pair.domino),
        head=sorted(head),
        unknown=sorted(name for name, x in bare.items() if x not in wanted and name not in {*shared, *head}),
        missing=sorted(wanted - set(bare.values())),
    )


# ---------------------------------------------------------------------------------------------
# Going on with a config.json that has faults


def repaired(pair: Pair) -> tuple[dict, list[str]]:
    """config.json with what is missing or contradictory filled from the target, and what was filled.

    Only keys for which a sensible value is known: whatever else is wrong, the reader will say.
    """
    values, dflash, assumed = dict(pair.values), dict(pair.dflash), []
    if pair.named not in DRAFTER_ARCHITECTURES:
        values["architectures"] = ["DFlashDraftModel"]
        assumed.append("architecture DFlashDraftModel")
    if len(set(map(repr, pair.block_sizes.values()))) > 1:
        values.pop("block_size")
        assumed.append(f"block_size {dflash['block_size']}, as in dflash_config")
    mask = getattr(pair.tokenizer, "mask_token_id", None)
    if dflash.get("mask_token_id") is None and mask is not None:
        dflash["mask_token_id"] = mask
        assumed.append(f"the tokenizer's mask token {mask}")
    if len(set(pair.thetas.values())) != 1:
        values |= {"rope_theta": pair.architecture.rope_theta, "rope_scaling": None, "rope_parameters": None}
        values |= {
            key: pair.target_values[key] for key in ("rope_scaling", "rope_parameters") if key in pair.target_values
        }
        assumed.append(f"the target's RoPE (theta {pair.architecture.rope_theta:g})")
    if pair.sliding and not (values.get("use_sliding_window") and values.get("sliding_window")):
        values |= {"layer_types": None, "use_sliding_window": False}
        assumed.append("full attention in every layer")
    if pair.layer_ids is None:
        count = pair.tensors.get("fc.weight", (0, 0))[-1] // max(pair.architecture.hidden_size, 1)
        ids = default_target_layer_ids(pair.architecture.num_hidden_layers, count) if count else ()
        dflash["target_layer_ids"] = list(ids)
        assumed.append(f"DFlash's default layer ids {list(ids)}")
    if pair.domino and not isinstance(dflash.get("shift_label"), bool):
        dflash["shift_label"] = True
        assumed.append("shift_label true")
    if type(values.get("num_target_layers")) is not int:
        values.pop("num_target_layers", None)
    return values | {"dflash_config": dflash}, assumed


@contextlib.contextmanager
def repaired_folder(pair: Pair, values: dict) -> Iterator[Path]:
    """A folder with this config.json and the drafter's own weights."""
    with tempfile.TemporaryDirectory() as folder:
        for path in pair.drafter.iterdir():
            if path.name.endswith((".safetensors", ".safetensors.index.json")):
                (Path(folder) / path.name).symlink_to(path.resolve())
        (Path(folder) / "config.json").write_text(json.dumps(values))
        yield Path(folder)
