# shellcheck shell=bash
# A systemd in namespaces of its own, and the control group that it needs: what the scripts share that need root for it.
# Sourced after lib.sh, never run.

# Set here for whoever sources this:
# shellcheck disable=SC2034

systemd=/lib/systemd/systemd
lab=/run/handover-lab # inside the namespaces
machine='' group=''

# make_group NAME: sets $group, a control group of our own
make_group() {
    local unified
    ((EUID == 0)) || die "it makes namespaces with a systemd in them: run it as root"
    unified=$(findmnt --types cgroup2 --noheadings --output TARGET --first-only) || die "no cgroup2 is mounted"
    group="$unified/$1-$$"
    mkdir "$group" || die "no cgroup can be made below $unified"
}

# Ends process 1 of the namespaces, with which all of theirs go, and removes the group.
end_group() {
    local tries directory directories
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
}

# boot DIRECTORY [--net] SOURCE:NAME...: starts machine.sh, which tells of these; with --net in a network of its own. What it
# says, and the pid, are files in the directory. Sets $init, its process 1 as seen from here.
boot() {
    local directory=$1 as=()
    shift
    if [[ $1 == --net ]]; then as=(unshare --net) && shift; fi
    "${as[@]}" scripts/machine.sh handover-lab "$group" "$directory/init" "$@" >"$directory/boot.log" 2>&1 </dev/null &
    machine=$!
    until_true 60 "systemd does not boot" booted "$directory"
}

booted() {
    kill -0 "$machine" 2>/dev/null || die "systemd ended: $(<"$1/boot.log")"
    [[ -s $1/init ]] && init=$(<"$1/init") && inside systemctl is-active --quiet mini.target 2>/dev/null
}

inside() {
    nsenter --target "$init" --mount --pid --uts --ipc --net --cgroup -- "$@"
}
