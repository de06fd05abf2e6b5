"""What the TPU's compiler is asked for when it compiles a step over a mesh.

What each option brings is in launch/measure/README.md, below "On TPUs, by their compiler". A libtpu that does not know
one says so by its name when the step is compiled: take it out here.
"""

import os

import jax

_OPTIONS = {
    # Parameters spread over `fsdp` are gathered whole, and products take them as they are. Without this, a product is
    # cut into as many parts as there are devices, each added to the sum of those before.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # While one layer's matrix is on its way, the chip computes with another.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # An MLP's two products stay two. As one operation the first is computed anew for every part of the second.
    "xla_tpu_dot_dot_fusion": "false",
    # A product's operands lie in fast memory in larger parts, and are read less often.
    "xla_tpu_scoped_vmem_limit_kib": str(64 * 1024),
}
_SMALL_VMEM = {"xla_tpu_scoped_vmem_limit_kib": str(48 * 1024)}  # of a TPU7x's 64 MiB


def tpu_options(mesh: jax.sharding.Mesh) -> dict[str, str] | None:
    """`compiler_options` of `jax.jit`; None on other devices. What LIBTPU_INIT_ARGS names, also as `--noNAME`, is left
    to it."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return None
    options = _OPTIONS | (_SMALL_VMEM if "7x" in device.device_kind else {})
    given = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get("LIBTPU_INIT_ARGS", "").split()}
    return {name: value for name, value in options.items() if not {name, f"no{name}"} & given}
