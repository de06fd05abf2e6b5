"""The loss of a drafter on a batch: drafter, then LM head, then objective. Pure."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.architecture import Head as DraftHead
from specauf_jax.architecture import ResolvedDrafter
from specauf_jax.config import Dtype, HeadSlots, Objective, Remat, TrainOptimisation, decay_gamma
from specauf_jax.errors import SpecaufError
from specauf_jax.models.drafter import context_keys_values, draft_blocks
from specauf_jax.models.layers import cast
from specauf_jax.models.target import Head
from specauf_jax.objectives import ConfidenceScores, decay_weights, objective_sums
from specauf_jax.pytrees import pytree
from specauf_jax.sharding import gather_head
from specauf_jax.training.blocks import (
    Batch,
    BlockBatch,
    eligible_anchors,
    make_blocks,
    predicting_states,
    sample_anchors,
)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Static data of `loss_fn`."""

    drafter: ResolvedDrafter
    objective: Objective  # of the branch that decoding follows
    base_objective: Objective | None = None  # of the base branch; None where there is none, or it does not train
    num_anchors: int = 512
    slot_chunk: int = 256
    head_slots: HeadSlots = "support"
    dtype: Dtype = "float32"
    remat: Remat = "none"

    def __post_init__(self):
        if self.base_objective is not None and "base" not in self.drafter.head.branches:
            raise SpecaufError(
                f"a base_objective for {self.drafter.head.title}",
                "None for a head without a base branch",
                "leave it out",
            )
        if self.base_objective is None and self.drafter.head.lambda_base_decay_ratio is None:
            raise SpecaufError(
                f"no base_objective for {self.drafter.head.title}",
                "one for the body's own logits, of which its candidates come",
                "give one",
            )
        for name, objective in self.objectives.items():
            if objective.soft and name in self.drafter.head.hard_branches:
                raise SpecaufError(
                    f"objective {objective.name} with loss {objective.loss} for the {name} branch of "
                    f"{self.drafter.head.title}",
                    "one of labels alone",
                    "take loss ce there, and another objective than survival",
                )

    @property
    def skip(self) -> bool:
        """Slots behind an objective's stop may skip the LM head."""
        return self.head_slots == "support" and self.drafter.head.skips_slots

    @property
    def skips(self) -> bool:
        """They do, under this objective."""
        return self.skip and self.objective.skips

    @property
    def objectives(self) -> dict[str, Objective]:
        """Branch → its objective."""
        final = {"final": self.objective}
        return final if self.base_objective is None else final | {"base": self.base_objective}

    @property
    def soft(self) -> bool:
        """The target's own distribution is needed, so that the target runs to its last layer."""
        soft = any(objective.soft for objective in self.objectives.values())
        return soft or self.drafter.head.confidence_weight > 0


def loss_config(
    drafter: ResolvedDrafter, objective: Objective, base: Objective, train: TrainOptimisation, sequence_length: int
):
    """The LossConfig of a training run's settings, for rows of this many tokens."""
    return LossConfig(
        drafter=drafter,
        objective=objective,
        base_objective=base if drafter.head.base_ratio(train.lambda_base_decay_ratio) else None,
        num_anchors=train.num_anchors or min(drafter.head.num_anchors, sequence_length - 1),
        slot_chunk=train.slot_chunk,
        head_slots=train.head_slots,
        dtype=train.dtype,
        remat=train.remat,
    )


@pytree
class BranchSums:
    """Sums over a batch of one set of logits, float32 []; every measure is a ratio of two of them."""

    numerator: jax.Array  # weighted loss
    denominator: jax.Array
    blocks: jax.Array  # kept blocks
    emitted: jax.Array  # tokens that a round would emit, summed over kept blocks
    valid: jax.Array  # slots with a label
    correct: jax.Array | None  # … of which the drafter's argmax is right; None where not every slot met the LM head
    support: jax.Array  # slots with weight
    support_correct: jax.Array

    def measures(self) -> dict[str, jax.Array]:
        """Names of the measures of launch/measure/README.md; 0 where nothing was counted."""
        ratio = {
            "loss": (self.numerator, self.denominator),
            "tau": (self.emitted, self.blocks),
            "support_accuracy": (self.support_correct, self.support),
            "active_ratio": (self.support, self.valid),
        }
        if self.correct is not None:
            ratio["common_token_accuracy"] = self.correct, self.valid
        return {name: safe_ratio(*pair) for name, pair in ratio.items()}


