#!/usr/bin/env bash
# What this project costs on one GPU, in a limited time.
set -euo pipefail

usage() {
  cat <<EOF
usage: bash launch/measure/device.sh --out DIR [--seconds 480] [--toy] [-- options of real_target.sh]

For a machine with one NVIDIA GPU, a Python with a JAX that sees it, and this project's requirements. Installs nothing.
Parts run one after another; each has a share of the seconds, and what one leaves over goes to the next:

  attention   block attention against jax.nn.dot_product_attention, S = 3,072, A = 512, bfloat16
  lm_head     the LM head up to first misses, of all slots, and computed again, D = 4,096, V = 151,936, bfloat16
  train       a train step of configs/qwen3_8b_dflash.py, 4 rows, random weights, auf and decay
  decode      a round of a random target of 1.3 billion parameters with a drafter, batch 1, 4 and 16
  study       where options for it stand behind --: launch/measure/real_target.sh, in half of the seconds and all that
              is left; it goes on in DIR/study, where a longer run may follow

Each part writes DIR/PART.json when it ends; DIR/device.log has everything printed, DIR/summary.json the outcomes.
A part that lacks a Python module is skipped, and its outcome names the module.

  --out DIR      folder for the results
  --seconds N    for all parts together (480)
  --toy          tiny sizes on a CPU, to see that all parts work

PYTHON names another interpreter than python3. Exit code: 0 if all parts ended well, 1 if one did not, 2 for bad
arguments.
EOF
}

refuse() {
  echo "device: found $1, expected $2" >&2
  usage >&2
  exit 2
}

out="" seconds=480 toy=false study=() shares=(12 13 40 35)
while [ $# -gt 0 ]; do
  case "$1" in
    --out | --seconds)
      [ $# -gt 1 ] || refuse "$1 without a value" "$1 VALUE"
      if [ "$1" = --out ]; then out=$2; else seconds=$2; fi
      shift 2
      ;;
    --toy) toy=true; shift ;;
    --) shift; study=("$@") shares=(6 7 20 17 50); break ;;
    -h | --help) usage; exit 0 ;;
    *) refuse "'$1'" "one of the options below" ;;
  esac
done
[ -n "$out" ] || refuse "no --out" "--out DIR"
[[ "$seconds" =~ ^[1-9][0-9]*$ ]] || refuse "--seconds '$seconds'" "a number of seconds"

mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
rm -f "$out"/{attention,lm_head,train,decode,summary}.json
exec > >(tee "$out/device.log") 2>&1
began=$SECONDS
outcomes=()

# part NAME PERCENT COMMAND …: runs the command within that share of all seconds and what is left over so far.
earned=0
part() {
  local name=$1 limit code=0 missing started=$SECONDS
  earned=$((earned + seconds * $2 / 100))
  shift 2
  limit=$((earned - (SECONDS - began)))
  printf '\n== %s (%d s)\n' "$name" $((SECONDS - began))
  if [ "$limit" -lt 1 ]; then
    outcome "$name" "skipped: no time left"
    return
  fi
  timeout -k 10 "$limit" "$@" 2>&1 | tee "$scratch/said" || code=${PIPESTATUS[0]}
  missing=$(grep -m 1 '^ModuleNotFoundError' "$scratch/said") || true
  case "$code" in
    0) outcome "$name" "measured in $((SECONDS - started)) s" ;;
    124 | 137) outcome "$name" "stopped after its $limit s" ;;
    *) if [ -n "$missing" ]; then outcome "$name" "skipped: $missing"; else outcome "$name" "failed with exit code $code"; fi ;;
  esac
}

outcome() {
  echo "$1: $2"
  outcomes+=("$1" "$2")
}

if $toy; then
  export JAX_PLATFORMS=cpu
  attention=(--S 24 --A 5 --K 4 --H 2 --G 1 --E 8 --repeats 1)
  lm_head=(--blocks 8 --slots 3 --width 16 --vocabulary 64 --chunk 8 --active 0.5 --repeats 1)
  train=(--sequence-length 32 --repeats 1)
  decode=(--width 128 --target-layers 1 --drafter-layers 1 --vocabulary 64 --block-size 4 --batch-sizes 1
    --prompt-length 4 --new-tokens 4 --repeats 1)
else
  attention=(--dtype bfloat16 --S 3072 --A 512 --H 32 --G 8 --E 128 --repeats 5)
  lm_head=(--dtype bfloat16 --width 4096 --vocabulary 151936 --chunk 256 --active 0.25 0.5 1 --repeats 5)
  train=(--sequence-length 3072 --repeats 5)
  decode=(--dtype bfloat16 --batch-sizes 1 4 16)
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "device: no nvidia-smi here"
fi
"$python" -c 'import jax; print("jax", jax.__version__, jax.devices())' || true

recipe() { # the recipe to time: four rows of the shipped one; of a toy a target of 2 layers
  cat > "$scratch/recipe.py" <<EOF
import dataclasses, runpy
recipe = runpy.run_path("configs/qwen3_8b_dflash.py")["config"]
rows = dataclasses.replace(recipe.train, batch_size=4, accumulation=4)
config = dataclasses.replace(recipe, data="", train=rows)
EOF
  if ! $toy; then return; fi
  cat >> "$scratch/recipe.py" <<EOF
rows = dataclasses.replace(rows, accumulation=1, num_anchors=2, dtype="float32")
drafter = dataclasses.replace(recipe.drafter, block_size=4, num_hidden_layers=1, mask_token_id=63)
config = dataclasses.replace(config, target="$scratch/target", train=rows, drafter=drafter)
EOF
  "$python" -c '
import sys, jax, specauf_jax as sa
target = sa.Target(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                   num_key_value_heads=1, head_dim=16)
sa.save_target(sa.init_target(target, jax.random.key(0)), target, sys.argv[1])' "$scratch/target"
}

part attention "${shares[0]}" \
  "$python" launch/measure/bench_attention.py "${attention[@]}" --out "$out/attention.json"
part lm_head "${shares[1]}" \
  "$python" launch/measure/bench_lm_head.py "${lm_head[@]}" --out "$out/lm_head.json"
recipe || true
part train "${shares[2]}" \
  "$python" -m specauf_jax benchmark-train --config "$scratch/recipe.py" "${train[@]}" --out "$out/train.json"
part decode "${shares[3]}" \
  "$python" launch/measure/bench_round.py "${decode[@]}" --out "$out/decode.json"
if [ ${#study[@]} -gt 0 ]; then
  left=$((seconds - (SECONDS - began) - 20)) # what it has begun takes some seconds more
  part study "${shares[4]}" env PYTHON="$python" \
    bash launch/measure/real_target.sh --out "$out/study" --seconds $((left > 0 ? left : 1)) "${study[@]}"
fi

printf '\n== done (%d s)\n' $((SECONDS - began))
"$python" -c '
import json, sys
path, *words = sys.argv[1:]
outcomes = dict(zip(words[::2], words[1::2]))
json.dump(outcomes, open(path, "w"), indent=2)
for name, outcome in outcomes.items():
    print(f"{name:<10} {outcome}")
sys.exit(any(not outcome.startswith("measured") for outcome in outcomes.values()))' "$out/summary.json" "${outcomes[@]}"
