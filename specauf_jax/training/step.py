"""One optimiser step as one jitted function: frozen target, drafter, gradients, update.

`make_train_step` and `make_pretrain_step` give pure functions, for any caller to jit. `place_drafter_step` and
`place_pretrain_step` jit them for a mesh: shardings, donation, and the state to begin with.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from specauf_jax.architecture import Head as DraftHead
from specauf_jax.architecture import Target
from specauf_jax.config import Optimisation, TrainOptimisation
from specauf_jax.kernels.lm_head import chunked_scores, project
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.layers import cast
from specauf_jax.models.target import (
    init_target,
    target_features,
    target_head,
    target_hidden,
    target_shapes,
    target_states,
)
from specauf_jax.objectives import label_scores
from specauf_jax.pytrees import pytree
from specauf_jax.sharding import batch_sharding, parameter_sharding, placed, replicated
from specauf_jax.training.blocks import Batch, eligible_anchors, sample_anchors
from specauf_jax.training.loss import (
    LossConfig,
    branch_factors,
    loss_sums,
    safe_ratio,
    weighted,
)
from specauf_jax.training.tpu_options import tpu_options


@pytree
class TrainState:
    """All that changes from step to step."""

    step: jax.Array  # int32 []
    params: dict  # float32
    opt_state: optax.OptState


_NOT_DECAYED = {"scale", "base_kernel", "A_log", "dt_bias", "conv1d"}  # parts of a parameter's path
_NO_MATRICES = {"lm_head", "conv1d"}  # likewise: what Muon leaves to AdamW


def make_optimizer(train: Optimisation) -> optax.GradientTransformation:
    """Clipped AdamW with linear warm-up and cosine decay to 0, or Muon for matrices and AdamW for the rest; norms are
    not decayed."""

    def of_each(kind):
        """A function from parameters to `kind` of each one's path."""
        return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: kind([k.key for k in path]), params)

    rate, shared = learning_rate_schedule(train), {"weight_decay": train.weight_decay, "mu_dtype": train.mu_dtype}
    rule = optax.adamw(rate, b1=0.9, b2=0.95, mask=of_each(lambda path: not {*path} & _NOT_DECAYED), **shared)
    if train.optimizer == "muon":
        muon = optax.contrib.muon(
            rate,
            consistent_rms=0.2,  # AdamW's (Moonlight, arXiv 2502.16982), so that one learning rate serves both
            muon_weight_dimension_numbers=of_each(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1)),
            **shared,
        )
        matrices = of_each(lambda path: "muon" if path[-1] == "kernel" and not {*path} & _NO_MATRICES else "adamw")
        rule = optax.partition({"muon": muon, "adamw": rule}, matrices)
    return optax.chain(optax.clip_by_global_norm(train.clip_norm), rule)


def learning_rate_schedule(train: Optimisation) -> optax.Schedule:
    """Step → learning rate."""
    warmup = round(train.warmup_ratio * train.steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=train.learning_rate / max(warmup, 1),
        peak_value=train.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(train.steps, warmup + 1),
    )


def lambda_base_schedule(train: TrainOptimisation, head: DraftHead) -> optax.Schedule:
    """Step → λ of the base branch: from 1 linearly to 0 over `lambda_base_decay_ratio` of the steps."""
    ratio = 0 if head.lambda_base_decay_ratio is None else head.base_ratio(train.lambda_base_decay_ratio)
    return optax.linear_schedule(1.0, 0.0, max(round(ratio * train.steps), 1)) if ratio else lambda step: 0.0


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def with_target(batch: Batch, target_params: dict, *, config: LossConfig, target: Target) -> Batch:
    """A batch with what the loss needs of the target; what it brings stays."""
    if batch.features is not None and not (config.soft and batch.target_hidden is None):
        return batch
    params, rows = cast(target_params, config.dtype), (batch.tokens, batch.positions, batch.document_ids)
    ids = config.drafter.target_layer_ids
    if not config.soft:
        return dataclasses.replace(batch, features=target_features(params, *rows, config=target, layer_ids=ids))
    features, hidden = target_states(params, *rows, config=target, layer_ids=ids)
    return dataclasses.replace(
        batch,
        features=features if batch.features is None else batch.features,
        target_hidden=hidden if batch.target_hidden is None else batch.target_hidden,
    )


