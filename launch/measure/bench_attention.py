"""Times and memory of block attention against dense forms, forward and backward, on this machine.

    python launch/measure/bench_attention.py [--S 768 --A 128 --K 16 --H 8 --G 2 --E 64] [--out attention.json]
    python launch/measure/bench_attention.py --topology v5e:2x2 --dtype bfloat16 --S 3072 --A 512 --H 32 --G 8 --E 128

`dot_product_attention` is JAX's own over context and all blocks' keys side by side with a full mask; `chunked` is
this package's dense form, 32 anchors at a time and rematerialised. Repeats take turns, so that a busy machine
slows all alike; times are medians. With --topology nothing runs: the compiler says what temporary memory each
form would take on such a TPU.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

SIZES = {"B": 1, "S": 768, "A": 128, "K": 16, "H": 8, "G": 2, "E": 64, "documents": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--topology", help="of a TPU to compile for, e.g. v5e:2x2")
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    arguments = parser.parse_args()
    if arguments.topology:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    report = {name: getattr(arguments, name) for name in (*SIZES, "dtype")}
    report |= temporaries(arguments) if arguments.topology else times(arguments)
    for form, values in report["forms"].items():
        print(f"{form:24}", "  ".join(f"{name} {value:10.2f}" for name, value in values.items()))
    print(json.dumps(report))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2))


def forms() -> dict:
    """Functions of (q, k, v, context_k, context_v, start, stop, keep)."""
    import jax
    import jax.numpy as jnp

    from specauf_jax.kernels.block_attention import block_attention, dense, visible_ranges
    from specauf_jax.kernels.chunks import map_chunks

    def full_mask(q, k, v, context_k, context_v, start, stop, keep):
        B, A, K, H, E = q.shape
        S = context_k.shape[1]
        j, block = jnp.arange(S), jnp.arange(A)
        context = (j >= start[..., None]) & (j < stop[..., None])
        own = jnp.repeat(block[:, None] == block, K, axis=1)[None]
        mask = jnp.concatenate([context, jnp.broadcast_to(own, (B, A, A * K))], axis=-1) & keep[..., None]
        mask = jnp.repeat(mask, K, axis=1)[:, None]
        keys, values = (
            jnp.concatenate([c, x.reshape(B, A * K, -1, E)], axis=1) for c, x in ((context_k, k), (context_v, v))
        )
        return jax.nn.dot_product_attention(q.reshape(B, A * K, H, E), keys, values, mask=mask).reshape(q.shape)

    def chunked(q, k, v, context_k, context_v, *seen):
        def chunk(q, k, v, *seen):
            return dense(q, k, v, context_k, context_v, visible_ranges(*seen, q.shape[2]))

        return map_chunks(chunk, 32, q, k, v, *seen)

    return {"block_attention": block_attention, "chunked": chunked, "dot_product_attention": full_mask}


def compiled(form, arrays):
    """Forward and backward as one program, from arrays or their shapes."""
    import jax

    def both(cotangent, q, k, v, context_k, context_v, *seen):
        mixed, pull = jax.vjp(lambda *x: form(*x, *seen), q, k, v, context_k, context_v)
        return mixed, pull(cotangent)

    return jax.jit(both).lower(arrays[0], *arrays).compile()


def inputs(arguments) -> list:
    """Random arrays and sorted anchors in documents of equal length; every block is kept."""
    import jax.numpy as jnp
    import numpy as np

    B, S, A, K, H, G, E, documents = (getattr(arguments, name) for name in SIZES)
    rng, dtype = np.random.default_rng(0), jnp.dtype(arguments.dtype)
    shapes = (B, A, K, H, E), (B, A, K, G, E), (B, A, K, G, E), (B, S, G, E), (B, S, G, E)
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]
    anchors = np.stack([np.sort(rng.choice(S, A, replace=False)) for _ in range(B)]).astype(np.int32)
    length = -(-S // documents)
    return [*arrays, jnp.asarray(anchors // length * length), jnp.asarray(anchors), jnp.ones((B, A), bool)]


def times(arguments) -> dict:
    """Median milliseconds of every form, and its share of the dense masked one."""
    import jax

    arrays = inputs(arguments)
    programs = {name: compiled(form, arrays) for name, form in forms().items()}
    taken = {name: [] for name in programs}
    for _ in range(arguments.repeats + 1):  # the first warms up
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(arrays[0], *arrays))
            taken[name].append(1e3 * (time.perf_counter() - begin))
    median = {name: statistics.median(values[1:]) for name, values in taken.items()}
    return {
        "device": jax.devices()[0].device_kind,
        "forms": {
            name: {"ms": ms, "of_dense": ms / median["dot_product_attention"], "temporary_mib": _mib(programs[name])}
            for name, ms in median.items()
        },
    }


def temporaries(arguments) -> dict:
    """MiB of temporary memory by the TPU's compiler; what it refuses for want of memory is left out."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices[0]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)) for x in inputs(arguments)]
    report = {}
    for name, form in forms().items():
        try:
            report[name] = {"temporary_mib": _mib(compiled(form, shapes))}
        except jax.errors.JaxRuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
    return {"device": arguments.topology, "forms": report}


def _mib(program) -> float:
    return program.memory_analysis().temp_size_in_bytes / 2**20


if __name__ == "__main__":
    main()
