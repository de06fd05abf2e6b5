"""The embedded corpus: the running interpreter's own standard library, with held-out domains."""

import ast
import hashlib
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from specauf_jax.data.tokenizer import Tokenizer
from specauf_jax.errors import SpecaufError

HELDOUT_PACKAGES = ("asyncio", "json", "email")
"""Domains of source code; nothing of these packages is in the training text."""
DOCSTRING_MODULES = ("argparse", "difflib", "logging", "statistics", "unittest")
"""Their docstrings are the fourth domain; their sources are not in the training text either."""
# Tests, vendored wheels, and what a program wrote: code-page tables, topics of help(), build settings.
_EXCLUDED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages",
             "dist-packages", "encodings", "pydoc_data", "__pycache__", "__phello__"}  # fmt: skip


def stdlib_corpus(max_bytes: int) -> tuple[list[str], dict[str, list[str]]]:
    """Training texts (whole files, `max_bytes` at most) and the texts of each held-out domain.

    Raises:
      SpecaufError: this interpreter carries no library sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = list(_source_files(root))
    if not files:
        raise SpecaufError(f"no .py files under {root}", "an interpreter with its standard library's sources",
                           "use a full Python installation, or --input with your own text")  # fmt: skip
    heldout: dict[str, list[str]] = {name: [] for name in (*HELDOUT_PACKAGES, "docstrings")}
    training: list[Path] = []
    for path in files:
        package = path.relative_to(root).parts[0].removesuffix(".py")
        if package in HELDOUT_PACKAGES:
            heldout[package].append(_read(path))
        elif package in DOCSTRING_MODULES:
            heldout["docstrings"].append(_docstrings(_read(path)))
        else:
            training.append(path)
    return _up_to(training, root, max_bytes), {name: [t for t in texts if t] for name, texts in heldout.items()}


def _source_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _EXCLUDED.intersection(parts) and not parts[-1].startswith("_sysconfigdata"):
            yield path


def _up_to(files: list[Path], root: Path, max_bytes: int) -> list[str]:
    # In the order of a hash of the name, so that a small corpus is a fair sample of the whole.
    order = sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    texts, size = [], 0
    for path in order:
        if size + path.stat().st_size <= max_bytes:
            size += path.stat().st_size
            texts.append(_read(path))
    return [text for text in texts if text.strip()]


def _read(path: Path) -> str:
    with tokenize.open(path) as file:  # knows the source's own encoding
        return file.read()


def _docstrings(source: str) -> str:
    """The docstrings of a module, one after another."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return "\n\n".join(filter(None, found))


def corpus_name() -> str:
    """What the manifest says of this corpus; it differs between Python versions."""
    return f"standard library of {sys.implementation.name} {sys.version.split()[0]}"


def heldout_prompts(tokenizer: Tokenizer, texts: list[str], count: int, length: int) -> list[str]:
    """Distinct prompts of about `length` tokens, each from the start of a line, spread over the texts.

    Raises:
      SpecaufError: the texts are too short for `count` of them.
    """
    starts = [(text, offset) for text in texts for offset in _line_starts(text, room=8 * length)]
    prompts: list[str] = []
    for index in range(count):
        for text, offset in starts[index * len(starts) // count : (index + 1) * len(starts) // count]:
            prompt = _first_tokens(tokenizer, text[offset : offset + 8 * length], length)
            if prompt not in prompts:
                prompts.append(prompt)
                break
        else:
            raise SpecaufError(f"a held-out domain has too little text for {count} distinct prompts of {length} tokens",
                               "fewer or shorter prompts", "lower --heldout-prompts or --prompt-length")  # fmt: skip
    return prompts


def _line_starts(text: str, room: int) -> Iterator[int]:
    """Offsets of the lines that are not blank and have `room` characters after their start."""
    offset = 0
    for line in text.splitlines(keepends=True):
        if offset + room > len(text):
            return
        if line.strip():
            yield offset
        offset += len(line)


def _first_tokens(tokenizer: Tokenizer, text: str, length: int) -> str:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    return text[: encoded["offset_mapping"][:length][-1][1]]
