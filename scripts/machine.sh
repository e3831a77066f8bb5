#!/usr/bin/env bash
# A machine in namespaces, with systemd as its process 1: what systemd-test.sh and fleet-test.sh run their servers on.
#
# Usage: scripts/machine.sh NAME GROUP INIT_FILE [SOURCE:NAME...]
#
# Runs until systemd ends, or is killed with it. Nothing outside is touched: /run, /tmp, /var, /dev and /etc are copies
# in memory; the network is the one of the caller. Every SOURCE is seen as /run/handover-lab/NAME, and the units are those
# of /run/handover-lab/units, to which mini.target belongs. Its cgroup is GROUP. The pid of its process 1, as seen from
# outside, is written to INIT_FILE.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

systemd=/lib/systemd/systemd
lab=/run/handover-lab # inside

# Process 1 from here to the exec, in namespaces of its own but for the cgroups.
if [[ ${1:-} == --boot ]]; then
    name=$2 group=$3 init_file=$4
    shift 4
    echo $$ >"$group/cgroup.procs"
    # This /proc is still the one outside, so the pid is, too.
    read -r init _ </proc/self/stat
    echo "$init" >"$init_file"
    exec unshare --cgroup "$script" --mount "$name" "$@"
elif [[ ${1:-} == --mount ]]; then
    name=$2
    shift 2
    mount --make-rprivate /
    hostname "$name"
    mount -t proc proc /proc
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir -p "$lab/units/mini.target.wants" /run/dev /run/etc
    # Before /tmp is hidden, where they may be.
    for directory in "$@"; do
        mkdir "$lab/${directory##*:}"
        mount --bind "${directory%:*}" "$lab/${directory##*:}"
    done
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
(($# >= 3)) || misused "three arguments are needed"
[[ -x $systemd ]] || die "there is no $systemd: apt install systemd"
exec unshare --mount --pid --fork --kill-child=KILL --uts --ipc -- "$script" --boot "$@"
