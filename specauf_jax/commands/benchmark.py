"""`specauf benchmark`: speed of autoregressive decoding, prompt lookup and drafters at several batch sizes."""

import dataclasses
import json

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from specauf_jax.checks import named
from specauf_jax.commands.benchmark_settings import Benchmark
from specauf_jax.commands.loading import Models, check_rows, load_models, with_drafts
from specauf_jax.decoding.baselines import PromptLookup
from specauf_jax.decoding.generate import start
from specauf_jax.decoding.state import Decoding
from specauf_jax.distributed import is_primary
from specauf_jax.environment import describe_environment, float32_precision
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.exactness import compare, said
from specauf_jax.evaluation.measure import alpha, tau_micro
from specauf_jax.evaluation.prompts import encode_first_turn, read_prompts
from specauf_jax.evaluation.timing import Timed, spread, timed_part, timed_pass, widths
from specauf_jax.files import existing_folder, output_file, write_text
from specauf_jax.models.cpu import serving_params
from specauf_jax.models.resolve import fitted
from specauf_jax.models.target import target_step
from specauf_jax.models.weights import drafter_config, load_drafter, target_config
from specauf_jax.sharding import make_mesh

ALONE, LOOKUP = "autoregressive", "prompt_lookup"
CONVENTIONS = {
    "tokens_per_s": "new tokens of all rows by seconds in the decoding loop, prefill apart",
    "ms_per_token": "milliseconds between two tokens of one row: decoding time × batch size / new tokens",
    "ms_per_round": "decoding time by rounds of the device's loop, which ends with its slowest row",
    "speedup": "autoregressive by own decoding time, within one repeat",
    "median, p10, p90": "over the repeats; in each, every method runs once, one after another",
    "round.draft_ms": "the drafter alone: proposing, and reading the K new positions into its cache",
    "round.verify_ms": "the target's pass over K tokens alone, or over a tree's N + 1, with its choices",
    "round.round_ms": "a whole round in the same kind of loop, each part compiled by itself and run on one state",
    "round.commit_ms": "the rest, round - draft - verify: comparing, committing, book-keeping; near 0 it is noise",
    "round.overhead": "commit_ms by round_ms",
    "widths": "rounds that verify fewer tokens: their cost, as round.round_ms, the tokens that alpha lets expect, and "
    "these by round_ms against the target alone in its own round_ms",
}


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to decode."""

    decoding: Decoding
    drafter_params: dict | None = None


def benchmark(config: Benchmark, console: Console) -> dict:
    """Measure, print a table, write `config.out`; returns what was written."""
    folders = named("--drafters", config.drafters, "DIR", taken=(ALONE, LOOKUP))
    out = output_file(config.out, config.target, config.prompts, *folders.values())
    mesh = make_mesh(config.mesh)
    for size in config.batch_sizes:
        check_rows(size, mesh)
    prompts = read_prompts(config.prompts)
    for folder in folders.values():
        existing_folder(folder, "a drafter")
    with float32_precision(config.dtype):
        models = load_models(config.target, None, config.dtype, mesh, console, config.template_args)
        models.tell_clock(prompts, console)
        requests = [encode_first_turn(models.tokenizer, prompt) for prompt in prompts]
        models.check_room(requests, config.max_new_tokens)
        methods = load_methods(folders, models, config)
        decoding = {}
        for size in config.batch_sizes:
            decoding[str(size)] = measure_size(size, requests, methods, models, config, console)
    meta = describe_environment(mesh) | {"dtype": config.dtype, "config": dataclasses.asdict(config)}
    meta |= {
        "target_parameters": sum(x.size for x in jax.tree.leaves(models.target_params)),
        "conventions": CONVENTIONS,
    }
    results = {"decoding": decoding, "meta": meta}
    if is_primary():
        write_text(out, json.dumps(results, indent=2) + "\n")
    _show(results, console)
    return results


def load_methods(folders: dict[str, str], models: Models, config: Benchmark) -> dict[str, Method]:
    """All that is compared: the target alone, prompt lookup, every drafter."""
    alone, target = models.autoregressive, target_config(config.target)
    lookup = PromptLookup(config.lookup_block_size, config.lookup_ngram)
    methods = {ALONE: Method(alone), LOOKUP: Method(dataclasses.replace(alone, drafter=lookup))}
    for name, folder in folders.items():
        drafter = fitted(drafter_config(folder), target)
        step = target_step(target, drafter.target_layer_ids)
        params = serving_params(load_drafter(folder, config.dtype, models.mesh)[0])
        methods[name] = chain = Method(dataclasses.replace(alone, drafter=drafter, target_step=step), params)
        for nodes in config.tree_nodes:
            if f"{name}/tree {nodes}" in folders:
                raise SpecaufError(f"a drafter named {name}/tree {nodes}", "names other than those of the trees",
                                   "give it another name")  # fmt: skip
            heat = config.tree_temperature
            tree = dataclasses.replace(chain.decoding, tree_nodes=nodes, tree_temperature=heat)
            methods[f"{name}/tree {nodes}"] = Method(tree, params)
    return methods


def measure_size(size: int, requests, methods: dict[str, Method], models: Models, config: Benchmark, console) -> dict:
    """Every method at one batch size."""
    count = -(-max(size, config.max_prompts) // size) * size
    asked = [requests[i % len(requests)] for i in range(count)]
    methods = {name: _narrowed(method, asked, size, models, config, console) for name, method in methods.items()}

    def once(method: Method) -> Timed:
        return timed_pass(
            method.drafter_params,
            models.target_params,
            asked,
            config=method.decoding,
            max_new_tokens=config.max_new_tokens,
            batch_size=size,
            mesh=models.mesh,
        )

    passes: dict[str, list[Timed]] = {name: [] for name in methods}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"batch {size}", total=len(methods) * (config.repeats + 2))
        for repeat in range(config.repeats + 1):  # the first compiles, and does not count
            for name, method in methods.items():
                timed = once(method)
                passes[name] += [timed] if repeat else []
                bar.advance(task)
        rounds = {}
        for name, method in methods.items():
            rounds[name] = {"round": measure_round(method, asked[:size], models, config)}
            if method.decoding.drafter is not None and method.decoding.tree_nodes is None:
                alone_ms = rounds[ALONE]["round"]["round_ms"]
                rounds[name] |= measure_widths(method, passes[name][-1], asked[:size], alone_ms, models, config)
            bar.advance(task)
    alone = passes[ALONE]
    measured = {}
    for name, method in methods.items():
        texts = passes[name][-1].generations, alone[-1].generations
        comparison = compare(*texts, models.target_params, method.decoding, size, models.mesh)
        measured[name] = comparison.results() | summary(passes[name], alone, size)
        measured[name] |= {"block_size": method.decoding.block_size, "tree_nodes": method.decoding.tree_nodes}
        measured[name] |= rounds[name]
    return measured


def summary(passes: list[Timed], alone: list[Timed], size: int) -> dict:
    """Measures of one method's passes, beside the autoregressive passes of the same repeats."""
    found = passes[-1].generations
    tokens = sum(len(g.tokens) for g in found)
    return {
        "tau": tau_micro([g.accepted for g in found]),
        "tokens": tokens,
        "tokens_per_s": spread([tokens / p.decode_s for p in passes]),
        "ms_per_token": spread([1000 * p.decode_s * size / tokens for p in passes]),
        "ms_per_round": spread([1000 * p.decode_s / p.rounds for p in passes]),
        "prefill_s": spread([p.prefill_s for p in passes]),
        "speedup": spread([a.decode_s / p.decode_s for p, a in zip(passes, alone, strict=True)]),
    }


