#!/usr/bin/env bash
# Trains on this machine: one process for each GPU, or as many as given.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash examples/launch/torchrun.sh [--nproc N] [--python PATH] [--dry-run] [--] ARGUMENTS...

  --nproc N       processes to start (default: the GPUs that are visible, or 1 without any)
  --python PATH   the interpreter (default: the repository's .venv if there is one, else python3)
  --dry-run       print the command instead of running it

ARGUMENTS go to megatron_moe.pretrain: --config recipe.toml and any flag. These options come first; the first word that is none
of them, or --, ends them. Exit codes are those of megatron_moe.pretrain: 75 means saved after a signal
or the kill switch, start again to resume; 93 that several starts in a row got nowhere: mend the cause first.
TEXT
}

python=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin/python
if [[ ! -x $python ]]; then python=python3; fi
nproc=""
dry_run=no
while (($# > 0)); do
    case $1 in
    --nproc | --python)
        if (($# < 2)); then
            echo "$1 needs a value" >&2
            exit 2
        fi
        if [[ $1 == --nproc ]]; then nproc=$2; else python=$2; fi
        shift 2
        ;;
    --dry-run)
        dry_run=yes
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    --)
        shift
        break
        ;;
    *) break ;;
    esac
done

if [[ -z $nproc ]]; then
    nproc=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
if [[ ! $nproc =~ ^[1-9][0-9]*$ ]]; then
    echo "--nproc $nproc is no number of processes; give 1 or more." >&2
    exit 2
fi

# torchrun, with its options, that also passes signals on and ends with the ranks' exit code
command=("$python" -m megatron_moe.launch --rdzv-backend c10d --rdzv-endpoint localhost:0 --nproc-per-node "$nproc"
    -m megatron_moe.pretrain "$@")
if [[ $dry_run == yes ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
