"""What a drafter's folder and its target's say, against the conventions and each other. Nothing is decoded here."""

import contextlib
import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from safetensors import safe_open

from specauf_jax.architecture import Drafter, Head, ResolvedDrafter, Target
from specauf_jax.data.tokenizer import hashes, load_tokenizer
from specauf_jax.errors import SpecaufError
from specauf_jax.files import existing_folder, local_copy, read_json
from specauf_jax.models.drafter import drafter_shapes
from specauf_jax.models.heads import head_settings, head_types, make_head
from specauf_jax.models.hf_drafter import DRAFTER_ARCHITECTURES, DRAFTER_KEYS, dflash_settings, read_drafter
from specauf_jax.models.hf_keys import unknown_keys
from specauf_jax.models.hf_target import target_keys, text_config
from specauf_jax.models.hf_values import shared_json
from specauf_jax.models.resolve import default_target_layer_ids, resolve_drafter
from specauf_jax.models.tensors import file_names, tensor_files
from specauf_jax.models.weights import target_config

Level = Literal["error", "warning", "note"]
_MOST_LAYERS = 4096


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to report; a note needs nothing to be done."""

    topic: str
    level: Level
    found: str
    expected: str
    remedy: str = "correct config.json"


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of a drafter's tensors, sorted, by what is wrong with them."""

    shared: list[str]  # embedding and LM head, which are the target's
    prefixed: list[str]  # with "model." in front
    early: list[str]  # of its head, under the prefix of early files
    other_head: list[str]  # of another head than the one that config.json names
    unknown: list[str]
    missing: list[str]  # under no prefix either


