"""Safetensors files ↔ parameter trees, checked before a byte is read and streamed in pieces.

One rule of names serves every model: our tree's path is the tensor's name, `kernel` (transposed),
`scale` and `embedding` are called `weight` in files, and the leading axis of stacked layers becomes
the number after `layers.`, that of stacked experts the one after `experts.`. The heads' own exceptions stand in their
files.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from specauf_jax.distributed import to_host
from specauf_jax.errors import SpecaufError
from specauf_jax.files import read_json
from specauf_jax.models.heads import head_types
from specauf_jax.models.stored import OfExpert, Stored, stored

PIECE_BYTES = 64 * 2**20  # read, turned and put on devices at one time
_RENAMED = {ours: theirs for head in head_types().values() for ours, theirs in head.tensors.items()}

Progress = Callable[[int, int], None]
"""Called with how many numbers were read so far, and how many there are for this process."""


def file_names(path, shape) -> list[str]:
    """Names of the tensors behind one leaf of our tree: one, or one per stacked layer, and expert of it."""
    *parts, last = [p.key for p in path]
    parts.append("weight" if last in ("kernel", "scale", "embedding") else last)
    stacks = _stacks(path)
    if not stacks:
        name = ".".join(parts)
        return [_RENAMED.get(name, name)]
    names = []
    for numbers in np.ndindex(*shape[: len(stacks)]):
        after = dict(zip(stacks, numbers, strict=True))
        names.append(".".join(f"{part}.{after[part]}" if part in after else part for part in parts))
    return names


def file_shapes(shapes: dict) -> dict[str, tuple]:
    """Name → shape in files, [out, in], of every tensor behind our tree."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        shape = leaf.shape[len(_stacks(path)) :]
        for name in file_names(path, leaf.shape):
            found[name] = shape[::-1] if _is_transposed(path) else shape
    return found


def flatten(params: dict, dtype) -> dict[str, np.ndarray]:
    """Our tree → tensors by name, in PyTorch's orientation [out, in]; all processes call it together.

    Parameters that are spread over several hosts come layer by layer, so that no device ever holds a whole stack.
    """
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        stacks = len(_stacks(path))
        slices: Iterable = map(to_host, (leaf[i] for i in range(len(leaf))) if stacks else [leaf])
        if stacks > 1:
            slices = itertools.chain.from_iterable(x.reshape(-1, *x.shape[stacks - 1 :]) for x in slices)
        for name, x in zip(file_names(path, leaf.shape), slices, strict=True):
            tensors[name] = np.ascontiguousarray(x.T if _is_transposed(path) else x).astype(dtype)
    return tensors


