"""Train, check and serve speculative-decoding drafters with accept-until-fail objectives, in JAX.

Everything public takes and returns plain pytrees; jit, vmap, shard and differentiate at will.
Names are imported when first used, so that the command line answers before JAX is loaded.
"""

import importlib

_HOME = {
    "SpecaufError": "errors",
    "Drafter": "architecture",
    "Objective": "config",
    "Sampling": "config",
    "Target": "architecture",
    "RopeScaling": "parts",
    "ResolvedDrafter": "architecture",
    "resolve_drafter": "models.resolve",
    "accept_until_fail_mask": "objectives",
    "LabelScores": "objectives",
    "SoftScores": "objectives",
    "label_scores": "objectives",
    "objective_sums": "objectives",
    "prefix_acceptance": "objectives",
    "Head": "models.target",
    "TargetStep": "models.target",
    "HybridStep": "models.target",
    "target_step": "models.target",
    "serving_params": "models.cpu",
    "init_target": "models.target",
    "target_features": "models.target",
    "target_states": "models.target",
    "target_head": "models.target",
    "init_drafter": "models.drafter",
    "load_drafter": "models.weights",
    "load_target": "models.weights",
    "save_drafter": "models.weights",
    "save_target": "models.weights",
    "Mesh": "config",
    "batch_sharding": "sharding",
    "make_mesh": "sharding",
    "parameter_sharding": "sharding",
    "Batch": "training.blocks",
    "LossAux": "training.loss",
    "LossConfig": "training.loss",
    "loss_fn": "training.loss",
    "TrainState": "training.step",
    "make_train_step": "training.step",
    "DecodeState": "decoding.state",
    "Decoding": "decoding.state",
    "PromptLookup": "decoding.baselines",
    "Round": "decoding.state",
    "init_state": "decoding.state",
    "draft_and_verify": "decoding.speculate",
    "prefill": "decoding.speculate",
    "Generation": "decoding.rows",
    "generate": "decoding.generate",
    "stream": "decoding.generate",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'specauf_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"specauf_jax.{_HOME[name]}"), name)


def __dir__():
    return __all__
