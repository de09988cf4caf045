#!/usr/bin/env bash
# Holds our routers to other people's packages, in an environment of their own: they want an older transformers.
set -euo pipefail

# shellcheck source=../../examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../examples/environment.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: bash tests/third_party/run.sh [--venv DIR] [--torch-index URL] [pytest arguments...]"
    exit 0
fi

venv="" torch_index="" rest=()
take_environment_options "$@"
[[ $venv == "$REPOSITORY/.venv" ]] && venv=$REPOSITORY/.venv-peers

cd "$REPOSITORY"
stage "environment ready: $venv" make_environment peers "$venv" "$torch_index"
PATH=$venv/bin:$PATH
PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python -m pytest -p timeout tests/third_party "${rest[@]}"