def write_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """One safetensors file, as readable as the umask lets it be: safetensors would keep it from all others."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:  # how safetensors tells of a full disk
        raise OSError(str(error)) from error


def read_tree(
    folder,
    shapes: dict,
    prefixed,
    dtype,
    *,
    shardings=None,
    progress: Progress | None = None,
    ignored: Collection[str] = (),
) -> dict:
    """Fill the tree `shapes` from the folder's tensors, after checking every name, shape and dtype.

    Each device's part is read from the memory-mapped file in pieces, so that the host holds a few
    pieces and no more, whatever the size of the checkpoint.

    Args:
      folder: with model.safetensors, or model.safetensors.index.json and its shards.
      shapes: our tree, of anything with a shape.
      prefixed: our name → name in the file.
      dtype: of the parameters.
      shardings: tree of shardings; None puts all on the first device.
      progress: told of every piece.
      ignored: names that may be in the files besides.

    Raises:
      SpecaufError: naming the file or tensor that does not fit.
    """
    wanted = {prefixed(name): shape for name, shape in file_shapes(shapes).items()}
    files = tensor_files(folder)
    places = {name: stored(name, shape, files) for name, shape in wanted.items()}
    _check_tensors(folder, files, places, ignored)
    if shardings is None:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), shapes)
    sizes = jax.tree.map(lambda leaf, sharding: sum(map(_size, _parts(leaf, sharding))), shapes, shardings)
    total = sum(jax.tree.leaves(sizes))
    read = 0

    def advance(piece: np.ndarray):
        nonlocal read
        read += piece.size
        if progress:
            progress(read, total)

    def fill(path, leaf, sharding):
        names = [prefixed(name) for name in file_names(path, leaf.shape)]
        stacks = leaf.shape[: len(_stacks(path))]
        held = _Leaf([places[name] for name in names], files, stacks, _is_transposed(path), np.dtype(dtype))
        arrays = [
            array
            for bounds, devices in _parts(leaf, sharding).items()
            for array in held.place(bounds, devices, advance)
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)

    return jax.tree_util.tree_map_with_path(fill, shapes, shardings)


def _parts(leaf, sharding) -> dict[tuple, list]:
    """Box `((start, stop), …)` of a leaf → the devices of this process that hold it."""
    parts: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        parts.setdefault(bounds, []).append(device)
    return parts


def _size(bounds) -> int:
    return math.prod(stop - start for start, stop in bounds)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One leaf of our tree, as it lies in the files."""

    places: list[Stored]
    files: dict[str, Path]
    stacks: tuple[int, ...]  # sizes of the leading axes, along which every tensor is one of the places
    transposed: bool
    dtype: np.dtype

    def place(self, bounds, devices, advance) -> list[jax.Array]:
        """The box `bounds` on each of `devices`, read once."""
        pieces = list(self._pieces(bounds))
        if len(pieces) == 1:
            host = self._read(pieces[0])
            advance(host)
            return [jax.device_put(host, device) for device in devices]
        shape = tuple(stop - start for start, stop in bounds)
        buffers = [jnp.zeros(shape, self.dtype, device=device) for device in devices]
        for piece in pieces:
            host = self._read(piece)
            offset = tuple(np.int32(start - first) for (start, _), (first, _) in zip(piece, bounds, strict=True))
            buffers = [_write_piece(buffer, host, offset) for buffer in buffers]
            jax.block_until_ready(buffers)  # or pieces would queue up on the host
            advance(host)
        return buffers

    def _pieces(self, bounds):
        """Boxes of at most PIECE_BYTES that make up the box `bounds`: whole layers, or parts of one."""
        item = max(self.dtype.itemsize, 4)
        size = item * _size(bounds)
        cuts = [1] * len(bounds)
        for axis, (start, stop) in enumerate(bounds[: len(self.stacks)]):
            cuts[axis] = min(stop - start, -(-size // PIECE_BYTES))
            size = -(-(stop - start) // cuts[axis]) * size // max(stop - start, 1)
        # Along the axis that is the file's first: its rows lie together.
        rows = len(bounds) - 1 if self.transposed else len(self.stacks)
        if rows < len(bounds) and size > PIECE_BYTES:
            cuts[rows] = min(bounds[rows][1] - bounds[rows][0], -(-size // PIECE_BYTES))
        return itertools.product(*(_cut(*bound, count) for bound, count in zip(bounds, cuts, strict=True)))

    def _read(self, box) -> np.ndarray:
        """The box as a host array, in our orientation and dtype."""
        stacks, inner = box[: len(self.stacks)], box[len(self.stacks) :]
        host = np.empty([stop - start for start, stop in box], self.dtype)
        order = inner[::-1] if self.transposed else inner
        # Opened anew for every piece: closing unmaps the pages that were read.
        with contextlib.ExitStack() as stack:
            opened = functools.cache(lambda file: stack.enter_context(safe_open(file, framework="numpy")))

            def slices(name: str, box) -> np.ndarray:
                return opened(self.files[name]).get_slice(name)[box]

            for place in np.ndindex(*host.shape[: len(stacks)]):
                numbers = [start + i for (start, _), i in zip(stacks, place, strict=True)]
                source = self.places[np.ravel_multi_index(numbers, self.stacks) if stacks else 0]
                x = source.read(slices, tuple(slice(*bound) for bound in order))
                host[place] = x.T if self.transposed else x
        return host


_write_piece = jax.jit(lax.dynamic_update_slice, donate_argnums=0)


def _cut(start: int, stop: int, count: int):
    edges = np.linspace(start, stop, count + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))


# ---------------------------------------------------------------------------------------------
# Which files, and whether they fit


def tensor_files(folder) -> dict[str, Path]:
    """Tensor name → the file that holds it, by what the files themselves say.

    Raises:
      SpecaufError: no weights, a shard missing or unreadable, or an index that is not true of its shards.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return dict.fromkeys(_names(single), single)
    if not index.exists():
        raise SpecaufError(f"{folder} has no weights", f"{single.name} or {index.name}", "check the folder's name")
    weight_map = read_json(index, "an index of shards").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SpecaufError(f"{index} has no weight_map", "tensor names and their files", "restore the file")
    files, shards = {}, sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise SpecaufError(f"{index} names {shard!r}", "safetensors files in the same folder", "restore the file")
        if not (folder / shard).is_file():
            raise SpecaufError(
                f"{folder / shard} does not exist", "every shard that the index names", "restore the file"
            )
    for shard in shards:
        for name in _names(folder / shard):
            if weight_map.get(name) != shard:
                said = weight_map.get(name)
                raise SpecaufError(
                    f"{index} places {name} in {said}, but {shard} holds it too" if said else
                    f"{folder / shard} holds {name}, which {index.name} does not name",
                    "an index that agrees with its shards",
                    "restore the files",
                )  # fmt: skip
            files[name] = folder / shard
    lost = sorted(weight_map.keys() - files.keys())
    if lost:
        raise SpecaufError(
            f"{folder / weight_map[lost[0]]} does not hold {lost[0]}", f"what {index.name} says", "restore the files"
        )
    return files


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _opened(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise SpecaufError(f"{path} cannot be read: {error}", "a whole safetensors file", "restore the file") from error


def _check_tensors(folder, files: dict[str, Path], places: dict[str, Stored], ignored: Collection[str]) -> None:
    experts = 1 + max((place.number for place in places.values() if isinstance(place, OfExpert)), default=0)
    wanted: dict[str, tuple] = {}
    for place in places.values():
        wanted |= place.needs(experts)
    missing, extra = sorted(wanted.keys() - files.keys()), sorted(files.keys() - wanted.keys() - set(ignored))
    if missing or extra:
        found = "; ".join(
            f"{len(names)} {kind}, first {names[0]}"
            for kind, names in (("missing", missing), ("unknown", extra))
            if names
        )
        raise SpecaufError(
            f"{folder}: tensors do not fit config.json: {found}",
            f"exactly {len(wanted)} tensors",
            "use the config.json that belongs to these weights",
        )
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            for name in sorted(wanted.keys() & set(file.keys())):
                part = file.get_slice(name)
                _check_tensor(path, name, tuple(part.get_shape()), part.get_dtype(), *wanted[name])


def _check_tensor(path: Path, name: str, shape: tuple, dtype: str, wanted: tuple, dtypes: tuple[str, ...]) -> None:
    if shape != wanted:
        raise SpecaufError(
            f"{path}: {name} has shape {shape}",
            f"{wanted} by config.json",
            "use the config.json that belongs to these weights",
        )
    if dtype not in dtypes:
        raise SpecaufError(
            f"{path}: {name} is stored as {dtype}", f"one of {', '.join(dtypes)}", "use an unquantised checkpoint"
        )


def _stacks(path) -> list[str]:
    """Parts of a leaf's path behind which files have a number: a leading axis each."""
    keys = [part.key for part in path]
    if keys[0] != "layers":
        return []
    apart = keys[-1] == "kernel"  # experts are, in files, but gpt-oss's
    return [key for i, key in enumerate(keys) if i == 0 or (i == 1 and key == "linear") or (apart and key == "experts")]


def _is_transposed(path) -> bool:
    return path[-1].key == "kernel"
