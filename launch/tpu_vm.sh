#!/usr/bin/env bash
# A command on every worker of a Cloud TPU pod, through preemptions, until it ends by itself.
set -euo pipefail

usage() {
  cat <<END
usage: bash launch/tpu_vm.sh --name NAME --zone ZONE --accelerator-type TYPE [options] -- specauf COMMAND …
       bash launch/tpu_vm.sh --name NAME --zone ZONE --delete

Creates a queued resource, waits until it is ACTIVE, copies this project to all workers, sets it up, runs the command on
all of them and shows worker 0's log. When the resource is preempted, it is deleted and created again and the same command
runs again: a training run goes on from its newest checkpoint. New machines have empty disks, so data, target and --out
belong on gs://. The run is detached: interrupting this script, or losing it, stops nothing, and the same line joins it again.

  --name NAME                of the queued resource and its TPU VMs
  --zone ZONE                such as us-west4-a
  --accelerator-type TYPE    such as v5litepod-16, v5p-32, v6e-16
  --runtime-version VERSION  the VM's image; has a default for v5litepod, v5p and v6e
  --project PROJECT          default: gcloud's own
  --node-count N             slices, joined over the data-centre network; default 1
  --on-demand                not spot
  --repository URL           clone on the workers instead of copying this tree
  --revision REVISION        of the repository; default HEAD
  --max-restarts N           default 100
  --poll-s SECONDS           between two looks at the resource; default 30
  --delete                   delete the resource once the command has ended; without a command, now
  --dry-run                  print every command for a run without preemption, run none

exit codes: 0 the command ended with 0 everywhere; 2 bad arguments; 3 no resource, no set-up, or restarts used up; 130
interrupted; else the highest exit code of the command on any worker. Needs gcloud, logged in, with the Cloud TPU API enabled.
END
}

say() { echo "tpu_vm: $*" >&2; }
fail() {
  say "$*"
  exit 3
}
refuse() { # FOUND EXPECTED
  say "found $1, expected $2; see --help"
  exit 2
}

# Exit code of specauf after SIGTERM, so that "stopped, start me again" is not taken for "done".
stopped_code=75
failed_disk=74 # its exit code where a disk or the network failed: another try may succeed
name='' zone='' type='' runtime='' project='' nodes=1 spot=true repository='' revision=HEAD max_restarts=100 poll_s=30
delete=false dry_run=false command=()

parse() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --on-demand) spot=false ;;
      --delete) delete=true ;;
      --dry-run) dry_run=true ;;
      -h | --help) usage; exit 0 ;;
      --)
        shift
        command=("$@")
        return
        ;;
      --name | --zone | --accelerator-type | --runtime-version | --project | --node-count | --repository | --revision | \
        --max-restarts | --poll-s)
        [ $# -gt 1 ] || refuse "$1 without a value" "$1 VALUE"
        set_option "$1" "$2"
        shift
        ;;
      *) refuse "argument $1" "an option, or -- before the command" ;;
    esac
    shift
  done
}

set_option() {
  case "$1" in
    --name) name=$2 ;;
    --zone) zone=$2 ;;
    --accelerator-type) type=$2 ;;
    --runtime-version) runtime=$2 ;;
    --project) project=$2 ;;
    --node-count) nodes=$2 ;;
    --repository) repository=$2 ;;
    --revision) revision=$2 ;;
    --max-restarts) max_restarts=$2 ;;
    --poll-s) poll_s=$2 ;;
  esac
}

