"""The one layer under every path of a user: local files, and gs:// objects of Google Cloud Storage.

Nothing already written is ever damaged: files are written beside, then renamed. Objects appear whole by themselves, but
know neither folders, nor renaming, nor appending: `local_copy`, `storage.upload` and `GrowingFolder` say what is done.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

from specauf_jax import storage
from specauf_jax.errors import SpecaufError, io_error

AnyPath: TypeAlias = "Path | epath.Path"
_READINGS = 5  # of objects that change under the reading


def is_remote(path) -> bool:
    """Whether it is a gs:// path."""
    return str(path).startswith("gs://")


def as_path(path) -> AnyPath:
    """A path that a user gave, with pathlib's methods whatever it names.

    Raises:
      SpecaufError: empty, another scheme than gs://, no gcsfs, or a bucket that is not there or not open to this
        account.
    """
    text = str(path)
    if not text.strip():
        raise SpecaufError("an empty path", "the name of a file or folder", "look for an unset variable")
    if is_remote(text):
        storage.check_bucket(text.removeprefix("gs://").partition("/")[0])
        return epath.Path(text)
    if "://" in text:
        raise SpecaufError(f"{text}", "a local path, or gs://bucket/…", "copy it to one of them")
    return Path(text)


def absolute(path) -> AnyPath:
    """The same without ".", ".." and links, so that it has a name and siblings."""
    return as_path(path) if is_remote(path) else Path(os.path.realpath(path))


