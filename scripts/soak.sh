#!/usr/bin/env bash
# Upgrades a server again and again under changing load, and watches that nothing is lost and nothing grows.
#
# Usage: scripts/soak.sh [--exec] [--upgrades N] [--minutes M] [--seed S]
#
#   --exec         a program under `handover exec`, with 4 workers and 10 listeners, instead of the axum example
#   --upgrades N   how many [1000]
#   --minutes M    ends after this time, if that is sooner
#   --seed S       of the random numbers, to repeat a run
#
# Twenty upgrades are a round. Each round has clients of a random mix, and ends with a look at the serving process when
# they have gone: its file descriptors and threads must be as many as after the first round, its memory no more than a
# quarter (and 2 MiB) above it, no zombie and no older generation may be left. Fails at the first round that lost a
# request, or where something has grown. With --exec it is the supervisor that is looked at, a round has one more upgrade
# that fails and one of the supervisor itself, and 5 MiB are the most that it may have.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

upgrades=1000 minutes=0 seed=$RANDOM under_exec=no
while (($#)); do
    case $1 in
        --exec) under_exec=yes && shift ;;
        --upgrades) number "$1" "${2:-}" && upgrades=$2 && shift 2 ;;
        --minutes) number "$1" "${2:-}" && minutes=$2 && shift 2 ;;
        --seed) number "$1" "${2:-}" 0 && seed=$2 && shift 2 ;;
        -h | --help) help ;;
        *) misused "unknown argument \`$1\`" ;;
    esac
done
round_upgrades=20
exec_kib_max=5120

build --quiet
scratch
RANDOM=$seed

serve_under_exec() {
    local n listen=''
    # With the one that `serve` asks for ten of them.
    for n in {1..9}; do listen+="\"other-$n=127.0.0.1:0\", "; done
    printf 'program = ["%s"]\nworkers = 4\nlisten = [%s]\n' "$examples/plain" "$listen" >"$scratch/exec.toml"
    serve exec "$handover" exec --config "$scratch/exec.toml"
}

if [[ $under_exec == yes ]]; then serve_under_exec; else serve axum "$examples/axum"; fi

between() {
    echo $(($1 + RANDOM % ($2 - $1 + 1)))
}

# A mix of clients. What a drained generation waits for is at most a slow request, so rounds do not take long.
mix() {
    load=(--new "$(between 1 8)" --kept "$(between 1 16)")
    # Under exec both builds accept until the old one is told to stop.
    [[ $under_exec == yes ]] || load+=(--monotonic)
    ((RANDOM % 2)) && load+=(--rate "$(between 50 2000)")
    ((RANDOM % 2)) && load+=(--think "$(between 1 20)ms")
    ((RANDOM % 2)) && load+=(--slow "$(between 1 4):0.$(between 1 9)")
    [[ $under_exec == no ]] || return 0
    ((RANDOM % 2)) && load+=(--stream "$(between 1 4)")
    ((RANDOM % 2)) && load+=(--websocket "$(between 1 8)" --interval "$(between 1 100)ms")
    ((RANDOM % 4)) || load+=(--post "$(between 1 65536)")
}

alone() {
    [[ $(our_servers) == "$(<"$pid_file")" ]] && (($(draining) == 0)) &&
        [[ $("$handover" status --pid-file "$pid_file" --json) == *'"connections":{"open":0,'* ]]
}

# Zombies whose parent is one of ours: what a parent has not reaped.
zombies() {
    local status parent count=0
    for status in /proc/[0-9]*/stat; do
        parent=$(sed -n 's/.*) Z \([0-9]*\) .*/\1/p' "$status" 2>/dev/null || true)
        if [[ -n $parent && -S $HANDOVER_DIR/$parent.sock ]]; then count=$((count + 1)); fi
    done
    echo "$count"
}

