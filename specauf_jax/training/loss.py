"""The loss of a drafter on a batch: drafter, then LM head, then objective. Pure."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.architecture import Drafter
from specauf_jax.config import Dtype, HeadSlots, Objective, Remat, TrainOptimisation
from specauf_jax.kernels.lm_head import corrected_cross_entropy, frozen_head_cross_entropy
from specauf_jax.models.domino import correction_features, prefix_states
from specauf_jax.models.drafter import context_keys_values, draft_blocks
from specauf_jax.models.layers import cast
from specauf_jax.models.target import Head
from specauf_jax.objectives import objective_sums
from specauf_jax.sharding import gather_head
from specauf_jax.training.blocks import Batch, BlockBatch, eligible_anchors, make_blocks, sample_anchors


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Static data of `loss_fn`."""

    drafter: Drafter  # resolved
    objective: Objective  # of a plain drafter, or of Domino's final branch
    base_objective: Objective = Objective()  # of Domino's base branch
    num_anchors: int = 512
    slot_chunk: int = 256
    head_slots: HeadSlots = "support"
    dtype: Dtype = "float32"
    remat: Remat = "none"

    @property
    def support_top_n(self) -> int | None:
        """A label within so many best tokens keeps its block going; None where every slot meets the LM head."""
        if self.head_slots == "all" or self.drafter.projector_type != "dflash":
            return None
        return {"auf": 1, "auf_decay": 1, "griffin": self.objective.griffin_top_n}.get(self.objective.name)


def loss_config(drafter: Drafter, objective: Objective, base: Objective, train: TrainOptimisation) -> LossConfig:
    """What the loss takes of a training run's settings."""
    return LossConfig(
        drafter=drafter,
        objective=objective,
        base_objective=base,
        num_anchors=train.num_anchors or (512 if drafter.projector_type == "dflash" else 256),
        slot_chunk=train.slot_chunk,
        head_slots=train.head_slots,
        dtype=train.dtype,
        remat=train.remat,
    )


@chex.dataclass(frozen=True)
class LossAux:
    """Sums over a batch, float32 []; every measure is a ratio of two of them."""

    numerator: jax.Array  # weighted cross-entropy
    denominator: jax.Array
    blocks: jax.Array  # kept blocks
    emitted: jax.Array  # tokens that a round would emit, summed over kept blocks
    valid: jax.Array  # slots with a label
    correct: jax.Array | None  # … of which the drafter's argmax is right; None where not every slot met the LM head
    support: jax.Array  # slots with weight
    support_correct: jax.Array
    base: "LossAux | None" = None  # Domino: the same of the base branch

    def measures(self) -> dict:
        """Names of the README's measures; 0 where nothing was counted. Domino's base branch as `base_…`."""
        ratio = {
            "loss": (self.numerator, self.denominator),
            "tau": (self.emitted, self.blocks),
            "support_accuracy": (self.support_correct, self.support),
            "active_ratio": (self.support, self.valid),
        }
        if self.correct is not None:
            ratio["common_token_accuracy"] = self.correct, self.valid
        measures = {name: safe_ratio(*pair) for name, pair in ratio.items()}
        if self.base is not None:
            measures |= {f"base_{name}": value for name, value in self.base.measures().items()}
        return measures

    def branches(self) -> list["LossAux"]:
        """In the order of `loss_sums`' numerators."""
        return [self] if self.base is None else [self, self.base]


def safe_ratio(numerator, denominator):
    """numerator / denominator, and 0 (with zero gradient) where the denominator is 0."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0.0)


def branch_factors(aux: LossAux, lambda_base) -> jax.Array:
    """What each branch's numerator counts in the loss: float32 `[1]`, or (1-λ, λ) over their denominators."""
    shares = [1.0] if aux.base is None else [1 - lambda_base, lambda_base]
    return jnp.stack([safe_ratio(share, b.denominator) for share, b in zip(shares, aux.branches(), strict=True)])


