"""Rows that end take the next request: no token depends on who else is there, on when, or on which devices."""

import dataclasses
import functools
import random
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_decoding import RecurrentStep, greedy_by_hand, recurrent_head, recurrent_model

from specauf_jax.config import Sampling
from specauf_jax.decoding.baselines import PromptLookup
from specauf_jax.decoding.generate import converse, generate
from specauf_jax.decoding.rows import Request, Rows
from specauf_jax.decoding.speculate import prefill
from specauf_jax.decoding.state import Decoding, init_state
from specauf_jax.models.layers import init_kv_cache
from specauf_jax.models.target import TargetStep

TARGET, DRAFTER = tiny.target_config(), tiny.drafter_config()
STEP = TargetStep(TARGET, DRAFTER.target_layer_ids)
STOPS = (3, 6)
CONFIG = Decoding(STEP, DRAFTER, stop_tokens=STOPS)
HOW = (Sampling(), Sampling(0.8, top_k=5), Sampling(1.2, top_p=0.7), Sampling())
ROOMIEST = Request([1] * 40, 99, 40)
"""With it among the requests, rows have the same room whatever the others are: nothing is compiled again."""


@functools.cache
def params():
    return tiny.drafter_params(), tiny.target_params()


def various(count: int = 14) -> list[Request]:
    """Requests of 1 to 40 tokens for 1 to 40 more, each with its own sampling."""
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (40, 40), (1, 40), (40, 1), *rng.integers(1, 41, (count - 4, 2)).tolist()]
    prompts = [rng.integers(1, 6, length).tolist() for length, _ in sizes]
    return [
        Request(prompt, i, new, HOW[i % 4]) for i, prompt, (_, new) in zip(range(count), prompts, sizes, strict=True)
    ]


def ask(*requests: Request):
    """A dialogue that asks for all of these, one after another."""
    answers = []
    for request in requests:
        answers.append((yield request))
    return answers


def answers(requests, *, batch_size: int, models=None, config=CONFIG, mesh=None) -> dict:
    """Each request's Generation, by its index; it may be asked in any order."""
    dialogues = {request.index: ask(request) for request in requests}
    found = converse(*(models or params()), dialogues, config=config, batch_size=batch_size, seed=3, mesh=mesh)
    return {index: answer for index, [answer] in found}


def cacheless(prompt, count: int) -> list[int]:
    """What the target alone writes."""
    return greedy_by_hand(tiny.target_params(), prompt, count, target=TARGET)


def test_a_request_gets_the_same_answer_in_any_company():
    requests = [*various(), ROOMIEST]
    alone = {}
    for request in requests:
        alone |= answers([request, ROOMIEST], batch_size=1) if request is not ROOMIEST else {}
    alone |= answers([ROOMIEST], batch_size=1)
    assert len({a for found in alone.values() for a in found.accepted}) > 2
    stopped = [found.tokens[-1] in STOPS and len(found.tokens) < requests[i].max_new_tokens
               for i, found in list(alone.items())[:14]]  # fmt: skip
    assert any(stopped) and not all(stopped)
    for batch_size, order in ((1, 1), (3, 2), (3, 3), (8, 4)):
        shuffled = random.Random(order).sample(requests, len(requests))
        assert answers(shuffled, batch_size=batch_size) == alone


def test_idle_rows_change_nothing():
    requests = [*various()[:2], ROOMIEST]
    assert answers(requests, batch_size=8) == answers(requests, batch_size=1)


def test_first_come_first_served_and_what_is_too_large_waits():
    requests = various()
    rows = Rows(*params(), [requests[0], Request([1] * 10, 0, 10)], config=CONFIG, batch_size=3)
    waiting = deque([requests[0], requests[1], requests[2]])  # the second one fits in neither room nor limit
    assert rows.admit(waiting) and list(waiting) == requests[1:3]
    [(request, answer)] = rows.advance(bool(waiting))
    assert request is requests[0] and len(answer.tokens) == 1
    assert not rows.admit(waiting) and len(waiting) == 2
    longer = Rows(*params(), waiting, config=CONFIG, batch_size=3)
    assert longer.admit(waiting) and not waiting


def test_dialogues_go_on_with_what_was_answered():
    """Every question holds the answers before it, soon needs more room than the first one, and a larger limit."""

    def talk(prompt, number):
        text = list(prompt)
        for turn in range(number % 4):  # the first one asks nothing
            answer = yield Request(text, number, 8 + 3 * turn)
            assert answer.prompt == text
            text = [*text, *answer.tokens, 2, 3, *[4] * 9 * turn]
        return text

    prompts = [[1, 2], [3, 1, 4], [2] * 9, [5, 4, 3, 2, 1], [1], [2, 5, 2]]
    config = dataclasses.replace(CONFIG, stop_tokens=())
    dialogues = {10 * n: talk(prompt, n) for n, prompt in enumerate(prompts)}
    found = dict(converse(*params(), dialogues, config=config, batch_size=3))
    assert found.keys() == {0, 10, 20, 30, 40, 50}
    for n, prompt in enumerate(prompts):
        text = list(prompt)
        for turn in range(n % 4):
            text = [*text, *cacheless(text, 8 + 3 * turn), 2, 3, *[4] * 9 * turn]
        assert found[10 * n] == text
    assert dict(converse(*params(), {}, config=config)) == {}
    assert dict(converse(*params(), {4: talk([1], 0)}, config=config)) == {4: [1]}


