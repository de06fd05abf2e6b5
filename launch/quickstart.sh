#!/usr/bin/env bash
# The whole job on a laptop: text, target, on-policy labels, two drafters (decay and auf), evaluation, report.
set -euo pipefail

usage() {
  cat <<EOF
usage: bash launch/quickstart.sh [--fresh] [--short]

Trains a small target on Python's standard library, then a DFlash drafter with the positional decay of DFlash and one
with accept-until-fail, from the same weights and data, and compares them on four held-out domains. Under 10 minutes on
2 CPU cores. Everything lands in runs/quickstart; run again, it goes on where it stopped.

  --fresh   delete runs/quickstart first
  --short   a quarter of the training, to see that all parts work; lands in runs/quickstart_short
EOF
}

out=runs/quickstart target_steps=500 documents=1500 drafter_steps=800 prompts=48
fresh=false
for argument in "$@"; do
  case "$argument" in
    --fresh) fresh=true ;;
    --short) out=runs/quickstart_short target_steps=120 documents=384 drafter_steps=200 prompts=16 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "quickstart: unknown argument $argument" >&2; usage >&2; exit 2 ;;
  esac
done
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if $fresh; then rm -rf "$out" "$out"/data.parts; fi
mkdir -p "$out"
export JAX_PLATFORMS=cpu
began=$SECONDS
# Two host devices, one a core: a small model gains more from a row each than from threads inside one product.
two_devices() { XLA_FLAGS=--xla_force_host_platform_device_count=2 "$@" --mesh.replica 2 --mesh.fsdp 1; }
say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - began)); }

say "1/6 corpus: the standard library's sources"
[ -f "$out/text/manifest.json" ] || specauf prepare --corpus stdlib --sequence-length 160 --out "$out/text"

say "2/6 target: $target_steps steps"
if [ ! -f "$out/target/config.json" ]; then
  two_devices specauf pretrain --data "$out/text" --out "$out/pretrain" --train.steps "$target_steps" \
    --train.batch-size 20 --train.learning-rate 4e-3 --train.warmup-ratio 0.05
  rm -rf "$out/target.part" && cp -r "$out/pretrain/target" "$out/target.part" && mv "$out/target.part" "$out/target"
fi

say "3/6 labels: $documents continuations by the target itself"
[ -f "$out/data/manifest.json" ] || two_devices specauf regenerate --data "$out/text" --target "$out/target" \
  --out "$out/data" --documents "$documents" --prompt-length 64 --max-new-tokens 96

say "4/6 drafters: decay and auf side by side, $drafter_steps steps each"
train() {
  specauf train --config configs/tiny_cpu.py --target "$out/target" --data "$out/data" --out "$out/train_$1" \
    --objective.name "$1" --train.steps "$drafter_steps"
}
train decay > >(sed -u "s/^/[decay] /") 2>&1 &
decay=$!
trap 'pkill -P "$decay" 2>/dev/null; kill "$decay" 2>/dev/null' EXIT  # whatever ends this script ends both runs
train auf 2>&1 | sed -u "s/^/[auf] /"
wait "$decay"
trap - EXIT
for name in decay auf; do specauf export --run "$out/train_$name" --out "$out/drafter_$name"; done

say "5/6 evaluation: $prompts prompts of each held-out domain, one at a time"
echo "A target this small lies in the processor's cache, so that a pass over K tokens costs several passes over one. Many
rows at one time are slower still: two cores are busy computing, and the K tokens of a round are not free. A target
that is large enough to gain: launch/measure/bench_decode.sh"
for name in decay auf; do
  [ -f "$out/results_$name.json" ] || specauf evaluate --target "$out/target" --drafter "$out/drafter_$name" \
    --prompts asyncio="$out/data/prompts/asyncio.jsonl" json="$out/data/prompts/json.jsonl" \
    email="$out/data/prompts/email.jsonl" docstrings="$out/data/prompts/docstrings.jsonl" \
    --max-prompts "$prompts" --max-new-tokens 80 --repeats 1 --batch-size 1 --out "$out/results_$name.json"
done

say "6/6 report"
specauf report "auf=$out/train_auf,$out/results_auf.json" "decay=$out/train_decay,$out/results_decay.json" \
  --out "$out/report.html"
echo "quickstart: done in $((SECONDS - began)) s, installation excluded"
