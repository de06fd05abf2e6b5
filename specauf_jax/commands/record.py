"""What a training run says of itself: the settings stored with it, and the line at its start."""

import dataclasses
import json

from rich.console import Console

from specauf_jax.environment import describe_environment


def run_record(config, manifest: dict, **resolved) -> dict:
    """What a checkpoint must agree with: the command's config, what was resolved from it, the dataset."""
    record = json.loads(json.dumps(dataclasses.asdict(config) | resolved))
    return record | {
        name: manifest[name]
        for name in ("sequence_length", "tokenizer_sha256", "template_sha256", "template_args", "rows")
    }


def announce(out, mesh, console: Console) -> dict:
    """Print where and on what a command runs; returns the environment's description."""
    environment = describe_environment(mesh)
    shape = " ".join(f"{axis}={size}" for axis, size in environment["mesh"].items())
    console.print(
        f"[bold]{out}[/bold]  {environment['devices']} × {environment['device']}, mesh {shape}, "
        f"jax {environment['versions']['jax']}, revision {environment['revision']}",
        highlight=False,
    )
    return environment
