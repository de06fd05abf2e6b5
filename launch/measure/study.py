"""Does accept-until-fail pay, over seeds and lengths of training? Trains and evaluates; prints a Markdown table.

    python launch/measure/study.py --target runs/quickstart/target --data runs/study/data --out runs/study

Runs `specauf train` and `specauf evaluate` for every combination of objective, seed and number of steps with the recipe
configs/tiny_cpu.py, `--workers` at a time; a finished combination is not run again. The seed sets initial weights, data
order and anchors, the same for all objectives.

--objectives takes the names of DFlash's (decay, auf, …), of Domino's variants (domino_baseline, domino_b_auf,
domino_s_auf, domino_f_auf, domino_b_auf_d), and A>B: trained with A, then fine-tuned with B for a tenth of the steps.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOMINO = {
    "domino_baseline": ("decay", "decay", "own"),
    "domino_b_auf": ("auf", "full", "own"),
    "domino_s_auf": ("auf", "auf", "base"),
    "domino_f_auf": ("auf", "auf", "own"),
    "domino_b_auf_d": ("auf_decay", "decay", "own"),
}
"""Objectives of the base and final branch, and the final branch's witness of failure."""


def main() -> None:
    arguments = parse_arguments()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = [
        (steps, seed, name) for steps in arguments.steps for seed in arguments.seeds for name in arguments.objectives
    ]
    results = {}
    for tuned in (False, True):  # what is fine-tuned must be there first
        with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
            futures = {pool.submit(run, arguments, out, *key): key for key in runs if (">" in key[2]) == tuned}
            for future in concurrent.futures.as_completed(futures):
                steps, seed, name = key = futures[future]
                results[key] = future.result()
                tau = results[key]["overall"]["tau_micro"]
                print(f"[{len(results)}/{len(runs)}] {name} seed {seed} {steps} steps: tau {tau:.3f}", flush=True)
    print(tables(arguments, results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="target folder")
    parser.add_argument("--data", required=True, help="on-policy dataset with held-out prompts")
    parser.add_argument("--out", required=True, help="folder for all runs")
    parser.add_argument("--objectives", nargs="+", default=["decay", "auf"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[400, 800, 2500, 5000])
    parser.add_argument("--learning-rate", type=float, default=None, help="instead of the recipe's")
    parser.add_argument("--finetune-learning-rate", type=float, default=1e-3, help="of B in A>B")
    parser.add_argument("--workers", type=int, default=2, help="runs at one time, about one core each")
    return parser.parse_args()


def run(arguments: argparse.Namespace, out: Path, steps: int, seed: int, name: str) -> dict:
    """Results of one combination, trained and evaluated unless that was done before."""
    folder = out / f"{name.replace('>', '_then_')}_{steps}_{seed}"
    results = folder / "results.json"
    if not results.exists():
        first, _, second = name.partition(">")
        rate = arguments.finetune_learning_rate if second else arguments.learning_rate
        length = steps // 10 if second else steps
        train = ["train", "--config", str(ROOT / "configs/tiny_cpu.py"), "--target", arguments.target,
                 "--data", arguments.data, "--out", str(folder), *objective(second or first),
                 "--train.steps", str(length), "--train.seed", str(seed), "--train.decode-every", "0",
                 "--train.checkpoint-every", str(max(length // 4, 1))]  # fmt: skip
        if second:
            train += ["--init-from", str(out / f"{first}_{steps}_{seed}" / "drafter")]
        if rate:
            train += ["--train.learning-rate", str(rate)]
        specauf(*train)
        prompts = [f"{path.stem}={path}" for path in sorted(Path(arguments.data, "prompts").glob("*.jsonl"))]
        specauf("evaluate", "--target", arguments.target, "--drafter", str(folder / "drafter"), "--prompts", *prompts,
                "--max-new-tokens", "80", "--repeats", "1", "--out", str(results))  # fmt: skip
    return json.loads(results.read_text())


def objective(name: str) -> list[str]:
    """The settings of `specauf train` behind a name of the study."""
    if name not in DOMINO:
        return ["--objective.name", name]
    base, final, witness = DOMINO[name]
    return ["--drafter.projector-type", "domino", "--drafter.head", "emb_dim=64", "gru_hidden_dim=128",
            "--base-objective.name", base, "--objective.name", final, "--objective.witness", witness]  # fmt: skip


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
