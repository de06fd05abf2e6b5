"""One round of speculative decoding: propose, verify, commit. Pure, static shapes, batched.

Exactness: at temperature 0 a row's tokens are those that the target alone would choose, whatever
the drafter; above 0 they follow the target's own distribution.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.decoding.baselines import PromptLookup, look_up
from specauf_jax.decoding.sampling import distribution, draw, verify_greedy, verify_sampled
from specauf_jax.decoding.state import DecodeState, Decoding, Proposal, Round, Verdict
from specauf_jax.decoding.tree import Tree, ancestors, grow, walk
from specauf_jax.errors import SpecaufError
from specauf_jax.models.drafter import context_keys_values, draft_cached
from specauf_jax.models.layers import KVCache, with_entries

PROMPT_CHUNK, PROMPT_CHUNK_ON_CPU = 256, 32  # tokens of a prompt that are read at one time


def prompt_chunk() -> int:
    """Tokens of a prompt that this machine reads at one time."""
    return PROMPT_CHUNK_ON_CPU if jax.default_backend() == "cpu" else PROMPT_CHUNK


def draft_and_verify(drafter_params, target_params, state: DecodeState, *, config: Decoding):
    """One round for every row.

    Args:
      drafter_params: as from `init_drafter`; None if `config.drafter` is no model.
      target_params: whatever `config.target_step` takes.
      state: rows whose prompts have been read (`prefill`). Rows that are done stay as they are.
      config: static.

    Returns:
      The state after the round, and a `Round`.
    """
    if config.tree_nodes is not None:
        return tree_and_verify(drafter_params, target_params, state, config=config)
    row_keys = jax.vmap(jax.random.fold_in)(state.keys, state.length)
    draft_keys, verify_keys = jnp.moveaxis(jax.vmap(jax.random.split)(row_keys), 1, 0)
    anchor = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)
    positions = state.length[:, None] - 1 + jnp.arange(config.block_size)
    proposal = propose(drafter_params, target_params, state, anchor, draft_keys, config=config)
    block = jnp.concatenate([anchor, proposal.tokens], axis=1)
    with jax.named_scope("verify"):
        logits, taps, cache = config.target_step(target_params, block, positions, state.target_cache)
    verdict = verify(logits, proposal, state, verify_keys)
    cache = settled(config, cache, jnp.where(state.done, 0, verdict.accepted + 1))
    # Features of rejected drafts are written too: out of sight behind the next anchor, then overwritten.
    state = extend(drafter_params, dataclasses.replace(state, target_cache=cache), taps, positions, config=config)
    return commit(state, proposal, verdict, config=config)


def tree_and_verify(drafter_params, target_params, state: DecodeState, *, config: Decoding):
    """`draft_and_verify` with a tree of drafts: the target reads root and nodes in one pass."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.length)
    last = state.length[:, None] - 1
    anchor, levels = jnp.take_along_axis(state.tokens, last, axis=1), config.block_size - 1
    tree = propose_tree(drafter_params, target_params, state, anchor, config=config)
    with jax.named_scope("verify"):
        logits, taps, read = config.target_step.read_tree(
            target_params, tree.tokens, last, tree.depths, ancestors(tree, levels), state.target_cache
        )
        choices, _ = _choose(logits, state, keys)
        path, accepted = walk(tree, choices, levels)
        token = jnp.take_along_axis(choices, jnp.take_along_axis(path, accepted[:, None], axis=1), axis=1)
    drafts = jnp.take_along_axis(tree.tokens, path[:, 1:], axis=1)
    positions, taps = last + jnp.arange(levels + 1), jnp.take_along_axis(taps, path[..., None], axis=1)
    cache = config.target_step.keep(state.target_cache, read, path, positions)
    state = extend(drafter_params, dataclasses.replace(state, target_cache=cache), taps, positions, config=config)
    verdict = Verdict(accepted=accepted, token=token[:, 0])
    return commit(state, _not_drawn(drafts), verdict, config=config)


@jax.named_scope("propose")
def propose_tree(drafter_params, target_params, state: DecodeState, anchor, *, config: Decoding) -> Tree:
    """The likeliest paths of drafts, of which nothing is drawn. Arguments as for `propose`."""
    assert config.model is not None and config.tree_nodes is not None
    hidden, logits = _drafted(drafter_params, target_params, state, anchor, config=config)
    heat = config.tree_temperature * jnp.where(state.temperature > 0, state.temperature, 1.0)
    return grow(
        config.model.head,
        drafter_params,
        hidden,
        embedding=config.target_head(target_params).embedding,
        anchor=anchor,
        logits=logits,
        temperature=jnp.clip(heat, jnp.finfo(heat.dtype).tiny, 1e30),
        nodes=config.tree_nodes,
    )


