#!/usr/bin/env bash
# Rolls releases out with Ansible to several machines behind nginx and HAProxy, under load; all of them on this one.
#
# Usage: scripts/fleet-test.sh [TEST...]
#        scripts/fleet-test.sh --growth [MACHINES...]   how the time grows with the number of machines
#
# A TEST is what Python's unittest takes, such as test_upgrade or `-k unreachable`; without one all of tests/fleet.
# Every machine is a systemd with an sshd in namespaces of its own (machine.sh); the balancers, the controller and the
# clients are in one around them, with the network between. Nothing outside is touched.
# Needs root, systemd, ansible-core, sshd, nginx, haproxy and iproute2.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
source scripts/boot.sh

# Process 1 of everything: with it every process goes.
if [[ ${1:-} == --inside ]]; then
    lab=$2 group=$3
    shift 3
    mount --make-rprivate /
    mount -t proc proc /proc
    mount -t tmpfs -o mode=755 tmpfs /run
    ip link set lo up
    exec env PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=tests/fleet HANDOVER_LAB="$lab" HANDOVER_GROUP="$group" python3 "$@"
fi

case ${1:-} in -h | --help) help ;; esac
if [[ ${1:-} == --growth ]]; then
    shift
    for count in "$@"; do number --growth "$count" 2; done
    inside=(tests/fleet/growth.py "$@")
elif (($#)); then
    inside=(-m unittest --verbose "$@")
else
    inside=(-m unittest discover --verbose --start-directory tests/fleet)
fi

((EUID == 0)) || die "it makes machines in namespaces: run it as root"
for program in ansible-playbook:ansible-core sshd:openssh-server ssh:openssh-client nginx:nginx-light haproxy:haproxy \
    ip:iproute2 systemctl:systemd; do
    command -v "${program%:*}" >/dev/null || die "there is no ${program%:*}: apt install ${program#*:}"
done

cargo build --quiet --all-features --bins --examples
make_group handover-fleet
lab=$(mktemp -d "${TMPDIR:-/tmp}/handover-fleet.XXXXXX")

shut_down() {
    local code=$?
    trap - EXIT INT TERM HUP
    end_group
    if ((code != 0)) && compgen -G "$lab/*.log" >/dev/null; then
        printf 'the last lines of the logs:\n' >&2
        tail -n 20 "$lab"/*.log >&2
    fi
    rm -rf "$lab"
    exit "$code"
}
trap shut_down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

built="$(target_directory)/debug"
mkdir "$lab/bin"
chmod 755 "$lab" "$lab/bin"
# Small ones: they are sent to every machine.
for program in "$built/handover" "$built"/examples/{fixture,plain,oracle}; do
    strip -o "$lab/bin/${program##*/}" "$program"
done

unshare --mount --pid --fork --kill-child=KILL --uts --ipc --net -- "$script" --inside "$lab" "$group" "${inside[@]}" &
machine=$!
wait "$machine"