@pytree
class ConfidenceSums:
    """Sums over a batch of what a confidence head says, float32 []; slots count by position, as under `decay`."""

    numerator: jax.Array  # weighted loss, times the weight that the head gives it
    denominator: jax.Array
    error: jax.Array  # weighted |said - a|

    def measures(self) -> dict[str, jax.Array]:
        """Names of the measures of launch/measure/README.md."""
        return {"loss": safe_ratio(self.numerator, self.denominator), "error": safe_ratio(self.error, self.denominator)}


@pytree
class LossAux:
    """The sums of everything that trains."""

    final: BranchSums
    base: BranchSums | None = None
    confidence: ConfidenceSums | None = None

    def parts(self) -> dict[str, BranchSums | ConfidenceSums]:
        """Those that there are, by name, `final` first."""
        both = {"base": self.base, "confidence": self.confidence}
        return {"final": self.final} | {name: part for name, part in both.items() if part is not None}

    def measures(self) -> dict[str, jax.Array]:
        """Those of the final branch; of the others as `base_…` and `confidence_…`."""
        found = {name: part.measures() for name, part in self.parts().items()}
        final = found.pop("final")
        return final | {f"{part}_{name}": x for part, measures in found.items() for name, x in measures.items()}


def safe_ratio(numerator, denominator):
    """numerator / denominator, and 0 (with zero gradient) where the denominator is 0."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0.0)


def branch_factors(aux: LossAux, head: DraftHead, lambda_base) -> dict[str, jax.Array]:
    """What each part's numerator counts in the loss, its share over its denominator.

    The final and the base branch count as the head says; 1 of a single one, and of a confidence head.
    """
    final, base = (1.0, None) if aux.base is None else head.shares(lambda_base)
    shares = {"final": final, "base": base, "confidence": 1.0}
    return {name: safe_ratio(shares[name], part.denominator) for name, part in aux.parts().items()}


def weighted(numerators: dict[str, jax.Array], factors: dict[str, jax.Array]) -> jax.Array:
    """The loss: Σ over parts of factor · numerator, float32 []."""
    return jnp.stack([numerators[name] for name in factors]) @ jnp.stack(list(factors.values()))


def loss_fn(drafter_params: dict, head: Head, batch: Batch, rng: jax.Array, *, config: LossConfig, lambda_base=0.0):
    """Loss of a drafter on the blocks at random anchors.

    No global state: jit, vmap and differentiate it. Over arrays that are spread over a mesh of `make_mesh`, rows stay
    on their devices (`specauf_jax.sharding.mesh_of`); XLA adds the collectives that parameters spread over `fsdp` and
    `tensor` need, and the sums over the whole batch.

    Args:
      drafter_params: as from `init_drafter`.
      head: the target's frozen embedding `[V, D]` and LM head `[D, V]`.
      batch: rows with `features` `[B, S, L·D]` of any target, and `target_hidden` `[B, S, D]` for soft losses.
      rng: key for the anchors.
      config: static.
      lambda_base: float [] λ, where a base branch trains (Domino, arXiv 2605.29707): the loss is
        (1-λ) · final + λ · base, or as the head's `shares` say. Training lets λ fall from 1 to 0
        (`specauf_jax.training.step.lambda_base_schedule`). A confidence head's own loss comes beside (DSpark, arXiv
        2607.05147).

    Returns:
      float32 [] loss, and LossAux.
    """
    eligible = eligible_anchors(batch.loss_mask, batch.document_ids)
    anchors, keep = sample_anchors(rng, eligible, batch.document_ids, config.num_anchors)
    numerators, aux = loss_sums(drafter_params, head, batch, anchors, keep, config=config)
    factors = branch_factors(aux, config.drafter.head, lambda_base)
    return weighted(numerators, lax.stop_gradient(factors)), aux


def loss_sums(drafter_params: dict, head: Head, batch: Batch, anchors, keep, *, config: LossConfig):
    """The loss's numerators at given anchors, to be summed over parts before one division.

    Args: as for `loss_fn`, with anchors int32 `[B, A]` and keep bool `[B, A]`.

    Returns:
      Part of the loss → float32 [] numerator (differentiable), and LossAux.
    """
    drafter, objectives = config.drafter, config.objectives
    if config.objective.witness == "base" and "base" not in objectives:
        raise SpecaufError(
            "the base branch as the witness of the final one, and no base branch that trains",
            "base_objective of a LossConfig whose head has a base branch",
            "give one, or take witness own",
        )
    blocks = make_blocks(batch, anchors, keep, config=drafter)
    hidden = block_hidden(drafter_params, head, batch, blocks, config=config)[:, :, drafter.first_slot :]
    scores = drafter.head.training_scores(
        cast(drafter_params, config.dtype),
        hidden,
        embedding=head.embedding,
        lm_head=gather_head(lax.stop_gradient(head.lm_head).astype(config.dtype)),
        previous=blocks.previous,
        labels=blocks.labels,
        valid=blocks.valid,
        target_hidden=_target_hidden(batch, blocks, config) if config.soft else None,
        objectives=objectives,
        chunk=config.slot_chunk,
        skip=config.skip,
    )
    with jax.named_scope("objective"):
        branches = {name: _branch(objective, scores, name, blocks, config) for name, objective in objectives.items()}
        said = scores.get("confidence")
        confidence = _confidence(said, blocks, config) if isinstance(said, ConfidenceScores) else None
    aux = LossAux(**branches, confidence=confidence)
    return {name: part.numerator for name, part in aux.parts().items()}, aux


def _target_hidden(batch: Batch, blocks: BlockBatch, config: LossConfig) -> jax.Array:
    if batch.target_hidden is None:
        raise SpecaufError(
            "a batch without target_hidden for a loss that compares with the target's distribution",
            "the target's final-normed hidden states, [B, S, D]",
            "take specauf_jax.target_states",
        )
    return predicting_states(lax.stop_gradient(batch.target_hidden).astype(config.dtype), blocks)


def block_hidden(drafter_params: dict, head: Head, batch: Batch, blocks: BlockBatch, *, config: LossConfig):
    """Final hidden states of all slots, `[B, A, K, D]` in compute precision."""
    if batch.features is None:
        raise SpecaufError("a batch without features", "the target's, [B, S, L·D]", "take specauf_jax.target_features")
    params = cast(drafter_params, config.dtype)
    features = lax.stop_gradient(batch.features).astype(config.dtype)
    embeddings = lax.stop_gradient(head.embedding[blocks.inputs]).astype(config.dtype)
    context = context_keys_values(params, features, batch.positions, config=config.drafter)
    return draft_blocks(
        params,
        embeddings,
        blocks.positions,
        context,
        blocks.start,
        blocks.anchors,  # strictly before the anchor
        blocks.keep,
        config=config.drafter,
        remat=config.remat,
    )


def _branch(objective: Objective, branches: dict, name: str, blocks: BlockBatch, config: LossConfig) -> BranchSums:
    """Sums of one set of logits, from what they say of the labels."""
    K, scores = config.drafter.block_size, branches[name]
    witness = branches["base"] if name == "final" and objective.witness == "base" else None
    sums = objective_sums(objective, scores, blocks.valid, block_size=K, witness=witness)
    correct = (scores.rank == 0) & blocks.valid
    support = sums.weights > 0
    # A round drafts K-1 tokens, also where K labels are trained.
    accepted = lax.cumprod(correct[..., : K - 1].astype(jnp.int32), axis=2).sum(-1)
    return BranchSums(
        numerator=sums.numerator,
        denominator=sums.denominator,
        blocks=_total(blocks.keep),
        emitted=_total(jnp.where(blocks.keep, accepted + 1, 0)),
        valid=_total(blocks.valid),
        correct=None if config.skips else _total(correct),
        support=_total(support),
        support_correct=_total(correct & support),
    )


def _confidence(scores: ConfidenceScores, blocks: BlockBatch, config: LossConfig) -> ConfidenceSums:
    weights = decay_weights(blocks.valid, decay_gamma(config.objective, config.drafter.block_size))
    return ConfidenceSums(
        numerator=config.drafter.head.confidence_weight * (weights * scores.loss).sum(),
        denominator=weights.sum(),
        error=(weights * scores.error).sum(),
    )


def _total(x):
    return x.sum(dtype=jnp.float32)
