#!/usr/bin/env bash
# Lint and all tests, after their own set-up. Arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export JAX_PLATFORMS=cpu
# The TPU compiler that belongs to this jax, which only tests and specauf compile need.
python -c 'import libtpu' 2> /dev/null ||
  python -m pip install --quiet --disable-pip-version-check "$(sed -n 's/^jax==/jax[tpu]==/p' requirements.txt)"
ruff check .
ruff format --check .
# A worker a core; each file in one worker, so that what it compiled serves all of its tests.
python -m pytest -n "$(nproc)" --dist loadfile "$@"