def test_dialogues_may_ask_the_same_request():
    request = Request([1, 2, 3], 0, 5)
    found = dict(converse(*params(), {n: ask(request, request) for n in range(3)}, config=CONFIG, batch_size=2))
    assert [found[n] for n in range(3)] == [[found[0][0]] * 2] * 3


def test_prompts_are_read_in_chunks():
    """A CPU reads 32 tokens at one time, or 16 if no prompt is longer; a prompt's last token is not read."""
    rng = np.random.default_rng(5)
    config = dataclasses.replace(CONFIG, stop_tokens=())
    for lengths in ([1, 33, 2, 32, 34, 65, 66, 97], [1, 2, 16]):
        prompts = [rng.integers(1, 6, length).tolist() for length in lengths]
        found = generate(*params(), prompts, config=config, max_new_tokens=6, batch_size=3)
        assert [g.tokens for g in found] == [cacheless(prompt, 6) for prompt in prompts]


def test_the_last_chunk_may_overlap_the_one_before_it():
    tokens, length = jnp.asarray(np.random.default_rng(1).integers(1, 6, (2, 40)), jnp.int32), jnp.array([40, 31])

    def read(chunk_size):
        caches = {"target_cache": STEP.init_cache(2, 40, jnp.float32),
                  "drafter_cache": init_kv_cache(DRAFTER, 2, 40, jnp.float32)}  # fmt: skip
        how, keys = (jnp.float32(0), jnp.int32(0), jnp.float32(1)), jax.random.split(jax.random.key(0), 2)
        state = prefill(*params(), init_state(tokens, length, length, keys, how, **caches), config=CONFIG,
                        chunk_size=chunk_size)  # fmt: skip
        return [x[:, row, : n - 1] for x in jax.tree.leaves((state.target_cache, state.drafter_cache))
                for row, n in enumerate((40, 31))]  # fmt: skip

    assert tiny.largest_difference(read(16), read(40)) < 1e-5


@dataclasses.dataclass(frozen=True)
class RowsLast:
    """A target whose cache counts positions first and rows last, in a structure of its own."""

    inner: RecurrentStep

    def __call__(self, params, tokens, positions, cache):
        logits, taps, states = self.inner(params, tokens, positions, jnp.moveaxis(cache["of"][0], 2, 0))
        return logits, taps, {"of": [jnp.moveaxis(states, 0, 2)]}

    def init_cache(self, batch, length, dtype):
        return {"of": [jnp.moveaxis(self.inner.init_cache(batch, length, dtype), 0, 2)]}


def test_a_callers_cache_may_have_its_rows_anywhere():
    params, drafter = recurrent_model()
    models = tiny.drafter_params(drafter), params
    requests = various(6)
    found = [answers(requests, batch_size=3, models=models, config=Decoding(step, drafter, target_head=recurrent_head))
             for step in (RecurrentStep(), RowsLast(RecurrentStep()))]  # fmt: skip
    assert found[0] == found[1] and len(found[0]) == 6


ON_MESHES = """
from collections import deque
import jax
from specauf_jax.config import Mesh
from specauf_jax.decoding.rows import Rows
from specauf_jax.sharding import make_mesh, parameter_sharding
from test_rows import CONFIG, ROOMIEST, answers, params, various

requests = [*various(), ROOMIEST]
expected = answers(requests, batch_size=8)
for mesh in (make_mesh(Mesh(2, 2, 2)), make_mesh(Mesh(fsdp=4), jax.devices()[:4])):
    models = jax.device_put(params(), parameter_sharding(params(), mesh))
    found = answers(requests, batch_size=8, models=models, mesh=mesh)
    assert found == expected, [(i, found[i], expected[i]) for i in found if found[i] != expected[i]]
    rows = Rows(*models, requests, config=CONFIG, batch_size=8, mesh=mesh)
    waiting = deque(requests)
    for _ in range(2):
        rows.admit(waiting)
        rows.advance(True)
        state, tensor = rows.running.state, mesh.shape["tensor"]
        for cache in (state.target_cache, state.drafter_cache):
            shape = list(cache.k.shape)
            assert shape[1] == 8 and shape[2] == 2
            shape[1], shape[2] = 2, 2 // tensor
            for x in (cache.k, cache.v):
                assert list(x.addressable_shards[0].data.shape) == shape, x.sharding
        for x in (state.tokens, state.length, state.keys, rows.running.accepted):
            assert x.addressable_shards[0].data.shape[0] == 2, x.sharding
print("same")
"""


@pytest.mark.long
def test_devices_share_rows_that_take_new_requests():
    assert tiny.on_eight_devices(ON_MESHES) == "same\n"


def test_prompt_lookup_takes_new_requests_too():
    config = dataclasses.replace(CONFIG, drafter=PromptLookup(4))
    requests = [r for r in various() if r.sampling == Sampling()]
    found = answers(requests, batch_size=2, models=(None, tiny.target_params()), config=config)
    alone = answers(requests, batch_size=2, models=(None, tiny.target_params()),
                    config=dataclasses.replace(config, drafter=None))  # fmt: skip
    assert {i: g.tokens for i, g in found.items()} == {i: g.tokens for i, g in alone.items()}


def test_what_waits_does_not_wait_for_more_rows_than_are_busy():
    """Of 50 rows three are read together; here one is busy, and the next request has no room beside it."""
    request = Request([1, 2, 3], 0, 4)
    rows = Rows(*params(), [request], config=CONFIG, batch_size=50)
    assert rows.admit(deque([request, Request([1] * 90, 1, 4)]))
    [(found, _)] = rows.advance(waiting=True)
    assert found is request and not rows.admit(deque())
