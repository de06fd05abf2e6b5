"""Where a drafter came from."""

import dataclasses

from specauf_jax.architecture import ResolvedDrafter
from specauf_jax.config import Objective, one_after_another


def drafter_origin(record: dict, drafter: ResolvedDrafter, step: int) -> dict:
    """Where a drafter came from, for people and for checks; stored beside its weights."""
    if drafter.first_slot == 0:
        labels = "slot k predicts the token k + 1 after the anchor; every slot is trained"
    else:
        labels = "slot k predicts the token k after the anchor; slot 0 is not trained"
    trained = drafter.head.base_ratio(record["train"].get("lambda_base_decay_ratio"))
    base = {"base_objective": record["base_objective"]} if trained else {}
    objective, objectives = record["objective"], record.get("objectives")
    if objectives:  # that of the last step
        stages = one_after_another(objectives, Objective(**objective), record["train"]["steps"])
        current = [stage for before, stage in stages if before < max(step, 1)][-1]
        objective, base = dataclasses.asdict(current), base | {"objectives": objectives}
    return base | {
        "objective": objective,
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


def objective_title(origin: dict) -> str | None:
    """A drafter's objective in short: `auf`, `auf kl`, `decay@0,auf@0.8`; None where nothing tells."""
    objective = origin.get("objective") or {}
    loss = objective.get("loss", "ce")
    name = origin.get("objectives") or objective.get("name")
    return name if name is None or loss == "ce" else f"{name} {loss}"
