"""config.json ↔ drafters: z-lab, SpecForge and speculators.

Nothing is guessed: a size, the mask token, the RoPE base and a head's settings must be written in the file, and what
this project would compute differently (another activation, biases, a quantised file) is refused.
"""

import dataclasses

from specauf_jax.architecture import Head, ResolvedDrafter
from specauf_jax.errors import SpecaufError
from specauf_jax.models.heads import head_settings, head_types
from specauf_jax.models.hf_keys import check_keys
from specauf_jax.models.hf_target import target_keys
from specauf_jax.models.hf_values import (
    MOST_LAYERS,
    architecture_of,
    build,
    flag,
    listed,
    number,
    object_of,
    refuse,
    shared_fields,
    shared_json,
)

DRAFTER_ARCHITECTURES = tuple(dict.fromkeys(name for head in head_types().values() for name in head.architectures))
_SPECULATORS = {head.speculator.kind: head for head in head_types().values() if head.speculator}
SPECULATORS = tuple(head.speculator.architecture for head in head_types().values() if head.speculator)
"""Architectures in speculators' layout."""
_UNNAMED = "dflash"  # the projector type of a file that names none
_LABELS = ("shift_label", "sample_from_anchor", "query_zero_predicts_next")
"""Names of one flag: in SpecForge, in speculators and vLLM, in DeepSpec."""
_DFLASH_KEYS = (
    *("block_size", "mask_token_id", "target_layer_ids", "num_target_layers", "projector_type", "attention_mode"),
    *_LABELS,
)
"""Keys that stand in dflash_config, or at the top level; with them the settings of the head."""
_SPECULATORS_KEYS = (
    *("speculators_model_type", "speculators_config", "transformer_layer_config", "aux_hidden_state_layer_ids"),
    *("sample_from_anchor", "draft_vocab_size", "block_size", "mask_token_id", "quantization_config", "is_causal"),
    *("speculators_version", "target_hidden_size"),  # of no effect
    *(field.name for head in _SPECULATORS.values() for field in dataclasses.fields(head)),
)
DRAFTER_KEYS = (
    *(*target_keys(), *_DFLASH_KEYS, "dflash_config"),
    *(field.name for head in head_types().values() for field in dataclasses.fields(head)),
)
"""Keys of a drafter's config.json that are read here."""


def read_drafter(values: dict, where: str) -> ResolvedDrafter:
    """The architecture that a drafter's config.json describes; arguments and errors as for `read_target`."""
    if "speculators_model_type" in values:
        values = _from_speculators(values, where)
    architecture = architecture_of(values, where)
    if architecture not in DRAFTER_ARCHITECTURES:
        raise SpecaufError(
            f"{where}: architecture {architecture!r}",
            " or ".join(DRAFTER_ARCHITECTURES),
            f"pass the folder of a {' or '.join(head.title for head in head_types().values())} drafter",
        )
    refuse(values, where, "attention_bias", "mlp_bias", "quantization_config")
    check_keys(values, where, DRAFTER_KEYS)
    kinds = {kind: head for kind, head in head_types().items() if architecture in head.architectures}
    dflash = dflash_settings(values, where)
    projector = dflash.get("projector_type", _UNNAMED if _UNNAMED in kinds else next(iter(kinds)))
    if projector not in list(kinds):
        raise SpecaufError(
            f"{where}: projector_type {projector!r} under {architecture}",
            " or ".join(sorted(kinds)),
            f"use a drafter of {' or '.join(head.title for head in kinds.values())}",
        )
    head, inside = kinds[projector], f"{where}: dflash_config"
    own = [field.name for field in dataclasses.fields(head)]
    section = object_of(values, where, "dflash_config")
    check_keys(section, inside, {*_DFLASH_KEYS, *own, "is_causal"}, strict=True)
    found = build(
        ResolvedDrafter,
        where,
        **shared_fields(values, where),
        **_layer_types(values, where),
        block_size=number(dflash, inside, "block_size"),
        mask_token_id=number(dflash, inside, "mask_token_id", least=0),
        target_layer_ids=tuple(listed(dflash, inside, "target_layer_ids", int)),
        num_target_layers=number(dflash, where, "num_target_layers") if "num_target_layers" in dflash else None,
        head=_read_head(head, dflash, where),
    )
    build(found.head.check, where, drafter=found)
    for place, name in ((values, where), (section, inside)):
        _check_causal(place, found, name)
    if dflash.get("attention_mode", mode := _attention_mode(found)) != mode:
        raise SpecaufError(f"{inside}: attention_mode is {dflash['attention_mode']!r}", f"{mode!r}, as the sizes say",
                           "correct the file")  # fmt: skip
    return found


