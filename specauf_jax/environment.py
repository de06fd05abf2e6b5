"""What a result is made with: versions, revision, devices, precision of products."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import jax

from specauf_jax.config import Dtype

_PACKAGES = (
    "specauf-jax",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "numpy",
)


def describe_environment(mesh: jax.sharding.Mesh | None = None) -> dict:
    """JSON-ready facts that are stored with every run and result."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "revision": _revision(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape) if mesh is not None else None,
    }


def float32_precision(dtype: Dtype):
    """Matrix products in full precision for float32: accelerators would quietly use bfloat16 passes."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Git revision of a source checkout, with "+" if it was changed; or what the file REVISION of a copy says."""
    root = Path(__file__).parents[1]
    if (root / "REVISION").is_file():
        return (root / "REVISION").read_text().strip() or None
    if not (root / ".git").exists():  # else git would tell of whatever repository this lies in
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
