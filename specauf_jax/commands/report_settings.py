"""Settings of `specauf report`."""

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Report:
    """Compare runs on one self-contained HTML page."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """[NAME=]PATH[,PATH]: run folders (metrics.jsonl) and results of `specauf evaluate`."""
    out: str
    """HTML file to write."""
    benchmark: str | None = None
    """JSON of `specauf benchmark`, for plots of speed against batch size."""
