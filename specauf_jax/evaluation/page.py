"""One self-contained HTML page that compares runs: tau, acceptance, training curves, speed, settings.

It reads only what the other commands left on disk (metrics.jsonl, config.json, results JSON) and never
imports JAX, so a page can be made on any machine. The page refers to no other file or site.
"""

import io
import re
from collections.abc import Callable
from functools import partial
from html import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from specauf_jax.evaluation.runs import CURVES, PALETTE, Run
from specauf_jax.recipes import flatten

DASH = "—"
INK = "#010203"  # stands for the page's text colour, light or dark, until the SVG is written
PLOT_STYLE: dict = {
    **{"svg.fonttype": "none", "svg.hashsalt": "specauf", "text.parse_math": False, "font.size": 9.5},
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.axisbelow": True},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": "#888888", "grid.alpha": 0.3, "grid.linewidth": 0.6},
}
FULL_WIDTH, HALF_WIDTH = 9.7, 4.65  # inches: at 96 dots the widths of a card on the page


# ---------------------------------------------------------------------------------------------
# Plots


def _svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element; `name` keeps its ids apart from those of the page's other plots."""
    buffer = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", buffer.getvalue())
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _card(title: str, text: str, runs: list[Run], draw: Callable[[list[Run]], str]) -> str:
    """A plot under its heading, with a legend of the runs that it shows; without any it says so."""
    chips = "".join(f'<span><i style="background:{run.colour}"></i>{escape(run.name)}</span>' for run in runs)
    body = f'<div class="legend">{chips}</div>{draw(runs)}' if runs else f"<p>{DASH} not measured in these runs</p>"
    heading = f"<h3>{title}</h3>" if title else ""
    return f"<figure>{heading}<figcaption>{text}</figcaption>{body}</figure>"


def bars(runs: list[Run], columns: list, key: str, label: str, form: str, line: Callable) -> str:
    """Bars of `key`, grouped by prompt set, with a line across each at `line(run, column)`."""
    figure = Figure(figsize=(FULL_WIDTH, 3.3), layout="constrained")
    axes = figure.add_subplot(ylabel=label)
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        x = np.arange(len(columns)) + (i - (len(runs) - 1) / 2) * width
        heights = np.array([run.read(column, key) for column in columns], float)
        drawn = axes.bar(x, heights, 0.92 * width, color=run.colour)
        lines = np.array([line(run, column) for column in columns], float)
        axes.hlines(lines, x - 0.46 * width, x + 0.46 * width, color=INK, linewidth=1.5)
        if len(columns) * len(runs) <= 24:  # more would overlap
            axes.bar_label(drawn, fmt=form, padding=2, fontsize=8.5)
    names = _headings(columns)
    slanted = sum(map(len, names)) > 100
    axes.set_xticks(range(len(columns)), names, rotation=25 if slanted else 0, ha="right" if slanted else "center")
    axes.tick_params(axis="x", length=0)
    return _svg(figure, key)


def alpha_lines(runs: list[Run]) -> str:
    """Conditional acceptance by draft position over all prompt sets, one line a run."""
    figure = Figure(figsize=(FULL_WIDTH, 3.1), layout="constrained")
    axes = figure.add_subplot(xlabel="position in the draft", ylabel="kept")
    for run in runs:
        alpha = np.array(run.read(None, "alpha"), float)
        axes.plot(1 + np.arange(len(alpha)), alpha, "o-", color=run.colour, linewidth=1.8, markersize=5)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(16, integer=True))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    return _svg(figure, "alpha")


def curve(run: Run, key: str, most: int = 120) -> tuple[np.ndarray, ...]:
    """Steps and values of a logged number; more than `most` points are averaged in that many bins."""
    points = [(step, row[key]) for step, row in sorted(run.metrics.items()) if row.get(key) is not None]
    steps, values = np.array(points, float).reshape(-1, 2).T
    if len(steps) <= most:
        return steps, values
    return tuple(np.array([part.mean() for part in np.array_split(x, most)]) for x in (steps, values))


