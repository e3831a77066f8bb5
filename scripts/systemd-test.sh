#!/usr/bin/env bash
# Runs the servers under a real systemd, as process 1 of namespaces of its own, and shuts it down again.
#
# Usage: scripts/systemd-test.sh [TEST...]
#
# A TEST is what Python's unittest takes, such as test_reload.Reload or `-k watchdog`; without one all of tests/systemd.
# Nothing outside the namespaces is touched, as machine.sh tells, nor the network.
# Needs root and systemd, which is installed with apt where that can be done.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
source scripts/boot.sh

case ${1:-} in -h | --help) help ;; esac

((EUID == 0)) || die "it makes namespaces with a systemd in them: run it as root"
if [[ ! -x $systemd ]] && command -v apt-get >/dev/null; then
    apt-get update -qq || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends systemd >/dev/null || true
fi
[[ -x $systemd ]] || die "there is no $systemd: apt install systemd"

cargo build --quiet --all-features --bins --examples
make_group handover-systemd
bin=$(mktemp -d "${TMPDIR:-/tmp}/handover-systemd.XXXXXX")

shut_down() {
    local code=$?
    trap - EXIT INT TERM HUP
    end_group
    if ((code != 0)) && [[ -s $bin/boot.log ]]; then
        printf 'the last lines of systemd:\n' >&2
        tail -n 20 "$bin/boot.log" >&2
    fi
    rm -rf "$bin"
    exit "$code"
}
trap shut_down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

built="$(target_directory)/debug"
mkdir "$bin/programs"
chmod 755 "$bin" "$bin/programs"
ln "$built/handover" "$built"/examples/{fixture,plain,oracle,axum} "$bin/programs" 2>/dev/null ||
    cp "$built/handover" "$built"/examples/{fixture,plain,oracle,axum} "$bin/programs"
boot "$bin" --net "$bin/programs:bin" "$PWD/tests/systemd:tests" "$PWD/docs:docs"

if (($#)); then set -- --verbose "$@"; else set -- discover --verbose --start-directory "$lab/tests"; fi
inside env -i HOME=/root PATH="$PATH" PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$lab/tests" HANDOVER_LAB="$lab" \
    CI="${CI:-}" python3 -m unittest "$@"