check() {
  [[ $name =~ ^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$ ]] ||
    refuse "--name '$name'" "at most 50 small letters, digits and dashes, a letter first"
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || refuse "--zone '$zone'" "a zone such as us-west4-a"
  [[ $poll_s =~ ^[0-9]+(\.[0-9]+)?$ ]] || refuse "--poll-s '$poll_s'" "seconds"
  [[ $nodes =~ ^[1-9][0-9]*$ ]] || refuse "--node-count '$nodes'" "a number from 1 on"
  [[ $max_restarts =~ ^[0-9]+$ ]] || refuse "--max-restarts '$max_restarts'" "a number from 0 on"
  if $delete && [ ${#command[@]} = 0 ]; then return; fi
  [[ $type =~ ^[a-z0-9]+-[0-9]+$ ]] || refuse "--accelerator-type '$type'" "a type such as v5litepod-16"
  [[ "${command[*]:0:2} " =~ ^specauf\ (train|pretrain|regenerate|synthesize|generate|evaluate|benchmark|benchmark-train)\ $ ]] ||
    refuse "the command '${command[*]}'" "-- specauf train, pretrain, regenerate, synthesize, generate, evaluate, benchmark or benchmark-train, with its settings"
  if [ -z "$runtime" ]; then
    case "$type" in
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      *) refuse "--accelerator-type $type without --runtime-version" "both: only v5litepod, v5p and v6e have a default" ;;
    esac
  fi
}

cloud() {
  if $dry_run; then
    { printf '%q ' gcloud compute tpus "$@" && echo; } >&3
  else
    gcloud compute tpus "$@"
  fi
}

pause() { $dry_run || sleep "$poll_s"; }

# The resource -------------------------------------------------------------------------------------------------------

look() { # sets state: the resource's, or NONE
  local try
  if $dry_run; then
    cloud queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
    state=$dry_state dry_state=ACTIVE
    return
  fi
  for try in {1..10}; do
    if state=$(cloud queued-resources describe "$name" "${where[@]}" '--format=value(state.state)' 2>"$scratch/error"); then
      return
    elif grep -q NOT_FOUND "$scratch/error"; then
      state=NONE
      return
    fi
    pause
  done
  fail "gcloud does not tell the resource's state, $try times: $(tail -n 1 "$scratch/error")"
}

create() {
  local how=(--accelerator-type "$type" --runtime-version "$runtime")
  if [ "$nodes" = 1 ]; then how+=(--node-id "$name"); else how+=(--node-count "$nodes" --node-prefix "$name"); fi
  if $spot; then how+=(--spot); fi
  say "creating $name: $nodes × $type in $zone$($spot && echo ', spot')"
  cloud queued-resources create "$name" "${where[@]}" "${how[@]}" || fail "gcloud refused to create $name; see above"
}

remove() {
  say "deleting $name"
  cloud queued-resources delete "$name" "${where[@]}" --force --quiet
}

restart() { # REASON: counts
  restarts=$((restarts + 1))
  [ "$restarts" -le "$max_restarts" ] || fail "$1; $max_restarts restarts (--max-restarts) are used up"
  say "$1; restart $restarts of at most $max_restarts"
}

get_resource() { # until it is ACTIVE; sets fresh: whether its disks are empty for sure
  local before=''
  fresh=false
  while true; do
    look
    if [ "$state" != "$before" ]; then say "$name is $state"; fi
    before=$state
    case "$state" in
      ACTIVE) return ;;
      NONE) create && fresh=true ;;
      SUSPENDED | FAILED)
        cloud queued-resources describe "$name" "${where[@]}" >&2 || true
        restart "$name is $state"
        remove || say "not deleted yet"
        ;;
    esac
    pause
  done
}

gone() { # after an ssh that failed: is the resource leaving? That may take a while to show.
  for _ in {1..6}; do
    look
    if [ "$state" != ACTIVE ]; then return 0; fi
    pause
  done
  return 1
}

# Its workers --------------------------------------------------------------------------------------------------------

node() { if [ "$nodes" = 1 ]; then echo "$name"; else echo "$name-$1"; fi; }

on_all() { # COMMAND on all workers of all slices at once; what node i prints goes to $scratch/said.i
  local i status=0 jobs=()
  for ((i = 0; i < nodes; i++)); do
    cloud tpu-vm ssh "$(node $i)" "${where[@]}" --worker all --command "$1" "${keep_alive[@]}" > "$scratch/said.$i" &
    jobs+=($!)
    if $dry_run; then wait $!; fi # in order
  done
  for i in "${jobs[@]}"; do wait "$i" || status=$?; done
  return "$status"
}

