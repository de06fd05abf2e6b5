"""DFlash's head (arXiv 2602.06036): the target's frozen LM head on every slot, nothing of its own."""

from dataclasses import dataclass

import jax.numpy as jnp

from specauf_jax.architecture import Head, Speculator
from specauf_jax.kernels.lm_head import frozen_head_scores


@dataclass(frozen=True)
class DFlash(Head):
    """All drafts at one time."""

    shift_label: bool = False
    """Slot k predicts the token k + 1 after the anchor, else (as in z-lab's drafters) the token k after it."""

    projector_type = "dflash"
    title = "DFlash"
    speculator = Speculator("dflash", "DFlashSpeculator")
    absent = {"shift_label": False}
    skips_slots = True
    rolls = False

    @property
    def first_slot(self) -> int:
        return 0 if self.shift_label else 1

    def modules(self, drafter, rngs):
        return {}

    def training_scores(
        self, params, hidden, *, embedding, lm_head, previous, labels, valid, target_hidden, objectives, chunk, skip
    ):
        options = {"objective": objectives["final"], "target_hidden": target_hidden, "chunk": chunk, "skip": skip}
        return {"final": frozen_head_scores(hidden, lm_head, labels, valid, **options)}

    def first_state(self, shape, dtype):
        return jnp.zeros((*shape, 0), dtype)

    def next_logits(self, params, state, token, n, hidden, logits, *, embedding):
        return state, logits

    def variants(self):
        return [("labels", "the other label convention", DFlash(shift_label=not self.shift_label))]


HEAD = DFlash
