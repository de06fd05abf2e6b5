"""The speed of training in this tree and at an older revision, in turn on one machine.

    python launch/measure/compare_revisions.py REVISION -- --config configs/tiny_cpu.py --target DIR --data DIR

What follows -- are settings of `specauf train` that both revisions know. Each of --repeats rounds trains once with
either; a run's tokens a second are the median over its lines of metrics.jsonl, the first left out, as it compiles.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("settings", nargs="+", help="of specauf train, after --")
    arguments = parser.parse_args()
    settings = [str(Path(part).resolve()) if Path(part).exists() else part for part in arguments.settings]
    with tempfile.TemporaryDirectory() as scratch:
        old = Path(scratch) / "tree"
        subprocess.run(
            ["git", "-C", ROOT, "worktree", "add", "--detach", "--quiet", old, arguments.revision], check=True
        )
        try:
            trees, rates = {"before": old, "now": ROOT}, {"before": [], "now": []}
            for repeat in range(arguments.repeats):
                for name, tree in trees.items():
                    rates[name].append(tokens_per_s(tree, Path(scratch) / f"{name}{repeat}", settings))
                    print(f"{name}: {rates[name][-1]:,.0f} tokens/s", flush=True)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", old], check=True)
    before, now = (statistics.median(rates[name]) for name in ("before", "now"))
    print(f"before {before:,.0f}, now {now:,.0f} tokens/s: {now / before:.2f} x")
    return 0


def tokens_per_s(tree: Path, out: Path, settings: list[str]) -> float:
    """Of `specauf train` as it stands in `tree`, padding included."""
    often = ["--train.log-every", "5", "--train.checkpoint-every", "100000", "--train.decode-every", "0"]
    command = [sys.executable, "-m", "specauf_jax", "train", *settings, *often, "--out", out]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["tokens_per_s"] for line in lines[1:])


if __name__ == "__main__":
    sys.exit(main())
