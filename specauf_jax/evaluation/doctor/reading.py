"""What a drafter's files say, against the conventions and against its target. Nothing is decoded here."""

import re
from collections.abc import Iterator

from specauf_jax.data.tokenizer import hashes
from specauf_jax.evaluation.doctor.pair import DOMINO_KEYS, Finding, Level, Pair, agree
from specauf_jax.models.hf_config import DRAFTER_ARCHITECTURES
from specauf_jax.models.resolve import default_target_layer_ids

Findings = Iterator[Finding]


def read_findings(pair: Pair) -> list[Finding]:
    """All findings that need no decoding, in the order of the checks."""
    return [finding for check in _CHECKS for finding in check(pair)]


# ---------------------------------------------------------------------------------------------
# config.json, key by key


def _architecture(pair: Pair) -> Findings:
    def say(level: Level, *rest) -> Finding:
        return Finding("architecture", level, *rest)

    if pair.named not in DRAFTER_ARCHITECTURES:
        yield say("error", f"architectures names {pair.named!r}", "DFlashDraftModel", "correct config.json")
    if pair.values.get("model_type") != "qwen3":
        yield say("warning", f"model_type is {pair.values.get('model_type')!r}", "'qwen3'", "correct config.json")
    for code in pair.object("auto_map").values():
        file = f"{str(code).rpartition('--')[2].partition('.')[0]}.py"
        if not (pair.drafter / file).is_file():
            yield say("warning", f"auto_map names {code!r}, but there is no {file}", "auto_map only where its code is",
                      f"put {file} beside config.json, or remove auto_map")  # fmt: skip
    kind = pair.dflash.get("projector_type")
    if kind not in (None, "dflash", "domino"):
        yield say("error", f"projector_type is {kind!r}", "'domino', or none for DFlash", "correct dflash_config")


def _layer_ids(pair: Pair) -> Findings:
    depth, ids = pair.architecture.num_hidden_layers, pair.layer_ids

    def say(level: Level, found: str, expected: str, remedy: str) -> Finding:
        return Finding("layer ids", level, found, expected, remedy)

    if ids is None:
        if "target_layer_ids" in pair.values and "target_layer_ids" not in pair.dflash:
            yield say("error", "target_layer_ids stands at the top level only", "it in dflash_config", "move it")
        else:
            yield say("error", f"dflash_config.target_layer_ids is {pair.dflash.get('target_layer_ids')!r}",
                      "a list of ids, written out", "write the ids that the drafter was trained with")  # fmt: skip
        return
    if ids != sorted(set(ids)):
        yield say("error", f"target_layer_ids is {ids}", "ascending, distinct ids", "write the ids of training")
    if min(ids) < 0 or max(ids) >= depth:
        higher = "; speculators, one higher, calls the last one so" if max(ids) == depth else ""
        yield say("error", f"target_layer_ids is {ids}", f"0-based ids below the target's {depth} layers{higher}",
                  "write the ids of training, 0-based")  # fmt: skip
    elif max(ids) == depth - 1:
        yield say("warning", f"target_layer_ids has {depth - 1}, the target's last layer",
                  "lower ids: Hugging Face's last hidden state is behind the final norm, and speculators' converter "
                  "drops this id",
                  "measure acceptance in the engine that is to serve it")  # fmt: skip
    if len(ids) > 1 and depth - 4 >= len(ids) - 1:
        usual = default_target_layer_ids(depth, len(ids))
        if ids == [i + 1 for i in usual]:
            yield say("note", f"target_layer_ids is {ids}", f"DFlash's {list(usual)}, unless trained otherwise",
                      "if the ids come from speculators, write each one lower")  # fmt: skip
    width = pair.tensors.get("fc.weight", ())
    if len(width) == 2 and width[1] != len(ids) * pair.architecture.hidden_size:
        yield say("error", f"{len(ids)} ids, but fc.weight is {list(width)}",
                  f"{pair.architecture.hidden_size} columns for each id", "write the ids of training")  # fmt: skip