def make_train_step(
    config: LossConfig,
    target: Target,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    seed: int = 0,
    lambda_base: optax.Schedule = lambda step: 0.0,
):
    """The drafter's step, `(state, target_params, batch) -> (state, metrics)`, to be jitted.

    A batch that brings its features spares the target's pass: several drafters can learn from one.

    Anchors are drawn for the whole batch before it is cut into `accumulation` parts, and numerators
    and denominators are summed over the parts before one division: accumulation changes memory,
    not results.

    Args:
      config: of the loss.
      target: architecture of the frozen target; its parameters are never differentiated.
      optimizer: as from `make_optimizer`.
      accumulation: parts of a batch; divides its rows.
      seed: of the anchors, with the step.
      lambda_base: step → λ, where a base branch trains.
    """

    def part_gradients(params, target_params, cotangents, batch, anchors, keep):
        batch, head = with_target(batch, target_params, config=config, target=target), target_head(target_params)
        _, pull, aux = jax.vjp(
            lambda params: loss_sums(params, head, batch, anchors, keep, config=config), params, has_aux=True
        )
        inputs = [batch.features, batch.target_hidden] if config.soft else [batch.features]
        bad = jnp.stack([_any_nonfinite(x) for x in inputs]).any()
        return [pull(cotangent)[0] for cotangent in cotangents(aux)], aux, bad

    def step(state: TrainState, target_params: dict, batch: Batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        eligible = eligible_anchors(batch.loss_mask, batch.document_ids)
        drawn = sample_anchors(rng, eligible, batch.document_ids, config.num_anchors)
        head, share = config.drafter.head, lambda_base(state.step)

        # A branch's gradient is divided by its own denominator, which is known when all parts are summed: of several
        # parts of the batch every branch keeps its gradient until then, of one a single backward pass gives the sum.
        def cotangents(aux):
            factors = branch_factors(aux, head, share)
            if accumulation == 1:
                return [factors]
            return [{other: jnp.float32(other == name) for other in factors} for name in factors]

        grads, aux, bad = _accumulate(
            lambda part: part_gradients(state.params, target_params, cotangents, *part), (batch, *drawn), accumulation
        )
        factors = branch_factors(aux, head, share)
        weights = [1.0] if accumulation == 1 else list(factors.values())
        grads = jax.tree.map(lambda *branches: sum(w * g for w, g in zip(weights, branches, strict=True)), *grads)
        metrics = aux.measures() | {"anchor_coverage": safe_ratio(aux.final.blocks, eligible.sum(dtype=jnp.float32))}
        if len(factors) > 1:
            scheduled = aux.base is not None and head.lambda_base_decay_ratio is not None
            metrics |= {"final_loss": metrics["loss"]} | ({"lambda_base": share} if scheduled else {})
            metrics["loss"] = weighted({name: part.numerator for name, part in aux.parts().items()}, factors)
        return _update(state, optimizer, grads, metrics, {"features": bad})

    return step


def make_pretrain_step(
    target: Target, optimizer: optax.GradientTransformation, *, accumulation: int, dtype, chunk: int = 4096
):
    """The target's own step, `(state, batch) -> (state, metrics)`: next-token cross-entropy, to be jitted.

    `chunk` is the number of tokens whose logits exist at one time, of every device.
    """

    def part_gradient(params, batch: Batch):
        def numerator(params):
            compute = cast(params, dtype)
            hidden = target_hidden(compute, batch.tokens, batch.positions, batch.document_ids, config=target)
            lm_head = target_head(compute).lm_head
            ce, rank = chunked_scores(
                lambda labels, hidden: label_scores(project(hidden, lm_head), labels),
                (batch.tokens[:, 1:], hidden[:, :-1]),
                chunk=chunk,
            )
            same_document = batch.document_ids[:, 1:] == batch.document_ids[:, :-1]
            valid = batch.loss_mask[:, 1:] & same_document
            counts = (valid.sum(dtype=jnp.float32), ((rank == 0) & valid).sum(dtype=jnp.float32))
            total = jnp.where(valid, ce, 0.0).sum()
            return total, (total, *counts)

        return jax.grad(numerator, has_aux=True)(params)

    def step(state: TrainState, batch: Batch):
        grads, (total, count, correct) = _accumulate(
            lambda part: part_gradient(state.params, part), batch, accumulation
        )
        grads = jax.tree.map(lambda g: safe_ratio(g, count), grads)
        metrics = {"loss": safe_ratio(total, count), "accuracy": safe_ratio(correct, count)}
        return _update(state, optimizer, grads, metrics, {})

    return step


def _accumulate(gradient, batch, parts: int):
    """Sum of `gradient(part)` over `parts` equal parts of the rows, one after another."""
    if parts == 1:
        return gradient(batch)
    # Part i takes rows i, i + parts, …, so that every part spreads over all devices.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], split))
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(part)), None

    return jax.lax.scan(add, zero, split)[0]


