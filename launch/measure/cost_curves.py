"""How the cost of a training step grows with each of its sizes, and that of a decode round with rows and context.

    python launch/measure/cost_curves.py [--out curves.json]    # 2 CPU cores, about 8 minutes

One size at a time takes half, twice and four times its base; the others stay. Everything runs in turn within each
repeat; a time is the fastest of them, which other work on the machine disturbs least. Beside each stands the same
ratio by the FLOP model (specauf_jax/flops.py): a step that costs what it must grows as that does. Weights are
random, and the objective is `decay`: what `auf` saves depends on how much the drafter has learnt.
"""

import argparse
import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from specauf_jax.architecture import Drafter, Target
from specauf_jax.config import Objective, TrainOptimisation
from specauf_jax.decoding.generate import decode_round, start
from specauf_jax.decoding.state import Decoding
from specauf_jax.flops import round_flops, step_flops
from specauf_jax.models.cpu import serving_params
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.target import init_target, target_step
from specauf_jax.training.blocks import Batch
from specauf_jax.training.loss import LossConfig
from specauf_jax.training.step import init_state, make_optimizer, make_train_step

STEP = {"B": 2, "S": 512, "A": 64, "K": 8, "V": 4096}
ROUND = {"B": 4, "S": 256, "K": 8, "V": 4096}  # S: the context's length
FACTORS = (0.5, 1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="D of target and drafter")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="JSON to write")
    arguments = parser.parse_args()
    measured = {"settings": vars(arguments), "device": jax.devices()[0].device_kind}
    kinds = {
        "train step": (STEP, functools.partial(train_step, arguments.width)),
        "decode round": (ROUND, functools.partial(one_round, arguments.width)),
    }
    for kind, (base, make) in kinds.items():
        measured[kind] = curves(base, make, arguments.repeats)
        print(f"\n{kind}: {measured[kind]['ms']:.1f} ms at {' '.join(f'{k}={n}' for k, n in base.items())}")
        print("| size | " + " | ".join(f"× {factor}: time (model)" for factor in FACTORS) + " |")
        for letter, points in measured[kind]["curves"].items():
            cells = (f"{p['times']:.2f} ({p['model']:.2f})" for p in points)
            print(f"| {letter} | " + " | ".join(cells) + " |", flush=True)
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(measured, file, indent=2)


def curves(base: dict, make, repeats: int) -> dict:
    """Milliseconds at the base, and for each size its points: the factor, the time and the FLOPs over the base's."""
    points = {(letter, factor): base | {letter: int(base[letter] * factor)} for letter in base for factor in FACTORS}
    different = {tuple(sizes.values()): sizes for sizes in points.values()}
    runs, seconds = {at: make(**sizes) for at, sizes in different.items()}, {}
    for repeat in range(repeats + 1):  # the first warms up
        for at, (run, _) in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            seconds.setdefault(at, []).extend([time.perf_counter() - begin] if repeat else [])
    times = {at: min(found) for at, found in seconds.items()}
    origin = tuple(base.values())
    found: dict[str, list] = {letter: [] for letter in base}
    for (letter, factor), sizes in points.items():
        at = tuple(sizes.values())
        ratios = {"times": times[at] / times[origin], "model": runs[at][1] / runs[origin][1]}
        found[letter].append({"factor": factor, "ms": 1e3 * times[at]} | ratios)
    return {"base": base, "ms": 1e3 * times[origin], "curves": found}


def models(width: int, K: int, V: int) -> tuple[Target, Drafter]:
    """A target of 6 layers and a drafter of 2."""
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128, "head_dim": 64}
    target = Target(vocab_size=V, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=6, **heads)
    return target, resolve_drafter(Drafter(block_size=K, num_hidden_layers=2, mask_token_id=V - 1), target)


def train_step(width: int, *, B, S, A, K, V):
    """A function that runs one step, and the operations that it needs."""
    target, drafter = models(width, K, V)
    optimizer = make_optimizer(TrainOptimisation())
    config = LossConfig(drafter=drafter, objective=Objective("decay"), num_anchors=A)
    step = jax.jit(make_train_step(config, target, optimizer))
    state = init_state(init_drafter(drafter, jax.random.key(1)), optimizer)
    ones = np.ones((B, S), np.int32)
    batch = Batch(
        tokens=np.random.default_rng(0).integers(0, V - 1, (B, S), np.int32),
        loss_mask=ones > 0,
        document_ids=ones,
        positions=np.broadcast_to(np.arange(S, dtype=np.int32), (B, S)),
    )
    target_params = init_target(target, jax.random.key(0))
    flops = sum(step_flops(drafter, target, rows=B, sequence_length=S, num_anchors=A).values())
    return lambda: step(state, target_params, batch), flops


def one_round(width: int, *, B, S, K, V):
    """As `train_step`; the round is `draft_and_verify` as it serves, on the same state each time."""
    target, drafter = models(width, K, V)
    decoding = Decoding(target_step=target_step(target, drafter.target_layer_ids), drafter=drafter)
    params = init_drafter(drafter, jax.random.key(1)), init_target(target, jax.random.key(0))
    params = tuple(map(serving_params, params))
    prompts = np.random.default_rng(0).integers(0, V - 1, (B, S))
    current = start(*params, prompts, config=decoding, max_new_tokens=2 * K)

    def run():
        nonlocal current
        at = current.length + 0, current.done & False  # copies: the round takes the state's buffers
        after, _ = decode_round(*params, current, config=decoding)
        current = dataclasses.replace(after, length=at[0], done=at[1])
        return jnp.asarray(after.tokens)

    return run, sum(round_flops(drafter, target, rows=B, context=S).values())


if __name__ == "__main__":
    main()
