#!/usr/bin/env bash
# Upgrades the example servers under load in a network namespace of its own, where the kernel's counters tell whether a
# connection was dropped that no client has missed.
#
# Usage: scripts/load.sh [--upgrades N] [axum] [std] [tokio] [wrk] [h2load]
#
#   --upgrades N   of each [50]
#
#   axum     the oracle on examples/axum.rs: new and kept connections, requests of 15 s in flight, streams, WebSockets
#   std      the oracle on examples/std.rs: new and kept connections
#   tokio    the same on examples/tokio.rs
#   wrk      wrk on examples/axum.rs, with kept connections and with new ones
#   h2load   h2load on examples/axum.rs, HTTP/1.1 on kept connections and HTTP/2 with prior knowledge
#
# All of them unless some are named. Fails if one request is lost, if a listener is not the same socket to the end, or if
# a kernel counter has moved that must not. Needs root, or a kernel that gives every user namespaces.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

upgrades=50 inside=no cases=()
while (($#)); do
    case $1 in
        --upgrades) number "$1" "${2:-}" && upgrades=$2 && shift 2 ;;
        --inside) inside=yes && shift ;;
        axum | std | tokio | wrk | h2load) cases+=("$1") && shift ;;
        -h | --help) help ;;
        *) misused "unknown argument \`$1\`" ;;
    esac
