#!/usr/bin/env bash
# Replaces a web server under load, and shows that no client notices.
#
# Usage: scripts/demo.sh [--upgrades N]
#
#   --upgrades N   how many times [5]
#
# Builds, starts examples/axum.rs on a free port, puts clients of every kind on it, and runs `handover upgrade` so many
# times. Needs Rust on Linux and nothing else. Exits with 1 if a request was lost.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

upgrades=5
while (($#)); do
    case $1 in
        --upgrades) number "$1" "${2:-}" && upgrades=$2 && shift 2 ;;
        -h | --help) help ;;
        *) misused "unknown argument \`$1\`" ;;
    esac
done
[[ $(uname -s) == Linux ]] || die "handover is for Linux, and this is $(uname -s)"

printf '%sBuilding%s (the first time takes a minute or two)\n' "$bold" "$plain"
build --quiet
scratch

serve axum "$examples/axum"
printf '\n%sThe server%s  http://%s, pid %s\n' "$bold" "$plain" "$address" "$(<"$pid_file")"
printf '%sThe clients%s 8 that connect for every request, 16 that keep their connection, 2 with requests of 3 s,\n' "$bold" "$plain"
printf '            2 that read a stream, 2 on a WebSocket; all ask again as soon as they are answered\n'
job "$examples/oracle" --target "$address" --new 8 --kept 16 --slow 2:3 --stream 2 --websocket 2 --monotonic --json \
    >"$scratch/oracle.json"
oracle=$job
sleep 1

printf '\n%s$ handover upgrade --pid-file …%s\n' "$bold" "$plain"
: >"$scratch/committed"
for ((n = 1; n <= upgrades; n++)); do
    old=$(<"$pid_file")
    upgrade
    printf '%5d   pid %s → %s, which serves after %s ms\n' "$n" "$old" "$server" "$committed"
    printf '%s\n' "$committed" >>"$scratch/committed"
done
kill -TERM "$oracle" || true
lossless=yes
wait "$oracle" || lossless=no
[[ -s $scratch/oracle.json ]] || die "the clients failed"

# The report of the oracle is JSON with a key a line; two spaces more are a level deeper.
awk -v bold="$bold" -v green="$green" -v red="$red" -v plain="$plain" '
    function value() { gsub(/[",]/, ""); return $2 }
    function name() { text = $1; gsub(/[":]/, "", text); return text }
    /^  "/ { section = name() }
    section == "requests" { requests = value(); section = "" }
    section == "failed" { failed = value(); section = "" }
    section == "elapsed_s" { elapsed = value(); section = "" }
    section == "kinds" && /^    "/ { kind = name() }
    section == "kinds" && /^      "[a-z_]*": [0-9]/ { count[kind, name()] = value() }
    section == "kinds" && /^        "p99"/ { p99[kind] = value() }
    section == "generations" && /^    "/ { first = 0; answers[name()] = value(); if (name() > last) last = name() + 0 }
    END {
        kinds = split("new kept slow stream websocket", order)
        label["new"] = "new connections"; label["kept"] = "kept connections"; label["slow"] = "requests of 3 s"
        label["stream"] = "streams"; label["websocket"] = "WebSocket messages"
        causes = split("refused reset cut timed_out wrong", cause)
        printf "\n%s%-20s %10s %10s %9s %9s %9s %9s %9s%s\n", bold, "", "requests", "answered", "refused", "reset", "cut off", "timed out", "wrong", plain
        for (k = 1; k <= kinds; k++) {
            total = count[order[k], "ok"]
            for (c = 1; c <= causes; c++) total += count[order[k], cause[c]]
            printf "%-20s %10d %10d", label[order[k]], total, count[order[k], "ok"]
            for (c = 1; c <= causes; c++) {
                lost = count[order[k], cause[c]]
                printf " %s%9d%s", lost ? red : "", lost, lost ? plain : ""
            }
            printf "\n"
        }
        printf "\n%sAnswered by generation%s", bold, plain
        for (g = 1; g <= last; g++) printf "  %d: %d", g, answers[g]
        printf "\n"
        printf "\n%s%d requests in %.0f s, %d failed.%s", failed ? red : green, requests, elapsed, failed, plain
    }' "$scratch/oracle.json"
printf ' %d upgrades, trigger to new build serving: %s ms (median), %s ms (longest).\n' \
    "$upgrades" "$(median <"$scratch/committed")" "$(quantile 1 <"$scratch/committed")"
if [[ $lossless == no ]]; then
    sed -n '/"failures"/,/^  \]/p; /"backwards"/p' "$scratch/oracle.json" >&2
    die "requests were lost"
fi
