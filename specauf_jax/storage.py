"""Google Cloud Storage through gcsfs: what files.py does to folders and objects of gs:// paths."""

import contextlib
import fcntl
import functools
import os
import shutil
from pathlib import Path

from etils import epath

from specauf_jax.errors import SpecaufError

_READ_FIRST = ("config.json", "manifest.json")  # what a reader of a folder looks for first, hence written last


@functools.cache
def storage():
    """gcsfs's file system. Its cache of listings is off, also for epath: it would hide what other hosts write."""
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise SpecaufError(
            f"a gs:// path, but {error.name} is not installed", "gcsfs", "pip install -e '.[gcs]'"
        ) from error
    os.environ["EPATH_USE_TF"] = "false"  # else epath takes TensorFlow's file system wherever that is installed
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


@functools.cache
def check_bucket(bucket: str) -> None:
    """Refuse a bucket that is not there, or not open to this account; asked once in a process."""
    try:
        with storage_errors():
            storage().ls(f"gs://{bucket}", detail=False, max_results=1)
    except OSError as error:
        absent = isinstance(error, FileNotFoundError) or not bucket
        raise SpecaufError(
            f"gs://{bucket} {'does not exist' if absent else f'cannot be listed: {error}'}",
            "a bucket that this account may read and write",
            "check its name; `gcloud auth application-default login` says who you are",
        ) from error


@contextlib.contextmanager
def storage_errors():
    """gcsfs, aiohttp and google.auth have kinds of errors of their own; here they become OSError."""
    try:
        yield
    except (OSError, SpecaufError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def generations(path) -> dict[str, str]:
    """Name with bucket → generation, which changes at every write, of an object or of all in a folder."""
    with storage_errors():
        found = storage().find(str(path), detail=True)
    found = {name: facts["generation"] for name, facts in found.items() if not name.endswith("/")}
    if not found:
        raise SpecaufError(f"{path} does not exist", "an object, or a folder of objects", "check the path")
    return found


def fetch(path: epath.Path, found: dict[str, str], copy: Path) -> bool:
    """Copy objects into the folder `copy`, if that is not there; whether they are still what was `found`."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    part, names = copy.with_name(f".{copy.name}.part"), sorted(found)
    with copy.with_name(f".{copy.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process, however it ends
        if copy.is_dir():
            return True
        shutil.rmtree(part, ignore_errors=True)  # of one that was killed
        try:
            with storage_errors():
                storage().get(names, [str(part / name) for name in names])
            if generations(path) != found:
                return False
            part.rename(copy)
        except FileNotFoundError:
            return False
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return True


def upload(new: Path, folder: epath.Path) -> None:
    """Put a local folder's files in the place of gs://….

    All go to `.NAME.part/` beside first, which takes the time that it takes: a kill leaves the old folder as it was.
    Then the store itself copies them over, one by one, what readers look for first last, and what the old folder
    had more is deleted. A kill in this short part leaves files of both; the same command, run again, puts it right,
    and deletes what a kill left beside.
    """
    names = [str(path.relative_to(new)) for path in sorted(new.rglob("*")) if path.is_file()]
    names.sort(key=lambda name: name in _READ_FIRST)
    part, store = folder.with_name(f".{folder.name}.part"), storage()
    with storage_errors():
        store.put([str(new / name) for name in names], [f"{part}/{name}" for name in names])
        bare = str(folder).removeprefix("gs://")
        surplus = set(store.find(str(folder))) - {f"{bare}/{name}" for name in names}
        for name in names:
            store.cp_file(f"{part}/{name}", f"{folder}/{name}")
        if surplus:
            store.rm(sorted(surplus))
    remove(part)


def move(folder: epath.Path, to: epath.Path) -> None:
    """Copy all, then delete all, so that a kill loses nothing."""
    with storage_errors():
        names = storage().find(str(folder))
        begin = len(str(folder).removeprefix("gs://"))
        storage().copy(names, [f"{to}{name[begin:]}" for name in names])
        storage().rm(names)


def remove(folder: epath.Path) -> None:
    """Delete it and all in it; it may be absent."""
    with storage_errors(), contextlib.suppress(FileNotFoundError):
        storage().rm(str(folder), recursive=True)