def write_drafter(config: ResolvedDrafter, architecture: str = "DFlashDraftModel") -> dict:
    """config.json of a drafter, in z-lab's layout."""
    dflash = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
    }
    values = shared_json(config, "qwen3") | {
        "architectures": [architecture],
        "block_size": config.block_size,
        "dflash_config": dflash,
        "num_target_layers": config.num_target_layers,
        "tie_word_embeddings": False,
    }
    head = config.head
    if head.projector_type != _UNNAMED:
        dflash["projector_type"] = head.projector_type
    if head.attention_mode:
        dflash["attention_mode"] = _attention_mode(config)
    dflash |= {name: x for name, x in head_settings(head).items() if (name, x) not in head.absent.items()}
    return values | {name: getattr(head, name) for name in head.top_level}


def write_speculators(config: ResolvedDrafter, verifier: str, verifier_architecture: str) -> dict:
    """config.json of a drafter in speculators' layout: its layer ids are one higher.

    Args:
      config: resolved.
      verifier: name or path of the target, from which speculators takes embedding and LM head.
      verifier_architecture: as in the target's config.json.
    """
    head = config.head
    assert head.speculator is not None
    return {name: getattr(head, name) for name in head.top_level} | {
        "architectures": [head.speculator.architecture],
        "speculators_model_type": head.speculator.kind,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "block_size": config.block_size,
        "draft_vocab_size": config.vocab_size,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.first_slot == 0,
        "sliding_window_non_causal": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": shared_json(config, "qwen3") | {"tie_word_embeddings": False},
        "speculators_config": {
            "algorithm": head.speculator.kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.num_labels}],
            "verifier": {"name_or_path": verifier, "architectures": [verifier_architecture]},
        },
    }


def _from_speculators(values: dict, where: str) -> dict:
    """The same drafter's config.json in z-lab's layout."""
    kind = values["speculators_model_type"]
    if kind not in list(_SPECULATORS):
        raise SpecaufError(
            f"{where}: speculators_model_type {kind!r}", f"one of {', '.join(_SPECULATORS)}", "use another drafter"
        )
    head, body = _SPECULATORS[kind], object_of(values, where, "transformer_layer_config")
    assert head.speculator is not None
    check_keys(values, where, _SPECULATORS_KEYS)
    if architecture_of(values, where) not in (named := (head.speculator.architecture, *head.architectures)):
        raise SpecaufError(f"{where}: architecture {architecture_of(values, where)!r} of a {kind}", " or ".join(named),
                           "correct the file")  # fmt: skip
    if other := sorted({"dflash_config", "target_layer_ids", "shift_label", "projector_type"} & values.keys()):
        raise SpecaufError(f"{where}: {other[0]} beside speculators_model_type", "the keys of one layout",
                           f"remove {other[0]}, or speculators_model_type")  # fmt: skip
    if values.get("draft_vocab_size") not in (None, body.get("vocab_size")):
        raise SpecaufError(
            f"{where}: draft_vocab_size is {values['draft_vocab_size']!r}",
            f"the target's {body.get('vocab_size')!r}: a drafter of the whole vocabulary",
            "train one without --draft-vocab-size",
        )
    if body.get("sliding_window") is not None:  # theirs starts at the anchor for all slots
        raise SpecaufError(
            f"{where}: sliding_window is {body['sliding_window']!r}", "full attention", "use another drafter"
        )
    names = ("block_size", "mask_token_id", *(field.name for field in dataclasses.fields(head)))
    dflash = {name: values[name] for name in names if name in values} | {
        "projector_type": head.projector_type,
        "target_layer_ids": [i - 1 for i in listed(values, where, "aux_hidden_state_layer_ids", int)],
    }
    if values.get("sample_from_anchor") is not None:
        dflash["shift_label"] = flag(values, where, "sample_from_anchor")
    kept = {name: values[name] for name in ("quantization_config", "is_causal") if name in values}
    return body | kept | {"architectures": [head.architectures[0]], "dflash_config": dflash}


