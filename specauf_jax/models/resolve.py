"""From a drafter's settings to its architecture: what is left open follows the target, and the two are checked."""

import dataclasses

from specauf_jax.architecture import Drafter, ResolvedDrafter, Target
from specauf_jax.errors import SpecaufError
from specauf_jax.models.heads import make_head


def default_target_layer_ids(num_target_layers: int, num_drafter_layers: int) -> tuple[int, ...]:
    """0-based ids of the tapped target layers (DFlash, arXiv 2602.06036): spread from 1 to N-3."""
    N, M = num_target_layers, num_drafter_layers
    if M == 1:
        return (N // 2,)
    return tuple(round(1 + i * (N - 4) / (M - 1)) for i in range(M))


_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
)


def resolve_drafter(drafter: Drafter, target: Target, mask_token_id: int | None = None) -> ResolvedDrafter:
    """Fill what the drafter leaves open from its target, and check that the two fit.

    Args:
      drafter: with any field left open.
      target: the target that it will serve.
      mask_token_id: the tokenizer's mask token, used when the drafter names none.

    Raises:
      SpecaufError: no mask token, or a field that cannot work with this target.
    """
    if drafter.mask_token_id is None and mask_token_id is None:
        raise SpecaufError(
            "no mask token: drafter.mask_token_id is unset and the tokenizer has none",
            "the id of a token that never occurs in text",
            "pass --drafter.mask-token-id ID",
        )
    given = {field.name: getattr(drafter, field.name) for field in dataclasses.fields(drafter)}
    given = {name: value for name, value in given.items() if value is not None and name != "projector_type"}
    open_ = {name: getattr(target, name) for name in _SHARED} | {
        "mask_token_id": mask_token_id,
        "target_layer_ids": default_target_layer_ids(target.num_hidden_layers, drafter.num_hidden_layers),
        "layer_types": ("full_attention",) * drafter.num_hidden_layers,
    }
    head = make_head(drafter.projector_type, drafter.head)
    return fitted(ResolvedDrafter(**open_ | given | {"head": head}), target)


def fitted(drafter: ResolvedDrafter, target: Target) -> ResolvedDrafter:
    """A drafter that was made elsewhere, checked against its target.

    Raises:
      SpecaufError: naming the field that cannot work with this target.
    """
    drafter.head.check(drafter)
    if drafter.num_target_layers not in (None, target.num_hidden_layers):
        raise SpecaufError(
            f"the drafter was made for a target of {drafter.num_target_layers} layers, this one has "
            f"{target.num_hidden_layers}",
            "the target that the drafter was trained with",
            "pass that target's folder",
        )
    _check_fit(drafter, target)
    return dataclasses.replace(drafter, num_target_layers=target.num_hidden_layers)


def _check_fit(drafter: ResolvedDrafter, target: Target) -> None:
    for name in ("hidden_size", "vocab_size"):
        found, expected = getattr(drafter, name), getattr(target, name)
        if found != expected:
            raise SpecaufError(
                f"drafter.{name} is {found}",
                f"the target's {expected} (embedding and LM head are shared)",
                "use the target that the drafter was made for",
            )
    ids = drafter.target_layer_ids
    if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= target.num_hidden_layers:
        raise SpecaufError(
            f"drafter.target_layer_ids is {list(ids)}",
            f"ascending, distinct 0-based ids below the target's {target.num_hidden_layers} layers",
            "set --drafter.target-layer-ids (the default needs a target with 3 layers more than the drafter)",
        )
    if not 0 <= drafter.mask_token_id < target.vocab_size:
        raise SpecaufError(
            f"drafter.mask_token_id is {drafter.mask_token_id}",
            f"an id below the vocabulary's {target.vocab_size}",
            "set --drafter.mask-token-id",
        )
