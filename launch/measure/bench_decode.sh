#!/usr/bin/env bash
# Decoding speed on a CPU with a target large enough that reading its weights is most of a pass.
set -euo pipefail

usage() {
  cat <<EOF
usage: bash launch/measure/bench_decode.sh [--fresh] [--short]

Trains a target of 29 M parameters (4 layers of width 768) on Python's standard library, has it write 2,000
continuations, trains a Domino drafter of one layer with K = 8 on them (B-AUF+D), all from seed 0, and runs
\`specauf benchmark\` on held-out prompts at batch 1, 4, 16 and 64. About an hour on 2 CPU cores. Everything lands in
runs/bench_decode; run again, it goes on where it stopped.

  --fresh   delete runs/bench_decode first
  --short   a tenth of the training, to see that all parts work; lands in runs/bench_decode_short
EOF
}

out=runs/bench_decode target_steps=250 documents=2000 drafter_steps=800 repeats=5
fresh=false
for argument in "$@"; do
  case "$argument" in
    --fresh) fresh=true ;;
    --short) out=runs/bench_decode_short target_steps=30 documents=96 drafter_steps=60 repeats=2 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "bench_decode: unknown argument $argument" >&2; usage >&2; exit 2 ;;
  esac
done
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
if $fresh; then rm -rf "$out" "$out"/data.parts; fi
mkdir -p "$out"
export JAX_PLATFORMS=cpu

[ -f "$out/text/manifest.json" ] || specauf prepare --corpus stdlib --sequence-length 160 --out "$out/text"

if [ ! -f "$out/target/config.json" ]; then
  specauf pretrain --data "$out/text" --out "$out/pretrain" --train.steps "$target_steps" \
    --train.batch-size 12 --train.learning-rate 1.5e-3 --train.warmup-ratio 0.05 --train.log-every 10 \
    --train.checkpoint-every 50 --target.hidden-size 768 --target.intermediate-size 2304 \
    --target.num-hidden-layers 4 --target.num-attention-heads 12 --target.num-key-value-heads 4 --target.head-dim 64
  rm -rf "$out/target.part" && cp -r "$out/pretrain/target" "$out/target.part" && mv "$out/target.part" "$out/target"
fi

[ -f "$out/data/manifest.json" ] || specauf regenerate --data "$out/text" --target "$out/target" \
  --out "$out/data" --documents "$documents" --prompt-length 64 --max-new-tokens 96

specauf train --config configs/tiny_cpu.py --target "$out/target" --data "$out/data" --out "$out/train_domino" \
  --train.steps "$drafter_steps" --train.learning-rate 2e-3 --train.decode-every 0 --drafter.intermediate-size 1152 \
  --drafter.projector-type domino --drafter.head emb_dim=64 gru_hidden_dim=128 \
  --base-objective.name auf_decay --objective.name decay
specauf export --run "$out/train_domino" --out "$out/drafter_domino"

for name in asyncio json email docstrings; do head -n 4 "$out/data/prompts/$name.jsonl"; done > "$out/prompts.jsonl"
specauf benchmark --target "$out/target" --prompts "$out/prompts.jsonl" --out "$out/speed.json" --repeats "$repeats" \
  --drafters "domino=$out/drafter_domino" --max-new-tokens 96
