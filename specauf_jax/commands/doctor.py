"""`specauf doctor`: a drafter folder's conventions against its target, read and measured, and who will serve it."""

import contextlib
import dataclasses
import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specauf_jax.architecture import ResolvedDrafter
from specauf_jax.commands.doctor_settings import Doctor
from specauf_jax.commands.loading import load_target_with_bar
from specauf_jax.data.tokenizer import eos_token_ids, load_tokenizer
from specauf_jax.environment import describe_environment, float32_precision
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.doctor.acceptance import (
    built_in_prompts,
    has_rope_of,
    judge,
    readings_of,
    rope_unmeasured,
)
from specauf_jax.evaluation.doctor.engines import SERVERS, Engine, engine_table
from specauf_jax.evaluation.doctor.measured import Measured, gain, measure
from specauf_jax.evaluation.doctor.pair import Finding, Pair, read_pair, repaired, repaired_folder
from specauf_jax.evaluation.doctor.reading import read_findings
from specauf_jax.evaluation.prompts import encode_first_turn, read_prompts
from specauf_jax.files import as_path, existing_folder, local_copy, write_text
from specauf_jax.models.hf_config import read_drafter
from specauf_jax.models.weights import load_drafter, target_config

_MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "note": ("·", "dim")}
_ENGINE_STYLES = {"yes": "green", "converted": "green", "differently": "yellow", "no": "red"}


def doctor(config: Doctor, console: Console) -> int:
    """Print all findings and engines, write `config.out`; returns the exit code: 1 if there is an error."""
    out = None if config.out is None else as_path(config.out)
    folder = existing_folder(local_copy(config.target), "a target")
    architecture = target_config(folder)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    pair = read_pair(config.drafter, folder, architecture, tokenizer)
    prompts = _prompts(config, pair)
    findings = read_findings(pair)
    values, assumed = repaired(pair)
    drafter, said = _parse(pair, values, findings)
    findings += said
    measured: list[Measured] = []
    if drafter is not None:
        measured, said = _decode(config, pair, drafter, values, assumed, prompts, findings, console)
        findings += said
    taus = {m.reading.kind: m.tau for m in measured if m.reading.kind != "ids"}
    other_rope = drafter is not None and not has_rope_of(drafter, architecture)
    engines = engine_table(pair, taus, other_rope=other_rope)
    levels = [finding.level for finding in findings]
    summary = {f"{level}s": levels.count(level) for level in _MARKS} | {"tau": taus.get("given")}
    _show(findings, measured, engines, summary, console)
    if out is not None:
        result = {
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "measured": [_row(m, measured) for m in measured],
            "engines": [dataclasses.asdict(engine) for engine in engines],
            "summary": summary,
            "meta": describe_environment() | {"config": dataclasses.asdict(config)},
        }
        write_text(out, json.dumps(result, indent=2) + "\n")
    return int("error" in levels)


# ---------------------------------------------------------------------------------------------
# Decoding


def _prompts(config: Doctor, pair: Pair) -> list[list[int]]:
    """Token ids of the texts to decode; none without a tokenizer."""
    if pair.tokenizer is None or not config.max_prompts:
        return []
    if config.prompts is None:
        requests = built_in_prompts(pair.tokenizer)[: config.max_prompts]
    else:
        prompts = read_prompts(config.prompts)[: config.max_prompts]
        requests = [encode_first_turn(pair.tokenizer, prompt) for prompt in prompts]
    longest, room = max(map(len, requests)), pair.architecture.max_position_embeddings
    if longest + config.max_new_tokens > room:
        raise SpecaufError(
            f"a prompt of {longest} tokens and {config.max_new_tokens} new ones",
            f"together at most the target's {room} positions",
            "shorten the prompt or lower --max-new-tokens",
        )
    return requests


def _parse(pair: Pair, values: dict, findings: list[Finding]) -> tuple[ResolvedDrafter | None, list[Finding]]:
    """The drafter that config.json describes, and what the reader has against it that no check has named."""
    try:
        return read_drafter(values, str(pair.drafter / "config.json")), []
    except SpecaufError as error:
        return None, [_refused(error, findings)]


def _refused(error: SpecaufError, findings: list[Finding]) -> Finding:
    """Why nothing is decoded; an error of its own only if no check has found one."""
    level = "note" if any(finding.level == "error" for finding in findings) else "error"
    return Finding("decoding", level, f"not decoded: {error.found}", error.expected, error.remedy)


