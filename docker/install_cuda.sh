#!/usr/bin/env bash
# The install steps of the CUDA image: an environment on top of NVIDIA's PyTorch image, whose torch and Transformer Engine are
# used as they are; Apex is built from NVIDIA's sources if the image has none.
set -euo pipefail

# shellcheck source=../examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"

if (($# != 1)); then
    echo "usage: bash docker/install_cuda.sh VENV" >&2
    exit 2
fi
venv=$(realpath -m "$1")

has_module() {
    "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"
}

build_apex() {
    (cd "$REPOSITORY" && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 run_pip "$venv" -c "$venv/constraints.txt" --no-build-isolation -e ".[apex]")
}

if ! find_torch python3 >/dev/null; then
    echo "the base image's torch is missing or outside the range of setup.py; choose another NGC_TAG." >&2
    exit 1
fi
make_environment quickstart "$venv"
make_environment data "$venv"
if ! has_module transformer_engine; then
    echo "the base image has no Transformer Engine; take one of NVIDIA's PyTorch images." >&2
    exit 1
fi
if has_module apex; then
    echo "Using the base image's Apex."
else
    stage "Apex built from NVIDIA's sources" build_apex
fi