@jax.named_scope("optimiser")
def _update(state: TrainState, optimizer, grads, metrics: dict, bad_inputs: dict):
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    bad = {f"gradient of {jax.tree_util.keystr(path)}": _any_nonfinite(leaf) for path, leaf in leaves}
    metrics |= {"grad_norm": optax.tree.norm(grads), "nonfinite": {**bad_inputs, **bad}}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


def _any_nonfinite(x):
    """bool []; sums of it (as over accumulated parts) mean "any"."""
    return ~jnp.isfinite(x).all()


# ---------------------------------------------------------------------------------------------
# On a mesh


@dataclasses.dataclass(frozen=True)
class PlacedStep:
    """A step, jitted for a mesh, with the shapes and shardings of what it takes."""

    step: jax.stages.Wrapped
    """`(state, *frozen, batch) -> (state, metrics)`; the state's buffers are used again. To be called as it is: on TPUs
    it has compiler options, which JAX takes at top level alone. A jit of one's own takes `make_train_step`."""
    state: TrainState
    frozen: tuple
    """Parameters that the step reads and does not change: the drafter's step has the target's."""
    rows: jax.sharding.NamedSharding
    """Of every array of the batch."""
    init: Callable[[], dict]
    optimizer: optax.GradientTransformation

    def initialise(self, params: dict | None = None) -> TrainState:
        """The state before the first step, on the mesh: of these parameters, and of random ones where they lack any."""

        def begin(params):
            return init_state(_overlaid(self.init(), params or {}), self.optimizer)

        return jax.jit(begin, out_shardings=_shardings(self.state))(params)


def _overlaid(tree: dict, parts: dict) -> dict:
    """A tree with the leaves of another one, which has some of its places, in place of its own."""
    return tree | {name: _overlaid(tree[name], x) if isinstance(x, dict) else x for name, x in parts.items()}


def place_drafter_step(
    loss: LossConfig, target: Target, train: TrainOptimisation, mesh: jax.sharding.Mesh
) -> PlacedStep:
    """The step of `specauf train`, `(state, target_params, batch)`. Nothing is computed or placed yet."""
    optimizer = make_optimizer(train)
    step = make_train_step(
        loss,
        target,
        optimizer,
        accumulation=train.accumulation,
        seed=train.seed,
        lambda_base=lambda_base_schedule(train, loss.drafter.head),
    )
    target_params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, train.dtype), target_shapes(target))
    return _place(
        step, lambda: init_drafter(loss.drafter, jax.random.key(train.seed)), optimizer, (target_params,), mesh
    )


def place_pretrain_step(target: Target, train: Optimisation, mesh: jax.sharding.Mesh) -> PlacedStep:
    """The step of `specauf pretrain`, `(state, batch)`. Nothing is computed or placed yet."""
    optimizer = make_optimizer(train)
    step = make_pretrain_step(target, optimizer, accumulation=train.accumulation, dtype=train.dtype)
    return _place(step, functools.partial(init_target, target, jax.random.key(train.seed)), optimizer, (), mesh)


def _place(step, init, optimizer, frozen: tuple, mesh: jax.sharding.Mesh) -> PlacedStep:
    state = jax.eval_shape(lambda: init_state(init(), optimizer))
    state, frozen = (placed(tree, parameter_sharding(tree, mesh)) for tree in (state, frozen))
    rows = batch_sharding(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(*map(_shardings, (state, *frozen)), rows),
        out_shardings=(_shardings(state), replicated(mesh)),
        donate_argnums=0,
        compiler_options=tpu_options(mesh),
    )
    return PlacedStep(jitted, state, frozen, rows, init, optimizer)


def _shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)