@jax.named_scope("propose")
def propose(drafter_params, target_params, state: DecodeState, anchor, keys, *, config: Decoding) -> Proposal:
    """K-1 drafts: looked up, or the body in one pass, of whose hidden states the head makes drafts.

    Args:
      anchor: int32 `[B, 1]`, the last committed token.
      keys: PRNG keys `[B]`.
      Others as for `draft_and_verify`.
    """
    head, drafter = config.target_head(target_params), config.drafter
    if drafter is None:
        return _not_drawn(jnp.zeros((anchor.shape[0], 0), jnp.int32))
    if isinstance(drafter, PromptLookup):
        drafts = look_up(state.tokens, state.length, config=drafter)
        return _not_drawn(drafts[:, : config.block_size - 1])
    hidden, logits = _drafted(drafter_params, target_params, state, anchor, config=config)

    def choose(logits, n):
        row_keys = keys if n is None else jax.vmap(jax.random.fold_in, (0, None))(keys, n)
        return _choose(logits, state, row_keys)

    if not drafter.head.rolls:
        tokens, chances = choose(logits, None)
    else:
        tokens, chances, logits = _roll(drafter_params, hidden, anchor, logits, choose, head.embedding, config=config)
    said = drafter.head.confidence(drafter_params, hidden, jnp.concatenate([anchor, tokens[:, :-1]], axis=1))
    survival = None if said is None else jnp.cumprod(jax.nn.sigmoid(said), axis=1)
    return Proposal(tokens=tokens, chances=chances, logits=logits, survival=survival)


def _not_drawn(drafts) -> Proposal:
    return Proposal(tokens=drafts, chances=jnp.ones(drafts.shape), logits=None)


def _drafted(drafter_params, target_params, state: DecodeState, anchor, *, config: Decoding):
    """The body's one pass: hidden states `[B, K-1, D]` of the slots that predict the drafts, and their logits."""
    head, drafter = config.target_head(target_params), config.model
    assert drafter is not None
    masks = jnp.full((anchor.shape[0], drafter.block_size - 1), drafter.mask_token_id, anchor.dtype)
    embeddings = head.embedding[jnp.concatenate([anchor, masks], axis=1)]
    slots = state.length[:, None] - 1 + jnp.arange(drafter.block_size)
    hidden = draft_cached(drafter_params, embeddings, slots, _drafter_cache(state), config=drafter)
    hidden = hidden[:, drafter.first_slot : drafter.first_slot + config.block_size - 1]
    return hidden, head.logits(hidden)


def _roll(drafter_params, hidden, anchor, logits, choose, embedding, *, config: Decoding):
    """Drafts one by one, their chances, `[B, K-1]` each, and the logits that they were chosen from."""
    assert config.model is not None
    head = config.model.head

    def step(carry, inputs):
        state, token = carry
        n, hidden, logits = inputs
        state, logits = head.next_logits(drafter_params, state, token, n, hidden, logits, embedding=embedding)
        token, chance = (x[:, 0] for x in choose(logits[:, None], n))
        return (state, token), (token, chance, logits)

    start = head.first_state(anchor.shape[:1], hidden.dtype), anchor[:, 0]
    slots = jnp.arange(logits.shape[1]), jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(logits, 1, 0)
    _, found = lax.scan(step, start, slots)
    return tuple(jnp.moveaxis(x, 0, 1) for x in found)


def _choose(logits, state: DecodeState, keys) -> tuple[jax.Array, jax.Array]:
    """Tokens from float32 logits `[B, T, V]`, int32 `[B, T]`, and the probability that each was drawn with."""

    def sampled():
        probability = distribution(logits, state.temperature, state.top_k, state.top_p)
        tokens = draw(keys, probability)
        return tokens, jnp.take_along_axis(probability, tokens[..., None], axis=-1)[..., 0]

    def greedy():
        return jnp.argmax(logits, -1).astype(jnp.int32), jnp.ones(logits.shape[:-1])

    # A branch at run time: an all-greedy batch never sorts a vocabulary, and temperature stays data.
    return lax.cond(jnp.any(state.temperature > 0), sampled, greedy)


