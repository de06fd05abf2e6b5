"""Every shipped recipe for a real target, compiled for every topology; prints the table of configs/README.md.

    python launch/measure/compile_matrix.py [--out runs/compile] [--jobs 2]
    python launch/measure/compile_matrix.py --recipes my_recipe.py --topologies v5e:4x4 --out runs/mine
    python launch/measure/compile_matrix.py --time --topologies v5e:4x4 v6e:4x4 --out runs/compile_time

Writes RECIPE-TOPOLOGY.json for each pair, RECIPE-TOPOLOGY-time.json with `--time`; those already there are kept, so
that it goes on where it stopped: delete the folder after a change of the code. The batch is 64, or the number of
devices where that is more; on v5e in the recipe's parts, elsewhere whole. `--time` finishes the train step's program,
which takes 4 to 10 minutes a pair on two cores, and prints how long it takes instead.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = [
    *("qwen3_4b_dflash", "qwen3_8b_dflash", "qwen3_32b_dflash", "qwen3_30b_a3b_dflash", "qwen3_5_9b_dflash"),
    *("qwen3_5_27b_dflash", "gpt_oss_20b_dflash", "qwen3_8b_domino", "qwen3_8b_dspark", "qwen3_8b_dflash2"),
]
WIDEST = {"gpt_oss_20b_dflash": 64}  # devices on `fsdp` that its sizes take; `replica` takes the others
DEVICES = {"v5e:4x4": 16, "v5p:2x2x4": 16, "v6e:4x4": 16, "tpu7x:2x2x4": 32, "v5p:4x4x8": 128, "v6e:16x16": 256}
IN_PARTS = ["v5e:4x4"]  # memory for the recipe's parts; others take all rows at one time, and gather parameters once
BATCH = 64
MEMORY = ("train step", "decode round", "fits", "collectives", "TFLOP a step", "s at 40 %")
TIME = ("GiB", "target", "blocks", "LM head", "collectives", "s a step", "of peak")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/compile"), help="folder of the reports")
    parser.add_argument(
        "--recipes",
        nargs="+",
        type=Path,
        default=[CONFIGS / f"{name}.py" for name in RECIPES],
        help="files; default: the shipped ones",
    )
    parser.add_argument("--topologies", nargs="+", choices=DEVICES, default=list(DEVICES), help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at one time")
    parser.add_argument("--time", action="store_true", help="seconds of the train step")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cells = [(recipe, topology) for topology in arguments.topologies for recipe in arguments.recipes]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        codes = list(pool.map(lambda cell: compile_cell(*cell, arguments.out, arguments.time), cells))
    print(table(cells, arguments.out, arguments.time))
    return max(codes)


def compile_cell(recipe: Path, topology: str, out: Path, timed: bool) -> int:
    """Exit code of `specauf compile`; its report stays at `report_path`, its output beside."""
    path, devices = report_path(out, recipe, topology, timed), DEVICES[topology]
    if path.exists():
        return 0 if json.loads(path.read_text())["fits"] else 1
    rows = max(BATCH, devices)
    command = ["compile", "--config", recipe, "--topology", topology, "--out", path, "--batch-size", rows]
    command += [] if topology in IN_PARTS else ["--accumulation", 1]
    fsdp = WIDEST.get(recipe.stem, devices)
    command += ["--mesh.fsdp", fsdp, "--mesh.replica", devices // fsdp] if fsdp < devices else []
    command += ["--only", "train"] if timed else ["--no-code"]
    done = subprocess.run([sys.executable, "-m", "specauf_jax", *map(str, command)], capture_output=True, text=True)
    path.with_suffix(".log").write_text(done.stdout + done.stderr)
    print(f"{recipe.stem} on {topology}: exit code {done.returncode}", file=sys.stderr, flush=True)
    return done.returncode


def report_path(out: Path, recipe: Path, topology: str, timed: bool) -> Path:
    """Where a pair's JSON lies."""
    return out / f"{recipe.stem}-{topology.replace(':', '-')}{'-time' * timed}.json"


def table(cells: list[tuple[Path, str]], out: Path, timed: bool) -> str:
    """The reports that are there, as Markdown."""
    columns, row = (TIME, time) if timed else (MEMORY, memory)
    head = ("recipe", "topology", "devices", "rows × parts", "HBM", *columns)
    lines = [head, ("---",) * len(head)]
    for recipe, topology in cells:
        path = report_path(out, recipe, topology, timed)
        if path.exists():
            report = json.loads(path.read_text())
            parts = report["meta"]["recipe"]["train"]["accumulation"]
            shape = f"{report['rows']['train'] // parts} × {parts}", f"{report['hbm_bytes'] / 2**30:.2f}"
            lines.append((recipe.stem, topology, str(report["devices"]), *shape, *row(report)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def time(report: dict) -> tuple[str, ...]:
    """The train step's peak in GiB; its seconds from the fewest to the most, and of what; the share of the peak."""
    found, peak = report["train"]["time"], f"{report['train']['peak_bytes'] / 2**30:.2f}"
    if found is None:  # the compiler found no room
        return peak, *("–" * (len(TIME) - 1))

    def seconds(pair) -> str:
        return " to ".join(f"{x:.2f}" for x in pair)

    parts = [found["compiler"].get(scope, [0, 0]) for scope in ("target", "blocks", "lm_head")]
    low, high = found["utilisation"]
    return (
        peak,
        *(f"{pair[1]:.2f}" for pair in parts),
        seconds(found["collectives"]),
        seconds(found["total"]),
        f"{100 * low:.0f} to {100 * high:.0f} %",
    )


def memory(report: dict) -> tuple[str, ...]:
    """Memory in GiB per device, collectives in GiB that a device receives in a step."""
    train = report["train"]
    moved = sum(entry["bytes"] for entry in train["collectives"].values()) / 2**30
    return (
        sizes(train),
        sizes(report["decode"]),
        "yes" if report["fits"] else "no",
        f"{moved:,.0f}",
        f"{train['flops'] / 1e12:,.0f}",
        f"{train['seconds']['at_40_percent']:.2f}",
    )


def sizes(program: dict) -> str:
    """Arguments + temporaries = peak, in GiB; no code is generated, for want of time."""
    parts = program["argument_bytes"], program["temporary_bytes"]
    return " + ".join(f"{size / 2**30:.2f}" for size in parts) + f" = **{program['peak_bytes'] / 2**30:.2f}**"


if __name__ == "__main__":
    sys.exit(main())
