"""`specauf doctor`: a drafter folder's conventions against its target, read and decoded, and which engines serve it."""

import dataclasses
import json
import warnings

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specauf_jax.architecture import ResolvedDrafter
from specauf_jax.commands.doctor_settings import Doctor
from specauf_jax.commands.loading import check_requests, load_target_with_bar, with_arguments
from specauf_jax.environment import describe_environment, float32_precision
from specauf_jax.errors import SpecaufError, SpecaufWarning
from specauf_jax.evaluation.doctor.checks import Finding, Folder, Level, read_findings, read_folder, repaired_folder
from specauf_jax.evaluation.doctor.engines import SERVERS, Engine, Verdict, engine_table
from specauf_jax.evaluation.doctor.variants import (
    Decoded,
    Kind,
    built_in_prompts,
    decode_variants,
    gain,
    variant_findings,
    variants_of,
)
from specauf_jax.evaluation.prompts import encode_first_turn, read_prompts
from specauf_jax.files import output_file, write_text
from specauf_jax.models.weights import load_drafter

_MARKS: dict[Level, tuple[str, str]] = {"error": ("✗", "red"), "warning": ("!", "yellow"), "note": ("·", "dim")}
_STYLES: dict[Verdict, str] = {"yes": "green", "converted": "green", "differently": "yellow", "no": "red"}


def doctor(config: Doctor, console: Console) -> int:
    """Print all findings and engines, write `config.out`; returns the exit code: 1 if there is an error."""
    warnings.simplefilter("ignore", SpecaufWarning)  # they are among the findings
    out = None if config.out is None else output_file(config.out, config.target, config.drafter, config.prompts)
    folder = read_folder(config.drafter, config.target)
    if folder.tokenizer is not None:
        with_arguments(folder.tokenizer, config.template_args, folder.provenance, console)
    findings = read_findings(folder)
    decoded, refusal = _decode(config, folder, _prompts(config, folder), console)
    if refusal is not None:  # an error of its own only if no check has found one
        level: Level = "note" if any(finding.level == "error" for finding in findings) else "error"
        found = f"not decoded: {refusal.found}"
        findings.append(Finding("decoding", level, found, refusal.expected, refusal.remedy))
    if isinstance(folder.drafter, ResolvedDrafter):
        findings += variant_findings(decoded, folder.drafter, folder.target)
    assumed = folder.repaired[1]
    if decoded and assumed:
        found, expected = f"decoded with {'; '.join(assumed)}", "a config.json that has all of this"
        findings.append(Finding("decoding", "note", found, expected, "correct it and run again"))
    taus: dict[Kind, float] = {d.variant.kind: d.tau for d in decoded if d.variant.kind != "ids"}
    engines = engine_table(folder, taus)
    levels = [finding.level for finding in findings]
    summary = {f"{level}s": levels.count(level) for level in _MARKS} | {"tau": taus.get("given")}
    rows = [_row(d, decoded[0]) for d in decoded]
    _show_findings(findings, console)
    _show_decoded(rows, console)
    _show_engines(engines, console)
    _show_summary(summary, engines, console)
    if out is not None:
        result = {
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "measured": rows,
            "engines": [dataclasses.asdict(engine) for engine in engines],
            "summary": summary,
            "meta": describe_environment() | {"config": dataclasses.asdict(config)},
        }
        write_text(out, json.dumps(result, indent=2) + "\n")
    return int("error" in levels)


# ---------------------------------------------------------------------------------------------
# Decoding


def _prompts(config: Doctor, folder: Folder) -> list[list[int]]:
    """Token ids of the texts to decode; none without a tokenizer."""
    if folder.tokenizer is None or not config.max_prompts:
        return []
    if config.prompts is None:
        requests = built_in_prompts(folder.tokenizer)[: config.max_prompts]
    else:
        prompts = read_prompts(config.prompts)[: config.max_prompts]
        requests = [encode_first_turn(folder.tokenizer, prompt) for prompt in prompts]
    check_requests(requests, folder.target, config.max_new_tokens)
    return requests


