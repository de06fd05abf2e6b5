"""The mesh and every PartitionSpec of the system.

Axes of the mesh: `replica` (batch only), `fsdp` (batch and parameters), `tensor` (heads, MLP, vocabulary). The mesh
is that of the arrays (`mesh_of`): no function takes it from a context. GSPMD adds the collectives; kernels whose loops
depend on data run on each device's own part, and the LM head's sums over a spread vocabulary are the only collectives
written out.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from specauf_jax.config import Mesh
from specauf_jax.errors import SpecaufError

AXES = ("replica", "fsdp", "tensor")
BATCH = ("replica", "fsdp")
_SMALL = 2**20  # numbers that every device may hold whole

# Logical axes of each parameter, by the module that holds it; stacked layers have one axis more in front.
_PARAMETER_AXES = {
    "embedding": ("tensor", "fsdp"),
    "scale": (None,),
    "bias": ("tensor",),
    "q_proj": ("fsdp", "tensor"),
    "k_proj": ("fsdp", "tensor"),
    "v_proj": ("fsdp", "tensor"),
    "o_proj": ("tensor", "fsdp"),
    "in_proj_qkv": ("fsdp", "tensor"),  # of linear attention, with the next three
    "in_proj_z": ("fsdp", "tensor"),
    "in_proj_qkvz": ("fsdp", "tensor"),
    "out_proj": ("tensor", "fsdp"),
    "gate_proj": ("fsdp", "tensor"),
    "up_proj": ("fsdp", "tensor"),
    "down_proj": ("tensor", "fsdp"),
    "lm_head": ("fsdp", "tensor"),
    "up": ("fsdp", "tensor"),  # of Domino's head, into the vocabulary
    "markov_w2": ("fsdp", "tensor"),  # of DSpark's, likewise
    "predecessor_codebook": ("tensor", "fsdp"),  # of DFlash2's
    "successor_codebook": ("tensor", "fsdp"),
}
_EXPERTS = (("tensor", "fsdp"), None, None)  # whole ones: gathered as they lie
_OTHER_MATRICES = ("fsdp", None)


def make_mesh(config: Mesh, devices=None) -> jax.sharding.Mesh:
    """A mesh over all devices; an axis of -1 takes what the others leave.

    Neighbours along `tensor`, then `fsdp`, are neighbours in the network; of several TPU slices, `replica` runs
    over them, so that only gradients cross the slower links between slices.

    Raises:
      SpecaufError: the axes' product is not the number of devices, or slices would be cut.
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
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if shape[0] % slices:
        raise SpecaufError(
            f"mesh replica={shape[0]} on {slices} slices", f"a multiple of {slices}", f"set --mesh.replica {slices}"
        )
    if slices > 1:
        inside = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: jax.sharding.Mesh | AbstractMesh) -> int:
    """Parts that rows are spread over."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def check_batch(rows: int, parts: int, mesh: jax.sharding.Mesh) -> None:
    """Every part of a batch must spread evenly over the mesh's batch axes."""
    shards = batch_shards(mesh)
    if rows % (parts * shards):
        raise SpecaufError(
            f"batch_size {rows} in {parts} part(s) over {shards} devices",
            f"a multiple of {parts * shards}",
            "change --train.batch-size, --train.accumulation or the mesh",
        )


