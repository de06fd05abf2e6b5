"""Timed decoding: whole passes over requests, and the parts of one round."""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specauf_jax.config import Sampling
from specauf_jax.decoding.generate import start
from specauf_jax.decoding.rows import GREEDY, Generation, Request, Rows
from specauf_jax.decoding.speculate import draft_and_verify, extend, propose, propose_tree, settled
from specauf_jax.decoding.state import DecodeState, Decoding
from specauf_jax.evaluation.measure import alpha

_PROBED_TOKENS = 64  # of each request, to see what is accepted
REPEATED = 8
"""Times that a part runs within one call on the device, so that calling it costs little of what is measured."""


@dataclasses.dataclass
class Timed:
    """A pass over requests: what was generated, the seconds of its two phases, and how often the loop went round."""

    generations: list[Generation]
    prefill_s: float
    decode_s: float
    rounds: int


def timed_pass(
    drafter_params,
    target_params,
    requests: Sequence[Sequence[int]],
    *,
    config: Decoding,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    mesh=None,
) -> Timed:
    """Continue every request and measure. Arguments as for `generate`; compiling counts, so warm up first."""
    waiting = deque(Request(prompt, i, max_new_tokens, sampling) for i, prompt in enumerate(requests))
    found: dict[int, Generation] = {}
    prefill_s = decode_s = 0.0
    rounds = 0
    while waiting:
        begin = time.perf_counter()
        options = {"config": config, "batch_size": batch_size, "seed": seed, "mesh": mesh}
        rows = Rows(drafter_params, target_params, waiting, **options)
        while rows.admit(waiting):
            jax.block_until_ready(rows.running)
            middle = time.perf_counter()
            found |= {request.index: answer for request, answer in rows.advance(bool(waiting))}
            prefill_s, begin = prefill_s + middle - begin, time.perf_counter()
            decode_s += begin - middle
        rounds += rows.rounds
    return Timed([found[i] for i in range(len(requests))], prefill_s, decode_s, rounds)


def spread(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    return {name: float(np.percentile(values, at)) for name, at in (("median", 50), ("p10", 10), ("p90", 90))}


# ---------------------------------------------------------------------------------------------
# Parts of a round


def timed_part(part: str, drafter_params, target_params, state: DecodeState, *, config: Decoding):
    """Seconds of one run of a part, and the state to go on with (the given one is donated).

    Args:
      part: "draft", "target" or "round".
      state: prompts read, with room for a round behind `length`; its rows stay where they are.
      Others as for `draft_and_verify`.
    """
    begin = time.perf_counter()
    state = jax.block_until_ready(_repeat(drafter_params, target_params, state, part=part, config=config))
    return (time.perf_counter() - begin) / REPEATED, state


@functools.partial(jax.jit, static_argnames=("part", "config"), donate_argnames="state")
def _repeat(drafter_params, target_params, state: DecodeState, *, part: str, config: Decoding) -> DecodeState:
    run = {"draft": _draft, "target": _target, "round": _round}[part]
    step = functools.partial(run, drafter_params, target_params, config=config)
    return lax.fori_loop(0, REPEATED, lambda _, state: step(state), state)


def _round(drafter_params, target_params, state: DecodeState, *, config: Decoding) -> DecodeState:
    """A whole round, whose rows are then put back to where they were."""
    after, _ = draft_and_verify(drafter_params, target_params, state, config=config)
    return dataclasses.replace(after, length=state.length, done=state.done)


def _draft(drafter_params, target_params, state: DecodeState, *, config: Decoding) -> DecodeState:
    """The drafter's two passes: proposing K-1 tokens, and reading K new positions of its context."""
    anchor, positions = _anchor(state, config)
    given = drafter_params, target_params, state, anchor[:, None]
    if config.tree_nodes is None:
        tokens = propose(*given, state.keys, config=config).tokens
    else:
        tokens = propose_tree(*given, config=config).tokens
    last = tokens.max(axis=1, initial=0)
    if config.model is not None:
        block = jnp.broadcast_to(anchor[:, None], positions.shape)
        taps = jax.eval_shape(config.target_step, target_params, block, positions, state.target_cache)[1]
        taps = jnp.broadcast_to(last[:, None, None], taps.shape).astype(taps.dtype)
        state = extend(drafter_params, state, taps, positions, config=config)
    return _mark(state, last)


def _target(drafter_params, target_params, state: DecodeState, *, config: Decoding) -> DecodeState:
    """The target's pass over K tokens, or over a tree, up to its choices."""
    anchor, positions = _anchor(state, config)
    if config.tree_nodes is None:
        block = jnp.broadcast_to(anchor[:, None], positions.shape)
        logits, taps, cache = config.target_step(target_params, block, positions, state.target_cache)
        cache = settled(config, cache, jnp.full(len(anchor), config.block_size))
    else:
        nodes = jnp.broadcast_to(anchor[:, None], (len(anchor), config.tree_nodes + 1))
        depths, cache = jnp.ones_like(nodes), state.target_cache
        sees = jnp.broadcast_to(jnp.eye(nodes.shape[1], dtype=bool), (*nodes.shape, nodes.shape[1]))
        logits, taps, read = config.target_step.read_tree(target_params, nodes, positions[:, :1], depths, sees, cache)
        path = jnp.broadcast_to(jnp.arange(config.block_size) % nodes.shape[1], positions.shape)
        cache = config.target_step.keep(cache, read, path, positions)
    choice = jnp.argmax(logits, axis=-1).max(axis=1).astype(jnp.int32)
    return _mark(dataclasses.replace(state, target_cache=cache), choice + (taps.max(axis=(1, 2)) == jnp.inf))


def _anchor(state: DecodeState, config: Decoding):
    anchor = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0]
    return anchor, state.length[:, None] - 1 + jnp.arange(config.block_size)