def training_lines(runs: list[Run], key: str) -> str:
    """One logged number over the training steps."""
    figure = Figure(figsize=(HALF_WIDTH, 2.7), layout="constrained")
    axes = figure.add_subplot(xlabel="training step")
    for run in runs:
        steps, values = curve(run, key)
        axes.plot(steps, values, marker="o" if len(steps) <= 30 else "", color=run.colour, linewidth=1.6, markersize=4)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    return _svg(figure, key)


# ---------------------------------------------------------------------------------------------
# Tables and text


def _headings(columns: list) -> list[str]:
    return ["overall" if column is None else column for column in columns]


def measure_rows(title: str, runs: list[Run], columns: list, key: str, form: str, mark_best: bool = True) -> str:
    """Rows of one measure, a row a run and a column a prompt set; what was not measured shows a dash."""
    values = [[run.read(column, key) for column in columns] for run in runs]
    best = [[value for value in column if value is not None] for column in zip(*values, strict=True)]
    html = f'<tr class="group"><th colspan="{1 + len(columns)}">{title}</th></tr>'
    for run, row in zip(runs, values, strict=True):
        html += f"<tr><th>{escape(run.name)}</th>"
        for value, known in zip(row, best, strict=True):
            text = DASH if value is None else form.format(value)
            # What looks equal is equally good; a run alone is not the best of anything.
            wins = mark_best and len(known) > 1 and text == form.format(max(known))
            html += f"<td><b>{text}</b></td>" if wins else f"<td>{text}</td>"
        html += "</tr>"
    return html


def _table(head: list[str], rows: str, kind: str = "") -> str:
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>'


def _text_rows(rows: dict[str, list]) -> str:
    """Rows of plain values, one column a run."""
    html = ""
    for name, values in rows.items():
        texts = [DASH if value is None else escape(str(value)) for value in values]
        html += f"<tr><th>{escape(name)}</th>{''.join(f'<td>{text}</td>' for text in texts)}</tr>"
    return html


def differing_settings(runs: list[Run]) -> dict[str, list]:
    """Settings that are not the same in all runs that state any, of training and of evaluation."""
    measured = [flatten(run.results["meta"]["config"], "evaluation.") if run.results else {} for run in runs]
    rows = {}
    for settings in ([run.config for run in runs], measured):
        stated = [each for each in settings if each]
        for key in dict.fromkeys(key for each in stated for key in each):
            if len({repr(each.get(key)) for each in stated}) > 1:
                rows[key] = [each.get(key) for each in settings]
    return rows


def _identical(run: Run) -> str:
    compared, ties = run.read(None, "compared"), run.read(None, "ties") or 0
    if not compared:
        return DASH
    same = f"{compared - run.read(None, 'mismatches') - ties:,} of {compared:,}"
    return f"{same}, and {ties:,} but for a tie" if ties else same


def origin(runs: list[Run]) -> dict[str, list]:
    """What each run was measured with; its training configuration stands in for missing results."""
    stand_in = {"objective": "objective.name", "block_size": "drafter.block_size"}
    metas = [run.results["meta"] if run.results else {} for run in runs]
    rows: dict[str, list] = {"last step logged": [max(run.metrics, default=None) for run in runs]}
    for key in ("objective", "block_size", "device", "dtype", "temperature", "seed"):
        values = [meta.get(key, run.config.get(stand_in.get(key))) for meta, run in zip(metas, runs, strict=True)]
        rows[key.replace("_", " ")] = values
    rows["outputs identical to the target alone"] = [_identical(run) for run in runs]
    rows["versions"] = [
        ", ".join(f"{k} {v}" for k, v in meta.get("versions", {}).items() if v) or None for meta in metas
    ]
    return rows


