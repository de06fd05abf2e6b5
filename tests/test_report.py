"""The report: what is read, what is refused, what stands on the page, what a failed write leaves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from specauf_jax import files
from specauf_jax.commands.report import write_report
from specauf_jax.commands.report_settings import Report
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation import page as page_
from specauf_jax.evaluation import runs as runs_


def part(tau: float, **changes) -> dict:
    return {
        **{"tau_micro": tau, "tau_macro": tau + 0.011, "tau_outside_loops": tau - 0.5, "alpha": [0.75, None, 0.5]},
        **{"exact": True, "compared": 10, "mismatches": 0, "rounds": 99, "another": "ignored"},
        **{"tokens_per_s": 1000 * tau, "autoregressive_tokens_per_s": 500.0, **changes},
    }


def results(tau: float, objective: str = "auf", **overall) -> dict:
    meta = {"device": "cpu", "dtype": "float32", "temperature": 0.0, "block_size": 4, "seed": 0}
    meta |= {
        "objective": objective,
        "versions": {"jax": "0.10.0", "absent": None},
        "config": {"drafter": f"{objective}/drafter"},
    }
    return {"overall": part(tau, **overall), "sets": {"json": part(tau + 0.1), "email": part(tau - 0.1)}, "meta": meta}


def write(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def run_folder(path: Path, tau: float, objective: str) -> Path:
    steps = [{"step": 10 * i, "loss": 5 - 0.1 * i, "tau": 1 + 0.1 * i, "active_ratio": 0.3} for i in range(1, 4)]
    steps.append({"step": 30, "decode_tau": 1.5})
    write(path / "metrics.jsonl", "".join(json.dumps(step) + "\n" for step in steps))
    write(path / "config.json", {"objective": {"name": objective}, "train": {"seed": 7, "steps": 30}})
    write(path / "results.json", results(tau, objective))
    return path


@pytest.fixture
def pair(tmp_path) -> tuple[str, str]:
    return str(run_folder(tmp_path / "auf", 2.5, "auf")), str(run_folder(tmp_path / "decay", 2.0, "decay"))


def page_of(tmp_path, *runs: str) -> str:
    out = write_report(Report(runs=runs, out=str(tmp_path / "page" / "report.html")), Console(quiet=True))
    return Path(out).read_text(encoding="utf-8")


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Cells of the tables of the section with that heading, bold marked by asterisks."""
    section = page.split(f"<h2>{heading}</h2>")[1].split("</section>")[0].replace("<b>", "*").replace("</b>", "*")
    rows = re.findall(r"<tr.*?</tr>", section)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def refused(match: str, *runs: str) -> None:
    with pytest.raises(SpecaufError, match=match):
        runs_.read_runs(runs)


def test_tau_table_holds_the_numbers_and_marks_the_best(tmp_path, pair):
    rows = rows_of(page_of(tmp_path, *pair), "Tau")
    assert rows[0] == ["", "json", "email", "overall"]
    assert rows[1:4] == [["micro"], ["auf", "*2.600*", "*2.400*", "*2.500*"], ["decay", "2.100", "1.900", "2.000"]]
    assert rows[4][0] == "micro, outside loops" and rows[5] == ["auf", "*2.100*", "*1.900*", "*2.000*"]
    assert rows[7] == ["macro"] and rows[9] == ["decay", "2.111", "1.911", "2.011"]


def test_speed_table_compares_with_the_target_alone(tmp_path, pair):
    rows = rows_of(page_of(tmp_path, *pair), "Speed")
    assert rows[2] == ["auf", "*2,600.0*", "*2,400.0*", "*2,500.0*"]
    assert rows[5] == ["auf", "500.0", "500.0", "500.0"]  # the target's own speed is no one's merit
    assert rows[9] == ["decay", "4.20×", "3.80×", "4.00×"]


def test_summary_states_gain_and_exactness(tmp_path, pair):
    page = page_of(tmp_path, *pair)
    assert "<b>auf</b> has the highest overall tau, 2.500 tokens a round: 25.0 % over decay (2.000)." in page
    assert "All 20 outputs compared were identical" in page and "Compare with care" not in page


def test_summary_names_the_run_that_is_not_exact_and_unlike_conditions(tmp_path, pair):
    other = results(2.2, exact=False, mismatches=3)
    other["meta"]["temperature"] = 1.0
    odd = write(tmp_path / "odd.json", other)
    page = page_of(tmp_path, *pair, str(odd))
    assert "<b>Not exact</b>" in page and "7 of 10 (odd)." in page and "All 30" not in page
    assert "not measured with the same temperature." in page


