# Bash functions shared by the scripts in this directory: `source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"`.
# It changes to the repository's root and sets strict mode.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
# shellcheck disable=SC2034  # used by the scripts that source this file
VENV=$ROOT/.venv
# Debian keeps libvirtd and mkfs out of an ordinary user's PATH.
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }

# die MESSAGE... : each argument is a line.
die() {
    printf 'error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '       %s\n' "$@" >&2
    exit 1
}

# quietly COMMAND... : its output is shown only when it fails.
quietly() {
    local log status=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null || status=$?
    [ "$status" -eq 0 ] || { warn "--- $* (exit $status):"; cat "$log" >&2; }
    rm -f "$log"
    return "$status"
}
