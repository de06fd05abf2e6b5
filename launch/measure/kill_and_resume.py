"""Kill a training run at random moments, let it go on each time, and compare it with a run that was left alone.

    python launch/measure/kill_and_resume.py --target runs/quickstart/target --data runs/quickstart/data \\
        --out runs/kill --hosts 4 --kills 30

One end comes in each of equal parts of the run, of three kinds in turn: SIGKILL of one process, shortly after a
random step; SIGTERM of all; SIGKILL of one process while a checkpoint is being written. Each time every process must
end within the heartbeat's time, and the next start must go on from the newest whole checkpoint (after SIGTERM: from
the very step). The final weights must be the same to the last bit; exits with 1 if anything is otherwise.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import simulate_hosts

ROOT = Path(__file__).resolve().parents[2]
HEARTBEAT_S = 10
KINDS = ("kill one", "terminate all", "kill in a write")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, help="folder for both runs; deleted first")
    parser.add_argument("--hosts", type=int, default=1, help="processes")
    parser.add_argument("--devices-per-host", type=int, default=1)
    parser.add_argument("--kills", type=int, default=9)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--checkpoint-every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is killed")
    parser.add_argument("extra", nargs="*", help="further settings of specauf train, after --")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    shutil.rmtree(out, ignore_errors=True)
    if any(wait(start(arguments, out / "alone"), 3600)):
        return 1
    print("left alone: complete", flush=True)
    draw, failures, in_time = random.Random(arguments.seed), 0, 0
    for number in range(1, arguments.kills + 1):
        moment = arguments.steps * draw.uniform(number - 1, number) / arguments.kills
        kind = KINDS[(number - 1) % len(KINDS)]
        before = newest(out / "killed")
        processes = start(arguments, out / "killed")
        end(processes, kind, moment, out / "killed", draw)
        began = time.monotonic()
        codes = wait(processes, 3 * HEARTBEAT_S)
        seconds = time.monotonic() - began
        late = not any(codes) and (out / "killed/drafter").exists()
        resumed = resumed_at(out / "killed.log")
        expected = {kind: (0,) * len(codes)} if kind == "terminate all" else {}
        good = resumed == before and None not in codes and (late or codes == expected.get(kind, codes))
        failures += not good
        in_time += not late
        print(f"{number}: {kind}{', came too late' if late else ''}; {'' if good else 'WRONG: '}went on from {resumed} "
              f"(newest was {before}), logged to {logged(out / 'killed')}, codes {codes} within {seconds:.1f} s, "
              f"newest now {newest(out / 'killed')}", flush=True)  # fmt: skip
    if any(wait(start(arguments, out / "killed"), 3600)):
        return 1
    same = weights(out / "alone") == weights(out / "killed")
    print(f"final weights after {in_time} ends in time: {'bit-identical' if same else 'DIFFERENT'}; {failures} wrong")
    return 0 if same and not failures else 1


def start(arguments: argparse.Namespace, out: Path) -> list[subprocess.Popen]:
    command = ["train", "--config", str(ROOT / "configs/tiny_cpu.py"), "--target", arguments.target,
               "--data", arguments.data, "--out", str(out), "--train.steps", str(arguments.steps),
               "--train.checkpoint-every", str(arguments.checkpoint_every), "--train.decode-every", "0",
               "--hosts.heartbeat-s", str(HEARTBEAT_S), *arguments.extra]  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{out}.log").open("w") as log:
        return simulate_hosts.start(command, arguments.hosts, arguments.devices_per_host, stdout=log, stderr=log)


def end(processes: list[subprocess.Popen], kind: str, moment: float, run: Path, draw: random.Random) -> None:
    """Wait for the moment of this kind of end, then send its signal."""
    began = time.time()
    while running(processes) and not (logged(run) >= moment and (kind == "kill one" or at_work(run, began))):
        time.sleep(0.05)
    if kind == "kill in a write":
        while running(processes) and not any("tmp" in path.name for path in (run / "checkpoints").glob("*")):
            time.sleep(0.002)
    else:
        time.sleep(draw.uniform(0, 0.3))
    victims = processes if kind == "terminate all" else [draw.choice(processes)]
    for process in victims:
        process.send_signal(signal.SIGTERM if kind == "terminate all" else signal.SIGKILL)


def at_work(run: Path, began: float) -> bool:
    """Whether a run that was started at `began` has come to its loop, before which there is nothing to save."""
    return (run / "config.json").stat().st_mtime > began


def running(processes: list[subprocess.Popen]) -> bool:
    return all(process.poll() is None for process in processes)


def wait(processes: list[subprocess.Popen], seconds: float) -> tuple:
    """Exit codes of all; None, and SIGKILL, for one that still runs after so many seconds."""
    codes, until = [], time.monotonic() + seconds
    for process in processes:
        try:
            codes.append(process.wait(max(0.0, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(None)
    return tuple(codes)


def resumed_at(log: Path) -> int | None:
    """The step that a run said it went on from; None for a fresh start."""
    found = [line.split(" at step ")[1].split()[0] for line in log.read_text().splitlines() if " at step " in line
             and line.startswith("resuming ")]  # fmt: skip
    return int(found[0]) if found else None


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
