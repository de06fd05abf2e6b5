#!/usr/bin/env bash
# One worker's part of launch/tpu_vm.sh, which copies this file to every worker and calls it there by ssh.
# The run is detached from ssh: gcloud repeats a command whose connection broke, and a run must not start twice.
set -euo pipefail

usage() {
  cat <<END
usage: bash tpu_worker.sh setup [REPOSITORY REVISION]   the project into ~/specauf_jax, with an environment of its own
       bash tpu_worker.sh start COMMAND …               detached; nothing where the same command is running already
       bash tpu_worker.sh running COMMAND …             exit code 0: yes, 1: nothing runs, 4: another command does
       bash tpu_worker.sh follow LINES                  the log from the last LINES on (+1: all of it), until the end
       bash tpu_worker.sh code                          waits for the end, prints "specauf-exit CODE", or lost

Without a repository, setup unpacks ~/specauf_jax.tar.gz.
END
}

project=$HOME/specauf_jax
run=$HOME/.specauf_run

set_up() {
  mkdir -p "$project"
  if [ $# = 2 ]; then
    [ -d "$project/.git" ] || git clone --quiet "$1" "$project"
    git -C "$project" fetch --quiet "$1" "$2"
    git -C "$project" checkout --quiet --force FETCH_HEAD
  else
    tar -xzf "$HOME/specauf_jax.tar.gz" -C "$project"
  fi
  cd "$project"
  # uv brings a Python along: the one of a TPU VM's image may be older than 3.11.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv # the variable: for Debian's newer Pythons
  python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
  python3 -m uv pip install --quiet --python .venv -r requirements.txt --editable '.[tpu]'
}

alive() { [ -f "$run/pid" ] && kill -0 "$(cat "$run/pid")" 2>/dev/null; }

is_running() {
  alive || return 1
  [ "$(cat "$run/command")" = "$(printf '%q ' "$@")" ] || return 4
}

start() {
  local found=0
  is_running "$@" || found=$?
  if [ "$found" = 0 ]; then return; fi
  if [ "$found" = 4 ]; then
    echo "tpu_worker: another command is running here: $(cat "$run/command")" >&2
    return 4
  fi
  mkdir -p "$run"
  rm -f "$run/code"
  printf '%q ' "$@" > "$run/command"
  cd "$project"
  export PATH="$project/.venv/bin:$PATH" PYTHONUNBUFFERED=1
  # shellcheck disable=SC2016 # expanded by the inner shell, which outlives a SIGTERM to all to write the code down
  setsid nohup bash -c 'trap : TERM; run=$1; shift; "$@"; echo $? > "$run/code.part"; mv "$run/code.part" "$run/code"' \
    run "$run" "$@" < /dev/null > "$run/log" 2>&1 &
  echo $! > "$run/pid"
}

follow() {
  tail -n "$1" -f -s 0.5 --pid="$(cat "$run/pid")" "$run/log"
}

code() {
  local found
  while alive; do sleep 0.5; done
  found=$(cat "$run/code" 2>/dev/null || echo lost)
  if [ "$found" != 0 ]; then tail -n 5 "$run/log" 2>/dev/null | sed "s/^/[$HOSTNAME] /" >&2; fi
  echo "specauf-exit $found"
}

refuse() {
  echo "tpu_worker: found ${1:-nothing}, expected one of the forms below" >&2
  usage >&2
  exit 2
}

form="${1:-} $#"
if [ $# -gt 0 ]; then shift; fi
case "$form" in
  "setup 1" | "setup 3") set_up "$@" ;;
  "follow 2") follow "$1" ;;
  "code 1") code ;;
  "start 1" | "running 1") refuse "${form% *} without a command" ;;
  "start "*) start "$@" ;;
  "running "*) is_running "$@" ;;
  "-h "* | "--help "*) usage ;;
  *) refuse "${form% *}" ;;
esac
