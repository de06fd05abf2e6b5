"""Which devices this machine has, before JAX looks for them."""

import glob
import importlib.util
import os

from specauf_jax.errors import SpecaufError

_TPU_CHIPS = ("/dev/accel*", "/dev/vfio/[0-9]*")
_GPUS = ("/dev/nvidia[0-9]*", "/dev/kfd")


def on_tpu() -> bool:
    """A machine with TPU chips, and JAX free to use them."""
    allowed = (os.environ.get("JAX_PLATFORMS") or "tpu").split(",")
    return "tpu" in allowed and _has_libtpu() and any(map(glob.glob, _TPU_CHIPS))


def choose_platform() -> None:
    """Keep JAX from a libtpu that has no chip to look for: it would complain at length, and take its time.

    Numbers of 64 bits, which the method has no use for, stay off.
    """
    os.environ["JAX_ENABLE_X64"] = "0"
    if not os.environ.get("JAX_PLATFORMS") and _has_libtpu() and not any(map(glob.glob, _TPU_CHIPS + _GPUS)):
        os.environ["JAX_PLATFORMS"] = "cpu"


def check_platform() -> None:
    """Refuse a JAX_PLATFORMS that this machine does not have."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX has both
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).splitlines()[0] if str(error) else "there is none"
        raise SpecaufError(f"JAX_PLATFORMS={platforms}: {reason}", "a platform of this machine",
                           "unset JAX_PLATFORMS, or set it to cpu") from error  # fmt: skip


def _has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None
