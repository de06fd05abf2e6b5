"""The documents tell the truth: the library example runs, the module table is the imports', every command exists.

`python tests/test_readme.py` writes README.md's table of modules anew.
"""

import argparse
import ast
import functools
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from specauf_jax import cli

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *(ROOT / f"{folder}/README.md" for folder in ("launch", "launch/measure", "configs"))]
MARKS = "<!-- modules -->\n", "<!-- end of modules -->\n"


def modules() -> list[tuple[str, str]]:
    """Modules and packages of specauf_jax with their docstring's first line, each after all that it imports."""
    package = ROOT / "specauf_jax"
    files = {path.stem: [path] for path in package.glob("*.py") if not path.name.startswith("__")}
    files |= {path.parent.name: sorted(path.parent.rglob("*.py")) for path in package.glob("*/__init__.py")}
    trees = {name: [ast.parse(path.read_text()) for path in paths] for name, paths in files.items()}

    def imported(tree):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Constant) and re.fullmatch(r"specauf_jax(\.\w+)+", str(node.value)):
                yield node.value  # which importlib is given

    @functools.cache
    def depth(name: str) -> int:
        """The longest way down to a module that imports none of the others."""
        full = [module.split(".") for tree in trees[name] for module in imported(tree)]
        used = {parts[1] for parts in full if parts[0] == "specauf_jax"} & files.keys() - {name}
        return max((depth(other) + 1 for other in used), default=0)

    said = {name: ast.get_docstring(trees[name][0]).splitlines()[0] for name in files}
    return [
        (f"{name}/" if len(files[name]) > 1 else f"{name}.py", said[name])
        for name in sorted(files, key=lambda n: (depth(n), n))
    ]


def table() -> str:
    return "".join(["| | |\n|---|---|\n", *(f"| `{name}` | {said} |\n" for name, said in modules())])


def parts() -> list[str]:
    """README.md before, in and after its table of modules."""
    before, rest = README.read_text().split(MARKS[0])
    return [before + MARKS[0], *rest.split(MARKS[1])]


def fences(document: Path) -> list[str]:
    """Texts of the blocks of shell."""
    return re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.M | re.S)


def commands(document: Path) -> list[list[str]]:
    """Words of every command in the document's blocks of shell; variables that a block sets are put in."""
    found = []
    for fence in fences(document):
        variables = {}
        for line in fence.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if len(words) == 1 and (match := re.fullmatch(r"(\w+)=(.*)", words[0])):
                variables[match[1]] = match[2]
                words = shlex.split(match[2])
            found += [words] if words else []
    return found


ALL = [(document, words) for document in DOCUMENTS for words in commands(document)]


def test_the_library_example_runs(capsys):
    [code] = [block.split("```")[0] for block in README.read_text().split("```python\n")[1:]]
    exec(compile(code, "README.md", "exec"), {})
    loss, tau, *_ = capsys.readouterr().out.split()
    assert 3 < float(loss) < 5 and 1 <= float(tau) < 2


def test_the_table_of_modules_is_true():
    assert parts()[1] == table(), "python tests/test_readme.py writes it anew"


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 180


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    assert all((document.parent / link).exists() for link in links if "://" not in link), links


def test_commands_are_found():
    """Of each kind, so that the test below has something to say."""
    assert {"specauf", "python", "bash", ".", ".venv-interop/bin/python"} == {words[0] for _, words in ALL}


@pytest.mark.parametrize("words", [words for _, words in ALL], ids=[" ".join(words)[:60] for _, words in ALL])
def test_commands_exist(words, monkeypatch):
    """Their flags are known and their values have the right form; nothing runs."""
    monkeypatch.chdir(ROOT)
    if words[0] == "specauf":
        cli._parse(cli.COMMANDS[words[1]][0], words[1], words[2:])
        return
    assert Path(words[1]).is_file()
    if words[0] in ("bash", "."):
        own = (
            words[: words.index("--")]
            if "--" in words
            else words[: words.index("specauf")]
            if "specauf" in words
            else words
        )
        said = subprocess.run(["bash", words[1], "--help"], capture_output=True, text=True).stdout if own[2:] else ""
        assert all(word in said for word in own if word.startswith("--"))
    else:
        parse = argparse.ArgumentParser.parse_args

        class Parsed(Exception):
            """In place of what the script does then."""

        def parse_only(self, arguments=None, namespace=None):
            parse(self, arguments, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        monkeypatch.setattr(sys, "argv", words[1:])
        monkeypatch.setattr(sys, "path", sys.path[:])
        with pytest.raises(Parsed):
            runpy.run_path(words[1], run_name="__main__")
    if "specauf" in words:
        at = words.index("specauf")
        cli._parse(cli.COMMANDS[words[at + 1]][0], words[at + 1], words[at + 2 :])


if __name__ == "__main__":
    before, _, after = parts()
    README.write_text(before + table() + MARKS[1] + after)