def _mask_token(pair: Pair) -> Findings:
    mask, size = pair.dflash.get("mask_token_id"), pair.architecture.vocab_size

    def say(level: Level, found: str, expected: str, remedy="write the mask token of training") -> Finding:
        return Finding("mask token", level, found, expected, remedy)

    if type(mask) is not int:
        where = " (it stands at the top level)" if "mask_token_id" in pair.values else ""
        yield say("error", f"dflash_config.mask_token_id is {mask!r}{where}", "an id: some engines take 0 without one")
        return
    if not 0 <= mask < size:
        yield say("error", f"mask_token_id is {mask}", f"an id below the vocabulary's {size}")
        return
    known = getattr(pair.tokenizer, "mask_token_id", None)
    if mask == 0 and known != 0:
        yield say("error", "mask_token_id is 0", "a token that never occurs in text, not one left at 0")
    for name in sorted(_roles(pair, mask)):
        yield say("error", f"mask_token_id {mask} is the {name} token", "a token that never occurs in text")
    if known is not None and known != mask:
        yield say("warning", f"mask_token_id is {mask}", f"the tokenizer's mask token, {known}")
    if pair.tokenizer is None:
        return
    if mask >= len(pair.tokenizer):
        yield say("note", f"mask_token_id {mask} is among the vocabulary's padding", "a token in no text", "none")
        return
    added, token = pair.tokenizer.added_tokens_decoder, pair.tokenizer.convert_ids_to_tokens(mask)
    if mask not in added or not added[mask].special:
        yield say("error", f"mask_token_id {mask} is {token!r}, an ordinary token", "a token in no text")
    elif token in _template_text(pair.tokenizer):
        yield say("error", f"mask_token_id {mask} is {token!r}, which the chat template writes", "a token in no text")


def _roles(pair: Pair, mask: int) -> set[str]:
    """Which of pad, eos and bos the mask token is, by the tokenizer and both config.json."""
    roles = set()
    for name in ("pad", "eos", "bos"):
        for place in (pair.values, pair.target_values):
            ids = place.get(f"{name}_token_id")
            if mask in (ids if isinstance(ids, list) else [ids]):
                roles.add(name)
        if getattr(pair.tokenizer, f"{name}_token_id", None) == mask:
            roles.add(name)
    return roles


def _rope(pair: Pair) -> Findings:
    def say(level: Level, found: str, expected: str, remedy: str) -> Finding:
        return Finding("RoPE", level, found, expected, remedy)

    thetas, target = pair.thetas, pair.architecture
    if not thetas:
        yield say("error", "no rope_theta", f"rope_theta and rope_parameters, like the target's {target.rope_theta:g}",
                  "write both")  # fmt: skip
        return
    if not agree(thetas.values()):
        found = " and ".join(f"{theta!r} {place}" for place, theta in thetas.items())
        yield say("error", f"rope_theta is {found}", "one base", f"write the target's {target.rope_theta:g} in both")
    for place, engine in (("at the top level", "sglang-jax"), ("in rope_parameters", "vLLM")):
        if place not in thetas:
            yield say("warning", f"no rope_theta {place}", f"it, for {engine}", "write both forms of the key")
    new, old = (_scaling(pair.object(name)) for name in ("rope_parameters", "rope_scaling"))
    both = new.keys() & old.keys()
    if pair.object("rope_parameters") and pair.object("rope_scaling") and any(new[key] != old[key] for key in both):
        yield say("error", f"rope_parameters {new} and rope_scaling {old}", "the same scaling in both", "correct one")
    elif "rope_parameters" in pair.values and new["rope_type"] != old["rope_type"]:
        yield say("warning", f"rope_parameters {new}, rope_scaling {old or None}", "both, for readers of either",
                  "write the scaling in both")  # fmt: skip


def _scaling(place: dict) -> dict:
    kept = {key: x for key, x in place.items() if key not in ("rope_theta", "type") and x is not None}
    return {"rope_type": place.get("type", "default")} | kept


