"""Kill a training run at random moments, let it go on each time, and compare it with a run that was left alone.

    python launch/kill_and_resume.py --target runs/quickstart/target --data runs/quickstart/data --out runs/kill

SIGKILL comes up to a second after a random step, one in each of equal parts of the run: while it trains, writes a
checkpoint or a line of metrics. The final weights must be the same to the last bit; exits with 1 if they are not.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, help="folder for both runs; deleted first")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--checkpoint-every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("extra", nargs="*", help="further settings of specauf train, after --")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    shutil.rmtree(out, ignore_errors=True)
    if start(arguments, out / "alone").wait():
        return 1
    print("left alone: complete", flush=True)
    draw, in_time = random.Random(arguments.seed), 0
    for number in range(1, arguments.kills + 1):
        moment = arguments.steps * draw.uniform(number - 1, number) / arguments.kills
        process = start(arguments, out / "killed")
        while process.poll() is None and logged(out / "killed") < moment:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        late = process.wait() == 0
        in_time += not late
        print(f"kill {number}: {'came too late, ' if late else ''}logged to step {logged(out / 'killed')}, "
              f"newest whole checkpoint {newest(out / 'killed')}", flush=True)  # fmt: skip
    if start(arguments, out / "killed").wait():
        return 1
    same = weights(out / "alone") == weights(out / "killed")
    print(f"final weights after {in_time} kills: {'bit-identical' if same else 'DIFFERENT'}")
    return 0 if same else 1


def start(arguments: argparse.Namespace, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "specauf_jax", "train", "--config", str(ROOT / "configs/tiny_cpu.py"),
               "--target", arguments.target, "--data", arguments.data, "--out", str(out),
               "--train.steps", str(arguments.steps), "--train.checkpoint-every", str(arguments.checkpoint_every),
               "--train.decode-every", "0", *arguments.extra]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def logged(run: Path) -> int:
    """The newest step in the metrics of a run that may be writing them; 0 before the first."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # what no newline ends is being written
    return json.loads(lines[-1])["step"] if lines else 0


def newest(run: Path) -> int | None:
    steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def weights(run: Path) -> bytes:
    return (run / "drafter/model.safetensors").read_bytes()


if __name__ == "__main__":
    sys.exit(main())
