"""Small models and batches for tests: D=16, V=17, K=4, with weights large enough to matter."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from specauf_jax.architecture import Drafter, ResolvedDrafter, Target
from specauf_jax.models.drafter import drafter_shapes
from specauf_jax.models.heads.dflash2 import DFlash2
from specauf_jax.models.heads.domino import Domino
from specauf_jax.models.heads.dspark import DSpark
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.target import target_shapes
from specauf_jax.training.blocks import Batch

MASK_TOKEN = 16
_FREQUENT = slice(1, 5)  # tokens that text and models both prefer, so that some drafts are right


def target_config(**changes) -> Target:
    """Three layers, four query heads over two key/value heads, an LM head of its own."""
    return Target(
        **{
            "vocab_size": 17,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "tie_word_embeddings": False,
            **changes,
        }
    )


def drafter_config(target: Target | None = None, **changes) -> ResolvedDrafter:
    """Two layers on two taps, resolved; the mask token is the last of the vocabulary."""
    settings = {"block_size": 4, "num_hidden_layers": 2, "mask_token_id": MASK_TOKEN, "target_layer_ids": (0, 1)}
    return resolve_drafter(Drafter(**(settings | changes)), target or target_config())


def domino_config(target: Target | None = None, **changes) -> ResolvedDrafter:
    """A `drafter_config` with Domino's head, of small widths; `changes` may be the head's too."""
    names = [field.name for field in dataclasses.fields(Domino)]
    head = {"emb_dim": 6, "gru_hidden_dim": 10} | {name: changes.pop(name) for name in names if name in changes}
    return dataclasses.replace(drafter_config(target, **changes), head=Domino(**head))


def dspark_config(target: Target | None = None, **changes) -> ResolvedDrafter:
    """A `drafter_config` with DSpark's head, of small widths; `changes` may be the head's too."""
    names = [field.name for field in dataclasses.fields(DSpark)]
    head = {"markov_rank": 6} | {name: changes.pop(name) for name in names if name in changes}
    return dataclasses.replace(drafter_config(target, **changes), head=DSpark(**head))


def dflash2_config(target: Target | None = None, **changes) -> ResolvedDrafter:
    """A `drafter_config` with DFlash2's head, of small widths; `changes` may be the head's too."""
    names = [field.name for field in dataclasses.fields(DFlash2)]
    head = {"conv_group_size": 4, "selector_rank": 6, "selector_top_k": 4}
    head |= {name: changes.pop(name) for name in names if name in changes}
    return dataclasses.replace(drafter_config(target, **changes), head=DFlash2(**head))


def target_params(config: Target | None = None, seed: int = 0) -> dict:
    """Random parameters of a target, norm scales included."""
    params = _random(target_shapes(config or target_config()), seed)
    if "lm_head" in params:
        params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[:, _FREQUENT].multiply(3.0)
    return params


def drafter_params(config: ResolvedDrafter | None = None, seed: int = 1) -> dict:
    """Random parameters of a drafter, norm scales included."""
    return _random(drafter_shapes(config or drafter_config()), seed)


def random_batch(documents, length: int = 24, seed: int = 0, supervised: float = 0.85) -> Batch:
    """Packed rows of random tokens, the mask token never among them.

    Args:
      documents: for every row the lengths of its documents; what they leave is padding.
      length: S.
      seed: of tokens and loss mask.
      supervised: share of the documents' tokens in the loss mask.
    """
    rng = np.random.default_rng(seed)
    shape = (len(documents), length)
    frequent = rng.integers(_FREQUENT.start, _FREQUENT.stop, shape)
    tokens = np.where(rng.random(shape) < 0.8, frequent, rng.integers(1, MASK_TOKEN, shape))
    ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, lengths in enumerate(documents):
        assert sum(lengths) <= length
        for number, (n, end) in enumerate(zip(lengths, np.cumsum(lengths), strict=True)):
            ids[row, end - n : end] = number + 1
            positions[row, end - n : end] = np.arange(n)
    return Batch(
        tokens=jnp.asarray(np.where(ids > 0, tokens, 0), jnp.int32),
        loss_mask=jnp.asarray((rng.random(shape) < supervised) & (ids > 0)),
        document_ids=jnp.asarray(ids),
        positions=jnp.asarray(positions),
    )


def largest_difference(tree, other) -> float:
    """The largest over all leaves of max|a - b| / max|b|; a leaf of zeros must be met exactly."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)

    def difference(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        if a.size == 0 or np.array_equal(a, b):
            return 0.0
        scale = np.abs(b).max()
        return np.abs(a - b).max() / scale if scale > 0 and np.isfinite(a).all() and np.isfinite(b).all() else np.inf

    return max(jax.tree.leaves(jax.tree.map(difference, tree, other)))


def on_eight_devices(code: str) -> str:
    """What a process with 8 CPU devices prints that runs `code` in the folder of the tests."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same_bits(tree, other) -> bool:
    """Whether two trees hold the same numbers exactly."""
    return jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), tree, other))


def _random(shapes, seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        match path[-1].key:
            case "scale":
                noise = 1 + 0.2 * noise
            case "kernel":
                noise /= np.sqrt(leaf.shape[-2])
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)
