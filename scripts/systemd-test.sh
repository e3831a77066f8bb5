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

systemd=/lib/systemd/systemd
lab=/run/handover-lab # inside the namespaces

case ${1:-} in -h | --help) help ;; esac

((EUID == 0)) || die "it makes namespaces with a systemd in them: run it as root"
if [[ ! -x $systemd ]] && command -v apt-get >/dev/null; then
    apt-get update -qq || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends systemd >/dev/null || true
fi
[[ -x $systemd ]] || die "there is no $systemd: apt install systemd"
unified=$(findmnt --types cgroup2 --noheadings --output TARGET --first-only) || die "no cgroup2 is mounted"

cargo build --quiet --all-features --bins --examples
bin=$(mktemp -d "${TMPDIR:-/tmp}/handover-systemd.XXXXXX")
group="$unified/handover-systemd-$$"
machine=''

shut_down() {
    local code=$? tries directory
    trap - EXIT INT TERM HUP
    # With process 1 every process of its pid namespace goes.
    if [[ -n $machine ]]; then
        kill -KILL "$machine" 2>/dev/null || true
        wait "$machine" 2>/dev/null || true
    fi
    for ((tries = 250; tries > 0; tries--)); do
        mapfile -t directories < <(find "$group" -depth -type d 2>/dev/null)
        ((${#directories[@]})) || break
        for directory in "${directories[@]}"; do rmdir "$directory" 2>/dev/null || true; done
        [[ ! -d $group ]] || sleep 0.02
    done
    [[ ! -d $group ]] || printf '%s is left behind\n' "$group" >&2
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
mkdir "$group" || die "no cgroup can be made below $unified"

unshare --net scripts/machine.sh handover-lab "$group" "$bin/init" "$bin/programs:bin" "$PWD/tests/systemd:tests" \
    "$PWD/docs:docs" >"$bin/boot.log" 2>&1 </dev/null &
machine=$!

inside() {
    nsenter --target "$init" --mount --pid --uts --ipc --net --cgroup -- "$@"
}

booted() {
    kill -0 "$machine" 2>/dev/null || die "systemd ended: $(<"$bin/boot.log")"
    [[ -s $bin/init ]] && init=$(<"$bin/init") && inside systemctl is-active --quiet mini.target 2>/dev/null
}
until_true 60 "systemd does not boot" booted

if (($#)); then set -- --verbose "$@"; else set -- discover --verbose --start-directory "$lab/tests"; fi
inside env -i HOME=/root PATH="$PATH" PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$lab/tests" HANDOVER_LAB="$lab" \
    CI="${CI:-}" python3 -m unittest "$@"