def _mark(state: DecodeState, token) -> DecodeState:
    """The state with other anchors: without a trace of a part's result the compiler would leave the part out."""
    rows = jnp.arange(len(token))
    return dataclasses.replace(state, tokens=state.tokens.at[rows, state.length - 1].set(token))


# ---------------------------------------------------------------------------------------------
# How many tokens to verify


@dataclasses.dataclass(frozen=True)
class Width:
    """What verifying so many tokens per round costs and gives."""

    slots: int
    round_ms: float
    tokens: float
    """Expected per round and row, from the acceptance of every draft."""

    @property
    def tokens_per_ms(self) -> float:
        """Of one row."""
        return self.tokens / self.round_ms


def widths(drafter_params, target_params, state: DecodeState, *, config: Decoding, accepted, repeats: int = 3):
    """The cost of a round that verifies 2, 4, 8, … of the K tokens, and all, as a list of `Width`.

    Args:
      state: prompts read, as for `timed_part`; donated.
      accepted: share of every draft given that the one before it stood, as from `measure.alpha`.
      repeats: timed runs of each width, after one to warm up; the median counts.
      Others as for `draft_and_verify`.
    """
    K = config.block_size
    sizes = [n for n in (2**i for i in range(1, K.bit_length())) if n < K] + [K]
    found = []
    for slots in sizes:
        narrow, seconds = dataclasses.replace(config, verify_slots=slots), []
        for _ in range(repeats + 1):
            taken, state = timed_part("round", drafter_params, target_params, state, config=narrow)
            seconds.append(taken)
        reached = np.cumprod([share or 0.0 for share in accepted[: slots - 1]])
        tokens = 1 + float(reached.sum())
        found.append(Width(slots, 1000 * float(np.median(seconds[1:])), tokens))
    return found


def fastest_width(
    drafter_params, target_params, requests, *, config: Decoding, batch_size: int, mesh=None
) -> list[Width]:
    """`widths` by what decoding some of these requests shows, the fastest first.

    Args:
      requests: token ids; as many as a batch holds are decoded, some of them twice where there are fewer.
      Others as for `generate`.
    """
    asked = [requests[i % len(requests)] for i in range(batch_size)]
    params = drafter_params, target_params
    options = {"config": dataclasses.replace(config, verify_slots=None), "mesh": mesh}
    timed = timed_pass(*params, asked, max_new_tokens=_PROBED_TOKENS, batch_size=batch_size, **options)
    accepted = alpha([g.accepted for g in timed.generations], options["config"].block_size)
    state = start(*params, asked, max_new_tokens=_PROBED_TOKENS, **options)
    found = widths(*params, state, config=options["config"], accepted=accepted)
    return sorted(found, key=lambda width: -width.tokens_per_ms)
