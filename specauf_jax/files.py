"""The one layer under every path of a user: local files, and gs:// objects of Google Cloud Storage.

Nothing already written is ever damaged: files are written beside, then renamed. Objects appear whole by themselves, but
know neither folders, nor renaming, nor appending: `_upload`, `local_copy` and `GrowingFolder` say what is done instead.
"""

import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from specauf_jax.errors import SpecaufError

AnyPath = Path | epath.Path
_READ_FIRST = ("config.json", "manifest.json")  # what a reader of a folder looks for first, hence written last


def is_remote(path) -> bool:
    """Whether it is a gs:// path."""
    return str(path).startswith("gs://")


def as_path(path) -> AnyPath:
    """A path that a user gave, with pathlib's methods whatever it names.

    Raises:
      SpecaufError: another scheme than gs://, no gcsfs, or a bucket that is not there or not open to this account.
    """
    text = str(path)
    if is_remote(text):
        _check_bucket(text.removeprefix("gs://").partition("/")[0])
        return epath.Path(text)
    if "://" in text:
        raise SpecaufError(f"{text}", "a local path, or gs://bucket/…", "copy it to one of them")
    return Path(text)


def absolute(path) -> AnyPath:
    """The same without "." and "..", so that it has a name and siblings."""
    return as_path(path) if is_remote(path) else Path(os.path.abspath(path))


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
    with _storage_errors():
        return _storage().cat_file(str(path))


def read_json(path, what: str) -> dict:
    """A JSON object from a file; the error says that it should hold `what`."""
    path = as_path(path)
    try:
        values = json.loads(read_bytes(path))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise SpecaufError(f"{path} does not exist", f"a file with {what}", "check the path") from error
    except OSError as error:
        raise SpecaufError(
            f"{path} cannot be read: {error.strerror or error}", f"a file with {what}", "check the file"
        ) from error
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
    while True:
        found = _generations(path)
        state = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
        try:
            _fetch(found, cache, state)
        except FileNotFoundError:  # deleted since: look again
            continue
        if _generations(path) == found:  # else it changed under the reading
            return cache / state / str(path).removeprefix("gs://")
        shutil.rmtree(cache / state)


def _fetch(objects: dict[str, str], cache: Path, state: str) -> None:
    """Copy objects to cache/state, if that is not there."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{state}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process, however it ends
        part, names = cache / f".{state}.part", sorted(objects)
        if (cache / state).is_dir():
            return
        shutil.rmtree(part, ignore_errors=True)  # of one that was killed
        with _storage_errors():
            _storage().get(names, [str(part / name) for name in names])
        part.rename(cache / state)


def _generations(path) -> dict[str, str]:
    """Name with bucket → generation, which changes at every write, of an object or of all in a folder."""
    with _storage_errors():
        found = _storage().find(str(path), detail=True)
    found = {name: facts["generation"] for name, facts in found.items() if not name.endswith("/")}
    if not found:
        raise SpecaufError(f"{path} does not exist", "an object, or a folder of objects", "check the path")
    return found


# ---------------------------------------------------------------------------------------------
# Writing


def write_text(path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path, data: bytes) -> None:
    """Write beside, then rename: `path` holds the old content or the new one, never a part."""
    path = as_path(path)
    try:
        if is_remote(path):
            with _storage_errors():
                _storage().pipe_file(str(path), data)
        else:
            _write_beside(path, data)
    except OSError as error:
        raise _unwritable(path, error) from error


def _write_beside(path: Path, data: bytes) -> None:
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
    return SpecaufError(
        f"{path} cannot be written: {error.strerror or error}",
        "a writable path and free space",
        "free space or choose another path",
    )


@contextlib.contextmanager
def replace_folder(folder) -> Iterator[Path]:
    """A new, empty local folder; it takes `folder`'s place when the block ends without an error."""
    folder = absolute(folder)  # "." has no sibling of its own name
    _put_back(folder)
    with _built(folder) as new:
        yield new
        if is_remote(folder):
            _upload(new, folder)
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
            _upload(new, folder)
        else:
            new.replace(folder)