@jax.named_scope("verify")
def verify(logits, proposal: Proposal, state: DecodeState, keys) -> Verdict:
    """The target's judgement of the drafts, from its float32 logits `[B, K, V]` over the block."""

    def sampled():
        how = state.temperature, state.top_k, state.top_p

        def q_of(slot):
            if proposal.logits is not None:
                return distribution(jnp.take_along_axis(proposal.logits, slot[:, None, None], axis=1), *how)[:, 0]
            drafts = jnp.take_along_axis(proposal.tokens, slot[:, None], axis=1)[:, 0]
            return jax.nn.one_hot(drafts, logits.shape[-1])

        return verify_sampled(keys, proposal.tokens, proposal.chances, q_of, distribution(logits, *how))

    accepted, token = lax.cond(jnp.any(state.temperature > 0), sampled, lambda: verify_greedy(proposal.tokens, logits))
    return Verdict(accepted=accepted, token=token)


@jax.named_scope("commit")
def commit(state: DecodeState, proposal: Proposal, verdict: Verdict, *, config: Decoding) -> tuple[DecodeState, Round]:
    """Append accepted drafts and the target's token, up to the row's stop token or limit."""
    slot = jnp.arange(config.block_size)
    drafts = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    tokens = jnp.where(slot == verdict.accepted[:, None], verdict.token[:, None], drafts)
    emitted = jnp.minimum(verdict.accepted + 1, state.limit - state.length)
    stops = jnp.isin(tokens, jnp.asarray(config.stop_tokens, tokens.dtype)) & (slot < emitted[:, None])
    stopped = stops.any(axis=1)
    emitted = jnp.where(stopped, jnp.argmax(stops, axis=1) + 1, emitted)
    active = ~state.done
    emitted = jnp.where(active, emitted, 0)
    length = state.length + emitted
    # What is not emitted goes to an index behind the end, which "drop" discards.
    index = jnp.where(slot < emitted[:, None], state.length[:, None] + slot, state.tokens.shape[1])
    written = jax.vmap(lambda row, i, x: row.at[i].set(x, mode="drop"))(state.tokens, index, tokens)
    done = state.done | stopped | (length >= state.limit)
    accepted = jnp.where(active, verdict.accepted, 0)
    result = Round(active=active, accepted=accepted, tokens=tokens, emitted=emitted, survival=proposal.survival)
    return dataclasses.replace(state, tokens=written, length=length, done=done), result


def prefill(
    drafter_params, target_params, state: DecodeState, *, config: Decoding, chunk_size: int | None = None, begin=0
) -> DecodeState:
    """Read every prompt but its last token, the first anchor, into the caches, a chunk of all rows at a time.

    Shorter rows are read beyond their end; what that leaves in the caches is out of sight and overwritten later. Where
    the last chunk would end behind `state.tokens`, the first one counts for as many tokens as whole chunks leave, so
    that no chunk begins before the end of the one before.

    Args:
      chunk_size: tokens of a row that are read at one time; None for what suits the device.
      begin: int [], tokens of every row that the caches hold already. A target step with `settle` needs room for a
        whole chunk behind them.
      Others as for `draft_and_verify`.
    """
    B, T = state.tokens.shape
    size = min(chunk_size or prompt_chunk(), T)
    left = state.length.max() - 1 - begin
    first = jnp.where(-(-left // size) * size > T - begin, (T - begin - 1) % size + 1, size)

    def chunk(i, state: DecodeState) -> DecodeState:
        at = jnp.minimum(jnp.where(i > 0, begin + first + (i - 1) * size, begin), T - size)
        tokens = lax.dynamic_slice_in_dim(state.tokens, at, size, axis=1)
        positions = jnp.broadcast_to(at + jnp.arange(size, dtype=jnp.int32), (B, size))
        _, taps, cache = config.target_step(target_params, tokens, positions, state.target_cache)
        cache = settled(config, cache, jnp.clip(state.length - 1 - at, 0, jnp.where(i > 0, size, first)))
        return extend(drafter_params, dataclasses.replace(state, target_cache=cache), taps, positions, config=config)

    return lax.fori_loop(0, jnp.where(left > 0, 1 + -(-jnp.maximum(left - first, 0) // size), 0), chunk, state)


def settled(config: Decoding, cache, count):
    """The target's cache after the first `count` tokens, int32 `[B]`, of the block that was read last."""
    return config.target_step.settle(cache, count) if hasattr(config.target_step, "settle") else cache


def extend(drafter_params, state: DecodeState, taps, positions, *, config: Decoding) -> DecodeState:
    """The state with the context of more positions in the drafter's cache; as it is for a drafter without one."""
    if config.model is None:
        return state
    new = context_keys_values(drafter_params, taps, positions, config=config.model)
    return dataclasses.replace(state, drafter_cache=with_entries(_drafter_cache(state), new, positions[:, 0]))


def _drafter_cache(state: DecodeState) -> KVCache:
    if state.drafter_cache is None:
        raise SpecaufError("a state without drafter_cache", "the cache of its drafter", "pass one to init_state")
    return state.drafter_cache
