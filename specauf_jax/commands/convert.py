"""`specauf convert`: a target's Hugging Face folder from a GGUF file."""

import json
import math

import numpy as np
from rich.console import Console
from rich.progress import track

from specauf_jax.commands.convert_settings import Convert
from specauf_jax.data.gguf_tokenizer import write_tokenizer
from specauf_jax.errors import SpecaufError
from specauf_jax.files import check_absent, check_apart, check_writable, fresh_folder, read_json
from specauf_jax.models.gguf import open_gguf, read_architecture, tensor_readers
from specauf_jax.models.hf_config import write_target
from specauf_jax.models.weights import target_tensors, write_shards


def convert(config: Convert, console: Console) -> None:
    """Write `config.out`, whole or not at all."""
    check_apart(config.out, config.gguf)
    check_absent(config.out)
    file = open_gguf(config.gguf)
    target = read_architecture(file)
    shapes = target_tensors(target)
    readers = tensor_readers(file, target, shapes)
    numbers = sum(map(math.prod, shapes.values()))
    check_writable(config.out, numbers * (4 if config.dtype == "float32" else 2))
    with fresh_folder(config.out) as new:
        stops, tokens = write_tokenizer(file.keys, file.where, new)
        if len(tokens) > target.vocab_size:
            raise SpecaufError(f"{file.where} has {len(tokens)} tokens and {target.vocab_size} embeddings",
                               "an embedding for every token", "use another file")  # fmt: skip
        special = read_json(new / "generation_config.json", "special tokens")
        values = write_target(target) | {"dtype": config.dtype} | special
        (new / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        write_shards(readers, shapes, new, config.dtype, lambda names: track(
            names, "converting", console=console, disable=not console.is_terminal))  # fmt: skip
    console.print(
        f"{values['architectures'][0]} of {numbers / 1e6:,.1f} M parameters, stored as {file.quantisation}, "
        f"stops at {', '.join(f'{tokens[stop]} ({stop})' for stop in stops)}: written to {config.out} as {config.dtype}",
        highlight=False,
    )
