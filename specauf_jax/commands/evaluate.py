"""`specauf evaluate`: tau, acceptance, exactness and speed of a drafter on prompt sets."""

import dataclasses
import json
import statistics

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specauf_jax.checks import named
from specauf_jax.commands.evaluate_settings import Evaluate
from specauf_jax.commands.loading import Models, check_rows, load_models, read_origin
from specauf_jax.decoding.state import Decoding
from specauf_jax.distributed import is_primary
from specauf_jax.environment import describe_environment, float32_precision
from specauf_jax.evaluation.exactness import Comparison, compare, said
from specauf_jax.evaluation.measure import acceptance_measures
from specauf_jax.evaluation.prompts import Prompt, answer, read_prompts
from specauf_jax.evaluation.timing import Timed, timed_pass
from specauf_jax.files import output_file, write_text
from specauf_jax.sharding import make_mesh
from specauf_jax.training.origin import objective_title


def evaluate(config: Evaluate, console: Console) -> dict:
    """Measure every set, print a table, write `config.out`; returns what was written."""
    files = named("--prompts", config.prompts, "FILE.jsonl")
    out = output_file(config.out, config.target, config.drafter, *files.values())
    sets = {name: read_prompts(file)[: config.max_prompts or None] for name, file in files.items()}
    origin = read_origin(config.drafter)
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size, mesh)
    with float32_precision(config.dtype):
        models = load_models(config.target, config.drafter, config.dtype, mesh, console, config.template_args)
        everything = [prompt for prompts in sets.values() for prompt in prompts]
        models.tell_clock(everything, console)
        spread = everything[:: max(1, len(everything) // config.batch_size)]
        models = models.with_drafts(
            config.verify_slots,
            config.tree_nodes,
            config.tree_temperature,
            spread,
            config.batch_size,
            config.max_new_tokens,
            console,
        )
        measured = {}
        for name, prompts in sets.items():
            with console.status(Text(f"{name}: {len(prompts)} prompts, warm-up and {config.repeats} timed passes")):
                measured[name] = _measure(models, prompts, config)
            console.print(f"{name}: {_line(_part(measured[name], models))}", highlight=False)
    parts = {name: _part(set_, models) for name, set_ in measured.items()}
    overall = _part(_joined(list(measured.values())), models)
    results = {"overall": overall, "sets": parts, "meta": _meta(config, models, origin)}
    if is_primary():
        write_text(out, json.dumps(results, indent=2) + "\n")
    _show(results, console)
    return results


@dataclasses.dataclass
class Measured:
    """Passes over one set, after warm-up; generations are those of the last pass."""

    speculative: list[Timed]
    autoregressive: list[Timed]
    prompts: list  # of each generation: which prompt it is a turn of
    comparison: Comparison


def _measure(models: Models, prompts: list[Prompt], config: Evaluate) -> Measured:
    def timed(requests, decoding: Decoding) -> Timed:
        return timed_pass(
            models.drafter_params if decoding.drafter else None,
            models.target_params,
            requests,
            config=decoding,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            sampling=config.sampling,
            seed=config.seed,
            mesh=models.mesh,
        )

    # The first pass compiles, and answers turn by turn; its requests are then timed all at once.
    requests: list[list[int]] = []
    owners: list[int] = []

    def first_pass(batch, indices):
        models.check_room(batch, config.max_new_tokens)
        requests.extend(batch)
        owners.extend(indices)
        return timed(batch, models.decoding).generations

    answer(models.tokenizer, prompts, first_pass)
    if any(len(prompt.turns) > 1 for prompt in prompts):  # all turns together make other shapes than turn by turn
        timed(requests, models.decoding)
    timed(requests, models.autoregressive)
    passes = [(timed(requests, models.decoding), timed(requests, models.autoregressive)) for _ in range(config.repeats)]
    speculative, autoregressive = zip(*passes, strict=True)
    comparison = Comparison()  # of draws only the distributions agree
    if config.sampling.temperature == 0:
        texts = speculative[-1].generations, autoregressive[-1].generations
        comparison = compare(*texts, models.target_params, models.decoding, config.batch_size, models.mesh)
    return Measured(list(speculative), list(autoregressive), owners, comparison)


def _part(measured: Measured, models: Models) -> dict:
    """One set's entry of the results file."""
    generations = measured.speculative[-1].generations
    part = acceptance_measures(generations, models.decoding.block_size, measured.prompts)
    part |= measured.comparison.results()
    part |= _speed("", measured.speculative) | _speed("autoregressive_", measured.autoregressive)
    return part | {"speedup": part["tokens_per_s"] / part["autoregressive_tokens_per_s"]}


def _speed(prefix: str, passes: list[Timed]) -> dict:
    tokens = sum(len(g.tokens) for g in passes[-1].generations)
    decode_s = statistics.median(p.decode_s for p in passes)
    return {
        f"{prefix}tokens_per_s": tokens / decode_s,
        f"{prefix}ms_per_token": 1000 * decode_s / tokens,
        f"{prefix}prefill_s": statistics.median(p.prefill_s for p in passes),
    }


def _joined(measured: list[Measured]) -> Measured:
    """All sets as one."""

    def join(passes: tuple[Timed, ...]) -> Timed:
        return Timed(
            [g for p in passes for g in p.generations],
            sum(p.prefill_s for p in passes),
            sum(p.decode_s for p in passes),
            sum(p.rounds for p in passes),
        )

    def repeats(which: str) -> list[Timed]:
        return [join(passes) for passes in zip(*(getattr(m, which) for m in measured), strict=True)]

    prompts = [(number, prompt) for number, m in enumerate(measured) for prompt in m.prompts]
    comparison = sum((m.comparison for m in measured), Comparison())
    return Measured(repeats("speculative"), repeats("autoregressive"), prompts, comparison)


def _meta(config: Evaluate, models: Models, origin: dict) -> dict:
    return describe_environment(models.mesh) | {
        "dtype": config.dtype,
        "temperature": config.sampling.temperature,
        "block_size": models.decoding.block_size,
        "tree_nodes": models.decoding.tree_nodes,
        "tree_temperature": models.decoding.tree_temperature,
        "seed": config.seed,
        "objective": objective_title(origin),
        "drafter": origin,
        "config": dataclasses.asdict(config),
        "conventions": {
            "tau": "mean of accepted + 1 over rounds; the last round counts in full, though a stop may cut its tokens",
            "calibration": "share of rounds in which n = 1..K-1 drafts stand, by the confidence and in fact",
            "tau_outside_loops": "rounds whose anchor does not stand in a stretch of period <= 16 over 16 tokens",
            "tokens_per_s": "new tokens by seconds in the decoding loop, prefill apart; median over repeats",
        },
    }


def _line(part: dict) -> str:
    outside = part["tau_outside_loops"]
    outside = "—" if outside is None else f"{outside:.3f}"
    return (
        f"tau {part['tau_micro']:.3f} (outside loops {outside}), {said(part)}, "
        f"{part['tokens_per_s']:,.0f} tokens/s, {part['speedup']:.2f} × autoregressive"
    )


def _show(results: dict, console: Console) -> None:
    table = Table("set", "tau micro", "macro", "outside loops", "exact", "tokens/s", "autoregressive", "ratio")
    for name, part in [*results["sets"].items(), ("overall", results["overall"])]:
        numbers = [part["tau_micro"], part["tau_macro"], part["tau_outside_loops"]]
        table.add_row(
            name,
            *("—" if n is None else f"{n:.3f}" for n in numbers),
            said(part),
            f"{part['tokens_per_s']:,.0f}",
            f"{part['autoregressive_tokens_per_s']:,.0f}",
            f"{part['speedup']:.2f}",
        )
    console.print(table)
    if found := results["overall"]["calibration"]:
        table = Table("drafts that stand", *(f"{n} or more" for n in range(1, len(found["observed"]) + 1)))
        for name, shares in found.items():
            table.add_row(name, *(f"{share:.3f}" for share in shares))
        console.print(table)
