"""Tables of what launch/measure/real_target.py has measured so far, as Markdown.

    python launch/measure/real_target_report.py --out DIR
    python launch/measure/real_target_report.py --out DIR DIR2 DIR3    # parts with other arms or seeds, as one study

A figure is the mean over seeds ± their standard deviation, with their number in brackets; that of one seed stands
alone. DIR/results.json gets the values of every seed, DIR/report.md the tables.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

from specauf_jax.evaluation.measure import alpha, tau_macro, tau_micro

PAIRS = (("auf", "decay"), ("dpace", "decay"), ("auf_decay", "auf"), ("decay_auf", "decay"),
         ("domino_b_auf_d", "domino_baseline"), ("auf_k16", "decay_k16"), ("auf_muon", "decay_muon"),
         ("auf_muon", "auf"), ("dflash2_b_auf", "dflash2"), ("auf_tv", "decay_tv"),
         ("dspark_auf", "dspark_decay"))  # fmt: skip
FIRST_ALPHAS = 7
STAGES = 6  # of training
ANY = ("arms", "seeds", "every_seed", "tree_nodes", "tree_temperature", "environment")  # may differ from part to part
SHOWN = ("target", "documents", "supervised_tokens", "steps", "batch_size", "anchors", "layers", "block_size",
         "learning_rate", "dtype", "eval_tokens")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, nargs="+", required=True, help="the study's folder, or those of its parts")
    print(report(*parser.parse_args().out))


def report(out: Path, *others: Path) -> str:
    """The tables; out/results.json and out/report.md are written."""
    parts = [out, *others]
    study = joined({part / "study.json": json.loads((part / "study.json").read_text()) for part in parts})
    files = [json.loads(path.read_text()) for part in parts for path in sorted(part.glob("measured/*/*.json"))]
    if twice := [key for key, count in Counter(map(place, files)).items() if count > 1]:
        sys.exit(
            f"real_target_report: arm, seed, step and measure {twice[0]} stand in two of {', '.join(map(str, parts))}"
        )
    files.sort(key=lambda file: (study["arms"].index(file["arm"]), file["seed"], file["step"]))
    found = [file | {"set": key} | values for file in files for key, values in file.get("sets", {}).items()]
    logs, passes = (
        lines(x for part in parts for x in part.glob(name)) for name in ("seed_*/steps.jsonl", "features.jsonl")
    )
    final = by("what", [row for row in found if row["step"] == study["steps"]])
    greedy, sampled = final.get("t0", []), final.get("t1", [])
    sets = {name: f"{name} ({count})" for name, count in study["prompts"].items()}
    curve = f"{study['point_prompts']} prompts of each of {', '.join(study['curve_sets'])}"
    tables = {
        "tau at temperature 0, all steps (in brackets the prompts of a set)": final_taus(greedy, sets),
        "tau at temperature 1": final_taus(sampled, sets),
        "tau at temperature 0 by nodes of a draft tree, and exactness": by_nodes(final),
        "Differences of tau at temperature 0: mean over seeds; each seed": differences(greedy, sets),
        "Accuracy of all slots in blocks of the target's own answers; tau there, and when decoding": accuracies(
            files, greedy
        ),
        "alpha at temperature 0": alphas(greedy),
        f"tau at temperature 0 by steps: {curve}": curves(found, study),
        f"tau in the rows learnt from: means over each {STAGES}th of the steps": learning(logs, study["steps"]),
        "Seconds of a step, medians, and of the target's pass over its rows, made once for all": seconds(logs, passes),
        "Speed": speeds(out / "speed.json"),
    }
    (out / "results.json").write_text(json.dumps({"study": study, "tables": tables}, indent=2) + "\n")
    parts = [", ".join(f"{name} {study[name]}" for name in SHOWN)]
    parts += [markdown(title, table) for title, table in tables.items() if table]
    (out / "report.md").write_text("\n\n".join(parts) + "\n")
    return "\n\n".join(parts)


def place(file: dict) -> tuple:
    """Of a measure in the study."""
    return tuple(file[name] for name in ("arm", "seed", "step", "what"))


def joined(studies: dict[Path, dict]) -> dict:
    """The studies of several folders as one: arms and seeds of all of them; all else must be the same."""
    (first, study), *others = studies.items()
    for path, other in others:
        differ = [key for key in study | other if key not in ANY and study.get(key) != other.get(key)]
        if differ:
            sys.exit(f"real_target_report: {path} is of another study than {first}: {', '.join(differ)} differ")
    arms = [arm for part in studies.values() for arm in part["arms"]]
    return study | {"arms": list(dict.fromkeys(arms))}


def lines(paths) -> list[dict]:
    """Of all files; each knows its folder."""
    return [{"folder": path.parent.name} | json.loads(line) for path in paths for line in path.read_text().splitlines()]


def by(key: str, rows: list[dict]) -> dict:
    """Value of a key → the rows that have it, in their order."""
    return {value: [row for row in rows if row[key] == value] for value in dict.fromkeys(row[key] for row in rows)}


def over_seeds(rows: list[dict], value) -> list:
    """The value of each seed's rows."""
    return [value(own) for own in by("seed", rows).values()]