def _narrowed(method: Method, requests, size: int, models: Models, config: Benchmark, console: Console) -> Method:
    """A drafter's chain with as many verified tokens as --verify-slots says."""
    if method.decoding.model is None or method.decoding.tree_nodes is not None:
        return method
    params = method.drafter_params, models.target_params
    decoding = with_drafts(
        method.decoding,
        config.verify_slots,
        None,
        1.0,
        params,
        requests,
        batch_size=size,
        mesh=models.mesh,
        console=console,
    )
    return dataclasses.replace(method, decoding=decoding)


def measure_widths(method: Method, timed: Timed, requests, alone_ms: float, models: Models, config: Benchmark) -> dict:
    """What rounds of fewer verified tokens would give, by the acceptance that was seen."""
    params = method.drafter_params, models.target_params
    room = max(config.max_new_tokens, method.decoding.block_size)
    state = start(*params, requests, config=method.decoding, max_new_tokens=room, mesh=models.mesh)
    accepted = alpha([g.accepted for g in timed.generations], method.decoding.block_size)
    found = widths(*params, state, config=method.decoding, accepted=accepted, repeats=config.repeats)
    by_slots = {
        str(w.slots): {"round_ms": w.round_ms, "tokens": w.tokens, "speedup": w.tokens_per_ms * alone_ms} for w in found
    }
    best = max(found, key=lambda width: width.tokens_per_ms)
    return {"alpha": accepted, "widths": by_slots, "fastest_width": best.slots}


def measure_round(method: Method, requests, models: Models, config: Benchmark) -> dict[str, float]:
    """Milliseconds of a round and of its parts, on the state after the prompts of one batch."""
    params = method.drafter_params, models.target_params
    room = max(config.max_new_tokens, method.decoding.block_size)
    state = start(*params, requests, config=method.decoding, max_new_tokens=room, mesh=models.mesh)
    parts = ["target", "round", "draft"][: 3 if method.decoding.drafter else 2]
    seconds: dict[str, list[float]] = {part: [] for part in parts}
    for repeat in range(config.repeats + 1):
        for part in parts:
            taken, state = timed_part(part, *params, state, config=method.decoding)
            seconds[part] += [taken] if repeat else []
    draft, verify, whole = (1000 * float(np.median(seconds.get(part, 0.0))) for part in ("draft", "target", "round"))
    rest = whole - draft - verify
    return {"draft_ms": draft, "verify_ms": verify, "commit_ms": rest, "round_ms": whole, "overhead": rest / whole}


def _show(results: dict, console: Console) -> None:
    table = Table("batch", "method", "tau", "exact", "tokens/s", "ms/token", "ms/round", "draft", "verify", "rest", "×")
    for size, methods in results["decoding"].items():
        for name, m in methods.items():
            medians = [m[key]["median"] for key in ("tokens_per_s", "ms_per_token", "ms_per_round")]
            parts = [m["round"][key] for key in ("draft_ms", "verify_ms", "commit_ms")]
            numbers = [f"{medians[0]:,.1f}", *(f"{x:.2f}" for x in (*medians[1:], *parts, m["speedup"]["median"]))]
            table.add_row(size, name, f"{m['tau']:.2f}", said(m), *numbers)
        table.add_section()
    console.print(table)
    narrow = Table("batch", "method", "alpha", "ms/round and × by verified slots", "fastest")
    for size, methods in results["decoding"].items():
        for name, m in methods.items():
            if "widths" in m:
                costs = (f"{n}: {w['round_ms']:.1f} ms {w['speedup']:.2f} ×" for n, w in m["widths"].items())
                shares = " ".join("—" if share is None else f"{share:.2f}" for share in m["alpha"])
                narrow.add_row(size, name, shares, ", ".join(costs), str(m["fastest_width"]))
    console.print(narrow)
