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
from safetensors import safe_open

from specauf_jax.architecture import ResolvedDrafter, RopeScaling, Target
from specauf_jax.errors import SpecaufError
from specauf_jax.files import existing_folder, local_copy, read_json
from specauf_jax.models.drafter import drafter_shapes
from specauf_jax.models.heads import make_head
from specauf_jax.models.hf_config import DRAFTER_ARCHITECTURES
from specauf_jax.models.resolve import default_target_layer_ids
from specauf_jax.models.tensors import file_names, tensor_files

Level = Literal["error", "warning", "note"]
DOMINO_KEYS = ("emb_dim", "gru_hidden_dim", "pure_draft_prefix_len", "shift_label")
_MOST_LAYERS = 4096


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a check has to say."""

    topic: str
    level: Level
    found: str
    expected: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Names:
    """Tensor names of a drafter folder, by what is to be said of them."""

    shared: list[str]
    """Embedding and LM head, which are the target's."""
    prefixed: list[str]
    """With "model." in front."""
    early: list[str]
    """Of Domino's head, under "logit_head."."""
    head: list[str]
    """Of Domino's head, in a folder that calls itself plain."""
    unknown: list[str]
    missing: list[str]
    """Under no prefix either."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """What the checks read. JSON values may be of any kind: nothing has looked at them yet."""

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

    def object(self, name: str) -> dict:
        """An object of config.json, or nothing."""
        found = self.values.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def dflash(self) -> dict:
        """dflash_config, or nothing."""
        return self.object("dflash_config")

    @property
    def named(self) -> object:
        """The architecture that config.json names."""
        found = self.values.get("architectures")
        return found[0] if isinstance(found, list) and len(found) == 1 else found

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
        places = {"in dflash_config": self.dflash, "at the top level": self.values}
        return {name: place["block_size"] for name, place in places.items() if "block_size" in place}

    @property
    def thetas(self) -> dict[str, object]:
        """Where RoPE's base is written, and what it says."""
        places = {"at the top level": self.values}
        places |= {f"in {name}": self.object(name) for name in ("rope_parameters", "rope_scaling")}
        return {n: place["rope_theta"] for n, place in places.items() if place.get("rope_theta") is not None}

    @property
    def sliding(self) -> bool:
        """Some layers have a sliding window: by layer_types or, without them, by Hugging Face's older keys."""
        types = self.values.get("layer_types")
        if isinstance(types, list):
            return "sliding_attention" in types
        return bool(self.values.get("use_sliding_window")) and self.values.get("sliding_window") is not None

    @functools.cached_property
    def names(self) -> Names:
        """The tensors' names, sorted."""
        return _names(self)


def agree(values) -> bool:
    """Whether all values are the same; true of none."""
    values = list(values)
    return all(value == values[0] for value in values)


def read_pair(drafter, target, architecture: Target, tokenizer) -> Pair:
    """Read both folders' JSON and the drafter's tensor names.

    Args:
      drafter, target: folders; the target's has been found to be sound.
      architecture: of the target.
      tokenizer: the target's, or None.

    Raises:
      SpecaufError: there is no drafter to check.
    """
    drafter, target = existing_folder(local_copy(drafter), "a drafter"), local_copy(target)
    path, origin = drafter / "config.json", drafter / "specauf.json"
    values = read_json(path, "a drafter's configuration")
    named = values.get("architectures")
    known = isinstance(named, list) and any(name in DRAFTER_ARCHITECTURES for name in named)
    if "speculators_model_type" in values or not ("dflash_config" in values or known):
        raise SpecaufError(
            f"{path}: {'a drafter in the layout of speculators' if 'speculators_model_type' in values else named}",
            f"a drafter in z-lab's layout: {' or '.join(DRAFTER_ARCHITECTURES)}, with dflash_config",
            "pass such a folder, or convert it first (layer ids of speculators are one higher)",
        )
    tensors, unreadable = {}, None
    try:
        tensors = _shapes(drafter)
    except SpecaufError as error:
        unreadable = error
    return Pair(
        drafter=drafter,
        target=target,
        values=values,
        target_values=read_json(target / "config.json", "a model's configuration"),
        architecture=architecture,
        tokenizer=tokenizer,
        origin=read_json(origin, "a drafter's origin") if origin.is_file() else {},
        tensors=tensors,
        unreadable=unreadable,
    )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    files = tensor_files(folder)
    for path in sorted(set(files.values())):
        with safe_open(path, framework="numpy") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    return shapes


