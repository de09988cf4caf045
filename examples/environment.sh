# shellcheck shell=bash
# The virtual environment that examples/quickstart.sh, tests/run.sh and docker/install_cpu.sh work in. Source this file, then
#
#     make_environment EXTRA VENV [TORCH_INDEX]      # afterwards "$VENV/bin/python" has megatron_moe[EXTRA]
#     stage "what happens" command arguments...      # runs it, then prints one line with the time it took
#
# An installed torch within the range of setup.py is used; otherwise one is downloaded. A second call with nothing changed
# returns at once.

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Takes --venv DIR and --torch-index URL out of the arguments: sets venv, torch_index and rest (all the others).
take_environment_options() {
    venv=$REPOSITORY/.venv torch_index="" rest=()
    while (($# > 0)); do
        case $1 in
        --venv | --torch-index)
            if (($# < 2)); then
                echo "$1 needs a value" >&2
                return 2
            fi
            if [[ $1 == --venv ]]; then venv=$(realpath -m "$2"); else torch_index=$2; fi
            shift 2
            ;;
        *)
            rest+=("$1")
            shift
            ;;
        esac
    done
}

# Prints the script's own `usage` and ends, if the first of the other arguments asks for it.
answer_help() {
    if [[ ${rest[0]:-} == -h || ${rest[0]:-} == --help ]]; then
        usage
        exit 0
    fi
}

milliseconds() {
    date +%s%3N
}

# Runs a command and says how it went and how long it took; returns the command's exit code.
stage() {
    local title=$1 start code=0 took
    shift
    start=$(milliseconds)
    "$@" || code=$?
    took=$(($(milliseconds) - start))
    if ((code == 0)); then
        printf '[%5d.%d s] %s\n' $((took / 1000)) $((took % 1000 / 100)) "$title"
    else
        printf '[%5d.%d s] %s: FAILED with exit code %d\n' $((took / 1000)) $((took % 1000 / 100)) "$title" "$code" >&2
    fi
    return "$code"
}

# Prints "VERSION FOLDER OUTER" of the torch that PYTHON imports, if it is within the range of setup.py: FOLDER is its
# site-packages, OUTER says whether PYTHON itself lives in a virtual environment. Fails if there is no such torch.
find_torch() {
    "$1" - "$REPOSITORY/setup.py" 2>/dev/null <<'PYTHON'
import re
import sys
from importlib import metadata
from pathlib import Path


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split(".")[:2])


low, high = re.search(r'^TORCH = "torch>=([\d.]+),<([\d.]+)"', Path(sys.argv[1]).read_text(), re.MULTILINE).groups()
found = metadata.version("torch")
if not release(low) <= release(found) < release(high):
    sys.exit(f"torch {found} is outside {low} to {high}")
import torch  # metadata alone would accept a torch that cannot start

print(found, Path(torch.__file__).parents[1], "yes" if sys.prefix != sys.base_prefix else "no")
PYTHON
}

# Prints the Python to build on: the first of the right version that has a usable torch, else the first of the right version.
find_python() {
    local name first=""
    for name in python3 python3.12 python3.11 python3.13; do
        "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        first=${first:-$name}
        if find_torch "$name" >/dev/null; then
            first=$name
            break
        fi
    done
    if [[ -z $first ]]; then
        echo "No Python 3.11 or newer with its venv module was found; on Debian or Ubuntu: apt install python3 python3-venv" >&2
        return 2
    fi
    command -v "$first"
}

# Everything that decides what an environment holds, as one hash.
environment_stamp() {
    {
        printf '%s\n' "$REPOSITORY" "$1"
        cat "$REPOSITORY/setup.py" "$REPOSITORY/.constraints.txt" "$REPOSITORY/examples/environment.sh"
    } | sha256sum | cut -d ' ' -f 1
}

# Makes the bare environment VENV on PYTHON; FOUND is what find_torch printed, or empty.
make_venv() {
    local python=$1 venv=$2 found=$3 folder
    if [[ $found == *" no" ]]; then
        "$python" -m venv --clear --system-site-packages "$venv" || return
    else
        "$python" -m venv --clear "$venv" || return
    fi
    if [[ $found == *" yes" ]]; then
        # --system-site-packages shows the base Python's packages only, not those of the environment that is active now
        folder=${found#* }
        folder=${folder% yes}
        printf '%s\n' "$folder" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    fi
}

# pip inside VENV, deaf to constraints and warnings that surround it; progress bars only for a person.
run_pip() {
    local venv=$1
    shift
    [[ -t 1 ]] || set -- "$@" --quiet
    env -u PIP_CONSTRAINT PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONWARNINGS=ignore \
        "$venv/bin/python" -m pip install "$@"
}

install_package() {
    local extra=$1 venv=$2 torch_index=$3 found options=()
    cp "$REPOSITORY/.constraints.txt" "$venv/constraints.txt" || return
    # other people's routers want the transformers that setup.py names for them
    [[ $extra != peers ]] || sed -i -E '/^(transformers|tokenizers)==/d' "$venv/constraints.txt" || return
    if found=$(find_torch "$venv/bin/python"); then
        sed -i "s/^torch==.*/torch==${found%% *}/" "$venv/constraints.txt" || return
    elif [[ -n $torch_index ]]; then
        options=(--extra-index-url "$torch_index")
    fi
    run_pip "$venv" -c "$venv/constraints.txt" pip setuptools || return
    # an editable install, so that the files of this folder are what runs
    (cd "$REPOSITORY" && run_pip "$venv" -c "$venv/constraints.txt" "${options[@]}" --no-build-isolation -e ".[$extra]")
}

# make_environment EXTRA VENV [TORCH_INDEX]: see the head of this file. TORCH_INDEX is a further index to find torch on, such
# as PyTorch's own index of CPU builds.
make_environment() {
    local extra=$1 venv=$2 torch_index=${3:-} python found stamp
    stamp=$(environment_stamp "$extra") || return
    if [[ -x $venv/bin/python && $(cat "$venv/installed-$extra" 2>/dev/null) == "$stamp" ]]; then
        return 0
    fi
    if [[ -e $venv && ! -e $venv/pyvenv.cfg ]] && [[ -n $(ls -A "$venv") ]]; then
        echo "$venv exists and is no virtual environment; name another folder with --venv, or move it away." >&2
        return 2
    fi
    if ! "$venv/bin/python" -c '' 2>/dev/null; then
        python=$(find_python) || return
        found=$(find_torch "$python") || found=""
        make_venv "$python" "$venv" "$found" || return
    fi
    if found=$(find_torch "$venv/bin/python"); then
        echo "Using the installed torch ${found%% *}; the other packages are about 0.2 GB to download at most."
    else
        echo "No usable torch is installed. pip will download it: about 0.2 GB if its index offers the CPU build, about 3 GB with"
        echo "CUDA; and about 0.2 GB of other packages. Without a GPU, --torch-index URL (PyTorch's CPU index) saves the difference."
    fi
    stage "packages installed in $venv" install_package "$extra" "$venv" "$torch_index" || return
    printf '%s\n' "$stamp" >"$venv/installed-$extra"
}