def _decode(
    config: Doctor, folder: Folder, prompts: list[list[int]], console: Console
) -> tuple[list[Decoded], SpecaufError | None]:
    """Acceptance under every variant, or why the drafter cannot be loaded."""
    drafter = folder.drafter
    if isinstance(drafter, SpecaufError):
        return [], drafter
    variants = variants_of(folder, drafter, single_ids=config.single_ids)
    if not (prompts and variants):
        return [], None
    with float32_precision(config.dtype):
        try:
            with repaired_folder(folder) as path:
                drafter_params, _ = load_drafter(path, config.dtype)
        except SpecaufError as error:
            return [], error
        target_params, _ = load_target_with_bar(folder.target_path, config.dtype, console)
        with console.status("decoding") as status:
            decoded = decode_variants(
                variants,
                drafter_params,
                target_params,
                folder.target,
                prompts,
                max_new_tokens=config.max_new_tokens,
                stop_tokens=folder.tokenizer.stops,
                batch_size=config.batch_size,
                begin=lambda name: status.update(f"decoding {len(prompts)} prompts: {name}"),
            )
    return decoded, None


# ---------------------------------------------------------------------------------------------
# What is shown and written


def _row(decoded: Decoded, first: Decoded) -> dict:
    change = gain(decoded, first) if first.variant.kind == "given" else None
    return {
        "reading": decoded.variant.name,
        "kind": decoded.variant.kind,
        "target_layer_ids": list(decoded.variant.layer_ids),
        "tau": decoded.tau,
        "gain": change and change.share,
        "standard_error": change and change.error,
        "rounds": sum(map(len, decoded.accepted)),
    }


def _show_findings(findings: list[Finding], console: Console) -> None:
    for level, (mark, style) in _MARKS.items():
        for finding in (f for f in findings if f.level == level):
            text = Text.assemble((f"{mark} {level} ", style), (f"{finding.topic}: ", "bold"), finding.found)
            console.print(text, highlight=False)
            if level != "note" or finding.remedy != "none":
                console.print(Text(f"    expected: {finding.expected}\n    to do:    {finding.remedy}"), style="dim")


def _show_decoded(rows: list[dict], console: Console) -> None:
    table = Table("decoded", "layer ids", "tau", "against as written ± s.e.")
    for row in rows:
        change = "" if row["gain"] is None or row["kind"] == "given" else (
            f"{100 * row['gain']:+.1f} % ± {100 * row['standard_error']:.1f}")  # fmt: skip
        table.add_row(row["reading"], " ".join(map(str, row["target_layer_ids"])), f"{row['tau']:.3f}", change)
    if rows:
        console.print(table)


def _show_engines(engines: list[Engine], console: Console) -> None:
    caption = "as the engines' code was at that version and date; none was run here"
    table = Table("engine", "serves it", "how", caption=caption)
    for engine in engines:
        source = Text(engine.name).append(f"\n{engine.version}\n{engine.date}", "dim")
        table.add_row(source, Text(engine.serves, _STYLES[engine.serves]), Text("\n".join(engine.why)))
    console.print(table)


def _show_summary(summary: dict, engines: list[Engine], console: Console) -> None:
    served = [engine.name for engine in engines if engine.name in SERVERS and engine.serves == "yes"]
    counts = [(summary[f"{level}s"], level) for level in _MARKS]
    counted = ", ".join(f"{n} {level}{'' if n == 1 else 's'}" for n, level in counts)
    tau = "acceptance not measured" if summary["tau"] is None else f"tau {summary['tau']:.2f}"
    end, style = f"as it is for {', '.join(served) or 'no engine'}", "green" if served else "yellow"
    if summary["errors"]:
        end, style = "not fit to serve as it is", "red"
    console.print(Text(f"{counted}; {tau}; {end}", style=style), highlight=False)