def _block_size(pair: Pair) -> Findings:
    def say(level: Level, found: str, expected: str, remedy: str) -> Finding:
        return Finding("block size", level, found, expected, remedy)

    sizes = pair.block_sizes
    if not sizes:
        yield say("error", "no block_size", "it at the top level and in dflash_config", "write that of training")
    elif not agree(sizes.values()):
        found = " and ".join(f"{size!r} {place}" for place, size in sizes.items())
        yield say("error", f"block_size is {found}", "one value", "write the block size of training in both")
    if "at the top level" not in sizes and sizes:
        yield say("warning", "block_size stands in dflash_config only", "it at the top level too, for tpu-inference",
                  "write it there")  # fmt: skip
    if "in dflash_config" not in sizes and sizes:
        yield say("note", "block_size stands at the top level only", "it in dflash_config too", "write it there")
    for place, size in sizes.items():
        if type(size) is not int or size < 2:
            yield say("error", f"block_size {place} is {size!r}", "at least 2: the anchor and a draft",
                      "write the block size of training")  # fmt: skip


def _sizes(pair: Pair) -> Findings:
    target, own = pair.architecture, pair.values
    for topic, name in (("vocabulary", "vocab_size"), ("sizes", "hidden_size")):
        if own.get(name) != getattr(target, name):
            yield Finding(topic, "error", f"{name} is {own.get(name)!r}",
                          f"the target's {getattr(target, name)}: embedding and LM head are shared",
                          "use the target that the drafter was trained with")  # fmt: skip
    count = None if pair.tokenizer is None else len(pair.tokenizer)
    if count is not None and count < target.vocab_size:
        yield Finding("vocabulary", "note", f"{target.vocab_size} embeddings for the tokenizer's {count} tokens",
                      "padding, whose rows no text uses", "none: drafter and target have the same padding")  # fmt: skip
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps")
    others = [f"{n} {own.get(n)!r} (target {getattr(target, n)!r})" for n in names if own.get(n) != getattr(target, n)]
    if others:
        yield Finding("sizes", "note", ", ".join(others), "the target's, or the drafter's own", "none, if meant so")
    depth = own.get("num_target_layers")
    if depth != target.num_hidden_layers:
        level = "warning" if depth is None else "error"
        tapped = " (here it counts the tapped layers)" if pair.layer_ids and depth == len(pair.layer_ids) else ""
        yield Finding("target depth", level, f"num_target_layers is {depth!r}{tapped}",
                      f"the depth of the target, {target.num_hidden_layers}",
                      "correct it, or use the target that the drafter was trained with")  # fmt: skip


def _labels(pair: Pair) -> Findings:
    shift = pair.dflash.get("shift_label")
    if not pair.domino:
        if shift:
            yield Finding("labels", "error", "shift_label in a plain DFlash drafter", "labels that are not shifted",
                          "no engine serves it: train again without shifted labels, or as Domino")  # fmt: skip
        return
    for key in DOMINO_KEYS:
        if key not in pair.dflash:
            yield Finding("Domino", "error", f"dflash_config has no {key}", "every key of Domino's head",
                          "write it as it was trained")  # fmt: skip
    if shift is not None and not isinstance(shift, bool):
        yield Finding("labels", "error", f"shift_label is {shift!r}", "true or false", "write it as it was trained")
    if pair.dflash.get("projector_type") != "domino":
        yield Finding("Domino", "warning", "no projector_type in dflash_config", "'domino', for SGLang", "write it")
    if "emb_dim" not in pair.values:
        yield Finding("Domino", "note", "emb_dim is in dflash_config only", "it at the top level too", "write it there")


