#!/usr/bin/env bash
# Upgrades a server with very many idle connections, and watches how they are let go of.
#
# Usage: scripts/idle.sh [--connections N] [--seconds N]
#
#   --connections N   how many [100000, or as many as the limits of this machine allow]
#   --seconds N       what opening them and draining may take, each; more for an emulated machine [120]
#
# Each connection asks once and stays open. After the upgrade the old process must close all of them, gently (an end and not a
# reset), none before `linger`, and spread over as much again; none may be left at the drain deadline. A client that comes new
# is answered meanwhile. Server and clients each need as many fds: as root the limit is raised, otherwise it is what it is.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

wanted=100000 seconds=120
while (($#)); do
    case $1 in
        --connections) number "$1" "${2:-}" && wanted=$2 && shift 2 ;;
        --seconds) number "$1" "${2:-}" && seconds=$2 && shift 2 ;;
        -h | --help) help ;;
        *) misused "unknown argument \`$1\`" ;;
    esac
done

ulimit -n $((wanted + 1000)) 2>/dev/null || ulimit -n "$(ulimit -Hn)"
room=$(($(ulimit -n) - 1000))
connections=$((wanted < room ? wanted : room))

build --quiet
scratch
serve axum "$examples/axum"
old=$(<"$pid_file")

resident_mib() {
    sed -n 's/^VmRSS:\s*\([0-9]*\).*/\1/p' "/proc/$1/status" | awk '{ printf "%.0f MiB", $1 / 1024 }'
}

printf 'Idle connections: %d of %d wanted (fds: %d)\n' "$connections" "$wanted" "$(ulimit -n)"
job python3 "$(dirname "$0")/idle.py" "$address" "$connections" "$seconds" "$scratch/opened"
idle=$job
opened() {
    kill -0 "$idle" 2>/dev/null || die 'the clients have ended'
    [[ -e $scratch/opened ]]
}
until_true "$seconds" 'the connections are not open' opened
printf 'All are open; the old process has %s\n' "$(resident_mib "$old")"
upgrade --wait drained --drain-timeout "${seconds}s"
wait "$idle" || die 'connections were not let go of as they should'
printf 'Upgraded: committed after %s ms, drained after %s ms, nothing cut; the new process has %s\n' \
    "$committed" "$(field at_ms "${upgraded##*\"event\":\"result\"}")" "$(resident_mib "$server")"
