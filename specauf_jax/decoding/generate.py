"""Whole continuations: prompts of any lengths in batches, the loop on the device; or streamed."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specauf_jax.config import Sampling
from specauf_jax.decoding.speculate import draft_and_verify, prefill
from specauf_jax.decoding.state import DecodeState, Decoding, init_state
from specauf_jax.distributed import to_host
from specauf_jax.errors import SpecaufError
from specauf_jax.models.layers import float_dtype, init_kv_cache
from specauf_jax.sharding import batch_sharding, cache_sharding, placed

GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Generation:
    """One prompt's continuation.

    `accepted` holds, for each round, the drafts that the target agreed with, before any stop cut
    the round's tokens: a round emits accepted + 1 tokens, the last one perhaps fewer.
    """

    prompt: list[int]
    tokens: list[int]
    accepted: list[int]


def generate(
    drafter_params,
    target_params,
    prompts: Sequence[Sequence[int]],
    *,
    config: Decoding,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch_size: int = 16,
    mesh=None,
    track: Callable[[list], Iterable] = iter,
    indices: Sequence[int] | None = None,
) -> list[Generation]:
    """Continue every prompt, `batch_size` at a time.

    Compiles once per shape: prompts are padded to the next power of two, batches with idle rows.
    A row's result does not depend on its neighbours, and its draws only on `seed` and its index.

    Args:
      drafter_params, target_params: float32 or bfloat16, which sets the compute precision.
      prompts: token ids; none may be empty.
      config: whose `target_step` also offers `init_cache(batch, length, dtype)`.
      max_new_tokens: of every row.
      sampling: how tokens are chosen.
      seed: of the draws above temperature 0.
      batch_size: rows on the device at one time; a multiple of the mesh's batch shards.
      mesh: to spread rows over; None for one device.
      track: wraps the list of batches, for a progress bar.
      indices: what fixes each prompt's draws beside `seed`; None for its place in `prompts`.

    Returns:
      One Generation per prompt, in order.
    """
    results: dict[int, Generation] = {}
    for batch in track(prompt_batches(prompts, batch_size)):
        if indices is not None:
            batch = dataclasses.replace(batch, draws=np.asarray(indices, np.int32)[batch.indices])
        state = start(
            drafter_params,
            target_params,
            batch,
            config=config,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            mesh=mesh,
        )
        state, accepted = decode(drafter_params, target_params, state, config=config, max_new_tokens=max_new_tokens)
        results |= collect(batch, state, accepted)
    return [results[i] for i in range(len(prompts))]


def stream(
    drafter_params,
    target_params,
    prompt: Sequence[int],
    *,
    config: Decoding,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    index: int = 0,
    mesh=None,
) -> Iterator[tuple[list[int], int]]:
    """Continue one prompt, round by round, with the same step as `generate`.

    Args:
      index: the prompt's place among others; with `seed` it fixes the draws, as in `generate`.
      mesh: that the parameters are spread over, along `tensor` alone; None for one device.
      Others as for `generate`.

    Yields:
      The tokens that a round committed, and how many drafts the target agreed with.
    """
    [batch] = prompt_batches([prompt], 1)
    batch = dataclasses.replace(batch, draws=np.asarray([index]))
    state = start(
        drafter_params,
        target_params,
        batch,
        config=config,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        mesh=mesh,
    )
    while not state.done[0]:
        state, done = decode_round(drafter_params, target_params, state, config=config)
        yield np.asarray(done.tokens[0, : int(done.emitted[0])]).tolist(), int(done.accepted[0])


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Padded prompts. Rows beyond `indices` are idle, there to keep the shape."""

    indices: np.ndarray  # [n ≤ B]: which prompt each row holds
    tokens: np.ndarray  # int32 [B, P]
    length: np.ndarray  # int32 [B]
    draws: np.ndarray  # [n]: what fixes each row's draws, beside the seed


def prompt_batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[PromptBatch]:
    """Prompts of similar length together, so that little is padding; P is a power of two."""
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise SpecaufError(f"prompt {i} is empty", "at least one token (the first anchor)", "start it with a token")
    if not len(prompts):
        return []
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    result = []
    for indices in np.split(order, range(batch_size, len(order), batch_size)):
        width = max(16, 1 << int(max(len(prompts[i]) for i in indices) - 1).bit_length())
        tokens, length = np.zeros((batch_size, width), np.int32), np.ones(batch_size, np.int32)
        for row, i in enumerate(indices):
            tokens[row, : len(prompts[i])] = prompts[i]
            length[row] = len(prompts[i])
        result.append(PromptBatch(indices=indices, tokens=tokens, length=length, draws=indices))
    return result


