"""Time decoding of random models at several batch sizes: the target alone, and with a drafter.

    python launch/measure/bench_round.py --dtype bfloat16 --out round.json    # an accelerator with 8 GB
    python launch/measure/bench_round.py --width 128 --target-layers 2 --vocabulary 512 --batch-sizes 1 --out round.json

Needs no files: weights and prompts are random, so that almost every draft is wrong and a round emits one token. What
it costs is what is measured: milliseconds of a round, against those of one autoregressive step. A drafter of any tau
gains tau × step / round. Methods take turns within each repeat, times are medians, and the texts must be equal but for
ties (exit code 1 if they are not).
"""

import argparse
import json
import statistics
import sys

import jax
import numpy as np

from specauf_jax.architecture import Drafter, Target
from specauf_jax.decoding.state import Decoding
from specauf_jax.evaluation.exactness import compare, said
from specauf_jax.evaluation.timing import timed_pass
from specauf_jax.models.cpu import serving_params
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.target import TargetStep, init_target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048, help="D, a multiple of 128")
    parser.add_argument("--target-layers", type=int, default=24)
    parser.add_argument("--drafter-layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=65_536, help="V")
    parser.add_argument("--block-size", type=int, default=16, help="K")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="JSON to write")
    arguments = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest" if arguments.dtype == "float32" else "default")
    methods, target_params = models(arguments)
    measured = {str(size): measure(size, methods, target_params, arguments) for size in arguments.batch_sizes}
    report = {"settings": vars(arguments), "device": jax.devices()[0].device_kind, "batch_sizes": measured}
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(report, file, indent=2)
    return int(not all(found["exact"] for found in measured.values()))


def models(arguments: argparse.Namespace) -> tuple[dict, dict]:
    """Name → (decoding, parameters of the drafter), and the target's parameters, all in the dtype asked for."""
    D, V = arguments.width, arguments.vocabulary
    heads = {"num_attention_heads": D // 64, "num_key_value_heads": D // 128, "head_dim": 64}
    target = Target(vocab_size=V, hidden_size=D, intermediate_size=3 * D, num_hidden_layers=arguments.target_layers,
                    **heads)  # fmt: skip
    drafter = resolve_drafter(
        Drafter(block_size=arguments.block_size, num_hidden_layers=arguments.drafter_layers, mask_token_id=V - 1),
        target,
    )

    def draw(init, config, seed):
        params = jax.jit(
            lambda: jax.tree.map(lambda x: x.astype(arguments.dtype), init(config, jax.random.key(seed)))
        )()
        return serving_params(params)

    alone = Decoding(target_step=TargetStep(target, drafter.target_layer_ids))
    together = Decoding(target_step=TargetStep(target, drafter.target_layer_ids), drafter=drafter)
    methods = {"autoregressive": (alone, None), "drafter": (together, draw(init_drafter, drafter, 1))}
    return methods, draw(init_target, target, 0)


def measure(size: int, methods: dict, target_params: dict, arguments: argparse.Namespace) -> dict:
    """Milliseconds of a round of either method, tokens a second, and whether the texts are exact."""
    prompts = np.random.default_rng(0).integers(0, arguments.vocabulary - 1, (size, arguments.prompt_length)).tolist()
    times, texts, rates = {name: [] for name in methods}, {}, {name: [] for name in methods}
    for repeat in range(arguments.repeats + 1):  # the first compiles
        for name, (decoding, params) in methods.items():
            found = timed_pass(params, target_params, prompts, config=decoding, batch_size=size,
                               max_new_tokens=arguments.new_tokens)  # fmt: skip
            texts[name] = found.generations
            if repeat:
                times[name].append(1e3 * found.decode_s / found.rounds)
                rates[name].append(sum(len(g.tokens) for g in texts[name]) / found.decode_s)
    result = {name: {"ms_per_round": statistics.median(times[name]), "tokens_per_s": statistics.median(rates[name])}
              for name in methods}  # fmt: skip
    result |= compare(
        texts["drafter"], texts["autoregressive"], target_params, methods["drafter"][0], size, None
    ).results()
    step, round_ = (result[name]["ms_per_round"] for name in methods)
    print(f"batch {size:3}: a step {step:8.3f} ms, a round of {arguments.block_size} {round_:8.3f} ms: a drafter gains "
          f"{step / round_:.2f} × its tau; {said(result)}", flush=True)  # fmt: skip
    return result


if __name__ == "__main__":
    sys.exit(main())