@dataclasses.dataclass(frozen=True)
class Folder:
    """A drafter's folder and its target's. JSON values may be of any kind: nothing has looked at them yet."""

    path: Path
    target_path: Path
    config: dict
    """The drafter's config.json."""
    target_config: dict
    target: Target
    tokenizer: Any
    """The target's, or None."""
    provenance: dict
    """specauf.json; empty for drafters of others."""
    tensors: dict[str, tuple[int, ...]]
    """Name → shape of the drafter's tensors; empty if they cannot be read."""
    unreadable: SpecaufError | None
    """Why they cannot."""

    def section(self, name: str) -> dict:
        """An object of config.json, or nothing."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def dflash(self) -> dict:
        """dflash_config, or nothing."""
        return self.section("dflash_config")

    @property
    def settings(self) -> dict:
        """dflash_config and what stands at the top level instead; dflash_config alone where they cannot be read."""
        try:
            return dflash_settings(self.config, "")
        except SpecaufError:
            return self.dflash

    @property
    def architecture(self) -> object:
        """The architecture that config.json names."""
        found = self.config.get("architectures")
        return found[0] if isinstance(found, list) and len(found) == 1 else found

    @property
    def head(self) -> Head:
        """The head that config.json names by projector_type or, without a known one, by the architecture.

        With the settings there, as far as they make sense.
        """
        known, named = head_types(), self.settings.get("projector_type")
        if not isinstance(named, str) or named not in known:
            fits = [kind for kind, head in known.items() if self.architecture in head.architectures]
            named = fits[0] if fits and Drafter.projector_type not in fits else Drafter.projector_type
        head = make_head(named)
        for name, default in head_settings(head).items():
            value = self.settings.get(name)
            if type(value) is type(default):
                with contextlib.suppress(SpecaufError):
                    head = dataclasses.replace(head, **{name: value})
        return head

    @property
    def layer_ids(self) -> list[int] | None:
        """target_layer_ids if it is a list of numbers."""
        found = self.settings.get("target_layer_ids")
        return found if isinstance(found, list) and found and all(type(i) is int for i in found) else None

    @property
    def block_sizes(self) -> dict[str, object]:
        """Where block_size is written, and its value there."""
        places = {"in dflash_config": self.dflash, "at the top level": self.config}
        return {name: place["block_size"] for name, place in places.items() if "block_size" in place}

    @property
    def thetas(self) -> dict[str, object]:
        """Where RoPE's base is written, and its value there."""
        places = {"at the top level": self.config}
        places |= {f"in {name}": self.section(name) for name in ("rope_parameters", "rope_scaling")}
        return {name: place["rope_theta"] for name, place in places.items() if place.get("rope_theta") is not None}

    @property
    def mask_token(self) -> int | None:
        """The tokenizer's own."""
        return getattr(self.tokenizer, "mask_token_id", None)

    @property
    def template(self) -> str:
        """The tokenizer's chat template; empty without one."""
        return str(getattr(self.tokenizer, "chat_template", None) or "")

    @property
    def slides(self) -> bool:
        """Some layers have a sliding window: by layer_types or, without them, by Hugging Face's older keys."""
        types = self.config.get("layer_types")
        if isinstance(types, list):
            return "sliding_attention" in types
        return bool(self.config.get("use_sliding_window")) and self.config.get("sliding_window") is not None

    @functools.cached_property
    def names(self) -> Names:
        """The tensors' names."""
        layers = self.config.get("num_hidden_layers")
        layers = layers if type(layers) is int and 0 < layers < _MOST_LAYERS else 1
        wanted = _tensor_names(self.head, layers)
        others = frozenset().union(*(_tensor_names(make_head(kind), layers) for kind in head_types())) - wanted
        prefixes = tuple(head.early_prefix for head in head_types().values() if head.early_prefix)
        bare = {name: re.sub(f"^({'|'.join(map(re.escape, prefixes))})", "", name.removeprefix("model."))
                for name in self.tensors}  # fmt: skip
        shared = {name for name, plain in bare.items() if plain.startswith(("embed_tokens.", "lm_head."))}
        other_head = {name for name, plain in bare.items() if plain in others}
        known = shared | other_head | {name for name, plain in bare.items() if plain in wanted}
        return Names(
            shared=sorted(shared),
            prefixed=sorted(name for name in bare if name.startswith("model.") and name not in shared),
            early=sorted(name for name in bare if name.startswith(prefixes) and name not in other_head),
            other_head=sorted(other_head),
            unknown=sorted(bare.keys() - known),
            missing=sorted(wanted - set(bare.values())),
        )

    @functools.cached_property
    def repaired(self) -> tuple[dict, list[str]]:
        """config.json with missing or contradictory keys filled where a sensible value is known, and what was filled.

        The reader of config.json reports whatever else is wrong.
        """
        config, dflash, target, assumed = dict(self.config), dict(self.dflash), self.target, []

        def assume(place: dict, what: str, **changes):
            place |= changes
            assumed.append(what)

        if self.architecture not in DRAFTER_ARCHITECTURES:
            name = self.head.architectures[0]
            assume(config, f"architecture {name}", architectures=[name])
        if not isinstance(self.settings.get("projector_type"), str | None):
            assume(dflash, f"projector_type {self.head.projector_type}", projector_type=self.head.projector_type)
        if not agree(self.block_sizes.values()):
            assume(config, f"block_size {dflash['block_size']} of dflash_config", block_size=dflash["block_size"])
        if self.settings.get("mask_token_id") is None and self.mask_token is not None:
            assume(dflash, f"the tokenizer's mask token {self.mask_token}", mask_token_id=self.mask_token)
        if not self.thetas or not agree(self.thetas.values()):
            said = shared_json(target, "")
            theirs = {key: said[key] for key in ("rope_theta", "rope_scaling", "rope_parameters")}
            assume(config, f"the target's RoPE, theta {target.rope_theta:g}", **theirs)
        if self.slides and not (config.get("use_sliding_window") and config.get("sliding_window")):
            assume(config, "full attention in all layers", layer_types=None, use_sliding_window=False)
        if self.layer_ids is None:
            count = self.tensors.get("fc.weight", (0,))[-1] // target.hidden_size
            ids = list(default_target_layer_ids(target.num_hidden_layers, count)) if count else []
            assume(dflash, f"DFlash's default layer ids {ids}", target_layer_ids=ids)
        for name, default in head_settings(self.head).items():
            if isinstance(default, bool) and not isinstance((self.head.absent | self.settings).get(name), bool):
                assume(dflash, f"{name} {str(default).lower()}", **{name: default})
        if type(config.get("num_target_layers")) is not int:
            config.pop("num_target_layers", None)
        return config | {"dflash_config": dflash}, assumed

    @functools.cached_property
    def drafter(self) -> ResolvedDrafter | SpecaufError:
        """What the repaired config.json describes, or why it cannot be read."""
        try:
            return read_drafter(self.repaired[0], str(self.path / "config.json"))
        except SpecaufError as error:
            return error


