#!/usr/bin/env bash
# Lint and all tests, after their own set-up. Arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export JAX_PLATFORMS=cpu
ruff check .
ruff format --check .
# A worker a core; each file in one worker, so that what it compiled serves all of its tests.
python -m pytest -n "$(nproc)" --dist loadfile "$@"
