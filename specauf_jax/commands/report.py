"""`specauf report`: runs compared on one self-contained HTML page. Never imports JAX, so that it runs anywhere."""

from rich.console import Console
from rich.table import Table

from specauf_jax.commands.report_settings import Report
from specauf_jax.evaluation.page import DASH, render
from specauf_jax.evaluation.runs import Run, parse_run, read_benchmark, read_runs
from specauf_jax.files import output_file, write_text


def write_report(config: Report, console: Console) -> str:
    """Read the runs, print their tau, write the page (a failure leaves any older page as it was); returns its path."""
    runs = read_runs(config.runs)
    files = [path for text in config.runs for path in parse_run(text)[1] if path.is_file()]
    out = output_file(config.out, config.benchmark, *files)
    speeds = read_benchmark(config.benchmark) if config.benchmark else None
    write_text(out, render(runs, speeds))
    print_tau(runs, console)
    console.print(f"report written to {config.out}", highlight=False)
    return config.out


def print_tau(runs: list[Run], console: Console) -> None:
    """tau per prompt set, and outside loops over all, as a table in the terminal."""
    measured = [run for run in runs if run.results]
    if not measured:
        return
    sets = list(dict.fromkeys(name for run in measured for name in run.results["sets"]))
    table = Table("tau", *sets, "overall", "outside loops", "exact")
    for run in measured:
        values = [run.read(name, "tau_micro") for name in (*sets, None)] + [run.read(None, "tau_outside_loops")]
        cells = [DASH if value is None else f"{value:.3f}" for value in values]
        table.add_row(run.name, *cells, str(run.read(None, "exact")))
    console.print(table)
