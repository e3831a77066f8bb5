#!/usr/bin/env bash
# Measures, and prints what docs/benchmarks.md shows. Nothing passes or fails on time.
#
# Usage: scripts/bench.sh [upgrade] [accept] [http] [peers] [exec] [intercept]
#
#   upgrade   from the trigger until the new build accepts, with 1 to 10,000 listeners and up to 8 GiB of memory
#   accept    what the gate and the counting of connections cost
#   http      10,000 idle connections, and the latency around an upgrade
#   peers     the same load on nginx and HAProxy, where they are installed
#   exec      `handover exec` beside pm2, which npm gets, and start_server, where it is installed (apt install
#             libserver-starter-perl); the memory of the supervisor
#   intercept what it costs a program that its calls are decided on
#
# All of them unless some are named: some ten minutes, on a machine that has nothing else to do. In a network namespace
# of its own where one can be made: among the ports of other programs the kernel searches long for a free one.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

benches=() inside=no
for argument in "$@"; do
    case $argument in
        upgrade | accept | http | peers | exec | intercept) benches+=("$argument") ;;
        --inside) inside=yes ;;
        -h | --help) help ;;
        *) misused "unknown argument \`$argument\`" ;;
    esac
done
((${#benches[@]})) || benches=(upgrade accept http peers exec intercept)

if [[ $inside == no ]]; then
    build --quiet
    if [[ " ${benches[*]} " == *" exec "* ]]; then
        npm install --prefix "$(target_directory)/programs" --no-audit --no-fund --loglevel error pm2@7.0.4 >/dev/null || true
    fi
    cargo bench --quiet --features axum --benches --no-run
    namespace "${benches[@]}"
    where='among the ports of everything else'
else
    ip link set lo up
    where='in a network namespace of its own'
fi
commit=$(git rev-parse --short HEAD 2>/dev/null || echo 'no repository')
read -r load _ </proc/loadavg
printf '%s, %s cores (%s), Linux %s, commit %s, load %s before the start, %s\n\n' \
    "$(date +%F)" "$(nproc)" "$(sed -n 's/^model name\s*: //p' /proc/cpuinfo | sort -u)" "$(uname -r)" "$commit" "$load" "$where"
for bench in "${benches[@]}"; do
    cargo bench --quiet --features axum --bench "$bench"
done