def histories(rows: list[dict], which: str = "accepted") -> list[list[int]]:
    return [history for row in rows for history in row[which]]


def micro(rows: list[dict]) -> float | None:
    return tau_micro(histories(rows))


def final_taus(rows: list[dict], sets: dict[str, str]) -> dict:
    table = {}
    for name, own in by("arm", rows).items():
        of_sets = by("set", own)
        cells = table[name] = {shown: over_seeds(of_sets.get(key, []), micro) for key, shown in sets.items()}
        cells["all"] = over_seeds(own, micro)
        cells["macro"] = over_seeds(own, lambda rows: tau_macro(histories(rows)))
        cells["outside loops"] = over_seeds(own, lambda rows: tau_micro(histories(rows, "outside")))
        if "compared" in own[0]:
            cells["exact"] = exact(own)
    return table


def by_nodes(final: dict[str, list[dict]]) -> dict:
    """Arm → tau of chains and of trees of N nodes, and how many of all trees' texts are the target's own."""
    trees = sorted((what for what in final if what.startswith("tree")), key=lambda what: int(what.split()[1]))
    table = {}
    for name in dict.fromkeys(row["arm"] for what in trees for row in final[what]):
        own = {what: [row for row in rows if row["arm"] == name] for what, rows in final.items()}
        table[name] = {"chain": over_seeds(own["t0"], micro)}
        table[name] |= {what.replace("tree", "N ="): over_seeds(own[what], micro) for what in trees if own[what]}
        table[name]["exact"] = exact([row for what in trees for row in own[what]])
    return table


def exact(rows: list[dict]) -> str:
    compared, wrong, ties = (sum(row[key] for row in rows) for key in ("compared", "mismatches", "ties"))
    return f"{compared - wrong} of {compared} ({ties} ties)"


def differences(rows: list[dict], sets: dict[str, str]) -> dict:
    """Of pairs of arms with equal seeds, by set and over all sets; in how many pairs of seed and set it is above 0."""
    arms, table = by("arm", rows), {}
    for pair in PAIRS:
        if not arms.keys() >= {*pair}:
            continue
        cells = table[" - ".join(pair)] = {}
        for shown, keys in [*((shown, [key]) for key, shown in sets.items()), ("all", list(sets))]:
            one, other = (by("seed", [row for row in arms[name] if row["set"] in keys]) for name in pair)
            cells[shown] = [micro(one[seed]) - micro(other[seed]) for seed in one if seed in other]
        single = [x for shown in sets.values() for x in cells[shown]]
        cells["above 0"] = f"{sum(x > 0 for x in single)} of {len(single)}"
        for shown in (*sets.values(), "all"):
            each = " ".join(f"{x:+.3f}" for x in cells[shown])
            cells[shown] = f"{spread(cells[shown])}: {each}" if len(cells[shown]) > 1 else each
    return table


