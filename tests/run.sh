#!/usr/bin/env bash
# Makes the environment and runs every check and every test: the quick ones first, the slow ones last.
set -euo pipefail

# shellcheck source=../examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"

usage() {
    cat <<'TEXT'
usage: bash tests/run.sh [--venv DIR] [--torch-index URL] [pytest arguments...]

  --venv DIR          the virtual environment to make or reuse (default: .venv in the repository)
  --torch-index URL   a further package index to find torch on, if none is installed

Everything else goes to pytest, its paths relative to the repository: bash tests/run.sh tests/house -k floors
TEXT
}

venv="" torch_index="" rest=()
take_environment_options "$@"
answer_help

cd "$REPOSITORY"
stage "environment ready: $venv" make_environment test "$venv" "$torch_index"
PATH=$venv/bin:$PATH

failed=()
check() {
    stage "$@" || failed+=("$1")
}

mapfile -t scripts < <(find .ci examples tests tools docker -name '*.sh' -o -name '*.sbatch' -o -path .ci/run)
check "ruff" ruff check --quiet .
check "shellcheck: ${#scripts[@]} scripts" shellcheck "${scripts[@]}"
check "hadolint" hadolint docker/Dockerfile.cpu docker/Dockerfile.cuda
check "codespell" codespell
# plugins of a surrounding environment stay out; the two that are needed are named
check "pytest" env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python -m pytest -p timeout -p hypothesispytest "${rest[@]}"

if ((${#failed[@]} > 0)); then
    printf 'FAILED: %s\n' "${failed[*]}" >&2
    exit 1
fi
echo "Everything passed."
