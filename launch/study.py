"""Does accept-until-fail pay, over seeds and lengths of training? Trains and evaluates; prints a Markdown table.

    python launch/study.py --target runs/quickstart/target --data runs/study/data --out runs/study

Runs `specauf train` and `specauf evaluate` for every combination of objective, seed and number of steps with the recipe
configs/tiny_cpu.py, `--workers` at a time; a finished combination is not run again. The seed sets initial weights, data
order and anchors, the same for all objectives.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    arguments = parse_arguments()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = [
        (steps, seed, name) for steps in arguments.steps for seed in arguments.seeds for name in arguments.objectives
    ]
    with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
        futures = {pool.submit(run, arguments, out, *key): key for key in runs}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            steps, seed, name = futures[future]
            tau = future.result()["overall"]["tau_micro"]
            print(f"[{done}/{len(runs)}] {name} seed {seed} {steps} steps: tau {tau:.3f}", flush=True)
    print(tables(arguments, {key: future.result() for future, key in futures.items()}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="target folder")
    parser.add_argument("--data", required=True, help="on-policy dataset with held-out prompts")
    parser.add_argument("--out", required=True, help="folder for all runs")
    parser.add_argument("--objectives", nargs="+", default=["decay", "auf"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[400, 800, 2500, 5000])
    parser.add_argument("--learning-rate", type=float, default=None, help="instead of the recipe's")
    parser.add_argument("--workers", type=int, default=2, help="runs at one time, about one core each")
    return parser.parse_args()


def run(arguments: argparse.Namespace, out: Path, steps: int, seed: int, name: str) -> dict:
    """Results of one combination, trained and evaluated unless that was done before."""
    folder = out / f"{name}_{steps}_{seed}"
    results = folder / "results.json"
    if not results.exists():
        train = ["train", "--config", str(ROOT / "configs/tiny_cpu.py"), "--target", arguments.target,
                 "--data", arguments.data, "--out", str(folder), "--objective.name", name, "--train.steps", str(steps),
                 "--train.seed", str(seed), "--train.decode-every", "0",
                 "--train.checkpoint-every", str(max(steps // 4, 1))]  # fmt: skip
        if arguments.learning_rate:
            train += ["--train.learning-rate", str(arguments.learning_rate)]
        specauf(*train)
        prompts = [f"{path.stem}={path}" for path in sorted(Path(arguments.data, "prompts").glob("*.jsonl"))]
        specauf("evaluate", "--target", arguments.target, "--drafter", str(folder / "drafter"), "--prompts", *prompts,
                "--max-new-tokens", "80", "--repeats", "1", "--out", str(results))  # fmt: skip
    return json.loads(results.read_text())


def specauf(*arguments: str) -> None:
    command = [sys.executable, "-m", "specauf_jax", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def tables(arguments: argparse.Namespace, results: dict) -> str:
    """tau by steps and objective: mean ± standard deviation over seeds, per set, with the first objective as base."""
    sets = sorted(next(iter(results.values()))["sets"])
    lines = ["", f"| steps | objective | mean | {' | '.join(sets)} | outside loops | gain | all exact |",
             "|" + "---|" * (len(sets) + 6)]  # fmt: skip
    for steps in arguments.steps:
        base = None
        for name in arguments.objectives:
            runs = [results[steps, seed, name] for seed in arguments.seeds]
            mean = [r["overall"]["tau_micro"] for r in runs]
            base = base or statistics.mean(mean)
            cells = [spread(mean)] + [spread([r["sets"][s]["tau_micro"] for r in runs]) for s in sets]
            cells.append(spread([r["overall"]["tau_outside_loops"] for r in runs]))
            gain = f"{100 * (statistics.mean(mean) / base - 1):+.1f} %"
            exact = all(r["overall"]["exact"] for r in runs)
            lines.append(f"| {steps} | {name} | {' | '.join(cells)} | {gain} | {'yes' if exact else 'NO'} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