# ---------------------------------------------------------------------------------------------
# Parts of a drafter's file


def _attention_mode(config: ResolvedDrafter) -> str:
    return "gqa" if config.num_key_value_heads < config.num_attention_heads else "mha"


def dflash_settings(values: dict, where: str) -> dict:
    """Settings of dflash_config, with those that stand at the top level, each under one name.

    Raises:
      SpecaufError: two places, or two names of the label convention, hold different values.
    """
    inside, heads = object_of(values, where, "dflash_config"), head_types().values()
    names = {*_DFLASH_KEYS, *(field.name for head in heads for field in dataclasses.fields(head))}
    found: dict = {}
    said: dict[str, str] = {}
    for place, section in (("in dflash_config", inside), ("at the top level", values)):
        for key in sorted(names & section.keys()):
            name, value = "shift_label" if key in _LABELS else key, section[key]
            if value is None:
                continue
            if key in _LABELS:
                value = flag(section, where, key)
            if name in found and found[name] != value:
                raise SpecaufError(
                    f"{where}: {said[name]}, and {key} {value!r} {place}", "one value", "correct the file"
                )
            found[name], said[name] = value, f"{key} is {value!r} {place}"
    aliases = {alias: head.projector_type for head in heads for alias in head.aliases}
    if isinstance(found.get("projector_type"), str):
        found["projector_type"] = aliases.get(found["projector_type"], found["projector_type"])
    return found


def _read_head(kind: type[Head], dflash: dict, where: str) -> Head:
    """Every setting of the head."""
    inside, found = f"{where}: dflash_config", {}
    dflash = kind.absent | dflash
    for field in dataclasses.fields(kind):
        if field.name not in dflash:
            raise SpecaufError(f"{inside} has no {field.name}", f"every setting of {kind.title}'s head",
                               "add it, as it was trained")  # fmt: skip
        match field.default:
            case bool():
                found[field.name] = flag(dflash, inside, field.name)
            case str():
                found[field.name] = dflash[field.name]  # one of a few words, as the head itself says
            case value:
                found[field.name] = number(dflash, inside, field.name, least=0, kind=type(value))
    return build(kind, where, **found)


def _check_causal(values: dict, drafter: ResolvedDrafter, where: str) -> None:
    """is_causal, of all layers, must say what is computed: only layers with a window see no later slot."""
    causal = values.get("is_causal")
    if causal is not None and any(causal is not (window is not None) for window in drafter.windows):
        raise SpecaufError(
            f"{where}: is_causal is {causal!r}",
            "slots that see the whole block, but in layers with a window none behind them",
            "use a drafter that was trained so",
        )


def _layer_types(values: dict, where: str) -> dict:
    """Fields of sliding windows; where no list says which layers have one, the last ones do (Hugging Face's rule)."""
    layers, window = number(values, where, "num_hidden_layers", most=MOST_LAYERS), values.get("sliding_window")
    slides = flag(values, where, "use_sliding_window") and window is not None
    if values.get("layer_types") is not None:
        types = tuple(listed(values, where, "layer_types", str))
    else:
        full = number(values, where, "max_window_layers", 0) if slides else layers
        types = tuple("full_attention" if i < full else "sliding_attention" for i in range(layers))
    if "sliding_attention" not in types:
        return {"layer_types": types}
    if not slides:
        raise SpecaufError(
            f"{where}: layer_types has sliding_attention, use_sliding_window is "
            f"{values.get('use_sliding_window')!r} and sliding_window {window!r}",
            "use_sliding_window true and the window",
            "correct the file",
        )
    return {"layer_types": types, "sliding_window": number(values, where, "sliding_window")}
