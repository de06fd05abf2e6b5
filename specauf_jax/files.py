"""Reading and replacing files so that nothing already written is ever damaged."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from specauf_jax.errors import SpecaufError


def existing_folder(folder, what: str) -> Path:
    """`folder` as a path; the error says that it should hold `what`."""
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise SpecaufError(f"{folder} {found}", f"a folder with {what}", "check the path")
    return folder


def read_json(path, what: str) -> dict:
    """A JSON object from a file; the error says that it should hold `what`."""
    path = Path(path)
    if not path.is_file():
        raise SpecaufError(f"{path} does not exist", f"a file with {what}", "check the path")
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise SpecaufError(
            f"{path} cannot be read: {error.strerror}", f"a file with {what}", "check the file"
        ) from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise SpecaufError(f"{path} is not JSON: {error}", f"a file with {what}", "restore the file") from error
    if not isinstance(values, dict):
        raise SpecaufError(f"{path} holds a {type(values).__name__}", f"an object with {what}", "restore the file")
    return values


def write_text(path, text: str) -> None:
    """Write beside, then rename: `path` holds the old text or the new one, never a part."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never made
            beside.unlink()


def _unwritable(path: Path, error: OSError) -> SpecaufError:
    return SpecaufError(
        f"{path} cannot be written: {error.strerror or error}",
        "a writable path and free space",
        "free space or choose another path",
    )


@contextlib.contextmanager
def replace_folder(folder) -> Iterator[Path]:
    """A new, empty folder beside; it takes `folder`'s place when the block ends without an error."""
    folder = Path(os.path.abspath(folder))  # "." has no sibling of its own name
    beside, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    try:
        beside.mkdir(parents=True)
        yield beside
        if folder.exists():
            folder.replace(old)
        beside.replace(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        if old.exists() and not folder.exists():
            old.replace(folder)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
    folder = Path(os.path.abspath(folder))  # "." has no sibling of its own name
    check_absent(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        partial.mkdir(parents=True)
        yield partial
        check_absent(folder)
        partial.replace(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
