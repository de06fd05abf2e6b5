"""What runs left on disk, read and checked: metrics.jsonl, config.json, results of `specauf evaluate`."""

from dataclasses import dataclass

import matplotlib
import numpy as np

from specauf_jax.errors import SpecaufError
from specauf_jax.files import AnyPath, absolute, as_path, parse_json, read_bytes
from specauf_jax.recipes import flatten

NUMBER, MAYBE_NUMBER = (int, float), (int, float, type(None))
PART_KINDS = {
    **dict.fromkeys(("tau_micro", "tau_macro", "tokens_per_s", "autoregressive_tokens_per_s"), NUMBER),
    **{"tau_outside_loops": MAYBE_NUMBER, "alpha": list, "compared": int, "mismatches": int},
    "exact": (bool, type(None)),  # nothing to compare where tokens were sampled
}
META_KINDS = {
    **{"device": str, "dtype": str, "temperature": NUMBER, "block_size": int, "seed": int},
    **{"objective": (str, type(None)), "versions": dict, "config": dict},
}
CURVES = {  # key of metrics.jsonl: heading and explanation
    "tau": ("Tau on training blocks", """One plus the drafts that would be kept, averaged over the training blocks, as
        if all text before a draft were the data's own."""),
    "decode_tau": ("Tau in decoding", "Tau of real decoding on held-out prompts, measured from time to time."),
    "common_token_accuracy": ("Common-token accuracy", """How often the drafter's first choice is the label, over every
        supervised position: the same positions whatever the objective, so runs may be compared."""),
    "support_accuracy": ("Support accuracy", """The same over those positions alone to which the objective gives weight:
        runs with different objectives are asked different questions here."""),
    "active_ratio": ("Active ratio", "Share of the supervised positions to which the objective gives weight."),
    "loss": ("Loss", """Mean loss under the objective's weights, of the label's cross-entropy in nats: its course tells
        something, its level differs with the objective."""),
}  # fmt: skip
# Blue, orange, green, pink, sky, vermilion, grey: told apart with any colour vision (Okabe and Ito).
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8a8a")


@dataclass(frozen=True)
class Run:
    """One line of the page's tables and plots."""

    name: str
    colour: str
    metrics: dict[int, dict]
    """Step: what was logged at that step."""
    config: dict
    """Settings of the training run, under dotted names."""
    results: dict
    """As from `read_results`; empty where nothing was evaluated."""

    def read(self, name: str | None, key: str):
        """A measure of one prompt set, or of all sets together for None; None where it was not measured."""
        if not self.results:
            return None
        return (self.results["overall"] if name is None else self.results["sets"].get(name, {})).get(key)


def _read_object(path: AnyPath) -> dict:
    try:
        value = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise SpecaufError(f"{path} cannot be read ({error})", "a JSON object", "write the file again") from error
    if not isinstance(value, dict):
        raise SpecaufError(f"{path} holds a {type(value).__name__}", "a JSON object", "write the file again")
    return value


def read_metrics(path: AnyPath) -> dict[int, dict]:
    """Step: metrics. Of lines with the same step (after a resume) the later wins; a last line cut off is dropped."""
    rows: dict[int, dict] = {}
    lines = read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            if number == len(lines):  # no newline follows: a kill interrupted the write
                break
            found = f"line {number} of {path} is not JSON ({error})"
            raise SpecaufError(found, "one JSON object a line", "repair or delete that line") from error
        if isinstance(row, dict) and not row.keys() & {"step", *CURVES}:  # somebody's note
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise SpecaufError(f"line {number} of {path} has no step", '{"step": INT, ...}', "delete that line")
        for key in CURVES:
            if not isinstance(row.get(key), MAYBE_NUMBER):
                raise SpecaufError(f"line {number} of {path}: {key} is {row[key]!r}", "a number", "repair that line")
        rows.setdefault(row["step"], {}).update(row)
    return rows


def _check_keys(path: AnyPath, where: str, holder: dict, kinds: dict) -> None:
    remedy = "evaluate again with this version, or leave the file out of the runs"
    for key, kind in kinds.items():
        if key not in holder:
            raise SpecaufError(f"{path} has no {where}{key}", "a results JSON of `specauf evaluate`", remedy)
        if not isinstance(holder[key], kind) or holder[key] != holder[key]:  # NaN is the best of nothing
            names = [k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))]
            raise SpecaufError(f"{where}{key} of {path} is {holder[key]!r}", " or ".join(names), remedy)


