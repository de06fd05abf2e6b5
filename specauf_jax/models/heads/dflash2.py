"""DFlash2's head (z-lab, 2026): convolutions over a block's slots in every layer, and a selector among likely tokens.

The body's layers convolve what attention and MLP read and write (`specauf_jax.models.layers.SlotConvolution`), so that
a slot sees those before it. Of every slot the selector takes the k tokens c that the body's logits z like best, and
scores them by the token before: z_c + (P[previous] ⊙ H h) · S[c], with codebooks P and S `[V, R]`, a projection H
`[D, R]` and the body's state h. All other tokens are out. n counts drafts as in Domino's head.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from specauf_jax.architecture import Head, Speculator
from specauf_jax.checks import positive
from specauf_jax.errors import SpecaufError
from specauf_jax.kernels.lm_head import chunked_scores, project
from specauf_jax.objectives import LabelScores, label_scores


@dataclass(frozen=True)
class DFlash2(Head):
    """The body runs once; then the selector goes from draft to draft. The branch `base` is the body's own logits."""

    conv_kernel_size: int = 2
    """T: slots that a convolution reads, the slot itself among them."""
    conv_group_size: int = 16
    """Channels that share a kernel."""
    selector_rank: int = 256
    """R: numbers that a codebook holds of a token."""
    selector_top_k: int = 16
    """k: candidates of a slot."""
    selector_loss_alpha: float = 1.0
    """What the selector's loss counts beside that of the body's own logits."""
    shift_label: bool = False
    """Slot k predicts the token k + 1 after the anchor, else (as in z-lab's drafters) the token k after it."""

    projector_type = "dflash2"
    title = "DFlash2"
    architectures = ("DFlash2DraftModel",)
    speculator = Speculator("dflash2", "DFlash2DraftModel")
    absent = {"shift_label": False, "selector_loss_alpha": 1.0}
    top_level = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
    branches = ("final", "base")
    hard_branches = ("final",)
    lambda_base_decay_ratio = None
    num_anchors = 256
    engines = {
        "SGLang": ("no", "has a DFlash2 of its own, which was not read"),
        "tpu-inference": ("no", "has no DFlash2"),
        "sglang-jax": ("no", "has no DFlash2"),
        "SpecForge": ("no", "has no DFlash2"),
    }

    def __post_init__(self):
        positive(self, "conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
        if not 0 < self.selector_loss_alpha < math.inf:
            found = f"selector_loss_alpha is {self.selector_loss_alpha}"
            raise SpecaufError(found, "a finite number above 0", "set it to 1")

    def check(self, drafter):
        for name, most, what in (
            ("conv_kernel_size", drafter.block_size, "block_size"),
            ("selector_top_k", drafter.vocab_size, "vocab_size"),
        ):
            if getattr(self, name) > most:
                raise SpecaufError(f"{name} is {getattr(self, name)}", f"at most {what}, {most}", f"lower {name}")
        if drafter.hidden_size % self.conv_group_size:
            raise SpecaufError(
                f"conv_group_size is {self.conv_group_size}",
                f"a divisor of hidden_size, {drafter.hidden_size}",
                "change conv_group_size",
            )

    @property
    def first_slot(self) -> int:
        return 0 if self.shift_label else 1

    @property
    def convolution(self):
        return self.conv_kernel_size, self.conv_group_size

    def shares(self, lambda_base):
        return self.selector_loss_alpha, 1.0

    def modules(self, drafter, rngs):
        sizes = drafter.hidden_size, drafter.vocab_size, self.selector_rank
        return {"candidate_selector": CandidateSelector(*sizes, rngs=rngs)}

    def training_scores(
        self, params, hidden, *, embedding, lm_head, previous, labels, valid, target_hidden, objectives, chunk, skip
    ):
        """The final branch knows the candidates alone; a label that is none takes the last one's place, and fails."""
        arrays = [labels, hidden, self.context(params, hidden, previous)]
        if target_hidden is not None:
            arrays.append(target_hidden)

        def scores(labels, hidden, context, *target_hidden):
            logits = project(hidden, lm_head)
            found = {}
            if "base" in objectives:
                target = project(*target_hidden, lm_head) if target_hidden else None
                found["base"] = label_scores(logits, labels, target, objectives["base"])
            if "final" in objectives:
                found["final"] = self.selector_scores(params, logits, context, labels)
            return found

        return chunked_scores(scores, tuple(arrays), chunk=chunk)

    def selector_scores(self, params: dict, logits: jax.Array, context: jax.Array, labels: jax.Array) -> LabelScores:
        """What the selector says of the labels: of `[..., V]` logits, `[..., R]` context and int32 `[...]` labels."""
        _, candidates = lax.top_k(lax.stop_gradient(logits), self.selector_top_k)
        held = (candidates == labels[..., None]).any(-1)
        candidates = candidates.at[..., -1].set(jnp.where(held, candidates[..., -1], labels))
        candidates = candidates.sort(-1)  # so that of equal scores the lower token is preferred
        unary = jnp.take_along_axis(logits, candidates, axis=-1)
        place = (candidates == labels[..., None]).argmax(-1)
        found = label_scores(unary + self.transitions(params, context, candidates), place)
        return LabelScores(found.cross_entropy, jnp.where(held, found.rank, jnp.iinfo(jnp.int32).max))

    def first_state(self, shape, dtype):
        return jnp.zeros((*shape, 0), dtype)

    def next_logits(self, params, state, token, n, hidden, logits, *, embedding):
        hidden = jnp.broadcast_to(hidden, (*token.shape, hidden.shape[-1]))
        unary, candidates = lax.top_k(logits, self.selector_top_k)
        scores = unary + self.transitions(params, self.context(params, hidden, token), candidates)
        out = jnp.full((*token.shape, logits.shape[-1]), -jnp.inf, scores.dtype)
        places = jnp.broadcast_to(candidates, scores.shape)
        return state, jnp.put_along_axis(out, places, scores, axis=-1, inplace=False)

    def context(self, params: dict, hidden: jax.Array, previous: jax.Array) -> jax.Array:
        """P[previous] ⊙ H h: of `[..., D]` and int32 `[...]`, `[..., R]`."""
        head = params["candidate_selector"]
        return head["predecessor_codebook"][previous] * (hidden @ head["hidden_projection"]["kernel"])

    def transitions(self, params: dict, context: jax.Array, candidates: jax.Array) -> jax.Array:
        """What the token before adds to candidates: of `[..., R]` and int32 `[..., k]`, float32 `[..., k]`."""
        successors = params["candidate_selector"]["successor_codebook"][candidates]
        return jnp.einsum("...r,...kr->...k", context, successors, preferred_element_type=jnp.float32)

    def draft_flops(self, drafter):
        return {"correction": 2 * self.selector_rank * (drafter.hidden_size + self.selector_top_k)}

    def variants(self):
        return [("labels", "the other label convention", dataclasses.replace(self, shift_label=not self.shift_label))]


HEAD = DFlash2


class CandidateSelector(nnx.Module):
    """P, S and H."""

    def __init__(self, D: int, V: int, R: int, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.predecessor_codebook = nnx.Param(normal(rngs.params(), (V, R)))
        self.successor_codebook = nnx.Param(normal(rngs.params(), (V, R)))
        self.hidden_projection = nnx.Linear(D, R, use_bias=False, kernel_init=normal, rngs=rngs)