def check_absent(folder) -> None:
    """Refuse a folder that already holds something.

    Raises:
      SpecaufError: it does.
    """
    folder = as_path(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or os.path.lexists(folder):
        what = "a prepared dataset" if (folder / "manifest.json").exists() else "files that would be overwritten"
        raise SpecaufError(f"{folder} already holds {what}", "a folder that does not exist yet",
                           "choose another --out, or delete the folder first")  # fmt: skip


def move_folder(folder: AnyPath, to: AnyPath) -> None:
    """Rename; at gs:// copy all, then delete all, so that a kill loses nothing."""
    if is_remote(folder):
        with _storage_errors():
            names = _storage().find(str(folder))
            begin = len(folder.as_posix().removeprefix("gs://"))
            _storage().copy(names, [f"{to}{name[begin:]}" for name in names])
            _storage().rm(names)
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(to)


def remove_folder(folder: AnyPath) -> None:
    """Delete it and all in it; it may be absent at gs://."""
    if is_remote(folder):
        with _storage_errors(), contextlib.suppress(FileNotFoundError):
            _storage().rm(str(folder), recursive=True)
    else:
        shutil.rmtree(folder)


class GrowingFolder:
    """For files that grow, in `path`: the folder itself, or, as objects cannot grow, a local one that `push` copies.

    What grew since the last push is copied whole, and lost if the process is killed before the next one.
    """

    def __init__(self, folder):
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
        for old in _hidden(folder)[-1:]:
            with contextlib.suppress(OSError):  # another process was quicker, or may write here
                old.rename(folder)
    return folder


def _hidden(folder: Path) -> list[Path]:
    """What `folder` was before replacements that did not end, oldest first."""
    return sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*.old"), key=lambda path: path.stat().st_mtime)


def _upload(new: Path, folder: AnyPath) -> None:
    """Put a local folder's files in the place of gs://….

    All go to `.NAME.part/` beside first, which takes the time that it takes: a kill leaves the old folder as it was.
    Then the store itself copies them over, one by one, what readers look for first last, and what the old folder
    had more is deleted. A kill in this short part leaves files of both; the same command, run again, puts it right,
    and deletes what a kill left beside.
    """
    names = [str(path.relative_to(new)) for path in sorted(new.rglob("*")) if path.is_file()]
    names.sort(key=lambda name: name in _READ_FIRST)
    part, storage = folder.with_name(f".{folder.name}.part"), _storage()
    with _storage_errors():
        storage.put([str(new / name) for name in names], [f"{part}/{name}" for name in names])
        surplus = set(storage.find(str(folder))) - {storage._strip_protocol(f"{folder}/{name}") for name in names}
        for name in names:
            storage.cp_file(f"{part}/{name}", f"{folder}/{name}")
        if surplus:
            storage.rm(sorted(surplus))
    remove_folder(part)


# ---------------------------------------------------------------------------------------------
# Google Cloud Storage


@functools.cache
def _storage():
    """gcsfs's file system. Its cache of listings is off, also for epath: it would hide what other hosts write."""
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise SpecaufError(
            f"a gs:// path, but {error.name} is not installed", "gcsfs", "pip install 'specauf-jax[gcs]'"
        ) from error
    os.environ["EPATH_USE_TF"] = "false"  # else epath takes TensorFlow's file system wherever that is installed
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


@functools.cache
def _check_bucket(bucket: str) -> None:
    try:
        with _storage_errors():
            _storage().ls(f"gs://{bucket}", detail=False, max_results=1)
    except OSError as error:
        absent = isinstance(error, FileNotFoundError) or not bucket
        raise SpecaufError(
            f"gs://{bucket} {'does not exist' if absent else f'cannot be listed: {error}'}",
            "a bucket that this account may read and write",
            "check its name; `gcloud auth application-default login` says who you are",
        ) from error


@contextlib.contextmanager
def _storage_errors():
    """gcsfs, aiohttp and google.auth have kinds of errors of their own; here they become OSError."""
    try:
        yield
    except (OSError, SpecaufError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
