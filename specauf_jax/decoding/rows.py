"""Rows on the device that decode together, each for a request of its own; one that ends takes the next request."""

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from specauf_jax.config import Sampling
from specauf_jax.decoding.speculate import draft_and_verify, prefill, prompt_chunk
from specauf_jax.decoding.state import DecodeState, Decoding, init_state
from specauf_jax.distributed import to_host
from specauf_jax.errors import SpecaufError
from specauf_jax.models.layers import float_dtype, init_kv_cache
from specauf_jax.pytrees import pytree
from specauf_jax.sharding import BATCH, batch_sharding, batch_shards, per_device, placed, rows_at

GREEDY = Sampling()
_ROOM_STEP = 256  # rows have room for a multiple of so many tokens, or a power of two: few shapes are compiled
_SHORT = 16  # tokens; where no prompt is longer, smaller chunks of prompts are read
_SHARE = 16  # one row of so many: what ends before new requests are read, and how many are read together


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    prompt: Sequence[int]
    index: int
    """With the seed it fixes what is drawn."""
    max_new_tokens: int
    sampling: Sampling = GREEDY

    def __post_init__(self):
        if len(self.prompt) == 0:
            raise SpecaufError(f"prompt {self.index} is empty", "at least one token (the first anchor)",
                               "start it with a token")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Generation:
    """One prompt's continuation.

    `accepted` holds, for each round, the drafts that the target agreed with, before any stop cut
    the round's tokens: a round emits accepted + 1 tokens, the last one perhaps fewer.
    `survival` holds, for each n = 1..K-1, the predicted probability that n drafts stand, summed over the rounds; empty
    for a drafter that predicts none.
    """

    prompt: list[int]
    tokens: list[int]
    accepted: list[int]
    survival: list[float] = dataclasses.field(default_factory=list)


@pytree
class Running:
    """What the device holds of the rows."""

    state: DecodeState
    accepted: jax.Array  # int32 [B, T]: of each row's rounds, at most one a token
    rounds: jax.Array  # int32 [B]: how many each row had
    survival: jax.Array  # float32 [B, K-1]: of each row, the predictions of all rounds added up; [B, 0] for none


