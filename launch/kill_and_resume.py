"""Kill a training run at random moments, let it go on each time, and compare it with a run that was left alone.

    python launch/kill_and_resume.py --target runs/quickstart/target --data runs/quickstart/data --out runs/kill

SIGKILL comes a random time after the process starts: while it imports, compiles, trains or writes a checkpoint. The
final weights must be the same to the last bit; exits with 1 if they are not.
"""

import argparse
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
    begin = time.monotonic()
    if start(arguments, out / "alone").wait():
        return 1
    whole = time.monotonic() - begin
    print(f"left alone: {whole:.1f} s", flush=True)
    draw = random.Random(arguments.seed)
    for number in range(1, arguments.kills + 1):
        process = start(arguments, out / "killed")
        try:
            process.wait(draw.uniform(0.2, 0.8) * whole)
            print(f"kill {number}: came too late, the run was complete", flush=True)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            print(f"kill {number}: newest whole checkpoint {newest(out / 'killed')}", flush=True)
    if start(arguments, out / "killed").wait():
        return 1
    same = weights(out / "alone") == weights(out / "killed")
    print(f"final weights after {arguments.kills} kills: {'bit-identical' if same else 'DIFFERENT'}")
    return 0 if same else 1


def start(arguments: argparse.Namespace, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "specauf_jax", "train", "--config", str(ROOT / "configs/tiny_cpu.py"),
               "--target", arguments.target, "--data", arguments.data, "--out", str(out),
               "--train.steps", str(arguments.steps), "--train.checkpoint-every", str(arguments.checkpoint_every),
               "--train.decode-every", "0", *arguments.extra]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def newest(run: Path) -> int | None:
    steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def weights(run: Path) -> bytes:
    return (run / "drafter/model.safetensors").read_bytes()


if __name__ == "__main__":
    sys.exit(main())