def read_folder(drafter, target) -> Folder:
    """Read both folders' JSON, the tokenizer and the drafter's tensor names.

    Args:
      drafter, target: folders.

    Raises:
      SpecaufError: there is no drafter to check, or the target is not sound.
    """
    target = local_copy(target)
    architecture, path = target_config(target), local_copy(drafter)
    existing_folder(path, "a drafter")
    file, provenance = path / "config.json", path / "specauf.json"
    config = read_json(file, "a drafter's configuration")
    named = config.get("architectures")
    known = isinstance(named, list) and any(name in DRAFTER_ARCHITECTURES for name in named)
    if "speculators_model_type" in config or not ("dflash_config" in config or known):
        raise SpecaufError(
            f"{file}: {'a drafter in the layout of speculators' if 'speculators_model_type' in config else named}",
            f"a drafter in z-lab's layout: {' or '.join(DRAFTER_ARCHITECTURES)}, with dflash_config",
            "pass such a folder, or convert it first: specauf export --drafter DIR --out NEW --layout zlab",
        )
    tensors, unreadable = {}, None
    try:
        tensors = _shapes(path)
    except SpecaufError as error:
        unreadable = error
    return Folder(
        path=path,
        target_path=target,
        config=config,
        target_config=text_config(read_json(target / "config.json", "a model's configuration")),
        target=architecture,
        tokenizer=load_tokenizer(target) if (target / "tokenizer.json").is_file() else None,
        provenance=read_json(provenance, "a drafter's origin") if provenance.is_file() else {},
        tensors=tensors,
        unreadable=unreadable,
    )


def agree(values: Iterable) -> bool:
    """Whether all values are the same; true of none."""
    values = list(values)
    return all(value == values[0] for value in values)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for part in sorted(set(tensor_files(path).values())):
        with safe_open(part, framework="numpy") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    return shapes


@functools.lru_cache
def _tensor_names(head: Head, layers: int) -> frozenset[str]:
    """Names of the tensors of a drafter with this head."""
    plain = resolve_drafter(Drafter(num_hidden_layers=layers, mask_token_id=0, target_layer_ids=(0,)), Target())
    leaves = jax.tree_util.tree_leaves_with_path(drafter_shapes(dataclasses.replace(plain, head=head)))
    return frozenset(name for path, leaf in leaves for name in file_names(path, leaf.shape))


@contextlib.contextmanager
def repaired_folder(folder: Folder) -> Iterator[Path]:
    """A folder with the repaired config.json and the drafter's own weights; its own where nothing was repaired."""
    config, assumed = folder.repaired
    if not assumed:
        yield folder.path
        return
    with tempfile.TemporaryDirectory() as name:
        for path in folder.path.iterdir():
            if path.name.endswith((".safetensors", ".safetensors.index.json")):
                (Path(name) / path.name).symlink_to(path.resolve())
        (Path(name) / "config.json").write_text(json.dumps(config))
        yield Path(name)


# ---------------------------------------------------------------------------------------------
# config.json, key by key. Each check gives level, found, expected and remedy

Rows = Iterator[tuple[Level, str, str] | tuple[Level, str, str, str]]


def _architecture(folder: Folder) -> Rows:
    if folder.architecture not in DRAFTER_ARCHITECTURES:
        yield "error", f"architectures names {folder.architecture!r}", folder.head.architectures[0]
    if folder.config.get("model_type") != "qwen3":
        yield "warning", f"model_type is {folder.config.get('model_type')!r}", "'qwen3'"
    for code in folder.section("auto_map").values():
        file = f"{str(code).rpartition('--')[2].partition('.')[0]}.py"
        if not (folder.path / file).is_file():
            yield "warning", f"auto_map names {code!r}, but there is no {file}", f"{file}, or no auto_map"
    if folder.config.get("tie_word_embeddings"):
        yield "warning", "tie_word_embeddings is true", "false: a drafter has neither embedding nor LM head"
    kind, read = (place.get("projector_type") for place in (folder.dflash, folder.settings))
    if read not in (None, *head_types()):
        known = " or ".join(head_types())
        yield "error", f"projector_type is {read!r}", f"{known}; none for a plain drafter"
    elif kind not in (None, read):
        yield "warning", f"projector_type is {kind!r}, another name of {read!r}", f"{read!r}, for SGLang"