def _windows(pair: Pair) -> Findings:
    types, window, use = (pair.values.get(key) for key in ("layer_types", "sliding_window", "use_sliding_window"))
    layers = pair.values.get("num_hidden_layers")

    def say(level: Level, found: str, expected: str, remedy="correct config.json") -> Finding:
        return Finding("sliding windows", level, found, expected, remedy)

    if isinstance(types, list) and len(types) != layers:
        yield say("error", f"{len(types)} layer_types for {layers} layers", "one for each layer")
    if pair.sliding and not (use and window):
        found = f"layer_types has sliding_attention, use_sliding_window is {use!r}, sliding_window {window!r}"
        yield say("error", found, "use_sliding_window true and the window")
    if use and not pair.sliding:
        yield say("warning", f"use_sliding_window true, sliding_window {window!r}, but no layer slides",
                  "sliding_attention in layer_types, or use_sliding_window false")  # fmt: skip
    if pair.sliding and not isinstance(types, list):
        yield say("warning", "use_sliding_window without layer_types", "each layer's type, written out")
    if pair.sliding:
        yield say("warning", "layers with a sliding window",
                  "the same window in training and serving, but every engine reads it differently: both TPU engines "
                  "ignore layer_types, z-lab's own code under sdpa sees everything, SpecForge's is causal in the block",
                  "serve with the engine whose reading it was trained under, or train with full attention")  # fmt: skip


def _heads(pair: Pair) -> Findings:
    if pair.architecture.tie_word_embeddings:
        yield Finding("heads", "note", "the target's LM head is its embedding",
                      "one tensor for both: an engine shares the embedding twice", "none")  # fmt: skip
    if pair.values.get("tie_word_embeddings"):
        yield Finding("heads", "warning", "tie_word_embeddings is true", "false: a drafter has neither of the two",
                      "correct config.json")  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Files beside it


def _tensors(pair: Pair) -> Findings:
    def say(level: Level, found: str, expected: str, remedy: str) -> Finding:
        return Finding("tensors", level, found, expected, remedy)

    if pair.unreadable is not None:
        error = pair.unreadable
        yield say("error", error.found, error.expected, error.remedy)
        return
    names = pair.names
    if names.shared:
        yield say("error", f"{_some(names.shared)} in the drafter's file", "no embedding and no LM head of its own",
                  "remove them from the file")  # fmt: skip
    if names.prefixed:
        yield say("error", f"{_some(names.prefixed)}", 'names without "model."', "rename the tensors")
    if names.early:
        yield say("warning", f"{_some(names.early)}: an early Domino file", 'its head without "logit_head."',
                  "write it again: specauf export --drafter DIR --out NEW")  # fmt: skip
    if names.head:
        yield say("error", f"{_some(names.head)} under a config of plain DFlash", "projector_type 'domino'",
                  "use the config.json that belongs to them")  # fmt: skip
    for kind, these in (("unknown", names.unknown), ("missing", names.missing)):
        if these:
            yield say("error", f"{kind}: {_some(these)}", "exactly the tensors of the layout",
                      "use the config.json that belongs to these weights")  # fmt: skip


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def _template(pair: Pair) -> Findings:
    def say(level: Level, found: str, expected: str, remedy: str) -> Finding:
        return Finding("chat template", level, found, expected, remedy)

    if pair.tokenizer is None:
        yield say("warning", f"{pair.target} has no tokenizer.json", "the target's tokenizer", "put it there")
        return
    template = _template_text(pair.tokenizer)
    if not template:
        yield say("note", "the target has no chat template", "one, to serve conversations", "none, for plain text")
    elif re.search(r"\benable_thinking\b", template):
        yield say("note", "the chat template has a thinking mode", "the same mode in training and serving",
                  "serve with the enable_thinking of training")  # fmt: skip
    names, keys = ("tokenizer", "chat template"), ("tokenizer_sha256", "template_sha256")
    if not any(key in pair.origin for key in keys):
        yield say("note", "nothing tells the tokenizer and chat template of training", "their hashes in specauf.json",
                  "compare them with the target's by hand")  # fmt: skip
        return
    for name, key, now in zip(names, keys, hashes(pair.target), strict=True):
        if pair.origin.get(key) != now:
            yield say("warning", f"the target's {name} is not the one of training", f"sha256 {pair.origin.get(key)}",
                      f"serve with the {name} of training")  # fmt: skip


def _template_text(tokenizer) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return str(template or "")


_CHECKS = (
    *(_architecture, _layer_ids, _mask_token, _rope, _block_size, _sizes, _labels, _windows, _heads),
    *(_tensors, _template),
)
