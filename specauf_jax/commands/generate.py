"""`specauf generate`: continuations of prompts, to a file or streamed to the terminal."""

import json

import jax
from rich.console import Console
from rich.progress import track
from rich.text import Text

from specauf_jax.commands.generate_settings import Generate
from specauf_jax.commands.loading import Models, check_rows, load_models
from specauf_jax.data.tokenizer import Tokenizer
from specauf_jax.decoding.generate import generate as generate_tokens
from specauf_jax.decoding.generate import stream
from specauf_jax.decoding.rows import Generation
from specauf_jax.decoding.state import Decoding
from specauf_jax.distributed import is_primary
from specauf_jax.environment import float32_precision
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.exactness import Comparison, compare, said
from specauf_jax.evaluation.measure import tau_micro
from specauf_jax.evaluation.prompts import Prompt, answer, read_prompts
from specauf_jax.files import AnyPath, output_file, write_text
from specauf_jax.sharding import make_mesh


def generate(config: Generate, console: Console) -> int:
    """Answer every prompt; write JSONL, or print as it comes. Returns the exit code: 1 if --check fails."""
    prompts = read_prompts(config.prompts)
    if config.out is None and jax.process_count() > 1:
        raise SpecaufError("no --out on several hosts", "a file for the continuations", "pass --out FILE.jsonl")
    out = None if config.out is None else output_file(config.out, config.target, config.drafter, config.prompts)
    # What streams is one row, which only a mesh without batch axes can spread.
    devices = None if config.out is not None else jax.devices()[: max(config.mesh.tensor, 1)]
    mesh = make_mesh(config.mesh, devices)
    check_rows(config.batch_size if config.out is not None else 1, mesh)
    with float32_precision(config.dtype):
        models = load_models(config.target, config.drafter, config.dtype, mesh, console, config.template_args)
        models.tell_clock(prompts, console)
        rows = config.batch_size if config.out is not None else 1
        models = models.with_drafts(
            config.verify_slots,
            config.tree_nodes,
            config.tree_temperature,
            prompts,
            rows,
            config.max_new_tokens,
            console,
        )
        if config.out is None:
            _stream_all(models, prompts, config, console)
            return 0
        return _write_all(models, prompts, out, config, console)


def _write_all(models: Models, prompts: list[Prompt], out: AnyPath, config: Generate, console: Console) -> int:
    comparison = Comparison()

    def decoded(requests, indices, decoding: Decoding):
        return generate_tokens(
            models.drafter_params if decoding.drafter else None,
            models.target_params,
            requests,
            config=decoding,
            max_new_tokens=config.max_new_tokens,
            sampling=config.sampling,
            seed=config.seed,
            batch_size=config.batch_size,
            mesh=models.mesh,
            indices=indices,
            track=lambda found: track(
                found, "generating", total=len(requests), console=console, disable=not console.is_terminal
            ),
        )

    def run(requests, indices):
        nonlocal comparison
        models.check_room(requests, config.max_new_tokens)
        found = decoded(requests, indices, models.decoding)
        if config.check:
            texts = found, decoded(requests, indices, models.autoregressive)
            comparison += compare(*texts, models.target_params, models.decoding, config.batch_size, models.mesh)
        return found

    answers = answer(models.tokenizer, prompts, run)
    rows = [_row(models.tokenizer, turns) for turns in answers]
    results = comparison.results()
    code = int(results["exact"] is False)
    if not is_primary():
        return code
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    tau = tau_micro([g.accepted for turns in answers for g in turns])
    checked = f", {said(results)}" if config.check else ""
    console.print(f"{len(rows)} continuations written to {config.out}, tau {tau:.3f}{checked}", highlight=False)
    return code


def _row(tokenizer: Tokenizer, turns: list[Generation]) -> dict:
    """One prompt's result; of several turns the sums, and each turn under `turns`."""
    parts: list[dict] = [
        {
            "prompt_tokens": g.prompt,
            "tokens": g.tokens,
            "text": tokenizer.decode(g.tokens, skip_special_tokens=True),
            "rounds": len(g.accepted),
            "accepted": g.accepted,
        }
        for g in turns
    ]
    if len(parts) == 1:
        return parts[0]
    return {
        "prompt_tokens": parts[0]["prompt_tokens"],
        "tokens": [token for part in parts for token in part["tokens"]],
        "text": "\n".join(part["text"] for part in parts),
        "rounds": sum(part["rounds"] for part in parts),
        "accepted": [a for part in parts for a in part["accepted"]],
        "turns": parts,
    }


def _stream_all(models: Models, prompts: list[Prompt], config: Generate, console: Console) -> None:
    """One prompt after another; green is what the drafter contributed."""

    accepted = []
    for index, prompt in enumerate(prompts):

        def run(requests, _, index=index):
            models.check_room(requests, config.max_new_tokens)
            return [_stream_one(models, request, index, config, console) for request in requests]

        accepted += [g.accepted for g in answer(models.tokenizer, [prompt], run)[0]]
    console.print(
        f"{len(prompts)} prompts, {sum(map(len, accepted))} rounds, tau {tau_micro(accepted):.3f}",
        style="dim",
        highlight=False,
    )


def _stream_one(models: Models, request, index: int, config: Generate, console: Console):
    tokens: list[int] = []
    history: list[int] = []
    console.print(Text(models.tokenizer.decode(request), style="dim"), end="")
    rounds = stream(
        models.drafter_params,
        models.target_params,
        request,
        config=models.decoding,
        max_new_tokens=config.max_new_tokens,
        sampling=config.sampling,
        seed=config.seed,
        index=index,
        mesh=models.mesh,
    )
    shown = ""
    for new, accepted in rounds:
        own = len(new) > accepted  # a stop may have cut off the target's own token
        for part, style in ((new[: len(new) - own], "green"), (new[len(new) - own :], "")):
            tokens += part
            # A character may span tokens: what ends in half of one waits for the rest.
            text = models.tokenizer.decode(tokens).rstrip("\ufffd")
            console.print(Text(text[len(shown) :], style=style), end="")
            shown = text
        history.append(accepted)
    console.print(f"\n── {len(tokens)} tokens in {len(history)} rounds\n", style="dim", highlight=False)
    return Generation(prompt=list(request), tokens=tokens, accepted=history)