def read_results(path: AnyPath) -> dict:
    """A results JSON of `specauf evaluate`, with every key that the page uses checked, and the `speedup` added."""
    results = _read_object(path)
    _check_keys(path, "", results, dict.fromkeys(("overall", "sets", "meta"), dict))
    _check_keys(path, "meta.", results["meta"], META_KINDS)
    _check_keys(path, "sets.", results["sets"], dict.fromkeys(results["sets"], dict))
    parts = {"overall.": results["overall"], **{f"sets.{name}.": part for name, part in results["sets"].items()}}
    for where, part in parts.items():
        _check_keys(path, where, part, PART_KINDS)
        positions = {f"[{i}]": value for i, value in enumerate(part["alpha"])}
        _check_keys(path, f"{where}alpha", positions, dict.fromkeys(positions, MAYBE_NUMBER))
        alone = part["autoregressive_tokens_per_s"]
        part["speedup"] = part["tokens_per_s"] / alone if alone > 0 else None
    return results


def read_benchmark(path: str) -> dict[str, dict[int, dict[str, float]]]:
    """Medians of a JSON of `specauf benchmark`: method → batch size → tokens_per_s and speedup."""
    results = _read_object(as_path(path))
    try:
        read: dict[str, dict[int, dict[str, float]]] = {}
        for size, methods in results["decoding"].items():
            for name, m in methods.items():
                medians = {key: float(m[key]["median"]) for key in ("tokens_per_s", "speedup")}
                read.setdefault(name, {})[int(size)] = medians
        return read
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SpecaufError(
            f"{path} lacks speeds by batch size and method ({error!r})",
            "a JSON of `specauf benchmark`",
            "measure again with this version",
        ) from error


def parse_run(text: str) -> tuple[str, list[AnyPath]]:
    """Name and paths of `[NAME=]PATH[,PATH]`; a NAME holds no slash, so that paths may hold an equals sign."""
    head, equals, tail = text.partition("=")
    named = equals and "/" not in head
    paths = [as_path(part) for part in (tail if named else text).split(",") if part]
    if not paths or (named and not head):
        raise SpecaufError(
            f"the run {text!r} has no name or no path", "[NAME=]PATH[,PATH]", "name a run folder or a results JSON"
        )
    first = absolute(paths[0])
    return (head if named else first.name if first.is_dir() else first.stem), paths


def read_run(text: str) -> list[tuple]:
    """(name, metrics, config, results) of `[NAME=]PATH[,PATH]`; each further results file makes another."""
    name, paths = parse_run(text)
    metrics: dict[int, dict] = {}
    config: dict = {}
    files: list[AnyPath] = []
    for path in paths:
        if not path.exists():
            raise SpecaufError(
                f"{path} does not exist", "a run folder or a results JSON", "name a run folder or a results JSON"
            )
        if (path / "metrics.jsonl").is_file():
            metrics |= read_metrics(path / "metrics.jsonl")
        if (path / "config.json").is_file():
            config |= flatten(_read_object(path / "config.json"))
        files += sorted(path.glob("results*.json")) if path.is_dir() else [path]
    files = list({absolute(file): file for file in files}.values())
    if not metrics and not files:
        raise SpecaufError(
            f"{text} holds no metrics and no results",
            "metrics.jsonl or results*.json",
            "name a run folder or a results JSON",
        )
    first = (name, metrics, config, read_results(files[0]) if files else {})
    return [first] + [(f"{name} ({file.stem})", {}, config, read_results(file)) for file in files[1:]]


def read_runs(texts: tuple[str, ...]) -> list[Run]:
    """All runs in the order given, each with its own name and colour."""
    found = [run for text in texts for run in read_run(text)]
    names = [run[0] for run in found]
    if not names or len(set(names)) < len(names):
        expected = "one or more runs, each with its own name"
        raise SpecaufError(f"the runs are named {', '.join(names) or '(none)'}", expected, "write NAME=PATH ...")
    colours = list(PALETTE)
    if len(found) > len(PALETTE):  # lightness alone then tells neighbours apart
        shades = matplotlib.colormaps["viridis"](np.linspace(0.2, 0.95, len(found)))
        colours = [matplotlib.colors.to_hex(shade) for shade in shades]
    return [Run(name, colours[i], *rest) for i, (name, *rest) in enumerate(found)]