def accuracies(files: list[dict], greedy: list[dict]) -> dict:
    """Of Domino's slots the accuracy given the right tokens before them."""
    decoded, table = by("arm", greedy), {}
    for name, own in by("arm", [file for file in files if "blocks" in file]).items():
        of_blocks = {"accuracy": "common_token_accuracy", "tau of blocks": "tau"}
        table[name] = {title: [file["blocks"][key] for file in own] for title, key in of_blocks.items()}
        table[name]["tau"] = over_seeds(decoded.get(name, []), micro)
    return table


def alphas(rows: list[dict]) -> dict:
    table = {}
    for name, own in by("arm", rows).items():
        values = over_seeds(own, lambda rows: alpha(histories(rows), rows[0]["block_size"]))
        table[name] = {f"{k + 1}": list(x) for k, x in enumerate(zip(*values, strict=True)) if k < FIRST_ALPHAS}
    return table


def curves(rows: list[dict], study: dict) -> dict:
    """Everywhere over the prompts of the points alone."""
    rows = [row | {"accepted": row["accepted"][: study["point_prompts"]]} for row in rows
            if row["what"] == "t0" and row["set"] in study["curve_sets"]]  # fmt: skip
    return {name: {f"{step}": over_seeds(at, micro) for step, at in by("step", own).items()}
            for name, own in by("arm", rows).items()}  # fmt: skip


def learning(logs: list[dict], steps: int) -> dict:
    """Arm → tau by the end of each stage, of the batches that were logged."""
    table, ends = {}, sorted({steps * i // STAGES for i in range(STAGES + 1)})
    for name in dict.fromkeys(name for row in logs for name in row["tau"]):
        own = by("folder", [row for row in logs if name in row["tau"]]).values()
        stages = {f"{end}": [[row["tau"][name] for row in rows if start < row["step"] <= end] for rows in own]
                  for start, end in itertools.pairwise(ends)}  # fmt: skip
        table[name] = {end: [statistics.mean(taus) for taus in seeds if taus] for end, seeds in stages.items()}
    return table


def seconds(logs: list[dict], passes: list[dict]) -> dict:
    names = dict.fromkeys(name for row in logs for name in row["seconds"])
    measured = {name: [row["seconds"][name] for row in logs if name in row["seconds"]] for name in names}
    measured = {"target": [row["seconds"] for row in passes]} | measured
    medians = {name: f"{statistics.median(values):.3f}" for name, values in measured.items() if values}
    return {"": medians} if medians else {}


def speeds(path: Path) -> dict:
    """Of `specauf benchmark`."""
    sizes = json.loads(path.read_text())["decoding"] if path.exists() else {}
    table = {}
    for size, methods in sizes.items():
        for name, method in methods.items():
            gain, speed = method["speedup"], method["tokens_per_s"]["median"]
            gain = f"{gain['median']:.2f} ({gain['p10']:.2f}, {gain['p90']:.2f})"
            cells = {
                "tau": f"{method['tau']:.3f}",
                "tokens/s": f"{speed:,.0f}",
                "× the target alone (10 %, 90 %)": gain,
            }
            table[f"batch {size}, {name}"] = cells
    return table


def markdown(title: str, table: dict[str, dict]) -> str:
    """A table of rows → columns → values of the seeds, or text."""
    columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
    lines = [f"**{title}**", "", f"| | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for name, cells in table.items():
        lines.append(f"| {name} | {' | '.join(shown(cells.get(column)) for column in columns)} |")
    return "\n".join(lines)


def shown(cell: str | list | None) -> str:
    if isinstance(cell, str):
        return cell or "—"
    values = [x for x in cell or [] if x is not None]
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "—"
    return f"{spread(values)} ({len(values)})"


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
