#!/usr/bin/env bash
# Runs every test, also those that plain `cargo test` leaves out.
#
# Usage: scripts/test.sh [PART...]
#
#   shell    the scripts themselves: shellcheck, and ansible-lint where it is installed
#   unit     the library's own tests and the examples in its documentation
#   it       tests with real processes
#   faults   each fault at each step of an upgrade, as docs/reliability.md has it
#   compat   scripts/compat.sh: this build and an earlier one hand over to each other
#   python   the protocol, played from each side by Python as docs/protocol.md tells it
#   programs real programs under `handover exec`: in Node (Express, and as for pm2), Python (gunicorn), Go, Java and Perl
#            (starman), and Apache httpd, nginx, HAProxy and redis where they are installed. HANDOVER_UPGRADES=N of each [20; 10 of those
#            that bind their sockets by themselves], HANDOVER_LONG_ROUNDS=N of requests of 15 s [1]
#   systemd  scripts/systemd-test.sh: the servers under a real systemd, in namespaces of its own
#   fleet    scripts/fleet-test.sh: roll-outs to several machines with Ansible, in namespaces of their own
#   demo     scripts/demo.sh; this and the next two with a debug build
#   load     scripts/load.sh: 50 upgrades under load, in a network namespace of its own
#   soak     scripts/soak.sh, a short one without systemd
#
# Without a PART all of them. Programs that are missing are installed with apt where that can be done; a part that still
# misses one is left out and named at the end, and with CI=true it fails.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

all=(shell unit it faults compat python programs systemd fleet demo load soak)
parts=()
for argument in "$@"; do
    case $argument in
        -h | --help) help ;;
        *) [[ " ${all[*]} " == *" $argument "* ]] || misused "no part is named \`$argument\`: there are ${all[*]}" ;;
    esac
    parts+=("$argument")
done
((${#parts[@]})) || parts=("${all[@]}")

# The programs that a part needs, and the package of each.
needs() {
    case $1 in
        shell) echo shellcheck:shellcheck ;;
        python) echo python3:python3 ;;
        programs)
            echo python3:python3-venv node:nodejs perl:perl
            # Elsewhere the servers are not installed, since that starts them.
            [[ ${CI:-} != true ]] || echo npm:npm go:golang-go java:default-jdk-headless starman:starman \
                apache2:apache2-bin nginx:nginx-light haproxy:haproxy redis-server:redis-server
            ;;
        systemd) echo systemctl:systemd python3:python3 unshare:util-linux findmnt:util-linux ;;
        fleet)
            echo python3:python3 ansible-playbook:ansible-core ssh:openssh-client sshd:openssh-server nginx:nginx-light
            echo haproxy:haproxy systemctl:systemd ip:iproute2 unshare:util-linux findmnt:util-linux strip:binutils
            ;;
        load) echo wrk:wrk h2load:nghttp2-client ip:iproute2 unshare:util-linux ;;
    esac
}

# To install one of these is to start it.
daemons=' nginx-light haproxy redis-server openssh-server '

# Those without which single tests of it say that they are left out.
wants() {
    case $1 in
        it) echo zsh:zsh fish:fish ;;
        programs) echo npm:npm go:golang-go java:default-jdk-headless starman:starman ;;
    esac
}

missing() {
    local need
    for need in $("$1" "$2"); do
        command -v "${need%:*}" >/dev/null || echo "${need#*:}"
    done
}