# Over a moment: the connection that asked for the status may still be open.
fewest_fds() {
    local n files fewest=99999
    for ((n = 0; n < 10; n++)); do
        files=("/proc/$1/fd"/*)
        ((${#files[@]} >= fewest)) || fewest=${#files[@]}
        sleep 0.02
    done
    echo "$fewest"
}

# Sets fds, threads, kib and zombies of the serving process.
look() {
    local pid
    until_true 60 'older generations or connections are left a minute after the clients have gone' alone
    pid=$(<"$pid_file")
    fds=$(fewest_fds "$pid")
    threads=$(sed -n 's/^Threads:\s*//p' "/proc/$pid/status")
    kib=$(sed -n 's/^VmRSS:\s*\([0-9]*\).*/\1/p' "/proc/$pid/status")
    zombies=$(zombies)
}

# What a supervisor must not show either.
fail_and_replace_itself() {
    local code=0
    "$handover" upgrade --pid-file "$pid_file" --json --env PLAIN=exit=3 >>"$scratch/failed.log" 2>&1 || code=$?
    ((code == 1)) || die "an upgrade to a build that fails ended with $code: $(tail -n 3 "$scratch/failed.log")"
    "$handover" upgrade --pid-file "$pid_file" --json --self >>"$scratch/self.log" 2>&1 ||
        die "the supervisor could not replace itself: $(tail -n 3 "$scratch/self.log")"
}

# One round of so many upgrades; adds to the totals.
round() {
    local oracle n
    mix
    job "$examples/oracle" --target "$address" "${load[@]}" --json >"$scratch/oracle.json"
    oracle=$job
    for ((n = 0; n < $1; n++)); do
        upgrade --trial "$(between 20 400)ms" --wait healthy
        echo "$committed" >>"$scratch/committed"
        sleep "0.$(between 1 3)"
    done
    [[ $under_exec == no ]] || fail_and_replace_itself
    kill -TERM "$oracle"
    wait "$oracle" || die "requests were lost in the round of ${load[*]} (seed $seed): $(<"$scratch/oracle.json")"
    requests=$((requests + $(sed -n 's/^  "requests": \([0-9]*\).*/\1/p' "$scratch/oracle.json")))
    done=$((done + $1))
}

printf 'Soak: %d upgrades, seed %d\n\n' "$upgrades" "$seed"
printf '%s%9s %8s %12s %7s %5s %8s %9s %8s%s\n' \
    "$bold" time upgrades requests failed fds threads 'RSS, KiB' zombies "$plain"
begun=$SECONDS done=0 requests=0 first=''
: >"$scratch/committed"
while ((done < upgrades)) && ((minutes == 0 || SECONDS - begun < minutes * 60)); do
    round $((upgrades - done < round_upgrades ? upgrades - done : round_upgrades))
    look
    time=$((SECONDS - begun))
    printf '%6d:%02d %8d %12d %7d %5d %8d %9d %8d\n' \
        $((time / 60)) $((time % 60)) "$done" "$requests" 0 "$fds" "$threads" "$kib" "$zombies"
    [[ -n $first ]] || first="$fds $threads" first_kib=$kib
    [[ "$fds $threads" == "$first" ]] ||
        die "fds and threads were $first after the first round: $(ls -l "/proc/$(<"$pid_file")/fd")"
    ((kib <= first_kib + first_kib / 4 + 2048)) || die "memory has grown from $first_kib KiB"
    [[ $under_exec == no ]] || ((kib <= exec_kib_max)) || die "the supervisor has $kib KiB"
    ((zombies == 0)) || die "zombies are left"
done

printf '\n%s%d upgrades, %d requests, 0 failed.%s With 95 %% confidence fewer than %s of requests are lost (3/N).\n' \
    "$green" "$done" "$requests" "$plain" "$(awk -v n="$requests" 'BEGIN { printf "%.1e", 3 / n }')"
printf 'Trigger to the new build serving: %s ms (median), %s ms (p99).\n' \
    "$(median <"$scratch/committed")" "$(quantile 0.99 <"$scratch/committed")"