def test_ties_are_told(tmp_path):
    page = page_of(tmp_path, str(write(tmp_path / "tied.json", results(2.0, ties=2, largest_tie_gap=2e-6))))
    assert "All 10 outputs compared were identical to the target's own, 2 of them but for two logits" in page
    assert ["outputs identical to the target alone", "8 of 10, and 2 but for a tie"] in rows_of(page, "Origin")


def test_outputs_that_were_not_compared_are_not_called_exact(tmp_path):
    page = page_of(tmp_path, str(write(tmp_path / "warm.json", results(2.0, compared=0, exact=None))))
    assert "Not compared with the target's own output: warm." in page and "were identical" not in page
    assert ["outputs identical to the target alone", "—"] in rows_of(page, "Origin")


def test_settings_that_differ_and_no_others(tmp_path, pair):
    page = page_of(tmp_path, *pair)
    assert rows_of(page, "Settings that differ") == [
        ["", "auf", "decay"],
        ["objective.name", "auf", "decay"],
        ["evaluation.drafter", "auf/drafter", "decay/drafter"],
    ]
    origin = rows_of(page, "Origin")
    assert ["last step logged", "30", "30"] in origin and ["objective", "auf", "decay"] in origin
    assert ["versions", "jax 0.10.0", "jax 0.10.0"] in origin


def test_runs_without_results_or_without_metrics_show_dashes(tmp_path, pair):
    (Path(pair[1]) / "results.json").unlink()
    alone = write(tmp_path / "alone.json", {**results(2.0), "sets": {"json": part(2.0, tau_outside_loops=None)}})
    page = page_of(tmp_path, *pair, str(alone))
    rows = rows_of(page, "Tau")
    assert rows[2:5] == [
        ["auf", "*2.600*", "2.400", "*2.500*"],  # alone in the second column: nothing to be better than
        ["decay", "—", "—", "—"],
        ["alone", "2.000", "—", "2.000"],
    ]
    assert rows[6] == ["auf", "2.100", "1.900", "*2.000*"] and rows[8] == ["alone", "—", "—", "1.500"]
    assert ["last step logged", "30", "30", "—"] in rows_of(page, "Origin")
    legend = page.split("<h3>Loss</h3>")[1].split("<svg")[0]
    assert "decay</span>" in legend and "alone</span>" not in legend


def test_page_of_training_alone(tmp_path, pair):
    (Path(pair[0]) / "results.json").unlink()
    page = page_of(tmp_path, pair[0])
    assert "None of these runs has been evaluated yet" in page and rows_of(page, "Origin")[2] == ["objective", "auf"]


def test_page_is_self_contained_with_distinct_ids(tmp_path, pair):
    page = page_of(tmp_path, f"a<script>$_={pair[0]}", f"_b={pair[1]}")
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in outside and "<script" not in outside and "url(//" not in outside
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 50
    assert set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert page.count("<svg") == 9 - 2  # nobody logged the two accuracies


def test_each_run_keeps_its_colour_in_every_plot(tmp_path, pair):
    runs = runs_.read_runs(pair)
    plots = re.findall(r"<svg.*?</svg>", page_of(tmp_path, *pair), re.S)
    assert len({run.colour for run in runs}) == 2
    assert all(run.colour in plot for run in runs for plot in plots)


def test_many_runs_have_distinct_colours(tmp_path):
    one = write(tmp_path / "one.json", results(2.0))
    runs = runs_.read_runs(tuple(f"r{i}={one}" for i in range(12)))
    assert len({run.colour for run in runs}) == 12


def test_metrics_later_lines_win_and_a_truncated_last_line_is_dropped(tmp_path):
    lines = (
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 1, "loss": 9.0}\n{"step": 1, "decode_tau": 1.5}\n'
    )
    path = write(tmp_path / "metrics.jsonl", lines + '{"note": "by hand"}\n{"step": 3, "lo')
    assert runs_.read_metrics(path) == {
        1: {"step": 1, "loss": 9.0, "decode_tau": 1.5},
        2: {"step": 2, "loss": 2.0},
    }