def start(
    drafter_params,
    target_params,
    batch: PromptBatch,
    *,
    config: Decoding,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    mesh=None,
) -> DecodeState:
    """A batch's state with its prompts read. Arguments as for `generate`."""
    busy = np.arange(len(batch.length)) < len(batch.indices)
    limit = batch.length + np.where(busy, max_new_tokens, 0).astype(np.int32)
    draws = np.zeros(len(batch.length), np.int32)
    draws[: len(batch.draws)] = batch.draws
    rows = (batch.tokens, batch.length, limit, draws)
    if mesh is not None:
        rows = jax.device_put(rows, batch_sharding(mesh))
    top_k = min(sampling.top_k, np.iinfo(np.int32).max)  # no vocabulary is larger
    how = (jnp.float32(sampling.temperature), jnp.int32(top_k), jnp.float32(sampling.top_p), jnp.uint32(seed))
    return _start(drafter_params, target_params, *rows, how, config=config, max_new_tokens=max_new_tokens, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "mesh"))
def _start(drafter_params, target_params, tokens, length, limit, draws, how, *, config, max_new_tokens, mesh):
    *how, seed = how
    B, P = tokens.shape
    dtype = float_dtype(target_params)
    room = P + max_new_tokens + config.block_size - 1
    caches = {"target_cache": config.target_step.init_cache(B, room, dtype), "drafter_cache": None}
    if config.model is not None:
        caches["drafter_cache"] = init_kv_cache(config.model, B, room, dtype)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), draws)
    tokens = jnp.pad(tokens, ((0, 0), (0, max_new_tokens)))
    state = init_state(tokens, length, limit, keys, how, **caches)
    if mesh is None:
        return prefill(drafter_params, target_params, state, P, config=config)
    # Zeros have no sharding of their own: say it, or every device holds all rows.
    sharding = _state_sharding(state, mesh)
    state = lax.with_sharding_constraint(state, sharding)
    state = prefill(drafter_params, target_params, state, P, config=config)
    return lax.with_sharding_constraint(state, sharding)


def _state_sharding(state: DecodeState, mesh) -> DecodeState:
    rows = jax.tree.map(lambda _: batch_sharding(mesh), state)
    caches = {name: cache_sharding(getattr(state, name), mesh) for name in ("target_cache", "drafter_cache")}
    return dataclasses.replace(rows, **caches)


def abstract_state(
    drafter_params, target_params, *, config: Decoding, batch_size: int, length: int, max_new_tokens: int, mesh
) -> DecodeState:
    """What `start` returns for prompts of `length` tokens, as shapes with shardings: to compile ahead of time."""
    rows, number = jax.ShapeDtypeStruct((batch_size,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    real = jax.ShapeDtypeStruct((), jnp.float32)
    how = (real, number, real, jax.ShapeDtypeStruct((), jnp.uint32))
    begin = functools.partial(_start, config=config, max_new_tokens=max_new_tokens, mesh=None)
    state = jax.eval_shape(begin, drafter_params, target_params, tokens, rows, rows, rows, how)
    return placed(state, _state_sharding(state, mesh))


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens"), donate_argnames="state")
def decode(drafter_params, target_params, state: DecodeState, *, config: Decoding, max_new_tokens: int):
    """Rounds until every row is done, in one device loop.

    Returns:
      The final state, and int32 `[B, max_new_tokens]`: accepted drafts of each round, -1 behind a
      row's last round.
    """
    accepted = jnp.full((state.length.shape[0], max_new_tokens), -1, jnp.int32)

    def body(carry):
        state, accepted, i = carry
        state, done = draft_and_verify(drafter_params, target_params, state, config=config)
        return state, accepted.at[:, i].set(jnp.where(done.active, done.accepted, -1)), i + 1

    state, accepted, _ = lax.while_loop(lambda carry: ~carry[0].done.all(), body, (state, accepted, jnp.int32(0)))
    return state, accepted


decode_round = functools.partial(jax.jit, static_argnames="config", donate_argnames="state")(draft_and_verify)
"""`draft_and_verify` as it serves: compiled, the state's buffers used again."""


def collect(batch: PromptBatch, state: DecodeState, accepted) -> Iterator[tuple[int, Generation]]:
    """(index of the prompt, its Generation) for every busy row; all processes call it together."""
    tokens, length, accepted = to_host((state.tokens, state.length, accepted))
    for row, index in enumerate(batch.indices):
        begin = batch.length[row]
        history = accepted[row]
        yield (
            int(index),
            Generation(
                prompt=tokens[row, :begin].tolist(),
                tokens=tokens[row, begin : length[row]].tolist(),
                accepted=history[history >= 0].tolist(),
            ),
        )
