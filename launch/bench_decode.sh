#!/usr/bin/env bash
# Decoding speed on a CPU with a target large enough that reading its weights is most of a pass.
set -euo pipefail

usage() {
  cat <<EOF
usage: bash launch/bench_decode.sh [--fresh] [--short]

Trains a target of 6.8 M parameters (8 layers of width 256) on Python's standard library, has it write 1,500
continuations, trains a DFlash (auf) and a Domino drafter of one layer with K = 8 on them, all from seed 0, and runs
\`specauf benchmark\` on held-out prompts at batch 1, 4, 16 and 64. Well under an hour on 2 CPU cores. Everything lands
in runs/bench_decode; run again, it goes on where it stopped.

  --fresh   delete runs/bench_decode first
  --short   a tenth of the training, to see that all parts work; lands in runs/bench_decode_short
EOF
}

out=runs/bench_decode target_steps=400 documents=1500 drafter_steps=1000 repeats=5
fresh=false
for argument in "$@"; do
  case "$argument" in
    --fresh) fresh=true ;;
    --short) out=runs/bench_decode_short target_steps=30 documents=96 drafter_steps=60 repeats=2 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "bench_decode: unknown argument $argument" >&2; usage >&2; exit 2 ;;
  esac
done
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if $fresh; then rm -rf "$out" "$out"/data.parts; fi
mkdir -p "$out"
export JAX_PLATFORMS=cpu
two_devices() { XLA_FLAGS=--xla_force_host_platform_device_count=2 "$@" --mesh.replica 2 --mesh.fsdp 1; }

[ -f "$out/text/manifest.json" ] || specauf prepare --corpus stdlib --sequence-length 160 --out "$out/text"

if [ ! -f "$out/target/config.json" ]; then
  two_devices specauf pretrain --data "$out/text" --out "$out/pretrain" --train.steps "$target_steps" \
    --train.batch-size 12 --train.learning-rate 3e-3 --train.warmup-ratio 0.05 \
    --target.hidden-size 256 --target.intermediate-size 768 --target.num-hidden-layers 8 \
    --target.num-attention-heads 4 --target.num-key-value-heads 2 --target.head-dim 64
  rm -rf "$out/target.part" && cp -r "$out/pretrain/target" "$out/target.part" && mv "$out/target.part" "$out/target"
fi

[ -f "$out/data/manifest.json" ] || two_devices specauf regenerate --data "$out/text" --target "$out/target" \
  --out "$out/data" --documents "$documents" --prompt-length 64 --max-new-tokens 96

train() {  # NAME, then what differs
  local name=$1
  shift
  two_devices specauf train --config configs/tiny_cpu.py --target "$out/target" --data "$out/data" \
    --out "$out/train_$name" --train.steps "$drafter_steps" --train.decode-every 0 "$@"
  specauf export --run "$out/train_$name" --out "$out/drafter_$name"
}
train auf --objective.name auf
train domino --drafter.projector-type domino --drafter.emb-dim 64 --drafter.gru-hidden-dim 128 \
  --objective.name decay --base-objective.name decay

for name in asyncio json email docstrings; do head -n 4 "$out/data/prompts/$name.jsonl"; done > "$out/prompts.jsonl"
specauf benchmark --target "$out/target" --prompts "$out/prompts.jsonl" --out "$out/speed.json" --repeats "$repeats" \
  --drafters "auf=$out/drafter_auf" "domino=$out/drafter_domino" --max-new-tokens 96
