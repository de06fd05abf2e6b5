"""The speed of whole generation, as `specauf regenerate` needs it, in this tree and in another one, in turn.

    python launch/measure/bench_generation.py OTHER --target DIR --prompts FILE.jsonl --mixed --out generation.json

OTHER is a checkout of another revision; --python its interpreter, where it needs one of its own. Both read the same
prompts' first turns, and generate greedily, in a process each. The first pass compiles and does not count; then they
take turns, --repeats times. Tokens a second are those of all rows by a whole pass, prompts included; the median counts.
--mixed limits each prompt's new tokens to a number of its own from 10 to --max-new-tokens, as if it stopped there. A
revision whose rows do not take new requests gets the same limits: its batches end with their slowest row. Exit code 1
if the tokens differ; in bfloat16, and with a drafter in any, those of two revisions may by rounding.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPILED = "/jax/core/compile/backend_compile_duration"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="checkout to compare with")
    parser.add_argument("--python", default=sys.executable, help="of the other checkout")
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", help="decode speculatively")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--mixed", action="store_true", help="each prompt has a limit of its own")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="JSON to write")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # in the process of either tree
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments)
    trees = {"before": (arguments.python, Path(arguments.other).resolve()), "now": (sys.executable, ROOT)}
    running, first, passes = {}, {}, {name: [] for name in trees}
    try:
        for name, (python, tree) in trees.items():
            running[name] = process(python, tree)
            first[name] = answer(running[name])
        for _ in range(arguments.repeats):
            for name in trees:
                passes[name].append(answer(running[name]))
    finally:
        for worker in running.values():
            worker.stdin.close()
            worker.wait()
    report = {"settings": vars(arguments), "trees": {}, "same": first["before"]["tokens"] == first["now"]["tokens"]}
    for name in trees:
        count = sum(map(len, first[name]["tokens"]))
        found = {
            "tokens": count,
            "tokens_per_s": count / statistics.median(p["seconds"] for p in passes[name]),
            "first_s": first[name]["seconds"],
            "compilations": first[name]["compilations"],
            "later_compilations": sum(p["compilations"] for p in passes[name]),
        }
        report["trees"][name] = found
        print(f"{name}: {found['tokens_per_s']:,.0f} tokens/s; the first pass {found['first_s']:.1f} s, with "
              f"{found['compilations']} compilations, {found['later_compilations']} more later")  # fmt: skip
    rates = [found["tokens_per_s"] for found in report["trees"].values()]
    report["ratio"] = rates[1] / rates[0]
    print(f"{report['ratio']:.2f} x; tokens {'agree' if report['same'] else 'DIFFER'}")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=2) + "\n")
    return int(not report["same"])


def process(python: str, tree: Path) -> subprocess.Popen:
    """This script at work with the package of `tree`."""
    line = [python, __file__, *sys.argv[1:], "--work"]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.Popen(line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(worker: subprocess.Popen) -> dict:
    """What the next pass of a process gives."""
    worker.stdin.write("\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        sys.exit(f"{worker.args[0]} ended with exit code {worker.wait()}")
    return json.loads(line)


def work(arguments: argparse.Namespace) -> int:
    """A pass for every line of the standard input; only what it gives goes to the standard output."""
    import jax
    import numpy as np
    from rich.console import Console

    from specauf_jax.config import Mesh
    from specauf_jax.evaluation.prompts import encode_first_turn, read_prompts
    from specauf_jax.sharding import make_mesh

    try:
        from specauf_jax.commands.loading import load_models
        from specauf_jax.environment import float32_precision
    except ImportError:  # of the first revisions
        from specauf_jax.commands.setup import float32_precision, load_models

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.extend([1] * (name == COMPILED))
    )
    with float32_precision(arguments.dtype):
        mesh, console = make_mesh(Mesh()), Console(stderr=True)
        models = load_models(arguments.target, arguments.drafter, arguments.dtype, mesh, console)
        prompts = [encode_first_turn(models.tokenizer, prompt) for prompt in read_prompts(arguments.prompts)]
        most = arguments.max_new_tokens
        limits = np.random.default_rng(0).integers(min(10, most), most + 1, len(prompts))
        limits = limits.tolist() if arguments.mixed else [most] * len(prompts)
        for number, _ in enumerate(sys.stdin):
            compiled.clear()
            begin = time.perf_counter()
            tokens = generated(models, prompts, limits, arguments.batch_size)
            result = {"seconds": time.perf_counter() - begin, "compilations": len(compiled)}
            print(json.dumps(result | ({} if number else {"tokens": tokens})), flush=True)
    return 0


def generated(models, prompts: list[list[int]], limits: list[int], batch_size: int) -> list[list[int]]:
    """Each prompt's new tokens, at most as many as its limit."""
    from specauf_jax.decoding import generate as module

    named = (getattr(models, name, None) for name in ("decoding", "speculative", "autoregressive"))  # of any revision
    decoding = next(filter(None, named))
    params, options = (models.drafter_params, models.target_params), {"config": decoding, "mesh": models.mesh}
    if not hasattr(module, "converse"):
        return generated_in_batches(params, options, prompts, limits, batch_size)

    def ask(request):
        return (yield request)

    requests = [module.Request(*one) for one in zip(prompts, range(len(prompts)), limits, strict=True)]
    dialogues = {request.index: ask(request) for request in requests}
    found = dict(module.converse(*params, dialogues, batch_size=batch_size, **options))
    return [found[i].tokens for i in range(len(prompts))]


def generated_in_batches(params, options: dict, prompts, limits, batch_size: int) -> list[list[int]]:
    """As `generate` was when a batch ended with its slowest row, but for the limits of the rows."""
    import jax
    import numpy as np

    from specauf_jax.decoding import generate as module

    found, most = {}, max(limits)
    for batch in module.prompt_batches(prompts, batch_size):
        state = module.start(*params, batch, max_new_tokens=most, **options)
        limit = batch.length.astype(np.int32)
        limit[: len(batch.indices)] += np.asarray(limits, np.int32)[batch.indices]
        state = dataclasses.replace(state, limit=jax.device_put(limit, state.limit.sharding))
        state, accepted = module.decode(*params, state, config=options["config"], max_new_tokens=most)
        found |= module.collect(batch, state, accepted)
    return [found[i].tokens for i in range(len(prompts))]


if __name__ == "__main__":
    sys.exit(main())