done
((${#cases[@]})) || cases=(axum std tokio wrk h2load)

build --quiet
if [[ $inside == no ]]; then
    namespace --upgrades "$upgrades" "${cases[@]}"
    die "no network namespace can be made: run it as root, with iproute2 installed"
fi
ip link set lo up
# Clients that close first keep their ports in TIME_WAIT.
echo '1024 65535' >/proc/sys/net/ipv4/ip_local_port_range
scratch

# What tells of a connection dropped or reset. The first three are the listener's own and must never move. The others
# also count what clients do: they hold for the oracle, which closes as one should, and not for wrk and h2load: when their
# time is over they end with answers unread, and the kernel resets each connection that they still have. It counts
# EstabResets at both ends of it, since both are in this namespace.
of_listeners=(ListenOverflows ListenDrops TCPReqQFullDrop)
of_connections=(OutRsts TCPAbortOnClose TCPAbortOnData TCPAbortOnTimeout)

# counters NAME...: a line `NAME VALUE` each
counters() {
    local name values
    for name in "$@"; do
        values=$(awk -v name="$name" '
            $1 == last { for (i = 2; i <= NF; i++) if (names[i] == name) print name, $i }
            { last = $1; split($0, names) }' /proc/self/net/netstat /proc/self/net/snmp)
        [[ -n $values ]] || die "this kernel has no counter $name"
        printf '%s\n' "$values"
    done
}

# moved_at_most N BEFORE NAME...
moved_at_most() {
    local most=$1 before=$2 moved
    shift 2
    moved=$(paste -d ' ' <(echo "$before") <(counters "$@") | awk -v most="$most" '$4 - $2 > most { print $1, "+" $4 - $2 }')
    [[ -z $moved ]] || die "$case: the kernel counted what must not be: $moved"
}

status() {
    "$handover" status --pid-file "$pid_file" --json
}

begin() {
    serve "$1" "$examples/$1"
    cookie=$(field cookie "$(status)")
    listeners_before=$(counters "${of_listeners[@]}")
    connections_before=$(counters "${of_connections[@]}")
    resets_before=$(counters EstabResets)
    : >"$scratch/committed"
}

upgrade_once() {
    upgrade --trial 300ms
    echo "$committed" >>"$scratch/committed"
}

# finish LEFT WHAT: ends the server, looks at what the kernel saw, and says how it went. The clients have left so many
# connections with an answer unread.
finish() {
    [[ $(field cookie "$(status)") == "$cookie" ]] || die "$case: the listener is another socket than at the start"
    [[ $(field generation "$(status)") == $((upgrades + 1)) ]] || die "$case: not the generation that it should be"
    "$handover" stop --pid-file "$pid_file" --json >/dev/null || die "$case: the server could not be stopped"
    until_true 90 "$case: a generation has not ended" all_ended
    moved_at_most 0 "$listeners_before" "${of_listeners[@]}"
    moved_at_most $((2 * $1)) "$resets_before" EstabResets
    moved_at_most "$1" "$connections_before" "${of_connections[@]}"
    printf '%s%-7s%s %s; %d upgrades, the new build served after %s ms (median)\n' \
        "$bold" "$case" "$plain" "$2" "$upgrades" "$(median <"$scratch/committed")"
}

all_ended() {
    [[ -z $(our_servers) ]]
}

# with_oracle SERVER LOAD...
with_oracle() {
    local server_name=$1 oracle report answered
    shift
    begin "$server_name"
    job "$examples/oracle" --target "$address" "$@" --monotonic --json >"$scratch/oracle.json"
    oracle=$job
    for ((n = 0; n < upgrades; n++)); do upgrade_once; done
    # All generations have answered, the last one too, when the load ends.
    sleep 0.5
    kill -TERM "$oracle"
    report="$scratch/oracle.json"
    wait "$oracle" || die "$case: requests were lost: $(<"$report")"
    [[ $(sed -n '/"outcomes"/,/}/ s/.*"client": \([0-9]*\).*/\1/p' "$report") == 0 ]] ||
        die "$case: requests were never made, for want of ports or fds: $(<"$report")"
    answered=$(sed -n '/^  "generations"/,/^  }/ { /^    / p }' "$report" | wc -l)
    ((answered == upgrades + 1)) || die "$case: only $answered generations have answered"
    finish 0 "$(sed -n 's/^  "requests": \([0-9]*\).*/\1/p' "$report") requests, 0 failed"
}

# Calls `once`, which runs a load to its end and checks it, again and again until all upgrades are done.
while_upgrading() {
    (for ((n = 0; n < upgrades; n++)); do upgrade_once; done) &
    local upgrading=$!
    while kill -0 "$upgrading" 2>/dev/null; do "$@"; done
    wait "$upgrading" || die "$case: an upgrade failed"
}

# wrk_once OPTIONS...
wrk_once() {
    local report
    report=$(wrk --threads 1 --connections 16 --duration 5s "$@" "http://$address/")
    if grep -q 'Socket errors\|Non-2xx' <<<"$report" || ! [[ $report =~ ([0-9]+)\ requests\ in ]]; then
        die "wrk $*: requests were lost: $report"
    fi
    requests=$((requests + BASH_REMATCH[1])) clients=$((clients + 16))
}

# h2load_once OPTIONS...
#
# A client of h2load that connects again at the very end of the time does not notice that it is over, and goes on for ever
# (nghttp2 1.52). Such a run is ended and made again; what it has asked is not counted.
h2load_once() {
    local report runs=0 status=0
    while
        clients=$((clients + 16)) status=0
        report=$(timeout --kill-after 5 30 h2load --clients 16 "$@" "http://$address/") || status=$?
        ((status == 124))
    do
        ((++runs < 3)) || die "h2load $*: does not end"
    done
    [[ $report =~ ([0-9]+)\ succeeded,\ 0\ failed,\ 0\ errored,\ 0\ timeout && ${BASH_REMATCH[1]} -gt 0 ]] ||
        die "h2load $*: requests were lost: $report"
    requests=$((requests + BASH_REMATCH[1]))
}

# with_loader WHAT COMMAND...
with_loader() {
    local what=$1 requests=0 clients=0
    shift
    begin axum
    while_upgrading "$@"
    finish "$clients" "$what: $requests requests, 0 failed"
}

for case in "${cases[@]}"; do
    case $case in
        axum) with_oracle axum --new 8 --rate 1000 --kept 16 --post 40000 --slow 2:15 --stream 2 --websocket 2 ;;
        std | tokio) with_oracle "$case" --echo 8 --rate 1000 --echo-kept 16 ;;
        wrk)
            with_loader 'kept connections' wrk_once
            with_loader 'new connections' wrk_once --header 'Connection: close'
            ;;
        h2load)
            with_loader 'HTTP/1.1' h2load_once --h1 --duration 5
            # h2load does not come back after a GOAWAY, as a client should: so each connection asks all that it has to
            # ask at once, and there are many of them.
            with_loader 'HTTP/2' h2load_once --max-concurrent-streams 50 --requests 800
            ;;
    esac
done
