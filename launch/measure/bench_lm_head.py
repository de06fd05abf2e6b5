"""Time the LM head's loss with its gradient: all slots against those up to each block's first failure.

    python launch/measure/bench_lm_head.py                  # 2 CPU cores, under 2 minutes
    python launch/measure/bench_lm_head.py --width 4096 --vocabulary 151936 --dtype bfloat16 --chunk 256  # accelerator

--losses ce kl times losses that compare with the target's distribution beside the cross-entropy of the label. Labels
are the drafter's own best token with a probability that gives the active ratio asked for: the share of slots
up to first failures. Forms are timed in turn within each repeat; ratios are of medians. `--memory v5e:2x2` asks the
compiler for a TPU (libtpu) for temporary bytes of one device, at the sizes given. Where tokamax is installed, its
`linear_softmax_cross_entropy_loss` is timed too: the plain sum over all slots, as it knows no weights.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from scipy.optimize import brentq

from specauf_jax.config import Objective
from specauf_jax.kernels.lm_head import chunked_scores, frozen_head_scores, project
from specauf_jax.objectives import label_scores, objective_sums

TOKAMAX = "tokamax"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=512)
    parser.add_argument("--slots", type=int, default=15, help="of a block, N")
    parser.add_argument("--width", type=int, default=512, help="D")
    parser.add_argument("--vocabulary", type=int, default=18_992, help="V")
    parser.add_argument("--losses", nargs="+", default=["ce"], metavar="LOSS", help="ce, kl, tv, lk, nla or mixes")
    parser.add_argument("--active", type=float, nargs="+", default=[0.25], help="active ratios")
    parser.add_argument("--chunk", type=int, default=128, help="slots whose logits exist at one time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", metavar="TOPOLOGY", help="compile only, for one device of it")
    parser.add_argument("--out", help="JSON to write")
    arguments = parser.parse_args()
    measured = {"settings": vars(arguments), "device": jax.devices()[0].device_kind}
    if arguments.memory:
        measured["temporary_mib"] = {name: _memory(form, arguments) for name, form in forms(arguments).items()}
        for name, mib in measured["temporary_mib"].items():
            print(f"{name:<30} {mib:10,.0f} MiB of temporaries")
    else:
        measured["seconds"] = {ratio: _times(ratio, arguments) for ratio in arguments.active}
        for ratio, times in measured["seconds"].items():
            for name, seconds in times.items():
                first = times[f"all slots, {arguments.losses[0]}"]
                print(f"active {ratio:<6} {name:<30} {seconds:8.3f} s   {seconds / first:.2f} x")
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(measured, file, indent=2)


def forms(arguments) -> dict:
    """Name → value and gradient of auf's loss, of (hidden, lm_head, labels, valid, target_hidden)."""
    found = {}
    for loss in arguments.losses:
        found |= {f"{name}, {loss}": form for name, form in forms_of(Objective("auf", loss), arguments).items()}
    if importlib.util.find_spec(TOKAMAX):
        del sys.argv[1:]  # which it would take for flags of its own
        found[TOKAMAX] = jax.jit(jax.value_and_grad(_tokamax))
    return found


def forms_of(objective: Objective, arguments) -> dict:
    chunk = arguments.chunk

    def checkpointed(hidden, lm_head, labels, valid, target_hidden):
        def scores(labels, hidden, target_hidden):
            target_logits = project(target_hidden, lm_head) if objective.soft else None
            return label_scores(project(hidden, lm_head), labels, target_logits, objective)

        return chunked_scores(scores, (labels, hidden, target_hidden), chunk=chunk)

    def frozen(skip):
        def form(hidden, lm_head, labels, valid, target_hidden):
            options = {"chunk": chunk, "objective": objective, "target_hidden": target_hidden, "skip": skip}
            return frozen_head_scores(hidden, lm_head, labels, valid, **options)

        return form

    ways = {"recomputing all slots": checkpointed, "all slots": frozen(False), "up to first failures": frozen(True)}

    def value_and_gradient(form):
        def loss(hidden, lm_head, labels, valid, target_hidden):
            scores = form(hidden, lm_head, labels, valid, target_hidden)
            sums = objective_sums(objective, scores, valid, block_size=arguments.slots + 1)
            return sums.numerator / sums.denominator

        return jax.jit(jax.value_and_grad(loss))

    return {name: value_and_gradient(form) for name, form in ways.items()}


def _tokamax(hidden, lm_head, labels, valid, target_hidden):
    import tokamax

    return tokamax.linear_softmax_cross_entropy_loss(hidden.reshape(-1, len(lm_head)), labels.reshape(-1), lm_head)


def problem(ratio: float, arguments):
    """Random slots whose blocks live as long as the ratio says."""
    blocks, slots = arguments.blocks, arguments.slots
    survive = brentq(lambda p: sum(p**k for k in range(slots)) / slots - ratio, 0.0, 1.0) if ratio < 1 else 1.0
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (1, blocks, slots, arguments.width), arguments.dtype)
    lm_head = jax.random.normal(keys[1], (arguments.width, arguments.vocabulary), arguments.dtype) * 0.02
    best = jax.lax.map(lambda h: jnp.argmax(jnp.dot(h, lm_head, preferred_element_type=jnp.float32), -1),
                       hidden[0])[None]  # fmt: skip
    right = jax.random.bernoulli(keys[2], survive, best.shape)
    labels = jnp.where(right, best, (best + 1) % arguments.vocabulary).astype(jnp.int32)
    target_hidden = hidden + 0.3 * jax.random.normal(keys[3], hidden.shape, hidden.dtype)
    return hidden, lm_head, labels, jnp.ones(best.shape, bool), target_hidden


def _times(ratio: float, arguments) -> dict[str, float]:
    arrays, compiled = problem(ratio, arguments), forms(arguments)
    values = {name: jax.block_until_ready(form(*arrays)) for name, form in compiled.items()}
    for kind in arguments.losses:
        losses = [float(loss) for name, (loss, _) in values.items() if name.endswith(f", {kind}")]
        assert max(losses) - min(losses) < 1e-3 * max(losses), losses
    seconds = {name: [] for name in compiled}
    for _ in range(arguments.repeats):
        for name, form in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(form(*arrays))
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _memory(form, arguments) -> float:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=arguments.memory).devices[0]
    shape = (1, arguments.blocks, arguments.slots)
    D, V = arguments.width, arguments.vocabulary
    states = (*shape, D), arguments.dtype
    kinds = states, ((D, V), arguments.dtype), (shape, "int32"), (shape, "bool"), states
    sharding = jax.sharding.SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct(size, dtype, sharding=sharding) for size, dtype in kinds]
    return form.lower(*arrays).compile().memory_analysis().temp_size_in_bytes / 2**20


if __name__ == "__main__":
    main()
