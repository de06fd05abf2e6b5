"""How a tensor lies in a folder's files: by itself, as a part of one that holds all experts, or as MXFP4.

Its reader asks for a tensor by its usual name and for a box of it; what is read for that stands here.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from specauf_jax.errors import SpecaufError

_FLOATS = ("F32", "F16", "BF16")
_OF_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.weight")
_BLOCK = 32  # numbers that share a scale
_MXFP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_MXFP4 = np.concatenate([_MXFP4, -_MXFP4])

Box = tuple[slice, ...]
Slices = Callable[[str, Box], np.ndarray]
"""(name in the files, box of it) → its numbers."""


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in the files under its own name."""

    name: str
    shape: tuple[int, ...]

    def needs(self, experts: int) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Names in the files → their shapes, and the types that they may have; `experts`: X, of all parts together."""
        return {self.name: (self.shape, _FLOATS)}

    def read(self, slices: Slices, box: Box) -> np.ndarray:
        return slices(self.name, box)


@dataclass(frozen=True)
class OfExpert(Stored):
    """A matrix `[out, in]` of one expert, in gate_up_proj `[X, 2F, D]` or down_proj `[X, D, F]` of all."""

    whole: str
    number: int
    part: int
    """0, or 1 for what lies behind the first half."""
    parts: int

    def needs(self, experts: int):
        rows, columns = self.shape
        return {self.whole: ((experts, self.parts * rows, columns), _FLOATS)}

    def read(self, slices: Slices, box: Box) -> np.ndarray:
        first = self.part * self.shape[0]
        rows = slice(first + box[0].start, first + box[0].stop)
        return slices(self.whole, (slice(self.number, self.number + 1), rows, box[1]))[0]


@dataclass(frozen=True)
class MXFP4(Stored):
    """Experts' matrices `[X, in, out]` (OCP Microscaling formats 1.0): by output, 16 bytes of two 4-bit numbers each,
    the lower half of a byte first, and an exponent for every 32."""

    def needs(self, experts: int):
        X, inputs, outputs = self.shape
        size = (X, outputs, inputs // _BLOCK)
        return {f"{self.name}_blocks": ((*size, _BLOCK // 2), ("U8",)), f"{self.name}_scales": (size, ("U8",))}

    def read(self, slices: Slices, box: Box) -> np.ndarray:
        experts, inputs, outputs = box
        own = slice(inputs.start // _BLOCK, -(-inputs.stop // _BLOCK))
        bytes_ = slices(f"{self.name}_blocks", (experts, outputs, own, slice(None)))
        numbers = np.stack([_MXFP4[bytes_ & 15], _MXFP4[bytes_ >> 4]], axis=-1).reshape(*bytes_.shape[:-1], _BLOCK)
        exponents = slices(f"{self.name}_scales", (experts, outputs, own)).astype(np.int32) - 127
        whole = np.ldexp(numbers, exponents[..., None]).reshape(*numbers.shape[:2], -1)
        first = own.start * _BLOCK
        found = whole[..., inputs.start - first : inputs.stop - first].swapaxes(1, 2)
        return found.astype(ml_dtypes.bfloat16).astype(np.float32)  # as all readers have it: 4-bit numbers fit


def stored(name: str, shape: tuple[int, ...], files: Collection[str]) -> Stored:
    """Where a tensor of this name and shape, [out, in], lies in files that hold the tensors `files`."""
    if name not in files and f"{name}_blocks" in files and len(shape) == 3:
        if shape[1] % _BLOCK:
            raise SpecaufError(f"{name} of {shape[1]} inputs in MXFP4", f"whole blocks of {_BLOCK}",
                               "use another checkpoint")  # fmt: skip
        return MXFP4(name, shape)
    if found := _OF_EXPERT.fullmatch(name):
        both = found["part"] != "down"
        whole = f"{found['experts']}.{'gate_up' if both else 'down'}_proj"
        if whole in files:
            return OfExpert(name, shape, whole, int(found["number"]), int(found["part"] == "up"), 1 + both)
    return Stored(name, shape)