class Rows:
    """B rows with room for the longest of the first requests; idle until `admit` gives them requests.

    What all of the first prompts begin with, as chat templates do, is read once. A row's tokens depend neither on its
    neighbours nor on when it was admitted (but for rounding, where a state runs over the chunks of a prompt).
    """

    def __init__(
        self, drafter_params, target_params, requests: Sequence[Request], *, config: Decoding, batch_size: int,
        seed: int = 0, mesh=None,
    ):  # fmt: skip
        """Arguments as for `generate`; `requests`, at least one, tell how much room rows need."""
        self._params = drafter_params, target_params
        self._config, self._mesh, self._seed = config, mesh, seed
        needed = max(map(self._needs, requests))
        self._room = max(64, min(-(-needed // _ROOM_STEP) * _ROOM_STEP, 1 << (needed - 1).bit_length()))
        short = max(len(request.prompt) for request in requests) <= _SHORT
        self._chunk = _SHORT if short else prompt_chunk()
        self._requests: list[Request | None] = [None] * batch_size
        self.rounds = 0
        """Rounds of the device's loop so far."""
        shape = {"batch_size": batch_size, "room": self._room, "dtype": float_dtype(target_params)}
        self.running = _idle(config=config, **shape, mesh=mesh)
        self._prefix = _common_start([request.prompt for request in requests])
        self._prefix = self._prefix[: max(self._room - self._chunk, 0)]  # a chunk has room behind it
        # Which of its rows each device reads, turn by turn, `together` at a time; none for a place behind the last.
        shards = 1 if mesh is None else batch_shards(mesh)
        local = batch_size // shards
        together = max(1, local // _SHARE)
        self._turns = np.full((shards, -(-local // together), together), local, np.int32)
        self._begun = self._begin()

    def admit(self, waiting: deque[Request]) -> bool:
        """Read the prompts of waiting requests, first come first served, into idle rows; whether any row is busy."""
        fresh = {}
        for row, request in enumerate(self._requests):
            if request is None and waiting and self._fits(waiting[0]):
                fresh[row] = self._requests[row] = waiting.popleft()
        if fresh:
            self.running = self._read(fresh)
        return any(self._requests)

    def advance(self, waiting: bool) -> list[tuple[Request, Generation]]:
        """Rounds until every row is done, or, if requests are waiting, until a few are; what is done then."""
        B, idle = len(self._requests), self._requests.count(None)
        enough = min(idle + max(1, B // _SHARE), B) if waiting else B
        self.running, rounds = _stretch(*self._params, self.running, jnp.int32(enough), config=self._config)
        state = self.running.state
        running = self.running
        tokens, length, done, accepted, count, survival, rounds = to_host(
            (state.tokens, state.length, state.done, running.accepted, running.rounds, running.survival, rounds)
        )
        self.rounds += int(rounds)
        finished = []
        for row, request in enumerate(self._requests):
            if request is not None and done[row]:
                begin = len(request.prompt)
                answer = tokens[row, begin : length[row]].tolist()
                history = accepted[row, : count[row]].tolist()
                found = Generation(list(request.prompt), answer, history, survival[row].tolist())
                finished.append((request, found))
                self._requests[row] = None
        return finished

    def _begin(self):
        """Caches of as many rows as are read together, which hold the prefix."""
        rows = math.prod(self._turns.shape[::2])
        tokens = np.zeros((rows, self._room), np.int32)
        tokens[:, : len(self._prefix)] = self._prefix
        length = np.full(rows, len(self._prefix) + 1, np.int32)  # prompts are read but for their last token
        chunk_size = self._chunk if self._prefix else None
        options = {"config": self._config, "mesh": self._mesh, "chunk_size": chunk_size}
        return _read_prefix(*self._params, _on(self._mesh, (tokens, length)), **options)

    def _needs(self, request: Request) -> int:
        return len(request.prompt) + request.max_new_tokens + self._config.block_size - 1

    def _fits(self, request: Request) -> bool:
        prefix, prompt = self._prefix, list(request.prompt)
        return self._needs(request) <= self._room and len(prompt) > len(prefix) and prompt[: len(prefix)] == prefix

    def _read(self, fresh: dict[int, Request]) -> Running:
        B, shards = len(self._requests), len(self._turns)
        tokens = np.zeros((B, self._room), np.int32)
        length, limit, draws, top_k = (np.ones(B, np.int32) for _ in range(4))
        temperature, top_p = np.zeros(B, np.float32), np.ones(B, np.float32)
        for row, request in fresh.items():
            tokens[row, : len(request.prompt)] = request.prompt
            length[row], draws[row] = len(request.prompt), request.index
            limit[row] = len(request.prompt) + request.max_new_tokens
            temperature[row], top_p[row] = request.sampling.temperature, request.sampling.top_p
            top_k[row] = min(request.sampling.top_k, np.iinfo(np.int32).max)  # no vocabulary is larger
        # Each device reads its own rows' prompts, those of similar length together.
        local, turns = B // shards, self._turns.copy()
        of_device = [sorted((r for r in fresh if r // local == d), key=length.__getitem__) for d in range(shards)]
        for device, rows in enumerate(of_device):
            turns[device].flat[: len(rows)] = np.asarray(rows, np.int32) % local
        prompts = _on(self._mesh, (tokens, length, limit, draws, temperature, top_k, top_p, turns))
        count = np.int32(-(-max(map(len, of_device)) // turns.shape[2]))
        begun = self._begun, np.int32(len(self._prefix))
        arguments = (*self._params, self.running, prompts, count, begun, np.uint32(self._seed))
        return _admit(*arguments, config=self._config, mesh=self._mesh, chunk_size=self._chunk)


def _common_start(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with, but for each one's last token; nothing where one is alone."""
    if len(prompts) == 1:
        return []
    shortest, longest = min(map(list, prompts)), max(map(list, prompts))
    most = min(map(len, prompts)) - 1
    return shortest[: next((i for i in range(most) if shortest[i] != longest[i]), most)]


def _on(mesh, rows):
    return rows if mesh is None else jax.device_put(rows, batch_sharding(mesh))


# ---------------------------------------------------------------------------------------------
# On the device


def abstract_state(*, config: Decoding, batch_size: int, room: int, dtype, mesh) -> DecodeState:
    """Rows with room for so many tokens, as shapes with shardings: to compile ahead of time."""
    shape = {"batch_size": batch_size, "room": room, "dtype": jnp.dtype(dtype)}
    running = jax.eval_shape(functools.partial(_idle, config=config, **shape, mesh=None))
    return placed(running, _sharding(running, _row_axes(running, config), mesh)).state


@functools.partial(jax.jit, static_argnames=("config", "batch_size", "room", "dtype", "mesh"))
def _idle(*, config: Decoding, batch_size: int, room: int, dtype, mesh) -> Running:
    """Rows without requests."""
    tokens, ones = jnp.zeros((batch_size, room), jnp.int32), jnp.ones(batch_size, jnp.int32)
    keys, how = jax.random.split(jax.random.key(0), batch_size), (jnp.float32(0), jnp.int32(0), jnp.float32(1))
    state = init_state(tokens, ones, ones, keys, how, **_caches(config, batch_size, room, dtype))
    running = _fresh(state, config)
    return _spread(running, _row_axes(running, config), mesh)


def _fresh(state: DecodeState, config: Decoding) -> Running:
    """Rows before their first round."""
    B = len(state.length)
    says = config.model is not None and config.model.head.confidence_weight > 0 and config.tree_nodes is None
    predicted = config.block_size - 1 if says else 0
    return Running(
        state=state,
        accepted=jnp.zeros_like(state.tokens),
        rounds=jnp.zeros(B, jnp.int32),
        survival=jnp.zeros((B, predicted), jnp.float32),
    )


def _caches(config, rows: int, room: int, dtype) -> dict:
    """Empty caches of a `Decoding`."""
    drafter_cache = None if config.model is None else init_kv_cache(config.model, rows, room, dtype)
    return {"target_cache": config.target_step.init_cache(rows, room, dtype), "drafter_cache": drafter_cache}


@functools.partial(jax.jit, static_argnames=("config", "mesh", "chunk_size"), donate_argnames="running")
def _admit(drafter_params, target_params, running: Running, prompts, count, begun, seed, *, config, mesh, chunk_size):
    """Requests' prompts read into their rows, some rows of each device at a time, `count` times.

    begun: of `_read_prefix`, and the prefix's length.
    """
    *rows, turns = prompts
    caches, begin = begun

    def read(turn, running):
        at = lax.dynamic_index_in_dim(turns, turn, 1, keepdims=False)  # [devices, rows together]
        tokens, length, limit, draws, *how = _take(rows, at, mesh)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), draws)
        state = init_state(tokens, length, limit, keys, how, **caches)
        fresh = _fresh(state, config)
        fresh = _spread(fresh, _row_axes(fresh, config), mesh)
        state = prefill(drafter_params, target_params, fresh.state, config=config, chunk_size=chunk_size, begin=begin)
        return _put(running, dataclasses.replace(fresh, state=state), at, mesh, config)

    return lax.fori_loop(0, count, read, running)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "chunk_size"))
def _read_prefix(drafter_params, target_params, prompts, *, config: Decoding, mesh, chunk_size: int | None) -> dict:
    """Caches after `tokens [n, T]`, of which `length [n]` - 1 are read; none if chunk_size is None."""
    tokens, length = prompts
    caches = _caches(config, tokens.shape[0], tokens.shape[1], float_dtype(target_params))
    caches = _spread(caches, _cache_axes(config), mesh)
    if chunk_size is None:
        return caches
    keys, how = jax.random.split(jax.random.key(0), len(length)), (jnp.float32(0), jnp.int32(0), jnp.float32(1))
    state = init_state(tokens, length, length, keys, how, **caches)
    state = prefill(drafter_params, target_params, state, config=config, chunk_size=chunk_size)
    return {name: getattr(state, name) for name in caches}


@functools.partial(jax.jit, static_argnames="config", donate_argnames="running")
def _stretch(drafter_params, target_params, running: Running, enough, *, config: Decoding):
    """Rounds until `enough` rows are done, in one device loop; and how many there were."""

    def body(carry):
        running, i = carry
        state, done = draft_and_verify(drafter_params, target_params, running.state, config=config)
        rows = jnp.arange(len(running.rounds))
        at = jnp.where(done.active, running.rounds, running.accepted.shape[1])  # behind the end: dropped
        accepted = running.accepted.at[rows, at].set(done.accepted, mode="drop")
        survival = running.survival
        if done.survival is not None:
            survival += jnp.where(done.active[:, None], done.survival, 0)
        return Running(state=state, accepted=accepted, rounds=running.rounds + done.active, survival=survival), i + 1

    return lax.while_loop(lambda carry: carry[0].state.done.sum() < enough, body, (running, jnp.int32(0)))


# ---------------------------------------------------------------------------------------------
# Rows of the arrays, each device its own


def _take(arrays, at, mesh):
    """Rows `at [devices, n]` of every device: `[B, ...]` → `[devices · n, ...]`; ones for a place behind the last."""

    def one(arrays, at):
        return [jnp.take(x, at[0], axis=0, mode="fill", fill_value=1) for x in arrays]

    return per_device(one, mesh, PartitionSpec(BATCH), PartitionSpec(BATCH))(arrays, at)


def _put(running: Running, fresh: Running, at, mesh, config: Decoding) -> Running:
    """`fresh` in the places `at [devices, n]` of every device's rows; nowhere for one behind the last."""
    axes = _row_axes(running, config)
    specs = _specs(running, axes, mesh)

    def one(running, fresh, at):
        def put(old, new, axis):
            return old.at[(slice(None),) * axis + (at[0],)].set(new, mode="drop")

        return jax.tree.map(put, running, fresh, axes)

    return per_device(one, mesh, (specs, specs, PartitionSpec(BATCH)), specs)(running, fresh, at)


def _cache_axes(config: Decoding) -> dict:
    """Which axis of every array of the caches counts rows. A target's may have them anywhere: two sizes tell."""
    of_two, of_three = (jax.eval_shape(lambda n=n: _caches(config, n, 1, jnp.float32)) for n in (2, 3))

    def axis(two, three):
        return next(i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b)

    return jax.tree.map(axis, of_two, of_three)


def _row_axes(running: Running, config: Decoding) -> Running:
    """As `_cache_axes`, of all."""
    axes = jax.tree.map(lambda _: 0, running)
    return dataclasses.replace(axes, state=dataclasses.replace(axes.state, **_cache_axes(config)))


def _specs(tree, axes, mesh):
    """Rows, at `axes`, over all batch axes of the mesh; the heads of key/value caches over `tensor`."""
    return jax.tree.map(lambda x, axis: rows_at(x.shape, axis, mesh), tree, axes)


def _sharding(tree, axes, mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(tree, axes, mesh))


def _spread(tree, axes, mesh):
    """Zeros have no sharding of their own: unless it is said, every device holds all rows."""
    return tree if mesh is None else lax.with_sharding_constraint(tree, _sharding(tree, axes, mesh))