def summary(runs: list[Run]) -> str:
    """Best run by overall tau, its gain over each other, whether outputs were exact, what hinders comparison."""
    measured = [run for run in runs if run.results]
    if not measured:
        return "None of these runs has been evaluated yet: this page shows their training alone."
    taus = {run.name: run.read(None, "tau_micro") for run in measured}
    best = max(taus, key=taus.__getitem__)
    others = {escape(name): tau for name, tau in taus.items() if name != best}
    gains = [f"{100 * (taus[best] / tau - 1):.1f} % over {name} ({tau:.3f})" for name, tau in others.items()]
    lead = f"<b>{escape(best)}</b> has the highest overall tau, {taus[best]:.3f} tokens a round"
    lead += f": {'; '.join(gains)}." if gains else ", as the only run evaluated."
    return " ".join([lead, *_exactness(measured), *_caveats(measured)])


def _exactness(measured: list[Run]) -> list[str]:
    compared = [run for run in measured if run.read(None, "compared")]
    wrong = [f"{_identical(run)} ({escape(run.name)})" for run in compared if not run.read(None, "exact")]
    said = []
    if wrong:
        said.append(
            f"<b>Not exact</b>: of the outputs compared, identical to the target's own were {', '.join(wrong)}."
        )
    elif compared:
        total = sum(run.read(None, "compared") for run in compared)
        ties = sum(run.read(None, "ties") or 0 for run in compared)
        but = f", {ties:,} of them but for two logits that only rounding tells apart" if ties else ""
        said.append(f"All {total:,} outputs compared were identical to the target's own{but}.")
    if unknown := [escape(run.name) for run in measured if run not in compared]:
        said.append(f"Not compared with the target's own output: {', '.join(unknown)}.")
    return said


def _caveats(measured: list[Run]) -> list[str]:
    keys = ("block_size", "temperature", "dtype", "device")
    unlike = [key.replace("_", " ") for key in keys if len({run.results["meta"][key] for run in measured}) > 1]
    if len({frozenset(run.results["sets"]) for run in measured}) > 1:
        unlike.append("prompt sets")
    return [f"Compare with care: the runs were not measured with the same {', '.join(unlike)}."] if unlike else []


# ---------------------------------------------------------------------------------------------
# Page

CSS = """
:root { color-scheme: light dark; --paper: #fff; --card: #f7f8fa; --ink: #1c2330; --soft: #5a6475; --line: #d9dde4 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --card: #1b1f26; --ink: #e4e8ee; --soft: #9aa5b5; --line: #333a45 } }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1000px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 1.7rem; margin: 0 0 12px } h2 { font-size: 1.25rem; margin: 44px 0 6px }
h3 { font-size: 1rem; margin: 0 } p, figcaption { margin: 0 0 12px }
section > p, figcaption { color: var(--soft); font-size: .9rem }
.wide { overflow-x: auto; margin: 0 0 18px }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid var(--line);
  font-weight: 400; vertical-align: top }
th:first-child { text-align: left } thead th { color: var(--soft) } .group th { padding-top: 14px; font-weight: 600 }
.text td, .text thead th { text-align: left; overflow-wrap: anywhere; min-width: 7.5em }
.text th:first-child { width: 24%; min-width: 11em }
figure { margin: 0; padding: 14px 12px 8px; background: var(--card); border-radius: 8px;
  display: flex; flex-direction: column }
figure svg { width: 100%; height: auto } section > figure { overflow-x: auto } section > figure svg { min-width: 640px }
figure svg text { font-family: system-ui, sans-serif !important }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: .85rem; margin: auto 0 6px }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px }
"""


