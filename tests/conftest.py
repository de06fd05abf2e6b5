"""Tests compile much and compute little: XLA may skip its optimisations, which takes a fifth of the time.

With XLA_FLAGS set, be it to nothing, they compile as they are told there: test_default_flags does so.
"""

import gc
import os

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

# The files that take longest, which a worker each begins with.
LONGEST = ("test_distributed.py", "test_default_flags.py", "test_domino.py", "test_doctor.py", "test_decoding.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A file's compiled programs go with it: each takes places in the table of memory maps, which is finite (65,530),
    and a process that compiles when none is left crashes."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