def loss_fn(drafter_params: dict, head: Head, batch: Batch, rng: jax.Array, *, config: LossConfig, lambda_base=0.0):
    """Loss of a drafter on the blocks at random anchors.

    No global state: jit, vmap and differentiate it. Over arrays that are spread over a mesh of `make_mesh`, rows stay
    on their devices (`specauf_jax.sharding.mesh_of`); XLA adds the collectives that parameters spread over `fsdp` and
    `tensor` need, and the sums over the whole batch.

    Args:
      drafter_params: as from `init_drafter`.
      head: the target's frozen embedding `[V, D]` and LM head `[D, V]`.
      batch: rows with `features` `[B, S, L·D]` of any target.
      rng: key for the anchors.
      config: static.
      lambda_base: float [] λ, for Domino (arXiv 2605.29707): the loss is (1-λ) · final + λ · base.
        Training lets it fall from 1 to 0 (`specauf_jax.training.step.lambda_base`).

    Returns:
      float32 [] loss, and LossAux.
    """
    eligible = eligible_anchors(batch.loss_mask, batch.document_ids)
    anchors, keep = sample_anchors(rng, eligible, batch.document_ids, config.num_anchors)
    numerators, aux = loss_sums(drafter_params, head, batch, anchors, keep, config=config)
    return numerators @ lax.stop_gradient(branch_factors(aux, lambda_base)), aux


def loss_sums(drafter_params: dict, head: Head, batch: Batch, anchors, keep, *, config: LossConfig):
    """The loss's numerators at given anchors, to be summed over parts before one division.

    Args: as for `loss_fn`, with anchors int32 `[B, A]` and keep bool `[B, A]`.

    Returns:
      float32 `[1]` numerators (differentiable), for Domino `[2]` (final, base), and LossAux.
    """
    drafter = config.drafter
    blocks = make_blocks(batch, anchors, keep, config=drafter)
    hidden = block_hidden(drafter_params, head, batch, blocks, config=config)[:, :, drafter.first_slot :]
    lm_head = gather_head(lax.stop_gradient(head.lm_head).astype(config.dtype))
    if drafter.projector_type == "dflash":
        top_n = config.support_top_n
        seen = frozen_head_cross_entropy(
            hidden, lm_head, blocks.labels, blocks.valid, chunk=config.slot_chunk, top_n=top_n
        )
        branches = [_branch(config.objective, seen, None, blocks, drafter, every_slot=top_n is None)]
    else:
        features, up = _correction(cast(drafter_params, config.dtype), head, hidden, blocks, config=config)
        base, final = corrected_cross_entropy(hidden, features, lm_head, up, blocks.labels, chunk=config.slot_chunk)
        witness = base if config.objective.witness == "base" else None
        branches = [
            _branch(config.objective, final, witness, blocks, drafter),
            _branch(config.base_objective, base, None, blocks, drafter),
        ]
    numerators, auxes = zip(*branches, strict=True)
    return jnp.stack(numerators), auxes[0].replace(base=auxes[1] if auxes[1:] else None)


def block_hidden(drafter_params: dict, head: Head, batch: Batch, blocks: BlockBatch, *, config: LossConfig):
    """Final hidden states of all slots, `[B, A, K, D]` in compute precision."""
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


def _correction(params: dict, head: Head, hidden, blocks: BlockBatch, *, config: LossConfig):
    """Domino's features `[B, A, N, emb_dim]` after the gold tokens, and the matrix that makes logits of them."""
    embeddings = lax.stop_gradient(head.embedding[blocks.previous]).astype(config.dtype)
    states = prefix_states(params, embeddings)
    n = jnp.arange(config.drafter.num_labels)
    features = correction_features(params, hidden, states, n, config=config.drafter)
    return features, gather_head(params["embed_proj"]["up"]["kernel"])


def _branch(objective: Objective, seen, witness, blocks: BlockBatch, drafter: Drafter, every_slot: bool = True):
    """Numerator and LossAux of one set of logits, from the labels' cross-entropy and rank."""
    ce, rank = seen
    sums = objective_sums(objective, ce, rank, blocks.valid, block_size=drafter.block_size, witness=witness)
    correct = (rank == 0) & blocks.valid
    support = sums.weights > 0
    # A round drafts K-1 tokens, also where K labels are trained.
    accepted = lax.cumprod(correct[..., : drafter.block_size - 1].astype(jnp.int32), axis=2).sum(-1)
    return sums.numerator, LossAux(
        numerator=sums.numerator,
        denominator=sums.denominator,
        blocks=_total(blocks.keep),
        emitted=_total(jnp.where(blocks.keep, accepted + 1, 0)),
        valid=_total(blocks.valid),
        correct=_total(correct) if every_slot else None,
        support=_total(support),
        support_correct=_total(correct & support),
    )


def _total(x):
    return x.sum(dtype=jnp.float32)
