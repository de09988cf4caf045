#!/usr/bin/env bash
# The install steps of the CPU image: an environment with what the quickstart and the data tools need, checked. The image and a
# test outside Docker run this same file.
set -euo pipefail

# shellcheck source=../examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"

if (($# < 1 || $# > 2)); then
    echo "usage: bash docker/install_cpu.sh VENV [TORCH_INDEX]" >&2
    exit 2
fi
venv=$(realpath -m "$1")

check_environment() {
    "$venv/bin/python" -m pip check &&
        "$venv/bin/python" -c 'import megatron_moe, torch, sentencepiece, transformers; print("torch", torch.__version__)'
}

make_environment quickstart "$venv" "${2:-}"
make_environment data "$venv" "${2:-}"
stage "environment checked" check_environment
