"""DSpark's head (arXiv 2607.05147): each draft's logits, corrected by the token before it, and how sure the head is.

A Markov head looks the token before up in W1 `[V, R]`; what it makes of that vector, by a gate or by a recurrent state
too, W2 `[R, V]` turns into a bias of the logits. A confidence head says the probability that the target will accept the
draft. n counts drafts as in Domino's head: draft n is the token n + 1 after the anchor.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from specauf_jax.architecture import Head, Speculator
from specauf_jax.checks import choice, positive
from specauf_jax.errors import SpecaufError
from specauf_jax.kernels.lm_head import chunked_scores, project
from specauf_jax.models.heads.dflash import DFlash
from specauf_jax.objectives import confidence_scores, label_scores
from specauf_jax.sharding import gather_head, spread_rows

MarkovHeadType = Literal["vanilla", "gated", "rnn"]


@dataclass(frozen=True)
class DSpark(Head):
    """The body runs once; then the head rolls over its own drafts. The branch `base` is the body's own logits."""

    markov_rank: int = 256
    """R: numbers that W1 holds of a token."""
    markov_head_type: MarkovHeadType = "vanilla"
    """vanilla takes W1's vector as it is, gated weighs it by the body's state, rnn remembers the drafts before."""
    enable_confidence_head: bool = True
    """Its training compares with the target's distribution, whatever the objective."""
    confidence_head_alpha: float = 1.0
    """What the loss of the confidence counts."""
    confidence_head_with_markov: bool = True
    """The confidence reads W1's vector too, beside the body's state."""
    shift_label: bool = True
    """Slot k predicts the token k + 1 after the anchor (DeepSpec's way), else the token k after it."""

    projector_type = "dspark"
    title = "DSpark"
    architectures = ("Qwen3DSparkModel", "DSparkDraftModel")
    speculator = Speculator("dspark", "DSparkSpeculator")
    absent = {"shift_label": True, "confidence_head_alpha": 1.0}
    attention_mode = True
    top_level = (
        *("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"),
        "sample_from_anchor",
    )
    branches = ("final", "base")
    lambda_base_decay_ratio = 0.0
    engines = {
        "SGLang": ("no", "has a DSpark of its own, which was not read"),
        "tpu-inference": ("no", "has no DSpark"),
        "z-lab": ("differently", "ignores DSpark's head: plain DFlash"),
    }

    def __post_init__(self):
        positive(self, "markov_rank", *(["confidence_head_alpha"] if self.enable_confidence_head else []))
        if not 0 <= self.confidence_head_alpha < math.inf:
            found = f"confidence_head_alpha is {self.confidence_head_alpha}"
            raise SpecaufError(found, "a finite number of at least 0", "set it to 1")
        choice(self, "markov_head_type", typing.get_args(MarkovHeadType))

    @property
    def first_slot(self) -> int:
        return 0 if self.shift_label else 1

    @property
    def unread(self) -> tuple[str, ...]:
        return () if self.enable_confidence_head else ("confidence_head_alpha", "confidence_head_with_markov")

    @property
    def sample_from_anchor(self) -> bool:
        """`shift_label` by the name that vLLM and speculators read."""
        return self.shift_label

    @property
    def confidence_weight(self) -> float:
        return self.confidence_head_alpha if self.enable_confidence_head else 0.0

    def modules(self, drafter, rngs):
        D, R = drafter.hidden_size, self.markov_rank
        found = {"markov_head": MarkovHead(D, drafter.vocab_size, R, self.markov_head_type, rngs=rngs)}
        if self.enable_confidence_head:
            found["confidence_head"] = ConfidenceHead(D + R * self.confidence_head_with_markov, rngs=rngs)
        return found

    def training_scores(
        self, params, hidden, *, embedding, lm_head, previous, labels, valid, target_hidden, objectives, chunk, skip
    ):
        w2 = gather_head(params["markov_head"]["markov_w2"]["kernel"])
        arrays = [labels, hidden, self.outputs(params, hidden, previous)]
        if target_hidden is not None:
            arrays.append(target_hidden)
        if self.enable_confidence_head:
            arrays.append(self.confidence(params, hidden, previous))

        def scores(labels, hidden, outputs, target_hidden=None, said=None):
            base = project(hidden, lm_head)
            logits = {"final": base + project(outputs, w2), "base": base}
            target = None if target_hidden is None else project(target_hidden, lm_head)
            found = {
                name: label_scores(
                    logits[name],
                    labels,
                    target if objective.soft or (name == "final" and said is not None) else None,
                    objective,
                )
                for name, objective in objectives.items()
            }
            return found if said is None else found | {"confidence": confidence_scores(said, found["final"].acceptance)}

        return chunked_scores(scores, tuple(arrays), chunk=chunk)

    def first_state(self, shape, dtype):
        return jnp.zeros((*shape, self.markov_rank if self.markov_head_type == "rnn" else 0), dtype)

    def next_logits(self, params, state, token, n, hidden, logits, *, embedding):
        hidden = jnp.broadcast_to(hidden, (*token.shape, hidden.shape[-1]))
        state, output = self.next_output(params, state, self.inputs(params, hidden, token))
        return state, logits + project(output, params["markov_head"]["markov_w2"]["kernel"])

    def inputs(self, params: dict, hidden: jax.Array, previous: jax.Array) -> jax.Array:
        """What the Markov head makes of a draft, but for its state.

        Args:
          params: of the drafter.
          hidden: `[..., D]`, z: the body's state of the slot that predicts the draft.
          previous: int32 `[...]`, the token before the draft.

        Returns:
          `[..., R]`; of an rnn `[..., 3R]`.
        """
        head = params["markov_head"]
        vector = head["markov_w1"]["embedding"][previous]
        match self.markov_head_type:
            case "vanilla":
                return vector
            case "gated":
                gate = jnp.concatenate([hidden, vector], axis=-1) @ head["gate_proj"]["kernel"]
                return jax.nn.sigmoid(gate + head["gate_proj"]["bias"]) * vector
        kernel, bias = head["joint_proj"]["kernel"], head["joint_proj"]["bias"]
        return jnp.concatenate([vector, hidden], axis=-1) @ kernel[self.markov_rank :] + bias

    def next_output(self, params: dict, state: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """State `[..., R]` and `inputs` of a draft → the state after it, and `[..., R]` that W2 turns into the bias.

        An rnn's gates g, c, o: s' = σ(g) s + (1 - σ(g)) tanh(c), and tanh(o). Others have no state.
        """
        if self.markov_head_type != "rnn":
            return state, inputs
        joint = inputs + state @ params["markov_head"]["joint_proj"]["kernel"][: self.markov_rank]
        gate, candidate, output = jnp.split(joint, 3, axis=-1)
        gate = jax.nn.sigmoid(gate)
        return gate * state + (1 - gate) * jnp.tanh(candidate), jnp.tanh(output)

    def outputs(self, params: dict, hidden: jax.Array, previous: jax.Array) -> jax.Array:
        """`next_output` of all drafts of blocks: `[..., N, D]` and int32 `[..., N]` → `[..., N, R]`."""
        inputs = spread_rows(self.inputs(params, hidden, previous))
        if self.markov_head_type != "rnn":
            return inputs
        start = self.first_state(hidden.shape[:-2], inputs.dtype)

        def step(state, inputs):
            return self.next_output(params, state, inputs)

        return jnp.moveaxis(lax.scan(step, start, jnp.moveaxis(inputs, -2, 0))[1], 0, -2)

    def confidence(self, params, hidden, previous):
        if not self.enable_confidence_head:
            return None
        if self.confidence_head_with_markov:
            vector = params["markov_head"]["markov_w1"]["embedding"][previous]
            hidden = jnp.concatenate([hidden, vector], axis=-1)
        proj = params["confidence_head"]["proj"]
        return (project(hidden, proj["kernel"]) + proj["bias"])[..., 0]

    def draft_flops(self, drafter):
        D, R = drafter.hidden_size, self.markov_rank
        inside = {"vanilla": 0, "gated": (D + R) * R, "rnn": (2 * R + D) * 3 * R}[self.markov_head_type]
        said = (D + R * self.confidence_head_with_markov) * self.enable_confidence_head
        return {"correction": 2 * (inside + R * drafter.vocab_size + said)}

    def variants(self):
        other = dataclasses.replace(self, shift_label=not self.shift_label)
        return [("labels", "the other label convention", other), ("plain", "plain DFlash", DFlash(self.shift_label))]


HEAD = DSpark


class MarkovHead(nnx.Module):
    """W1, W2 and what is between them; small numbers, so that training starts from plain DFlash."""

    def __init__(self, D: int, V: int, R: int, kind: MarkovHeadType, *, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.01)
        self.markov_w1 = nnx.Embed(V, R, embedding_init=small, rngs=rngs)
        self.markov_w2 = nnx.Linear(R, V, use_bias=False, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)
        if kind == "gated":
            self.gate_proj = nnx.Linear(D + R, R, rngs=rngs)
        if kind == "rnn":
            self.joint_proj = nnx.Linear(2 * R + D, 3 * R, rngs=rngs)


class ConfidenceHead(nnx.Module):
    """A logit of what it reads."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.proj = nnx.Linear(inputs, 1, rngs=rngs)
