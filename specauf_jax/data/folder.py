"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from specauf_jax.errors import SpecaufError


def check_absent(folder) -> None:
    """Refuse a folder that already holds something.

    Raises:
      SpecaufError: it does.
    """
    folder = Path(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if os.path.lexists(folder):
        what = "a prepared dataset" if (folder / "manifest.json").exists() else "files that would be overwritten"
        raise SpecaufError(f"{folder} already holds {what}", "a folder that does not exist yet",
                           "choose another --out, or delete the folder first")  # fmt: skip


@contextlib.contextmanager
def fresh_folder(folder) -> Iterator[Path]:
    """A temporary sibling to write into; it takes the name `folder` when the block ends without an error.

    Raises:
      SpecaufError: `folder` already holds something, or its parent cannot be written.
    """
    # Absolute, because "." has no sibling of its own name.
    folder = Path(os.path.abspath(folder))
    check_absent(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise SpecaufError(f"{folder.parent} cannot be written ({error.strerror})", "a writable folder",
                           "choose another --out") from error  # fmt: skip
    try:
        yield partial
        check_absent(folder)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
