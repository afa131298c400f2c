# shellcheck shell=bash
# Sourced by scripts/demo and scripts/test: makes .venv and keeps it as constraints.txt says.

fail() {
    printf '\n%s: %s\n' "$0" "$1" >&2
    exit 1
}

find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.10 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "needs Python 3.10 to 3.13 and found none; install one, or name it: PYTHON=/path/to/python3 $0"
}

# ensure_environment [EXTRA]: .venv holds this project, with EXTRA's dependencies if one is named.
ensure_environment() {
    local extra=${1:-} wanted have python free_kb
    wanted=$(cat constraints.txt pyproject.toml o-voxel/pyproject.toml | cksum)" $PWD"
    have=$(cat .venv/installed 2>/dev/null || true)
    if [ "$have" = "$wanted with test" ] || [ "$have" = "$wanted${extra:+ with $extra}" ]; then
        return
    fi

    python=$(find_python) || exit 1
    free_kb=$(df -Pk . | awk 'NR == 2 {print $4}')
    if [ "$free_kb" -lt 3000000 ] && [ ! -d .venv ]; then
        fail "needs 3 GB of free disk (8 GB where PyTorch comes with CUDA) in $PWD, which has $((free_kb / 1000)) MB."
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian or Ubuntu: sudo apt-get install python3-venv"

    printf 'Installing into .venv with %s; PyTorch is large, so the first time takes a minute or more.\n' \
        "$("$python" --version)"
    # An environment that was moved, or whose Python is gone, does not run.
    .venv/bin/python -c 'import pip' 2>/dev/null || rm -rf .venv
    rm -f .venv/installed
    [ -d .venv ] || "$python" -m venv .venv || fail "could not make .venv; see above."
    # Of what is installed little is imported: Python compiles that when it is.
    local pip=(.venv/bin/python -m pip --disable-pip-version-check install -qq --no-compile --constraint constraints.txt)
    if ! "${pip[@]}" setuptools ||
        ! "${pip[@]}" --no-build-isolation --editable ./o-voxel --editable ".${extra:+[$extra]}"; then
        fail "the installation failed; see above. Run it again when the cause is gone: it goes on where it stopped."
    fi
    printf '%s' "$wanted${extra:+ with $extra}" >.venv/installed
}