set_up() {
  local i files=("$here/tpu_worker.sh") sources=''
  if [ -n "$repository" ]; then
    sources=$(printf ' %q' "$repository" "$revision")
  else
    files+=("$scratch/specauf_jax.tar.gz")
    pack || return 1
  fi
  say "copying and setting up"
  for ((i = 0; i < nodes; i++)); do
    cloud tpu-vm scp "${files[@]}" "$(node $i):" "${where[@]}" --worker all || return 1
  done
  on_all "bash tpu_worker.sh setup$sources"
}

pack() {
  local line=(tar -czf "$scratch/specauf_jax.tar.gz" -C "$here/.." --exclude __pycache__ specauf_jax configs launch
    pyproject.toml requirements.txt README.md LICENSE -C "$scratch" REVISION)
  git -C "$here/.." describe --always --dirty=+ --abbrev=12 > "$scratch/REVISION" 2> /dev/null || true
  if $dry_run; then { printf '%q ' "${line[@]}" && echo; } >&3; else "${line[@]}"; fi
}

started() { # on all workers, or found running there; fails where the resource is leaving
  local found=1
  if ! $fresh; then
    found=0
    on_all "bash tpu_worker.sh running $quoted" 2> /dev/null || found=$?
  fi
  case "$found" in
    0) say "the command is running already: joining it" ;;
    4) fail "another command is running on $name: wait for it, or --delete" ;;
    *)
      if set_up && on_all "bash tpu_worker.sh start $quoted"; then return 0; fi
      gone || fail "the set-up failed on a resource that is ACTIVE; see above"
      return 1
      ;;
  esac
}

ended() { # shows the log until the command has ended on all workers; fails where they cannot be reached
  local lines=+1 tries=0
  until cloud tpu-vm ssh "$(node 0)" "${where[@]}" --worker 0 --command "bash tpu_worker.sh follow $lines" \
    "${keep_alive[@]}" && on_all "bash tpu_worker.sh code"; do
    tries=$((tries + 1)) lines=20
    say "ssh is lost"
    if gone || [ "$tries" = 5 ]; then return 1; fi
  done
}

run_once() { # sets outcome: an exit code, or why to start again
  outcome="$name is lost"
  if ! started; then return; fi
  if ! ended; then
    if [ "$state" = ACTIVE ]; then remove || true; fi
    return
  fi
  if $dry_run; then
    outcome=0
    return
  fi
  local codes
  codes=$(sed -n 's/^specauf-exit //p' "$scratch"/said.* | sort -n)
  if [ -z "$codes" ]; then
    outcome="no worker told its exit code"
    return
  fi
  if grep -qxE "$stopped_code|$failed_disk|143|lost" <<< "$codes"; then
    outcome="the command was stopped from outside, or a disk or the network failed"
    return
  fi
  outcome=$(tail -n 1 <<< "$codes")
  if [ "$outcome" != 0 ]; then
    look
    if [ "$state" != ACTIVE ]; then outcome="$name is $state, the command ended with $outcome"; fi
  fi
}

# shellcheck disable=SC2329 # the trap calls it
interrupted() {
  jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true
  say "interrupted; what runs on $name goes on: the same line joins it, --delete ends it"
  exit 130
}

main() {
  parse "$@"
  check
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  where=(--zone "$zone")
  if [ -n "$project" ]; then where+=(--project "$project"); fi
  keep_alive=('--ssh-flag=-o ServerAliveInterval=15' '--ssh-flag=-o ServerAliveCountMax=4') # or a preempted worker's connection would hang
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  exec 3>&1
  state='' dry_state=NONE restarts=0
  if [ ${#command[@]} = 0 ]; then
    remove || fail "not deleted; see above"
    exit 0
  fi
  trap interrupted INT TERM
  if [[ ${command[*]} != *gs://* ]]; then say "warning: no gs:// path in the command; a new machine's disk is empty"; fi
  quoted=$(printf '%q ' "${command[@]}" --hosts.stopped-code "$stopped_code")
  while true; do
    get_resource
    run_once
    if [[ $outcome =~ ^[0-9]+$ ]]; then break; fi
    restart "$outcome"
    pause
  done
  if $delete; then remove || say "not deleted: run this script with --delete alone"; fi
  say "the command ended with $outcome"
  exit "$outcome"
}

main "$@"
