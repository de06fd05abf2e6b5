"""The mesh and every PartitionSpec of the system.

Axes of the mesh: `replica` (batch only), `fsdp` (batch and parameters), `tensor` (heads, MLP,
vocabulary). GSPMD does the rest: no collective is written by hand anywhere.
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from specauf_jax.config import Mesh
from specauf_jax.errors import SpecaufError

BATCH = ("replica", "fsdp")

# Logical axes of each parameter, by the module that holds it; stacked layers have one axis more in front.
_PARAMETER_AXES = {
    "embedding": ("tensor", "fsdp"),
    "scale": (None,),
    "bias": ("tensor",),
    "q_proj": ("fsdp", "tensor"),
    "k_proj": ("fsdp", "tensor"),
    "v_proj": ("fsdp", "tensor"),
    "o_proj": ("tensor", "fsdp"),
    "gate_proj": ("fsdp", "tensor"),
    "up_proj": ("fsdp", "tensor"),
    "down_proj": ("tensor", "fsdp"),
    "lm_head": ("fsdp", "tensor"),
    "fc": ("fsdp", None),
    "prefix_gru": ("fsdp", None),
    "up": ("fsdp", "tensor"),
    "embed_proj": ("fsdp", None),
}


def make_mesh(config: Mesh, devices=None) -> jax.sharding.Mesh:
    """A mesh over all devices; an axis of -1 takes what the others leave.

    Raises:
      SpecaufError: the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [config.replica, config.fsdp, config.tensor]
    known = math.prod(n for n in shape if n != -1)
    if shape.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise SpecaufError(
            f"mesh replica={config.replica} fsdp={config.fsdp} tensor={config.tensor} on {len(devices)} devices",
            "axes whose product is the number of devices (at most one of them -1)",
            "change --mesh.replica, --mesh.fsdp or --mesh.tensor",
        )
    axes = ("replica", "fsdp", "tensor")
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), axes, axis_types=(AxisType.Auto,) * 3)


def check_batch(rows: int, parts: int, mesh: jax.sharding.Mesh) -> None:
    """Every part of a batch must spread evenly over the mesh's batch axes."""
    shards = mesh.shape["replica"] * mesh.shape["fsdp"]
    if rows % (parts * shards):
        raise SpecaufError(
            f"batch_size {rows} in {parts} part(s) over {shards} devices",
            f"a multiple of {parts * shards}",
            "change --train.batch-size, --train.accumulation or the mesh",
        )


def parameter_sharding(tree, mesh: jax.sharding.Mesh):
    """NamedSharding of every leaf of parameters, or of an optimiser state that mirrors them.

    An axis that the mesh does not divide stays whole, as do scalars.
    """

    def sharding(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        axes = next((_PARAMETER_AXES[name] for name in reversed(names) if name in _PARAMETER_AXES), ())
        axes = (None,) * (leaf.ndim - len(axes)) + axes if leaf.ndim else ()
        fits = [
            axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def spread_rows(x: jax.Array) -> jax.Array:
    """Rows (the leading axis) over all batch axes of the mesh in use, inside a jitted function; else x as it is.

    Parameters are spread over `fsdp` too, and without this word GSPMD may spread activations as they are, along
    their width, with the rows of all devices on every one of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["replica"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH))


def placed(shapes, sharding):
    """Shapes with their shardings, in place of arrays: what a restore needs to know."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, sharding)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows (the leading axis) over all batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def cache_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Key/value caches `[N, B, S, G, E]`: rows over all batch axes."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """A whole copy everywhere."""
    return NamedSharding(mesh, PartitionSpec())