install_missing() {
    local part package packages=() as=()
    for part in "${parts[@]}"; do
        for package in $(missing needs "$part" && missing wants "$part"); do
            [[ ${CI:-} != true && $daemons == *" $package "* ]] || packages+=("$package")
        done
    done
    ((${#packages[@]})) || return 0
    command -v apt-get >/dev/null || return 0
    if ((EUID != 0)); then
        sudo -n true 2>/dev/null || return 0
        as=(sudo -n)
    fi
    printf 'Installing %s\n' "${packages[*]}"
    "${as[@]}" apt-get update -qq || true
    "${as[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null || true
}

# A network namespace needs root, or a kernel that gives every user namespaces.
has_namespaces() {
    unshare --net true 2>/dev/null || unshare --map-root-user --net true 2>/dev/null
}

left_out=()
leave_out() {
    [[ ${CI:-} != true ]] || die "cannot run part \`$1\`: $2"
    left_out+=("$1: $2")
}

# Into $programs what the programs need beside the packages of the system. Without network the tests of those that are not
# there say so; in CI they fail.
get_programs() {
    programs="$(target_directory)/programs"
    mkdir -p "$programs"
    CGO_ENABLED=0 go build -o "$programs/served" tests/programs/served.go || true
    { python3 -m venv "$programs/gunicorn" &&
        "$programs/gunicorn/bin/pip" install --quiet --disable-pip-version-check gunicorn==27.0.1; } || true
    npm install --prefix "$programs" --no-audit --no-fund --loglevel error express@5.3.0 pm2@7.0.4 || true
}

# By themselves these scripts make a release build, of which nothing else here has a use.
with_what_is_built() {
    cargo build --quiet --all-features --examples --bins
    HANDOVER_BUILT="$(target_directory)/debug" "$@"
}

# in_two DIRECTORY MODULES MODULES: tests in Python. Two at a time: they wait most of the time, for programs that start or drain.
in_two() {
    local log first result=0
    log=$(mktemp "${TMPDIR:-/tmp}/handover-tests.XXXXXX")
    # shellcheck disable=SC2086
    (cd "$1" && exec python3 -m unittest --verbose $2) >"$log" 2>&1 &
    first=$!
    # shellcheck disable=SC2086
    (cd "$1" && exec python3 -m unittest --verbose $3) || result=1
    wait "$first" || result=1
    cat "$log"
    rm -f "$log"
    return "$result"
}

run() {
    case $1 in
        shell)
            shellcheck .ci/run scripts/*.sh
            if command -v ansible-lint >/dev/null; then (cd scripts/ansible && ansible-lint --offline .); fi
            ;;
        unit)
            cargo test --all-features --lib --bins
            cargo test --all-features --doc
            ;;
        it)
            # The programs that the tests start. `cargo test --examples` would build them as tests instead.
            cargo build --all-features --examples --bins
            cargo test --all-features --test it -- --skip faults::
            cargo test --all-features --example oracle arguments_are_checked
            ;;
        faults)
            cargo build --all-features --examples --bins
            # One table after the other: each runs many services at once.
            cargo test --all-features --test it -- --test-threads 1 --nocapture faults::
            ;;
        compat) scripts/compat.sh ;;
        python)
            cargo build --all-features --examples --bins
            in_two tests/python test_interop test_protocol
            ;;
        programs)
            cargo build --all-features --examples --bins
            get_programs
            HANDOVER_BIN=$(target_directory)/debug
            export PYTHONDONTWRITEBYTECODE=1 HANDOVER_PROGRAMS=$programs HANDOVER_BIN
            local binding='test_any test_redis test_take_over' others
            others=$(cd tests/programs && printf '%s\n' test_*.py | sed 's/\.py$//' | grep -vxF "${binding// /$'\n'}")
            in_two tests/programs "$binding" "$others"
            ;;
        systemd) scripts/systemd-test.sh ;;
        fleet) scripts/fleet-test.sh ;;
        demo) with_what_is_built scripts/demo.sh --upgrades 3 ;;
        load) with_what_is_built scripts/load.sh ;;
        soak) with_what_is_built scripts/soak.sh --rounds 6 --steps 3 library exec any ;;
    esac
}

# can_run PART: otherwise it is left out
can_run() {
    local lacking
    lacking=$(missing needs "$1")
    if [[ -n $lacking ]]; then
        leave_out "$1" "apt install ${lacking//$'\n'/ }"
    elif [[ $1 == load ]] && ! has_namespaces; then
        leave_out "$1" "it needs a network namespace: run it as root"
    elif [[ $1 == systemd || $1 == fleet ]] && ((EUID != 0)); then
        leave_out "$1" "it makes namespaces with a systemd in them: run it as root"
    else
        return 0
    fi
    return 1
}

title() {
    printf '\n%s--- %s%s\n' "$bold" "$1" "$plain"
}

# What runs beside the others has ended, or is not needed any more.
end_beside() {
    if kill "$beside" 2>/dev/null; then wait "$beside" || true; fi
    cat "$beside_log"
    rm -f "$beside_log"
}

install_missing
able=()
for part in "${parts[@]}"; do
    if can_run "$part"; then able+=("$part"); fi
done
beside=''
for part in "${able[@]}"; do
    begun=$SECONDS
    title "$part"
    # Both wait most of the time, for services that start and drain, so the second runs beside the first.
    if [[ $part == systemd && " ${able[*]} " == *" systemd "*"fleet "* ]]; then
        cargo build --quiet --all-features --bins --examples
        beside_log=$(mktemp "${TMPDIR:-/tmp}/handover-fleet.XXXXXX")
        scripts/fleet-test.sh >"$beside_log" 2>&1 &
        beside=$!
        trap end_beside EXIT
    fi
    if [[ $part == fleet && -n $beside ]]; then
        failed=0
        wait "$beside" || failed=$?
        end_beside
        trap - EXIT
        ((failed == 0)) || exit "$failed"
    else
        # Not in a condition, where a failure inside would be passed over.
        run "$part"
    fi
    printf '%s--- %s: %d s%s\n' "$bold" "$part" $((SECONDS - begun)) "$plain"
done
if ((${#left_out[@]})); then
    printf '\n%sLeft out:%s\n' "$red" "$plain"
    printf '  %s\n' "${left_out[@]}"
fi
printf '\n%sAll that ran has passed.%s\n' "$green" "$plain"
