#!/usr/bin/env bash
# Kills, stops, fills, flips and cuts, and counts what was survived: all tests that carry a goal of reliability.
set -euo pipefail

# shellcheck source=../../examples/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../examples/environment.sh"

usage() {
    cat <<'TEXT'
usage: bash tests/faults/run.sh [--nightly] [--fault-seed N] [--json FILE] [--venv DIR] [--torch-index URL]
                                [pytest arguments...]

  --nightly           the larger numbers of trials (hours)
  --fault-seed N      where and when faults strike (default: 0)
  --json FILE         where to write the counts (default: goals.json in a temporary folder)
  --venv DIR          the virtual environment to make or reuse (default: .venv in the repository)
  --torch-index URL   a further package index to find torch on, if none is installed

Everything else goes to pytest, for instance -k saving.
TEXT
}

venv="" torch_index="" rest=()
take_environment_options "$@"
answer_help
json="$(mktemp -d)/goals.json" arguments=() which="goal and not night"
for ((number = 0; number < ${#rest[@]}; number++)); do
    if [[ ${rest[number]} == --json ]]; then
        number=$((number + 1))
        json=$(realpath -m -- "${rest[number]:?--json needs a file}")
    else
        [[ ${rest[number]} == --nightly ]] && which=goal
        arguments+=("${rest[number]}")
    fi
done

cd "$REPOSITORY"
stage "environment ready: $venv" make_environment test "$venv" "$torch_index"
# to collect the others takes as long as some trials
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.goal(' tests | sort)
failed=0
PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$venv/bin/python" -m pytest -p timeout -p hypothesispytest -q -m "$which" \
    --goals-json "$json" "${arguments[@]}" "${files[@]}" || failed=$?
"$venv/bin/python" -m tests.faults.table "$json"
echo "Counts: $json"
exit "$failed"
