"""Whole continuations of prompts of any lengths, streamed ones, and conversations."""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np

from specauf_jax.config import Sampling
from specauf_jax.decoding.rows import GREEDY, Generation, Request, Rows
from specauf_jax.decoding.speculate import draft_and_verify
from specauf_jax.decoding.state import DecodeState, Decoding

Result = TypeVar("Result")
Dialogue = Generator[Request, Generation, Result]
"""Asks for one continuation after another, and returns what came of them."""


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
    track: Callable[[Iterable], Iterable] = iter,
    indices: Sequence[int] | None = None,
) -> list[Generation]:
    """Continue every prompt, `batch_size` at a time: a row that ends takes the next prompt.

    Compiles once for all prompts of a call. A row's result does not depend on its neighbours, and its draws only on
    `seed` and its index.

    Args:
      drafter_params, target_params: float32 or bfloat16, which sets the compute precision.
      prompts: token ids; none may be empty.
      config: whose `target_step` also offers `init_cache(batch, length, dtype)`.
      max_new_tokens: of every row.
      sampling: how tokens are chosen.
      seed: of the draws above temperature 0.
      batch_size: rows on the device at one time; a multiple of the mesh's batch shards.
      mesh: to spread rows over; None for one device.
      track: wraps the iterator of finished prompts, for a progress bar.
      indices: what fixes each prompt's draws beside `seed`; None for its place in `prompts`.

    Returns:
      One Generation per prompt, in order.
    """

    def ask(request: Request):
        return (yield request)

    requests = _requests(prompts, indices, max_new_tokens, sampling)
    dialogues = {i: ask(request) for i, request in enumerate(requests)}
    options = {"config": config, "seed": seed, "batch_size": batch_size, "mesh": mesh}
    found = dict(track(converse(drafter_params, target_params, dialogues, **options)))
    return [found[i] for i in range(len(prompts))]


def converse(
    drafter_params,
    target_params,
    dialogues: Mapping[int, Dialogue[Result]],
    *,
    config: Decoding,
    seed: int = 0,
    batch_size: int = 16,
    mesh=None,
) -> Iterator[tuple[int, Result]]:
    """Hold many dialogues at one time; each asks on as soon as it is answered.

    Args:
      dialogues: by any number.
      Others as for `generate`.

    Yields:
      (number, what the dialogue returned), as they end.
    """
    owners: dict[int, int] = {}
    waiting: deque[Request] = deque()

    def go_on(number: int, answer: Generation | None) -> Iterator[tuple[int, Result]]:
        try:
            asked = dialogues[number].send(answer)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            yield number, end.value
        else:
            request = dataclasses.replace(asked)  # an object of its own, though two may ask the same
            owners[id(request)] = number
            waiting.append(request) if answer is None else waiting.appendleft(request)

    for number in dialogues:
        yield from go_on(number, None)
    while waiting:
        options = {"config": config, "batch_size": batch_size, "seed": seed, "mesh": mesh}
        rows = Rows(drafter_params, target_params, waiting, **options)
        while rows.admit(waiting):
            for request, answer in rows.advance(bool(waiting)):
                yield from go_on(owners.pop(id(request)), answer)


def start(
    drafter_params,
    target_params,
    prompts: Sequence[Sequence[int]],
    *,
    config: Decoding,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    mesh=None,
) -> DecodeState:
    """A row for each prompt, which has been read. Arguments as for `generate`."""
    requests = _requests(prompts, indices, max_new_tokens, sampling)
    options = {"config": config, "batch_size": len(prompts), "seed": seed, "mesh": mesh}
    rows = Rows(drafter_params, target_params, requests, **options)
    rows.admit(deque(requests))
    return rows.running.state


def _requests(prompts, indices: Sequence[int] | None, max_new_tokens: int, sampling: Sampling) -> list[Request]:
    indices = range(len(prompts)) if indices is None else indices
    return [Request(prompt, index, max_new_tokens, sampling) for prompt, index in zip(prompts, indices, strict=True)]


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
    state = start(
        drafter_params,
        target_params,
        [prompt],
        config=config,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        indices=[index],
        mesh=mesh,
    )
    while not state.done[0]:
        state, done = decode_round(drafter_params, target_params, state, config=config)
        yield np.asarray(done.tokens[0, : int(done.emitted[0])]).tolist(), int(done.accepted[0])


decode_round = functools.partial(jax.jit, static_argnames="config", donate_argnames="state")(draft_and_verify)
"""`draft_and_verify` as it serves: compiled, the state's buffers used again."""