def parameter_sharding(tree, mesh: jax.sharding.Mesh):
    """NamedSharding of every leaf of parameters, or of an optimiser state that mirrors them.

    A mesh axis that does not divide its own dimension goes to another one, alone or beside the axis there; what
    no dimension takes stays whole if it is small.

    Raises:
      SpecaufError: something large would stay whole.
    """

    def sharding(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        others = _OTHER_MATRICES if names[-1] == "kernel" else ()
        axes = next((_PARAMETER_AXES[name] for name in reversed(names) if name in _PARAMETER_AXES), others)
        axes = _EXPERTS[: 2 if names[-1].endswith("_bias") else 3] if "experts" in names else axes
        axes = axes if leaf.ndim else ()
        first = leaf.ndim - len(axes)  # behind the axis of stacked layers, which a scan takes apart
        held = [[] for _ in leaf.shape]
        wanted = (
            (at, axis) for at, names in enumerate(axes, first) for axis in (names if type(names) is tuple else [names])
        )
        for at, axis in wanted:
            others = [dim for dim in range(first, leaf.ndim) if dim != at]
            free = [dim for dim in (at, *others) if leaf.shape[dim] % _ways(mesh, [*held[dim], axis]) == 0]
            if axis and free:
                held[free[0]].append(axis)
            elif axis and leaf.size > _SMALL:
                raise _indivisible(names, leaf.shape[first:], axis, mesh)
        return NamedSharding(mesh, PartitionSpec(*(tuple(h) if h[1:] else h[0] if h else None for h in held)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _ways(mesh, axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes if axis)


def _indivisible(names: list[str], shape, axis: str, mesh) -> SpecaufError:
    sizes = [n for n in range(1, mesh.size + 1) if mesh.size % n == 0 and any(size % n == 0 for size in shape)]
    return SpecaufError(
        f"{'.'.join(names)} of {' × '.join(map(str, shape))} over {axis}={mesh.shape[axis]}",
        f"a size of {axis} that divides one of them: {', '.join(map(str, sizes))}",
        f"change --mesh.{axis}",
    )


def mesh_of(x: jax.Array) -> AbstractMesh | None:
    """The mesh that an array is spread over, inside a jitted function too; None for one device and for manual regions.

    Whoever places the arrays says the mesh: nothing here reads a context. What jit alone places (host arrays under
    `in_shardings`) says none, so put arrays on the mesh before the call.

    Raises:
      SpecaufError: a mesh with other axes than those of `make_mesh`, or with explicit ones.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return None
    if mesh.axis_names != AXES or any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise SpecaufError(
            f"arrays on a mesh of axes {mesh.axis_names}, {', '.join(kind.name for kind in mesh.axis_types)}",
            f"a mesh of the axes {AXES}, Auto",
            "make it with specauf_jax.make_mesh, and place parameters and batch on it",
        )
    return mesh


def spread_rows(x: jax.Array) -> jax.Array:
    """Rows (the leading axis) over all batch axes of x's mesh; x as it is without one.

    Parameters are spread over `fsdp` too, and without this word GSPMD may spread activations as they are, along
    their width, with the rows of all devices on every one of them.
    """
    mesh = mesh_of(x)
    if mesh is None or x.shape[0] % batch_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH)))


def per_device(f, mesh: AbstractMesh | None, in_specs, out_specs):
    """`f` as each device of the mesh runs it, on its own parts; `f` itself without a mesh.

    For kernels, and for loops whose length is data: GSPMD would run them on whole arrays everywhere.
    """
    if mesh is None:
        return f
    # Without the check of replication: what every device has whole is computed whole by each.
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def rows_spec(mesh: AbstractMesh | None, rows: int) -> PartitionSpec:
    """For `per_device`: rows (the leading axis) over all batch axes; whole where these do not divide them."""
    return PartitionSpec(BATCH) if _divides(mesh, BATCH, rows) else PartitionSpec(None)


def heads_spec(mesh: AbstractMesh | None, rows: int, groups: int, axis: int) -> PartitionSpec:
    """For `per_device`: rows as in `rows_spec`, and heads, at `axis`, over `tensor` where it divides their groups."""
    heads = "tensor" if _divides(mesh, ("tensor",), groups) else None
    return PartitionSpec(*rows_spec(mesh, rows), *[None] * (axis - 1), heads)


def vocabulary_spec(mesh: AbstractMesh | None, vocabulary: int) -> PartitionSpec:
    """For `per_device`: an LM head `[D, V]`, V over `tensor` where it divides it."""
    return PartitionSpec(None, "tensor" if _divides(mesh, ("tensor",), vocabulary) else None)


def experts_spec(mesh: AbstractMesh | None, experts: int) -> PartitionSpec:
    """For `per_device`: stacked matrices of experts, over `tensor` where it divides their number."""
    return PartitionSpec("tensor" if _divides(mesh, ("tensor",), experts) else None)


def gather_head(lm_head: jax.Array) -> jax.Array:
    """An LM head `[D, V]` spread over `tensor` alone: gathered once, not in every chunk."""
    mesh = mesh_of(lm_head)
    if mesh is None:
        return lm_head
    spec = vocabulary_spec(mesh, lm_head.shape[1])
    return jax.lax.with_sharding_constraint(lm_head, NamedSharding(mesh, spec))


def _divides(mesh: jax.sharding.Mesh | AbstractMesh | None, axes: tuple[str, ...], size: int) -> bool:
    return mesh is not None and size % math.prod(mesh.shape[axis] for axis in axes) == 0


def placed(shapes, sharding):
    """Shapes with their shardings, in place of arrays: what a restore needs to know."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, sharding)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows (the leading axis) over all batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def local_rows(sharding: NamedSharding, count: int) -> np.ndarray:
    """Which of `count` rows this process's devices hold, ascending; processes may hold the same ones."""
    return np.unique(np.concatenate([np.arange(count)[part] for part in _device_rows(sharding, count).values()]))


def put_rows(x: np.ndarray, sharding: NamedSharding, count: int) -> jax.Array:
    """An array of `count` rows over the mesh, of which each process gives its `local_rows`."""
    rows = local_rows(sharding, count)
    parts = []
    for device, part in _device_rows(sharding, count).items():
        start, stop, _ = part.indices(count)
        begin = np.searchsorted(rows, start)
        parts.append(jax.device_put(x[begin : begin + stop - start], device))
    return jax.make_array_from_single_device_arrays((count, *x.shape[1:]), sharding, parts)


def _device_rows(sharding: NamedSharding, count: int) -> dict[jax.Device, slice]:
    """Which of `count` rows each of this process's devices holds."""
    rows = sharding.devices_indices_map((count,))
    return {device: part for device, (part,) in rows.items() if device in sharding.addressable_devices}


def rows_at(shape: tuple[int, ...], axis: int, mesh: jax.sharding.Mesh | AbstractMesh | None) -> PartitionSpec:
    """Of an array of what decodes: rows, at `axis`, over all batch axes; heads of caches `[N, B, G, S, E]` over
    `tensor` where it divides them."""
    heads = ("tensor",) if len(shape) == 5 and axis == 1 and _divides(mesh, ("tensor",), shape[2]) else ()
    return PartitionSpec(*[None] * axis, BATCH, *heads)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """A whole copy everywhere."""
    return NamedSharding(mesh, PartitionSpec())
