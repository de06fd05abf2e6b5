"""Where a drafter came from."""

from specauf_jax.architecture import ResolvedDrafter


def drafter_origin(record: dict, drafter: ResolvedDrafter, step: int) -> dict:
    """Where a drafter came from, for people and for checks; stored beside its weights."""
    if drafter.first_slot == 0:
        labels = "slot k predicts the token k + 1 after the anchor; every slot is trained"
    else:
        labels = "slot k predicts the token k after the anchor; slot 0 is not trained"
    base = {"base_objective": record["base_objective"]} if "base" in drafter.head.branches else {}
    objectives = {"objectives": record["objectives"]} if record.get("objectives") else {}
    return (
        base
        | objectives
        | {
            "objective": record["objective"],
            "init_from": record["init_from"],
            "steps": step,
            "seed": record["train"]["seed"],
            "target": record["target"],
            "data": record["data"],
            "tokenizer_sha256": record["tokenizer_sha256"],
            "template_sha256": record["template_sha256"],
            "template_args": record.get("template_args", {}),
            "labels": labels,
            "target_layer_ids": "0-based; id i is the residual output of layer i",
        }
    )
