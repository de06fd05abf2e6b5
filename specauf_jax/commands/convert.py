"""`specauf convert`: a target's Hugging Face folder from a GGUF file."""

import functools
import json
import math

from rich.console import Console
from rich.progress import track

from specauf_jax.commands.convert_settings import Convert
from specauf_jax.data.gguf_tokenizer import write_tokenizer
from specauf_jax.files import check_writable, fresh_folder, read_json
from specauf_jax.models.gguf import open_gguf, read_architecture, read_tensor
from specauf_jax.models.hf_target import write_target
from specauf_jax.models.weights import target_tensors, write_shards


def convert(config: Convert, console: Console) -> None:
    """Write `config.out`, whole or not at all."""
    file = open_gguf(config.gguf)
    target = read_architecture(file)
    shapes = target_tensors(target)
    numbers = sum(map(math.prod, shapes.values()))
    check_writable(config.out, numbers * (4 if config.dtype == "float32" else 2))
    with fresh_folder(config.out) as new:
        stops = write_tokenizer(file.keys, file.where, target.vocab_size, new)
        special = read_json(new / "generation_config.json", "special tokens")
        values = write_target(target) | {"dtype": config.dtype} | special
        (new / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        read = functools.partial(read_tensor, file, config=target)
        bar = functools.partial(track, description="converting", console=console, disable=not console.is_terminal)
        write_shards(shapes, read, new, config.dtype, bar)
    console.print(
        f"{values['architectures'][0]} of {numbers / 1e6:,.1f} M parameters, stored as {file.quantisation}, "
        f"stops at {', '.join(f'{token} ({id_})' for id_, token in stops.items())}: "
        f"written to {config.out} in {config.dtype}",
        highlight=False,
    )
