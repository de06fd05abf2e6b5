"""Peers from the Python package index, and nothing from the network."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
import torch
import transformers

torch.set_num_threads(1)  # models so small that threads cost a hundred times what they bring
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def forget_compilations():
    """Every case has shapes of its own; what was compiled for it will not be asked for again."""
    torch.manual_seed(0)
    yield
    jax.clear_caches()
