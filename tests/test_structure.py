"""File order is data order: what a module may import, and what must come without JAX."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import specauf_jax

ROOT = Path(specauf_jax.__file__).parent
LAYERS = (
    *(
        "errors",
        "signals",
        "machine",
        "checks",
        "pytrees",
        "config",
        "recipes",
        "storage",
        "files",
        "environment",
        "sharding",
        "distributed",
    ),
    *(
        "objectives",
        "parts",
        "architecture",
        "known_targets",
        "flops",
        "kernels",
        "models",
        "data",
        "training",
        "decoding",
        "evaluation",
        "commands",
    ),
    *("cli", "__main__"),
)
"""Modules and packages; each imports only from itself and from those before it."""
APART = {"decoding": {"training", "data"}, "data": {"models", "kernels", "objectives"}, "evaluation": {"training"}}
"""What stays apart although the order would allow it."""
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.name != "__init__.py"
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported(tree: ast.AST) -> set[str]:
    """Full names of everything that a module imports, functions' own imports too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


IMPORTS = {
    name: {full.removeprefix("specauf_jax.") for full in imported(tree)} & FILES.keys() - {name}
    for name, tree in TREES.items()
}


def layer(module: str) -> str:
    return module.partition(".")[0]


def public(tree: ast.Module) -> list:
    """Functions and classes without a leading underscore."""
    kinds = ast.FunctionDef | ast.ClassDef
    return [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def test_every_module_has_its_place():
    assert {layer(name) for name in FILES} == set(LAYERS)
    assert sum(map(len, IMPORTS.values())) > 100  # the graph was read


@pytest.mark.parametrize("module", FILES)
def test_imports_only_from_earlier(module):
    earlier = LAYERS[: LAYERS.index(layer(module)) + 1]
    used = {layer(name) for name in IMPORTS[module]}
    assert used <= set(earlier)
    assert not used & APART.get(layer(module), set())


def test_no_circle():
    assert len(list(graphlib.TopologicalSorter(IMPORTS).static_order())) == len(FILES)


def test_only_data_knows_tfds():
    users = {name for name, tree in TREES.items() if any(i.startswith("tensorflow") for i in imported(tree))}
    assert users and {layer(name) for name in users} == {"data"}


@pytest.mark.parametrize(
    "statement", ["import specauf_jax", "import specauf_jax.commands.report", "import specauf_jax.cli"]
)
def test_comes_without_jax(statement):
    slow = {"jax", "flax", "tensorflow_datasets", "transformers"}
    code = f"{statement}; import sys; print(sorted({slow!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", FILES)
def test_file_is_short_and_documented(module):
    assert len(FILES[module].read_text().splitlines()) <= 560
    tree = TREES[module]
    assert ast.get_docstring(tree)
    assert [node.name for node in public(tree) if not ast.get_docstring(node)] == []


def test_public_names_exist():
    assert [name for name in specauf_jax.__all__ if getattr(specauf_jax, name).__doc__ is None] == []