@pytest.mark.parametrize(
    "text, line",
    [
        ('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', 2),
        ('{"step": 1}\n{"step": 2}\n{"step": 3, "lo\n', 3),  # whole, by its newline, and broken
        ('{"step": 1}\n\n{"loss": 2}', 3),
        ('{"step": 1, "loss": "low"}\n', 1),
    ],
)
def test_broken_metrics_are_refused_by_line(tmp_path, text, line):
    path = write(tmp_path / "run" / "metrics.jsonl", text)
    refused(rf"line {line} of .*metrics\.jsonl", str(path.parent))


def test_a_loss_that_diverged_is_still_drawn(tmp_path):
    rows = [{"step": i, "loss": float("nan") if i > 200 else float("inf") if i == 9 else 1.0} for i in range(300)]
    write(tmp_path / "run" / "metrics.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert "<svg" in page_of(tmp_path, str(tmp_path / "run")).split("<h3>Loss</h3>")[1]


def test_long_curves_are_averaged_in_bins(tmp_path):
    run = runs_.Run("r", "#000000", {i: {"loss": float(i)} for i in range(1200)}, {}, {})
    steps, values = page_.curve(run, "loss")
    np.testing.assert_array_equal(steps, np.arange(120) * 10 + 4.5)
    np.testing.assert_array_equal(values, steps)


@pytest.mark.parametrize("where", ["overall", "sets.json", "meta", ""])
def test_missing_key_is_refused_by_file_and_name(tmp_path, where):
    value = results(2.0)
    holder = value
    for key in filter(None, where.split(".")):
        holder = holder[key]
    key = {"meta": "device", "": "sets"}.get(where, "tau_macro")
    del holder[key]
    path = write(tmp_path / "auf.json", value)
    refused(re.escape(f"{path} has no {f'{where}.{key}'.lstrip('.')}"), str(path))


@pytest.mark.parametrize(
    "change, found",
    [({"tau_micro": "2"}, "tau_micro"), ({"alpha": ["x"]}, r"alpha\[0\]"), ({"tau_micro": float("nan")}, "nan")],
)
def test_values_of_a_wrong_kind_are_refused(tmp_path, change, found):
    refused(found, str(write(tmp_path / "auf.json", results(2.0, **change))))


def test_what_cannot_be_a_run_is_refused(tmp_path, pair):
    refused("gone does not exist", str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    refused("no metrics and no results", str(tmp_path / "empty"))
    refused("cannot be read", str(write(tmp_path / "bad.json", "{")))
    refused("holds a list", str(write(tmp_path / "list.json", [])))
    refused("named x, x", *(f"x={path}" for path in pair))
    refused("(none)")
    refused("no name or no path", "auf=")
    refused("no name or no path", "=auf")


def test_names_and_paths_of_a_run(tmp_path):
    (tmp_path / "lr=1e-3").mkdir()
    assert runs_.parse_run("a=runs/x,y.json") == ("a", [Path("runs/x"), Path("y.json")])
    assert runs_.parse_run(f"{tmp_path}/lr=1e-3") == ("lr=1e-3", [tmp_path / "lr=1e-3"])
    assert runs_.parse_run("some/decay.json")[0] == "decay"


def test_results_beside_and_inside_a_run_folder(tmp_path, pair):
    apart = write(tmp_path / "elsewhere.json", results(3.0))
    runs = runs_.read_runs((f"a={pair[0]},{pair[0]}/results.json,{apart}",))
    assert [(run.name, run.read(None, "tau_micro"), bool(run.metrics)) for run in runs] == [
        ("a", 2.5, True),
        ("a (elsewhere)", 3.0, False),
    ]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_page_and_nothing_else(tmp_path, pair, monkeypatch, step):
    out = write(tmp_path / "page" / "report.html", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((files.os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(SpecaufError, match="No space left"):
        write_report(Report(runs=pair, out=str(out)), Console(quiet=True))
    assert out.read_bytes() == b"old" and [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_out_that_is_a_folder_is_refused(tmp_path, pair):
    (tmp_path / "page").mkdir()
    with pytest.raises(SpecaufError, match="is a folder"):
        write_report(Report(runs=pair, out=str(tmp_path / "page")), Console(quiet=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["auf", "decay", "page"]


def test_the_report_needs_no_jax_and_no_pyplot():
    code = "import sys, specauf_jax.commands.report; print(*{'jax', 'flax', 'matplotlib.pyplot'} & set(sys.modules))"
    root = Path(page_.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