def _layer_ids(folder: Folder) -> Rows:
    depth, ids, write = folder.target.num_hidden_layers, folder.layer_ids, "write the 0-based ids of training"
    if ids is None:
        found = f"target_layer_ids is {folder.settings.get('target_layer_ids')!r}"
        yield "error", found, "a list of ids, written out in dflash_config", write
        return
    yield from _misplaced(folder, "target_layer_ids")
    if ids != sorted(set(ids)):
        yield "error", f"target_layer_ids is {ids}", "ascending, distinct ids", write
    if min(ids) < 0 or max(ids) >= depth:
        higher = "; speculators, one higher, calls the last one so" if max(ids) == depth else ""
        yield "error", f"target_layer_ids is {ids}", f"0-based ids below the target's {depth} layers{higher}", write
    elif max(ids) == depth - 1:
        yield ("warning", f"target_layer_ids has {depth - 1}, the target's last layer",
               "lower ids: Hugging Face's last hidden state is behind the final norm, and some engines drop this id",
               "measure acceptance in the engine that is to serve it")  # fmt: skip
    if len(ids) > 1 and depth - 4 >= len(ids) - 1:
        usual = default_target_layer_ids(depth, len(ids))
        if ids == [i + 1 for i in usual]:
            yield ("note", f"target_layer_ids is {ids}", f"DFlash's {list(usual)}, unless trained otherwise",
                   "if the ids come from speculators, write each one lower")  # fmt: skip
    shape, width = folder.tensors.get("fc.weight", ()), folder.target.hidden_size
    if len(shape) == 2 and shape[1] != len(ids) * width:
        yield "error", f"{len(ids)} ids, but fc.weight is {list(shape)}", f"{width} columns for each id", write


def _misplaced(folder: Folder, key: str) -> Rows:
    if folder.dflash.get(key) is None:
        yield "warning", f"{key} stands at the top level only", "it in dflash_config, for most engines", "write both"


def _mask_token(folder: Folder) -> Rows:
    mask, size, tokenizer = folder.settings.get("mask_token_id"), folder.target.vocab_size, folder.tokenizer
    expected, remedy = "a token that never occurs in text", "write the mask token of training"
    if type(mask) is not int:
        yield "error", f"mask_token_id is {mask!r}", "an id: some engines take 0 without one", remedy
        return
    yield from _misplaced(folder, "mask_token_id")
    if not 0 <= mask < size:
        yield "error", f"mask_token_id is {mask}", f"an id below the vocabulary's {size}", remedy
        return
    if mask == 0 and folder.mask_token != 0:
        yield "error", "mask_token_id is 0", f"{expected}, not one left at 0", remedy
    for name in ("bos", "eos", "pad"):
        ids = [place.get(f"{name}_token_id") for place in (folder.config, folder.target_config)]
        ids.append(getattr(tokenizer, f"{name}_token_id", None))
        if any(mask in (found if isinstance(found, list) else [found]) for found in ids):
            yield "error", f"mask_token_id {mask} is the {name} token", expected, remedy
    if folder.mask_token not in (None, mask):
        yield "warning", f"mask_token_id is {mask}", f"the tokenizer's mask token, {folder.mask_token}", remedy
    if tokenizer is None:
        return
    if mask >= len(tokenizer):
        yield "note", f"mask_token_id {mask} is among the vocabulary's padding", expected, "none"
        return
    added, token = tokenizer.added_tokens_decoder, tokenizer.convert_ids_to_tokens(mask)
    if mask not in added or not added[mask].special:
        yield "error", f"mask_token_id {mask} is {token!r}, an ordinary token", expected, remedy
    elif token in folder.template:
        yield "error", f"mask_token_id {mask} is {token!r}, which the chat template writes", expected, remedy


