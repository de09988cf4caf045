#!/usr/bin/env bash
# The main job on real text: corpus, tokenizer, training on four ranks, interruption, resumption, export, generation.
# Makes its own virtual environment first. Options: --full (train longer), --output DIR, --venv DIR, --torch-index URL.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

venv="" torch_index="" rest=()
take_environment_options "$@"
stage "environment ready: $venv" make_environment quickstart "$venv" "$torch_index"
exec "$venv/bin/python" "$REPOSITORY/examples/quickstart/tour.py" "${rest[@]}"
