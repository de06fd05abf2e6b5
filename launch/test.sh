#!/usr/bin/env bash
# Lint and tests, after their own set-up.
set -euo pipefail

usage() {
  cat <<EOF
usage: bash launch/test.sh [--quick | --all] [PYTEST ARGUMENTS]

Checks style with ruff and types with mypy, then runs the tests of specauf_jax, but for the few that take half of the
time. Installs into .venv what is missing there. The arguments go to pytest, and the exit code is pytest's: 0 where
everything passed.

  --all     the long tests too: several hosts that are killed and go on, the flags that users have, every command in a
            row, eight devices. What must pass before work is merged.
  --quick   style, types and the tests of single modules only: 100 s of processor time. It leaves out the commands, the
            laws of decoding, meshes, several hosts and the launchers.
EOF
}

# The modules whose tests need few and small compilations.
QUICK=(attention blocks checkpoint data_{chat,dataset,loader,packing,prepare,sources,tokenizer} layers loss measure
  objectives overfit prompts regenerate rope structure weights)

files=() which=(-m "not long")
case "${1:-}" in
  --all)
    shift
    which=()
    ;;
  --quick)
    shift
    files=("${QUICK[@]/#/tests/test_}")
    files=("${files[@]/%/.py}")
    ;;
  -h | --help) usage; exit 0 ;;
esac
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export JAX_PLATFORMS=cpu
# The TPU compiler that belongs to this jax, which only tests and specauf compile need: beside .venv, whose users have none.
libtpu=$(python -c 'from importlib.metadata import requires
print(next(name.split(";")[0] for name in requires("jax") if name.startswith("libtpu")))')
if [ "$(cat .libtpu/installed 2> /dev/null)" != "$libtpu" ]; then
  python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .libtpu "$libtpu"
  echo "$libtpu" > .libtpu/installed
fi
export PYTHONPATH="$PWD/.libtpu${PYTHONPATH:+:$PYTHONPATH}"
if [ "${#files[@]}" -gt 0 ]; then echo "test: the quick form, which leaves out most of the tests"; fi
ruff check .
ruff format --check .
mypy
# A worker a core; each file in one worker, so that what it compiled serves all of its tests. The files come in the order
# in which tests/conftest.py puts them: the longest first.
python -m pytest -n "$(nproc)" --dist loadfile --no-loadscope-reorder ${which[@]+"${which[@]}"} ${files[@]+"${files[@]}"} "$@"