def _decode(
    config: Doctor,
    pair: Pair,
    drafter: ResolvedDrafter,
    values: dict,
    assumed: list[str],
    prompts,
    findings,
    console: Console,
) -> tuple[list[Measured], list[Finding]]:
    """Acceptance under every reading, and what it means; neither where the folder cannot be decoded."""
    target = pair.architecture
    unmeasured = rope_unmeasured(drafter, target)
    fits = (drafter.hidden_size, drafter.vocab_size) == (target.hidden_size, target.vocab_size)
    readings = readings_of(drafter, pair, alone=config.single_ids)
    if not (prompts and fits and readings and drafter.mask_token_id < target.vocab_size):
        return [], unmeasured
    with float32_precision(config.dtype):
        try:
            with repaired_folder(pair, values) if assumed else contextlib.nullcontext(pair.drafter) as folder:
                drafter_params, _ = load_drafter(folder, config.dtype)
        except SpecaufError as error:
            return [], [*unmeasured, _refused(error, findings)]
        target_params, _ = load_target_with_bar(pair.target, config.dtype, console)
        with console.status("decoding") as status:
            measured = measure(
                readings,
                drafter_params,
                target_params,
                target,
                prompts,
                max_new_tokens=config.max_new_tokens,
                stop_tokens=eos_token_ids(pair.tokenizer),
                batch_size=config.batch_size,
                begin=lambda name: status.update(f"decoding {len(prompts)} prompts: {name}"),
            )
    said = judge(measured, drafter, pair)
    if assumed:
        said.append(Finding("decoding", "note", f"decoded with {'; '.join(assumed)}",
                            "a config.json that says all of this", "correct it and run again"))  # fmt: skip
    return measured, said


# ---------------------------------------------------------------------------------------------
# What is shown and written


def _row(measured: Measured, all_: list[Measured]) -> dict:
    given = all_[0] if all_[0].reading.kind == "given" else None
    change = gain(measured, given) if given else None
    return {
        "reading": measured.reading.name,
        "kind": measured.reading.kind,
        "target_layer_ids": list(measured.reading.layer_ids),
        "tau": measured.tau,
        "gain": change and change.share,
        "standard_error": change and change.error,
        "rounds": sum(map(len, measured.accepted)),
    }


def _show(findings, measured: list[Measured], engines: list[Engine], summary: dict, console: Console) -> None:
    for level, (mark, style) in _MARKS.items():
        for finding in (f for f in findings if f.level == level):
            text = Text.assemble((f"{mark} {level} ", style), (f"{finding.topic}: ", "bold"), finding.found)
            console.print(text, highlight=False)
            if level != "note" or finding.remedy != "none":
                console.print(Text(f"    expected: {finding.expected}\n    to do:    {finding.remedy}"), style="dim")
    if measured:
        table = Table("decoded", "layer ids", "tau", "against as written ± s.e.")
        for row in (_row(m, measured) for m in measured):
            change = "" if row["gain"] is None or row["kind"] == "given" else (
                f"{100 * row['gain']:+.1f} % ± {100 * row['standard_error']:.1f}")  # fmt: skip
            ids = " ".join(map(str, row["target_layer_ids"]))
            table.add_row(row["reading"], ids, f"{row['tau']:.3f}", change)
        console.print(table)
    table = Table("engine", "serves it", "how", caption="by what is known of these engines; none was run")
    for engine in engines:
        table.add_row(engine.name, Text(engine.serves, _ENGINE_STYLES[engine.serves]), "; ".join(engine.why))
    console.print(table)
    served = [engine.name for engine in engines if engine.name in SERVERS and engine.serves == "yes"]
    style = "red" if summary["errors"] else "green" if served else "yellow"
    console.print(Text(_closing(summary, served), style=style), highlight=False)


def _closing(summary: dict, served: list[str]) -> str:
    counts = [(summary[f"{level}s"], level) for level in _MARKS]
    counted = ", ".join(f"{n} {level}{'' if n == 1 else 's'}" for n, level in counts)
    tau = "acceptance not measured" if summary["tau"] is None else f"tau {summary['tau']:.2f}"
    if summary["errors"]:
        return f"{counted}; {tau}; not fit to serve as it is"
    return f"{counted}; {tau}; as it is for {', '.join(served) or 'no engine'}"
