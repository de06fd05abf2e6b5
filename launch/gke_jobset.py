"""A JobSet for GKE from gke_jobset.yaml, to standard output; nothing is sent anywhere.

    python launch/gke_jobset.py --name auf --image REGISTRY/specauf --accelerator tpu-v5-lite-podslice --topology 4x4 \\
        -- specauf train --config configs/qwen3_8b_dflash.py --target gs://… --data gs://… --out gs://… \\
        | kubectl apply -f -

The cluster needs JobSet (v0.6 or newer) and a TPU node pool a slice, or auto-provisioning; its service account must
reach the gs:// paths. The image (launch/Dockerfile makes one) needs specauf, jax[tpu] and the recipe named.
A Pod that SIGTERM stops ends with code 75: all start again, and the run goes on from its newest checkpoint, at most
--max-restarts times. Exit codes 2, bad input, and 3, work that cannot go on, end the JobSet at once. `kubectl delete
jobset NAME` removes it. Where slices may become ready at very different times, say --hosts.join-s in the command, the
seconds to wait for the others.
"""

import argparse
import json
import math
import re
import string
import sys
from pathlib import Path

TEMPLATE = Path(__file__).with_name("gke_jobset.yaml")
STOPPED_CODE = 75
"""Exit code of specauf after SIGTERM: with 0, the Pod would count as done."""
DIMENSIONS = {"tpu-v4-podslice": 3, "tpu-v5p-slice": 3, "tpu7x": 3, "tpu-v5-lite-podslice": 2, "tpu-v6e-slice": 2}
"""GKE's name of an accelerator → numbers in its topologies."""
COMMANDS = ("train", "pretrain", "regenerate", "synthesize", "generate", "evaluate", "benchmark", "benchmark-train")
"""Those that run on several hosts."""


def main(arguments: list[str] | None = None) -> None:
    """Print the JobSet; exit with code 2 where an argument is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--accelerator", required=True, help=", ".join(DIMENSIONS))
    parser.add_argument("--topology", required=True, help="of one slice, such as 4x4 or 2x2x4")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--chips-per-host", type=int, help="default: 4, or the slice's if it has fewer")
    parser.add_argument("--max-restarts", type=int, default=100)
    parser.add_argument("--on-demand", action="store_true", help="not spot")
    parser.add_argument("command", nargs="+", help="specauf's command and its settings, after --")
    settings = parser.parse_args(arguments)
    try:
        sys.stdout.write(render(settings))
    except ValueError as error:
        parser.error(str(error))


def render(settings: argparse.Namespace) -> str:
    """The template, filled.

    Raises:
      ValueError: what was found and what was expected.
    """
    _check(settings)
    chips = math.prod(map(int, settings.topology.split("x")))
    chips_per_host = min(4, chips) if settings.chips_per_host is None else settings.chips_per_host
    if chips_per_host < 1 or chips % chips_per_host:
        raise ValueError(
            f"found --chips-per-host {chips_per_host}, expected a divisor of {settings.topology}'s {chips}"
        )
    lines = TEMPLATE.read_text().splitlines(keepends=True)
    if settings.on_demand:
        lines = [line for line in lines if not line.endswith("# spot only\n")]
    values = vars(settings) | {
        "hosts": chips // chips_per_host,
        "chips_per_host": chips_per_host,
        "topology": json.dumps(settings.topology),
        "image": json.dumps(settings.image),  # JSON is YAML, whatever is in it
        "command": json.dumps([*settings.command, "--hosts.stopped-code", str(STOPPED_CODE)], ensure_ascii=False),
    }
    return string.Template("".join(lines[3:])).substitute(values)


def _check(settings: argparse.Namespace) -> None:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", settings.name):
        raise ValueError(f"found --name {settings.name!r}, expected at most 40 of a-z, 0-9 and -, a letter first")
    if not re.fullmatch(r"\S+", settings.image):
        raise ValueError(f"found --image {settings.image!r}, expected a name without spaces")
    if settings.accelerator not in DIMENSIONS:
        raise ValueError(f"found --accelerator {settings.accelerator!r}, expected one of {', '.join(DIMENSIONS)}")
    numbers = DIMENSIONS[settings.accelerator]
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{numbers - 1}}}", settings.topology):
        raise ValueError(
            f"found --topology {settings.topology!r}, expected {numbers} numbers as in {'x'.join('224'[:numbers])}"
        )
    if settings.slices < 1 or settings.max_restarts < 0:
        raise ValueError(
            f"found --slices {settings.slices}, --max-restarts {settings.max_restarts}, expected at least 1 and 0"
        )
    if settings.command[0] != "specauf" or settings.command[1:2] == [] or settings.command[1] not in COMMANDS:
        raise ValueError(f"found the command {settings.command}, expected -- specauf and one of {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
