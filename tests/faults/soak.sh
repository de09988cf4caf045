#!/usr/bin/env bash
# Trains under one fault after another with nobody watching, and compares every step with an undisturbed run.
set -euo pipefail

# shellcheck source=../../examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../examples/environment.sh"

usage() {
    cat <<'TEXT'
usage: bash tests/faults/soak.sh [--minutes 30] [--ranks 4] [--every SECONDS] [--fault-seed N] [--json FILE]
                                 [--venv DIR] [--torch-index URL]

  --minutes N         how long it is disturbed (default: 30); the undisturbed run takes about a third of that more
  --ranks N           1, 2 or 4 (default: 4)
  --every SECONDS     a fault every so often (default: 20)
  --fault-seed N      which faults strike, and when (default: 0)
  --json FILE         where to write what happened
  --venv DIR          the virtual environment to make or reuse (default: .venv in the repository)
  --torch-index URL   a further package index to find torch on, if none is installed
TEXT
}

venv="" torch_index="" rest=()
take_environment_options "$@"
answer_help
for ((number = 0; number < ${#rest[@]}; number++)); do
    if [[ ${rest[number]} == --json ]]; then
        rest[number + 1]=$(realpath -m -- "${rest[number + 1]:?--json needs a file}")
    fi
done

cd "$REPOSITORY"
stage "environment ready: $venv" make_environment test "$venv" "$torch_index"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$REPOSITORY:$REPOSITORY/tests"
"$venv/bin/python" -m tests.faults.soak "${rest[@]}"
