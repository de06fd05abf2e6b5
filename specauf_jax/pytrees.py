"""Dataclasses that JAX transforms take as pytrees, typed for checkers."""

from typing import TypeVar, dataclass_transform

import chex

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass of arrays; fields by keyword. Change one with `dataclasses.replace`."""
    return chex.dataclass(frozen=True)(cls)
