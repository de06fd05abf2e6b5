"""The README's library example runs as it stands."""

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_nothing_is_left_open():
    assert "@@" not in README.read_text()


def test_the_library_example_runs(capsys):
    [code] = [block.split("```")[0] for block in README.read_text().split("```python\n")[1:]]
    exec(compile(code, "README.md", "exec"), {})
    loss, tau, *_ = capsys.readouterr().out.split()
    assert 3 < float(loss) < 5 and 1 <= float(tau) < 2