def _rope(folder: Folder) -> Rows:
    thetas, base = folder.thetas, f"the target's {folder.target.rope_theta:g}"
    if not thetas:
        yield "error", "no rope_theta", f"rope_theta and rope_parameters, like {base}", "write both"
        return
    if not agree(thetas.values()):
        found = " and ".join(f"{theta!r} {place}" for place, theta in thetas.items())
        yield "error", f"rope_theta is {found}", "one base", f"write {base} in both"
    for place, engine in (("at the top level", "sglang-jax"), ("in rope_parameters", "vLLM and sglang-jax")):
        if place not in thetas:
            yield "warning", f"no rope_theta {place}", f"it, for {engine}", "write both forms of the key"
    new, old = (_scaling(folder.section(name)) for name in ("rope_parameters", "rope_scaling"))
    both = new.keys() & old.keys() if folder.section("rope_parameters") and folder.section("rope_scaling") else set()
    if any(new[key] != old[key] for key in both):
        yield "error", f"rope_parameters {new} and rope_scaling {old}", "the same scaling in both", "correct one"
    elif "rope_parameters" in folder.config and new["rope_type"] != old["rope_type"]:
        yield "warning", f"rope_parameters {new}, rope_scaling {old}", "the same, for readers of either", "write both"


def _scaling(place: dict) -> dict:
    kept = {key: x for key, x in place.items() if key not in ("rope_theta", "type") and x is not None}
    return {"rope_type": place.get("type", "default")} | kept


def _block_size(folder: Folder) -> Rows:
    sizes, remedy = folder.block_sizes, "write the block size of training"
    if not sizes:
        yield "error", "no block_size", "it at the top level and in dflash_config", remedy
    elif not agree(sizes.values()):
        found = " and ".join(f"{size!r} {place}" for place, size in sizes.items())
        yield "error", f"block_size is {found}", "one value", f"{remedy} in both"
    elif "at the top level" not in sizes:
        yield "warning", "block_size stands in dflash_config only", "it in both, for tpu-inference", "write both"
    elif "in dflash_config" not in sizes:
        yield "note", "block_size stands at the top level only", "it in dflash_config too", "write both"
    for place, size in sizes.items():
        if type(size) is not int or size < 2:
            yield "error", f"block_size {place} is {size!r}", "at least 2: the anchor and a draft", remedy


def _sizes(folder: Folder) -> Rows:
    config, target, remedy = folder.config, folder.target, "use the target that the drafter was trained with"
    for name in ("vocab_size", "hidden_size"):
        if config.get(name) != getattr(target, name):
            expected = f"the target's {getattr(target, name)}: embedding and LM head are shared"
            yield "error", f"{name} is {config.get(name)!r}", expected, remedy
    depth = folder.settings.get("num_target_layers")
    if depth != target.num_hidden_layers:
        tapped = " (here it counts the tapped layers)" if folder.layer_ids and depth == len(folder.layer_ids) else ""
        yield ("warning" if depth is None else "error", f"num_target_layers is {depth!r}{tapped}",
               f"the depth of the target, {target.num_hidden_layers}", f"correct it, or {remedy}")  # fmt: skip
    count = target.vocab_size if folder.tokenizer is None else len(folder.tokenizer)
    if count < target.vocab_size:
        found = f"{target.vocab_size} embeddings for the tokenizer's {count} tokens"
        yield "note", found, "padding, whose rows no text uses", "none: drafter and target have the same padding"
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps")
    pairs = [(name, config.get(name), getattr(target, name)) for name in names]
    if others := [f"{name} {own!r} (target {theirs!r})" for name, own, theirs in pairs if own != theirs]:
        yield "note", ", ".join(others), "the target's, or the drafter's own", "none, if meant so"


def _head(folder: Folder) -> Rows:
    head, found, own = folder.head, folder.settings, head_settings(folder.head)
    known = {name for kind in head_types() for name in head_settings(make_head(kind))}
    others, trained = [name for name in known - own.keys() if found.get(name)], "write that of training"
    if others:
        yield ("error", f"dflash_config has {', '.join(sorted(others))}, the head is {head.title}'s",
               "settings of one head",
               "write the projector_type of training; if there was none, train again without them")  # fmt: skip
    for name, default in own.items():
        if name not in head.absent | found:
            yield "error", f"dflash_config has no {name}", f"every setting of {head.title}'s head", trained
        elif isinstance(default, bool) and not isinstance((head.absent | found)[name], bool):
            yield "error", f"{name} is {found[name]!r}", "true or false", trained
    if head.projector_type != Drafter.projector_type and found.get("projector_type") != head.projector_type:
        yield "warning", "no projector_type in dflash_config", f"{head.projector_type!r}, for SGLang"
    for name in head.top_level:
        if name not in folder.config:
            yield "note", f"{name} is in dflash_config only", "it at the top level too"


