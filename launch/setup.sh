# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment in .venv with the pinned requirements. Prints nothing but errors
# and one line of what it does; does nothing when the pins have not changed.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || return

find_python() {
  local candidate
  for candidate in python3 python3.11 python3.12 python3.13 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: no Python 3.11 to 3.13 found; install one and run this again" >&2
  return 1
}

set_up() {
  local wanted python
  wanted=$(cat requirements.txt pyproject.toml | cksum)
  if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    python=$(find_python)
    echo "setup: installing the pinned requirements into .venv ($($python --version))"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    echo "$wanted" > .venv/installed
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}

set_up