def _names(pair: Pair) -> Names:
    layers = pair.values.get("num_hidden_layers")
    layers = layers if type(layers) is int and 0 < layers < _MOST_LAYERS else 1
    plain, domino = _wanted_names("dflash", layers), _wanted_names("domino", layers)
    wanted = domino if pair.domino else plain
    bare = {name: name.removeprefix("model.").removeprefix("logit_head.") for name in pair.tensors}
    shared = {name for name, x in bare.items() if x.startswith(("embed_tokens.", "lm_head."))}
    head = {name for name, x in bare.items() if not pair.domino and x in domino - plain}
    return Names(
        shared=sorted(shared),
        prefixed=sorted(name for name in bare if name.startswith("model.") and name not in shared),
        early=sorted(name for name in bare if name.startswith("logit_head.") and name not in head),
        head=sorted(head),
        unknown=sorted(name for name, x in bare.items() if x not in wanted and name not in shared | head),
        missing=sorted(wanted - set(bare.values())),
    )


@functools.lru_cache
def _wanted_names(kind: str, layers: int) -> frozenset[str]:
    """Names of a drafter's tensors, from the tree of a drafter of size 2."""
    size_2 = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings"), 2)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "target_layer_ids": (0,)}
    kinds = {"layer_types": ("full_attention",) * layers, "rope_scaling": RopeScaling(), "rope_theta": 1.0}
    more = kinds | {"block_size": 2, "mask_token_id": 0, "head": make_head(kind), "num_hidden_layers": layers}
    drafter = ResolvedDrafter(**size_2, **heads, **more)
    leaves = jax.tree_util.tree_leaves_with_path(drafter_shapes(drafter))
    return frozenset(name for path, leaf in leaves for name in file_names(path, leaf.shape))


# ---------------------------------------------------------------------------------------------
# Going on with a config.json that has faults


def repaired(pair: Pair) -> tuple[dict, list[str]]:
    """config.json with missing or contradictory keys filled where a sensible value is known, and what was filled.

    Whatever else is wrong, the loader says.
    """
    values, dflash, assumed = dict(pair.values), dict(pair.dflash), []

    def assume(place: dict, what: str, **changes):
        place |= changes
        assumed.append(what)

    if pair.named not in DRAFTER_ARCHITECTURES:
        assume(values, "architecture DFlashDraftModel", architectures=["DFlashDraftModel"])
    if not agree(pair.block_sizes.values()):
        assume(values, f"block_size {dflash['block_size']} of dflash_config", block_size=dflash["block_size"])
    mask = getattr(pair.tokenizer, "mask_token_id", None)
    if dflash.get("mask_token_id") is None and mask is not None:
        assume(dflash, f"the tokenizer's mask token {mask}", mask_token_id=mask)
    if not pair.thetas or not agree(pair.thetas.values()):
        theirs = {key: pair.target_values.get(key) for key in ("rope_theta", "rope_scaling", "rope_parameters")}
        assume(values, f"the target's RoPE, theta {pair.architecture.rope_theta:g}", **theirs)
    if pair.sliding and not (values.get("use_sliding_window") and values.get("sliding_window")):
        assume(values, "full attention in all layers", layer_types=None, use_sliding_window=False)
    if pair.layer_ids is None:
        width = pair.tensors.get("fc.weight", (0,))[-1]
        count, depth = width // pair.architecture.hidden_size, pair.architecture.num_hidden_layers
        ids = list(default_target_layer_ids(depth, count)) if count else []
        assume(dflash, f"DFlash's default layer ids {ids}", target_layer_ids=ids)
    if pair.domino and not isinstance(dflash.get("shift_label"), bool):
        assume(dflash, "shift_label true", shift_label=True)
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
