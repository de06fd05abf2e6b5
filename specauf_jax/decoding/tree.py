"""Draft trees (DDTree, arXiv 2604.12989): the N likeliest paths of a block's drafts, judged by the target in one pass.

A path's score is the sum of its drafts' log-probabilities, so that no child scores above its parent, and the N best
paths are a tree. It is made without a look at the target, whose own token decides at every node where to go on: what is
written is the target's own at temperature 0, and follows its distribution above. Built level by level, for all rows
together, in static shapes: the best N of (nodes of the level before) × (tokens after each), then the best N of all.
"""

import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.architecture import Head
from specauf_jax.pytrees import pytree


@pytree
class Tree:
    """Nodes of every row, the root (the anchor) first, parents before their children."""

    tokens: jax.Array  # int32 [B, N+1]
    parents: jax.Array  # int32 [B, N+1], indices of nodes; -1 of the root, and of places that no path fills
    depths: jax.Array  # int32 [B, N+1], 0 of the root


def grow(
    head: Head,
    params: dict,
    hidden: jax.Array,
    *,
    embedding: jax.Array,
    anchor: jax.Array,
    logits: jax.Array,
    temperature: jax.Array,
    nodes: int,
) -> Tree:
    """The N best paths by the drafter's own distribution.

    Args:
      head: of the drafter; its logits may depend on each node's own ancestors.
      params: of the drafter.
      hidden: `[B, K-1, D]`, of the slots that predict the drafts.
      embedding: `[V, D]`, the target's.
      anchor: int32 `[B, 1]`, the last committed token.
      logits: float32 `[B, K-1, V]`, the target's LM head on `hidden`.
      temperature: float32 `[B]`, above 0, of the drafter's distribution.
      nodes: N.
    """
    B, levels, V = logits.shape
    most = min(nodes, V)

    def level(carry, inputs):
        states, tokens, scores = carry  # of the best N nodes of the level before
        n, hidden, logits = inputs
        states, logits = head.next_logits(
            params, states, tokens, n, hidden[:, None], logits[:, None], embedding=embedding
        )
        below = logits - logits.max(-1, keepdims=True)  # so that no heat, however low, makes infinities of the best
        heated = (below / temperature[:, None, None]).reshape(-1, V)  # of [B, 1, V] some TPUs would turn copies
        # [B, N, most], or [B, 1, most] of all nodes alike
        likely, after = (x.reshape(B, -1, most) for x in lax.top_k(jax.nn.log_softmax(heated), most))
        paths = (scores[..., None] + likely).reshape(B, -1)
        after = jnp.broadcast_to(after, (B, nodes, most)).reshape(B, -1)
        scores, best = lax.top_k(paths, nodes)
        parents = best // most
        states = jnp.take_along_axis(states, parents[..., None], axis=1)
        tokens = jnp.take_along_axis(after, best, axis=1)
        return (states, tokens, scores), (tokens, jnp.where(n == 0, -1, (n - 1) * nodes + parents), scores)

    first = jnp.where(jnp.arange(nodes) == 0, 0.0, -jnp.inf)  # one node, the root
    start = head.first_state((B, nodes), hidden.dtype), jnp.broadcast_to(anchor, (B, nodes)), jnp.tile(first, (B, 1))
    slots = jnp.arange(levels), jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(logits, 1, 0)
    _, (tokens, parents, scores) = lax.scan(level, start, slots)  # [K-1, B, N] each
    tokens, parents, scores = (jnp.moveaxis(x, 0, 1).reshape(B, -1) for x in (tokens, parents, scores))
    return _best(tokens, parents, scores, anchor, nodes)


def _best(tokens, parents, scores, anchor, nodes: int) -> Tree:
    """The best N of all levels' nodes `[B, (K-1)·N]`, whose parents are counted among them; -1 for the root."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    score, chosen = lax.top_k(scores, nodes)  # of equal ones the first: a parent before its child
    chosen = jnp.sort(jnp.where(jnp.isfinite(score), chosen, tokens.shape[1]), axis=1)  # what no path fills comes last
    exists = chosen < tokens.shape[1]
    at = jnp.minimum(chosen, tokens.shape[1] - 1)
    places = jnp.zeros(tokens.shape, jnp.int32).at[rows, chosen].set(1 + jnp.arange(nodes), mode="drop")
    parent = jnp.take_along_axis(parents, at, axis=1)
    parent = jnp.where(parent < 0, 0, jnp.take_along_axis(places, jnp.maximum(parent, 0), axis=1))
    count = len(rows)
    return Tree(
        tokens=jnp.concatenate([anchor, jnp.take_along_axis(tokens, at, axis=1)], axis=1),
        parents=jnp.concatenate([jnp.full((count, 1), -1), jnp.where(exists, parent, -1)], axis=1),
        depths=jnp.concatenate([jnp.zeros((count, 1), jnp.int32), jnp.where(exists, 1 + at // nodes, 0)], axis=1),
    )


def ancestors(tree: Tree, levels: int) -> jax.Array:
    """Which nodes each node sees, itself and all above it: bool `[B, N+1, N+1]`, of trees of so many levels."""
    own = jnp.arange(tree.tokens.shape[1])
    above = jnp.where(tree.parents < 0, own, tree.parents)  # a root stays where it is

    def up(_, carry):
        at, seen = carry
        at = jnp.take_along_axis(above, at, axis=1)
        return at, seen | (at[..., None] == own)

    start = jnp.broadcast_to(own, tree.tokens.shape)
    return lax.fori_loop(0, levels, up, (start, start[..., None] == own))[1]


def walk(tree: Tree, choices: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
    """From the root on as long as a child carries the token that the target chose.

    Args:
      tree: of at most so many `levels`.
      choices: int32 `[B, N+1]`, the target's own token after each node.

    Returns:
      int32 `[B, levels + 1]` nodes of the path, the root first, the last one again where it ends early; and int32
      `[B]`, how many drafts are on it.
    """

    def step(carry, _):
        at, accepted = carry
        token = jnp.take_along_axis(choices, at[:, None], axis=1)
        child = (tree.parents == at[:, None]) & (tree.tokens == token)
        found = child.any(axis=1)
        at = jnp.where(found, jnp.argmax(child, axis=1), at)
        return (at, accepted + found), at

    root = jnp.zeros(choices.shape[0], jnp.int32)
    (_, accepted), path = lax.scan(step, (root, root), None, length=levels)
    return jnp.concatenate([root[:, None], jnp.moveaxis(path, 0, 1)], axis=1), accepted
