#!/usr/bin/env bash
# The main job on real text: corpus, tokenizer, training on four ranks, interruption, resumption, export, generation.
# Makes its own virtual environment first. Options: --full (train longer), --output DIR, --venv DIR, --torch-index URL.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

venv=$REPOSITORY/.venv
torch_index=""
arguments=()
while (($# > 0)); do
    case $1 in
    --venv | --torch-index)
        if (($# < 2)); then
            echo "$1 needs a value" >&2
            exit 2
        fi
        if [[ $1 == --venv ]]; then venv=$(realpath -m "$2"); else torch_index=$2; fi
        shift 2
        ;;
    *)
        arguments+=("$1")
        shift
        ;;
    esac
done

stage "environment ready: $venv" make_environment quickstart "$venv" "$torch_index"
exec "$venv/bin/python" "$REPOSITORY/examples/quickstart/tour.py" "${arguments[@]}"