def existing_folder(folder, what: str) -> AnyPath:
    """`folder` as a path; the error says that it should hold `what`."""
    folder = as_path(folder)
    _put_back(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise SpecaufError(f"{folder} {found}", f"a folder with {what}", "check the path")
    return folder


# ---------------------------------------------------------------------------------------------
# Reading


def read_bytes(path) -> bytes:
    """A file or object whole.

    Raises:
      OSError: it cannot be read; FileNotFoundError if it does not exist.
    """
    path = as_path(path)
    if not is_remote(path):
        return path.read_bytes()
    with storage.storage_errors():
        return storage.storage().cat_file(str(path))


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it is none, or more than Python reads.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except (RecursionError, ValueError) as error:
        deep = isinstance(error, RecursionError)
        raise ValueError("nested too deep" if deep else "with a number of too many digits") from error


def read_json(path, what: str) -> dict:
    """A JSON object from a file; the error says that it should hold `what`."""
    path = as_path(path)
    try:
        values = parse_json(read_bytes(path))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise SpecaufError(f"{path} does not exist", f"a file with {what}", "check the path") from error
    except OSError as error:
        found = f"{path} cannot be read: {error.strerror or error}"
        raise io_error(found, error, f"a file with {what}", "check the file") from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise SpecaufError(f"{path} is not JSON: {error}", f"a file with {what}", "restore the file") from error
    if not isinstance(values, dict):
        raise SpecaufError(f"{path} holds a {type(values).__name__}", f"an object with {what}", "restore the file")
    return values


def local_copy(path) -> Path:
    """`path` itself; of gs://, a copy of the object or folder in $XDG_CACHE_HOME/specauf, for readers that need files.

    Each host fetches for itself, once for each state of the objects: a change is fetched anew. A copy is there whole
    or not at all; processes that want the same one wait for the first.

    Raises:
      SpecaufError: there is nothing at gs://….
    """
    path = as_path(path)
    if not is_remote(path):
        return _put_back(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specauf"
    for _ in range(_READINGS):
        found = storage.generations(path)
        state = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
        if storage.fetch(path, found, cache / state):
            return cache / state / str(path).removeprefix("gs://")
    raise SpecaufError(f"{path} changed while it was read, {_READINGS} times", "objects that stay as they are",
                       "wait until they are written")  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Writing


def write_text(path, text: str) -> None:
    """As `write_bytes`, in UTF-8; a path's bytes that are none become question marks."""
    write_bytes(path, text.encode(errors="replace"))


def write_bytes(path, data: bytes) -> None:
    """Write beside, then rename: `path` holds the old content or the new one, never a part."""
    path = as_path(path)
    try:
        if is_remote(path):
            with storage.storage_errors():
                storage.storage().pipe_file(str(path), data)
        else:
            _write_beside(path, data)
    except OSError as error:
        raise _unwritable(path, error) from error


def _write_beside(path: Path, data: bytes) -> None:
    path = Path(os.path.realpath(path))  # a link stays
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never made
            beside.unlink()


def _unwritable(path: AnyPath, error: OSError) -> SpecaufError:
    return io_error(
        f"{path} cannot be written: {error.strerror or error}", error, "a writable path and free space",
        "free space or choose another path",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Before the work: whether its result can be written, and what it would overwrite


def output_file(path, *inputs) -> AnyPath:
    """The path of a file that a command will write when its work is done.

    Args:
      path: a user's.
      inputs: what the command reads; None where it reads nothing.

    Raises:
      SpecaufError: it names a folder, a device, or what the command reads; or it cannot be written there.
    """
    path = as_path(path)
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or pipe"
        raise SpecaufError(f"{path} is {what}", "a file to write", "choose another --out")
    check_apart(path, *inputs)
    check_writable(path)
    return path


def check_apart(path, *inputs) -> None:
    """Refuse to write over what a command reads, or into it."""
    for read in (each for each in inputs if each is not None):
        if absolute(read) in (absolute(path), *absolute(path).parents):
            raise SpecaufError(f"{path} would be written over {read}, which the command reads",
                               "another place for what it writes", "choose another --out")  # fmt: skip


def check_writable(path, room: int = 0) -> None:
    """Refuse a local path that cannot be made, or whose disk has less than `room` bytes free."""
    if is_remote(path):
        return
    path = absolute(path)
    there = path if path.exists() else next(parent for parent in path.parents if parent.exists() or parent.is_symlink())
    if there != path and not there.is_dir():
        raise SpecaufError(f"{there} is no folder", f"a folder for {path.name}", "choose another --out")
    if not os.access(there, os.W_OK):
        raise SpecaufError(f"{there} cannot be written", "a path that this user may write", "choose another --out")
    free = shutil.disk_usage(there).free
    if free < room:
        raise SpecaufError(f"{free / 2**20:,.1f} MiB free in {there}", f"{room / 2**20:,.1f} MiB for what is saved",
                           "free space, or choose another --out")  # fmt: skip


@contextlib.contextmanager
def sole_user(folder) -> Iterator[None]:
    """This process alone works in a local folder until the end; a killed one leaves no lock behind.

    The folder is made if needed, and deleted at the end if nothing was put there.

    Raises:
      SpecaufError: another one does.
    """
    if is_remote(folder):
        yield
        return
    folder = absolute(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SpecaufError(f"another job is at work in {folder}", "a folder for each job",
                                   "wait until it has ended, or choose another --out") from error  # fmt: skip
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # the first that is not empty
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def replace_folder(folder) -> Iterator[Path]:
    """A new, empty local folder; it takes `folder`'s place when the block ends without an error."""
    folder = absolute(folder)  # "." has no sibling of its own name
    _put_back(folder)
    with _built(folder) as new:
        yield new
        if is_remote(folder):
            storage.upload(new, folder)
        else:
            _swap(new, folder)


@contextlib.contextmanager
def fresh_folder(folder) -> Iterator[Path]:
    """A new, empty local folder to write into; it becomes `folder` when the block ends without an error.

    Raises:
      SpecaufError: `folder` already holds something, or its parent cannot be written.
    """
    folder = absolute(folder)  # "." has no sibling of its own name
    check_absent(folder)
    with _built(folder) as new:
        yield new
        check_absent(folder)
        if is_remote(folder):
            storage.upload(new, folder)
        else:
            new.replace(folder)


def check_absent(folder) -> None:
    """Refuse a folder that already holds something.

    Raises:
      SpecaufError: it does.
    """
    folder = as_path(folder)
    check_writable(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or os.path.lexists(folder):
        what = "a prepared dataset" if (folder / "manifest.json").exists() else "files that would be overwritten"
        raise SpecaufError(f"{folder} already holds {what}", "a folder that does not exist yet",
                           "choose another --out, or delete the folder first")  # fmt: skip


def move_folder(folder: AnyPath, to: AnyPath) -> None:
    """Rename it; the place is free."""
    if is_remote(folder):
        storage.move(folder, to)
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(to)


def remove_folder(folder: AnyPath) -> None:
    """Delete it and all in it; it may be absent at gs://."""
    if is_remote(folder):
        storage.remove(folder)
    else:
        shutil.rmtree(folder)


class GrowingFolder:
    """For files that grow, in `path`: the folder itself, or, as objects cannot grow, a local one that `push` copies.

    What grew since the last push is copied whole, and lost if the process is killed before the next one.
    """

    def __init__(self, folder) -> None:
        self._to = self.path = as_path(folder)
        self._pushed: dict[Path, tuple[int, int]] = {}  # size and time
        if is_remote(folder):
            self.path = _scratch()

    def push(self) -> None:
        """Copy to gs:// what has changed; nothing to do for a local folder."""
        if not is_remote(self._to):
            return
        for file in (file for file in self.path.rglob("*") if file.is_file()):
            stamp = file.stat().st_size, file.stat().st_mtime_ns
            if self._pushed.get(file) != stamp:
                write_bytes(self._to / str(file.relative_to(self.path)), file.read_bytes())
                self._pushed[file] = stamp

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if is_remote(self._to):
            self.push()
            shutil.rmtree(self.path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------
# One folder in another's place


@contextlib.contextmanager
def _built(folder: AnyPath) -> Iterator[Path]:
    """A new local folder, beside where that can be; gone at the end unless it was renamed."""
    new = _scratch() if is_remote(folder) else folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        if not is_remote(folder):
            new.mkdir(parents=True)
        yield new
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="specauf-"))


def _swap(new: Path, folder: Path) -> None:
    """Two renames; a kill between them leaves `folder` under the hidden name from which `_put_back` restores it."""
    try:
        if folder.exists():
            folder.replace(folder.with_name(f".{folder.name}.{os.getpid()}.old"))
        new.replace(folder)
    finally:
        _put_back(folder)
        for old in _hidden(folder):
            shutil.rmtree(old, ignore_errors=True)


def _put_back(folder: AnyPath) -> AnyPath:
    """Undo a replacement that was killed between its two renames; every reader and writer does so first."""
    if not is_remote(folder) and not folder.exists():
        real = Path(os.path.realpath(folder))
        for old in _hidden(real)[-1:]:
            with contextlib.suppress(OSError):  # another process was quicker, or may write here
                old.rename(real)
    return folder


def _hidden(folder: Path) -> list[Path]:
    """What `folder` was before replacements that did not end, oldest first."""
    return sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*.old"), key=lambda path: path.stat().st_mtime)