def _section(title: str, text: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{''.join(parts)}</section>"


def _tau_section(runs: list[Run], measured: list[Run], columns: list) -> str:
    text = """Tokens that one round of drafting and checking adds to the text, from 1 (no draft kept) to the block size
        (all kept): micro divides all tokens by all rounds, outside loops leaves out rounds that start where the text
        already repeats itself, macro averages each prompt's own mean. The best is bold."""
    rows = measure_rows("micro", runs, columns, "tau_micro", "{:.3f}")
    rows += measure_rows("micro, outside loops", runs, columns, "tau_outside_loops", "{:.3f}")
    rows += measure_rows("macro", runs, columns, "tau_macro", "{:.3f}")
    caption = "Micro tau; the line across each bar is the target without a drafter, one token a round."
    draw = partial(bars, columns=columns, key="tau_micro", label="tokens a round", form="{:.2f}", line=lambda *_: 1)
    return _section("Tau", text, _table(["", *_headings(columns)], rows), _card("", caption, measured, draw))


def _speed_section(runs: list[Run], measured: list[Run], columns: list) -> str:
    text = "Tokens written in a second with the drafter, and by the same target alone in the same evaluation."
    alone = "autoregressive_tokens_per_s"
    rows = measure_rows("with the drafter, tokens/s", runs, columns, "tokens_per_s", "{:,.1f}")
    rows += measure_rows("the target alone, tokens/s", runs, columns, alone, "{:,.1f}", mark_best=False)
    rows += measure_rows("ratio of the two", runs, columns, "speedup", "{:.2f}×")
    caption = "Bars are with the drafter; the line across each is the target alone."
    draw = partial(bars, columns=columns, key="tokens_per_s", label="tokens/s", form="{:,.0f}")
    draw = partial(draw, line=lambda run, column: run.read(column, alone))
    return _section("Speed", text, _table(["", *_headings(columns)], rows), _card("", caption, measured, draw))


def _training_section(runs: list[Run]) -> str:
    cards = ""
    for key, (title, text) in CURVES.items():
        shown = [run for run in runs if len(curve(run, key)[0])]
        cards += _card(title, text, shown, partial(training_lines, key=key))
    text = "Numbers logged during training; long logs are averaged in 120 stretches."
    return _section("Training", text, f'<div class="grid">{cards}</div>')


def batch_lines(methods: list[Run], speeds: dict, key: str, label: str) -> str:
    """One measure of the benchmark against batch size, one line a method."""
    figure = Figure(figsize=(HALF_WIDTH, 2.9), layout="constrained")
    axes = figure.add_subplot(xlabel="rows decoded together", ylabel=label, xscale="log")
    for method in methods:
        sizes = sorted(speeds[method.name])
        values = [speeds[method.name][size][key] for size in sizes]
        axes.plot(sizes, values, "o-", color=method.colour, linewidth=1.6, markersize=4)
    sizes = sorted({size for by_size in speeds.values() for size in by_size})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    return _svg(figure, f"benchmark-{key}")


def _benchmark_section(speeds: dict) -> str:
    methods = [Run(name, PALETTE[i % len(PALETTE)], {}, {}, {}) for i, name in enumerate(speeds)]
    draw = partial(batch_lines, speeds=speeds)
    cards = _card("Tokens a second", "New tokens of all rows.", methods, partial(draw, key="tokens_per_s", label=""))
    cards += _card("Speed-up", "Over the target alone, same rows.", methods, partial(draw, key="speedup", label=""))
    text = "Every method in turn within each repeat; medians over the repeats."
    return _section("Speed against batch size", text, f'<div class="grid">{cards}</div>')


@matplotlib.rc_context(PLOT_STYLE)
def render(runs: list[Run], speeds: dict | None = None) -> str:
    """The whole page; `speeds` as from `read_benchmark`."""
    measured = [run for run in runs if run.results]
    columns = [*dict.fromkeys(name for run in measured for name in run.results["sets"]), None]
    title = "Drafters compared: " + escape(", ".join(run.name for run in runs))
    names = ["", *(run.name for run in runs)]
    alpha = (
        "Of the rounds that kept every earlier draft, the share that keeps the one at this position; all prompt sets."
    )
    differing = _text_rows(differing_settings(runs))
    settings = _table(names, differing, "text") if differing else f"<p>{DASH} none</p>"
    sections = (
        _tau_section(runs, measured, columns),
        _section("Acceptance by position", "", _card("", alpha, measured, alpha_lines)),
        _training_section(runs),
        _speed_section(runs, measured, columns),
        _benchmark_section(speeds) if speeds else "",
        _section("Settings that differ", "All that the runs' configurations do not have in common.", settings),
        _section("Origin", "What was measured, and on what.", _table(names, _text_rows(origin(runs)), "text")),
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{CSS}</style></head>
<body><h1>{title}</h1><p>{summary(runs)}</p>
{"".join(sections)}</body></html>
"""
