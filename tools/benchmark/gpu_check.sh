#!/usr/bin/env bash
# Is everything right, and how fast is it, on the device of this machine? Needs python3 with torch on the PATH, installs
# nothing, asks no network; what a missing library makes impossible is skipped and said. Under nine minutes.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash tools/benchmark/gpu_check.sh [--quick] [--output DIR] [--device cpu|cuda] [--only PART] [--patience N]
                                         [--label TEXT]

  --quick        small sizes: does it run?
  --output DIR   where <date>-<device>.json goes (default: tools/benchmark/results)
  --device       default: cuda where there is one
  --only PART    one of tests, correctness, certificate, ceilings, moe_layer, training_step,
                 router_decision
  --patience N   multiply the time limits, for a slow or busy machine
  --label TEXT   what a reader of the results must know of the conditions

Exit code 1 if a test or check failed or a part did not finish.
TEXT
}

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
output=$repository/tools/benchmark/results
flags=()
only=""
patience=1
label=""
while (($# > 0)); do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --quick)
        flags+=(--quick)
        shift
        continue
        ;;
    --output | --device | --only | --patience | --label)
        if (($# < 2)); then
            echo "$1 needs a value" >&2
            exit 2
        fi
        ;;
    *)
        echo "unknown argument $1" >&2
        usage >&2
        exit 2
        ;;
    esac
    case $1 in
    --output) output=$(realpath -m "$2") ;;
    --device) flags+=(--device "$2") ;;
    --only) only=$2 ;;
    --patience) patience=$2 ;;
    --label) label=$2 ;;
    esac
    shift 2
done

cd "$repository"
export PYTHONPATH=. HF_HUB_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Fails when another package of that name hides ours.
python3 -c 'import tools.benchmark.results' || exit 2
for library in safetensors xxhash rich numpy transformers sentencepiece pytest pytest_timeout; do
    python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$library') is None)" ||
        echo "$library is not installed: what needs it is skipped"
done

# run PART SECONDS COMMAND...: one part under its own time limit; its failure does not stop the others.
run() {
    local part=$1 seconds=$(($2 * patience)) code=0 start=$SECONDS
    shift 2
    [[ -z $only || $only == "$part" ]] || return 0
    timeout --kill-after=5 "$seconds" "$@" || code=$?
    echo "$part $code $((SECONDS - start))" >>"$work/parts.txt"
    echo "[$((SECONDS - start)) s] $part: exit code $code"
}

# benchmark PART SECONDS: a part written in Python, which stops by itself before it would be stopped.
benchmark() {
    run "$1" "$2" python3 -m "tools.benchmark.$1" --folder "$work" --seconds "$(($2 * patience * 3 / 4))" "${flags[@]}"
}

# The tests that need a device, from the files that have any.
gpu_tests() {
    local files options=(-q -m gpu -p no:cacheprovider)
    mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
    if python3 -c 'import pytest_timeout' 2>/dev/null; then
        options+=(-p timeout)
    else
        # .pytest.ini sets a timeout, which pytest alone does not know
        options+=(-o "addopts=--import-mode=importlib" -W "ignore::pytest.PytestConfigWarning")
    fi
    # plugins of a surrounding environment stay out
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 run tests 90 \
        python3 -m pytest "${options[@]}" --junitxml "$work/tests.xml" "${files[@]}"
}

if python3 -c 'import pytest' 2>/dev/null; then
    gpu_tests
else
    echo "skipped: tests marked gpu need pytest"
fi
benchmark correctness 80
benchmark ceilings 40
benchmark moe_layer 170
benchmark training_step 80
benchmark router_decision 70
benchmark certificate 90
python3 -m tools.benchmark.results --folder "$work" --output "$output" --label "$label"