def _keys(folder: Folder) -> Rows:
    target = folder.target_config
    keys = target_keys(*target["architectures"])
    for name, values, read in (("", folder.config, DRAFTER_KEYS), ("the target's ", target, keys)):
        for key in unknown_keys(values, read):
            found, expected = f"{name}{key} is {values[key]!r}", "keys that change nothing, or are read"
            yield "warning", found, expected, "find out what it means to the engine that is to serve it"


def _windows(folder: Folder) -> Rows:
    keys = ("layer_types", "sliding_window", "use_sliding_window", "num_hidden_layers")
    types, window, use, layers = (folder.config.get(key) for key in keys)
    found = f"use_sliding_window is {use!r}, sliding_window {window!r}"
    if isinstance(types, list) and len(types) != layers:
        yield "error", f"{len(types)} layer_types for {layers} layers", "one for each layer"
    if use and not folder.slides:
        yield "warning", f"{found}, but no layer slides", "sliding_attention in layer_types"
    if folder.slides:
        if not (use and window):
            yield "error", f"layers slide, but {found}", "use_sliding_window true and the window"
        if not isinstance(types, list):
            yield "warning", f"{found}, but no layer_types", "each layer's type, written out"
        found, expected = "layers with a sliding window", "the same window in training and serving"
        yield "warning", found, expected, "serve with an engine that reads it, or train with full attention"


# ---------------------------------------------------------------------------------------------
# The other files


def _tensors(folder: Folder) -> Rows:
    if folder.unreadable is not None:
        error = folder.unreadable
        yield "error", error.found, error.expected, error.remedy
        return
    names, title = folder.names, folder.head.title
    own, fits = "no embedding and no LM head of its own", "use the config.json that belongs to these weights"
    again = "write it again: specauf export --drafter DIR --out NEW"
    rows: list[tuple[list[str], Level, str, str, str]] = [
        (names.shared, "error", "{} in the drafter's file", own, "remove them from the file"),
        (names.prefixed, "error", "{}", 'names without "model."', "rename the tensors"),
        (names.early, "warning", f"{{}}: an early {title} file", "its head without this prefix", again),
        (names.other_head, "error", f"{{}} under a config of {title}", "the projector_type of their head", fits),
        (names.unknown, "error", "unknown: {}", "exactly the tensors of the layout", fits),
        (names.missing, "error", "missing: {}", "exactly the tensors of the layout", fits),
    ]
    for those, level, found, expected, remedy in rows:
        if those:
            first = those[0] + (f" and {len(those) - 1} more" if those[1:] else "")
            yield level, found.format(first), expected, remedy


def _template(folder: Folder) -> Rows:
    if folder.tokenizer is None:
        yield "warning", f"{folder.target_path} has no tokenizer.json", "the target's tokenizer", "put it there"
        return
    if not folder.template:
        yield "note", "the target has no chat template", "one, to serve conversations", "none, for plain text"
    elif re.search(r"\benable_thinking\b", folder.template):
        found, same = "the chat template has a thinking mode", "the same mode in training and serving"
        yield "note", found, same, "serve with the enable_thinking of training"
    names, keys = ("tokenizer", "chat template"), ("tokenizer_sha256", "template_sha256")
    if not any(key in folder.provenance for key in keys):
        expected = "hashes of the tokenizer and chat template of training"
        yield "note", "no specauf.json with hashes", expected, "compare the two with the target's by hand"
        return
    for name, key, now in zip(names, keys, hashes(folder.target_path), strict=True):
        if (then := folder.provenance.get(key)) != now:
            found = f"the target's {name} is not the one of training"
            yield "warning", found, f"sha256 {then}", f"serve with the {name} of training"


_CHECKS: dict[str, Callable[[Folder], Rows]] = {
    "architecture": _architecture,
    "layer ids": _layer_ids,
    "mask token": _mask_token,
    "RoPE": _rope,
    "block size": _block_size,
    "sizes": _sizes,
    "head": _head,
    "keys": _keys,
    "sliding windows": _windows,
    "tensors": _tensors,
    "chat template": _template,
}


def read_findings(folder: Folder) -> list[Finding]:
    """All findings that need no decoding, in the order of the checks."""
    return [Finding(topic, *row) for topic, check in _CHECKS.items() for row in check(folder)]
