#!/usr/bin/env bash
# Runs the servers under a real systemd, as process 1 of namespaces of its own, and shuts it down again.
#
# Usage: scripts/systemd-test.sh [TEST...]
#
# A TEST is what Python's unittest takes, such as test_reload.Reload or `-k watchdog`; without one all of tests/systemd.
# Nothing outside the namespaces is touched: /run, /tmp, /var, /dev and /etc are copies in memory, and so is the network.
# Needs root and systemd, which is installed with apt where that can be done.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

systemd=/lib/systemd/systemd
lab=/run/handover-lab # inside the namespaces

# Process 1 from here to the exec, in namespaces of its own but for the cgroups.
if [[ ${1:-} == --boot ]]; then
    bin=$2 group=$3 init_file=$4
    echo $$ >"$group/cgroup.procs"
    # This /proc is still the one outside, so the pid is, too.
    read -r init _ </proc/self/stat
    echo "$init" >"$init_file"
    exec unshare --cgroup "$script" --mount "$bin"
elif [[ ${1:-} == --mount ]]; then
    bin=$2
    mount --make-rprivate /
    hostname handover-lab
    mount -t proc proc /proc
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir -p "$lab"/{bin,tests,docs,units} /run/dev /run/etc
    # Before /tmp is hidden, where they may be.
    mount --bind "$bin" "$lab/bin"
    mount --bind tests/systemd "$lab/tests"
    mount --bind docs "$lab/docs"
    cp -a /etc/. /run/etc
    mount --bind /run/etc /etc
    for device in null zero full random urandom tty; do
        : >"/run/dev/$device"
        mount --bind "/dev/$device" "/run/dev/$device"
    done
    mkdir /run/dev/{shm,pts}
    mount --rbind /run/dev /dev
    mount -t devpts -o newinstance,ptmxmode=666 devpts /dev/pts
    ln -s pts/ptmx /dev/ptmx
    ln -s /proc/self/fd /dev/fd
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    mount -t tmpfs -o mode=755 tmpfs /var
    mkdir /var/{tmp,lib,cache,log}
    chmod 1777 /var/tmp
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    # The manager finds these units and no others: nothing of the machine is started in here.
    for unit in systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket; do
        ln -s "/lib/systemd/system/$unit" "$lab/units/$unit"
    done
    for target in sysinit basic shutdown sockets umount initrd-switch-root; do
        printf '[Unit]\nDefaultDependencies=no\n' >"$lab/units/$target.target"
    done
    cat >"$lab/units/mini.target" <<'UNIT'
[Unit]
DefaultDependencies=no
Requires=systemd-journald.service
After=systemd-journald.service
UNIT
    mkdir -p /run/systemd/journald.conf.d
    printf '[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\nForwardToConsole=no\nReadKMsg=no\nAudit=no\n' \
        >/run/systemd/journald.conf.d/lab.conf
    cd /
    exec env -i container=handover-lab PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        SYSTEMD_UNIT_PATH="$lab/units" "$systemd" --system --unit=mini.target --log-target=journal --log-level=info \
        --show-status=no --default-standard-output=journal
fi

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
unshare=''

shut_down() {
    local code=$? tries directory
    trap - EXIT INT TERM HUP
    # With process 1 every process of its pid namespace goes.
    if [[ -n $unshare ]]; then
        kill -KILL "$unshare" 2>/dev/null || true
        wait "$unshare" 2>/dev/null || true
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

unshare --mount --pid --fork --kill-child=KILL --uts --ipc --net -- \
    "$script" --boot "$bin/programs" "$group" "$bin/init" >"$bin/boot.log" 2>&1 </dev/null &
unshare=$!

inside() {
    nsenter --target "$init" --mount --pid --uts --ipc --net --cgroup -- "$@"
}

booted() {
    kill -0 "$unshare" 2>/dev/null || die "systemd ended: $(<"$bin/boot.log")"
    [[ -s $bin/init ]] && init=$(<"$bin/init") && inside systemctl is-active --quiet mini.target 2>/dev/null
}
until_true 60 "systemd does not boot" booted

if (($#)); then set -- --verbose "$@"; else set -- discover --verbose --start-directory "$lab/tests"; fi
inside env -i HOME=/root PATH="$PATH" PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$lab/tests" HANDOVER_LAB="$lab" \
    CI="${CI:-}" python3 -m unittest "$@"
