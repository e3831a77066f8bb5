#!/usr/bin/env bash
# Replaces servers of every kind again and again, under changing load and with faults, and watches that nothing is lost and
# nothing grows.
#
# Usage: scripts/soak.sh [--rounds N] [--minutes M] [--steps N] [--seed S] [SERVICE...]
#
#   --rounds N     how many [100]
#   --minutes M    begins no round after this time; without --rounds it alone ends the run
#   --steps N      of a round at most, and at least half as many [8]
#   --seed S       of the random numbers, to repeat a run
#
#   library        examples/axum.rs
#   exec           a program under `handover exec`, with 4 workers that take 10 listeners by LISTEN_FDS
#   any            a program under `handover exec` that binds its port by itself
#   systemd        examples/axum.rs under systemd
#   systemd-exec   the same under `handover exec` under systemd, with 2 workers and the fd store
#
# All of them unless some are named. Each runs from the beginning to the end; the rounds go round them in random order. In
# a round a service has clients of a random mix, of which none may lose a request, and random steps:
#
#   command, signal, reload   an upgrade; `reload` by systemctl
#   restart, self             `handover restart`; `handover upgrade --self`
#   two                       two upgrades are asked for at once: the other one is told that it is busy, or waits
#   storm                     signals that ask for an upgrade, every few milliseconds
#   alone                     the command is killed in the middle; the upgrade goes on
#   exits, hangs              a build that ends with an error, or does not become ready
#   killed, stopped           a new process gets SIGKILL at a random moment, or SIGSTOP for longer than it may take
#   paused                    it gets SIGSTOP, and SIGCONT while there is time
#   worker                    before the clients come a worker is killed, and has to be started again
#
# A process that has accepted a connection is neither killed nor stopped for good: nobody promises that what it has accepted
# survives. It goes on after a moment then, and the step is written with a `+`. Where the machine is so slow that it has been
# given up meanwhile, what it had accepted may fail: the round says how many.
#
# Each step has to end as it should, also in the number of generations. When the clients have gone, no older process, no
# connection and no zombie may be left; the serving process, or the supervisor, must have as many file descriptors and
# threads as after the first round, and no more memory than that and a quarter (and 2 MiB), a supervisor of its own (RssAnon) 1 MiB
# at most: of the files that it is made of the kernel maps 4.4 to 4.8 MiB, as it likes. Fails at the first round in which that
# is not so. The services of systemd need root; systemd is process 1 of namespaces of its own.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
source scripts/boot.sh

supervisor_kib_max=1024
rounds='' minutes=0 steps_max=8 seed=$RANDOM services=()
while (($#)); do
    case $1 in
        --rounds) number "$1" "${2:-}" && rounds=$2 && shift 2 ;;
        --minutes) number "$1" "${2:-}" && minutes=$2 && shift 2 ;;
        --steps) number "$1" "${2:-}" && steps_max=$2 && shift 2 ;;
        --seed) number "$1" "${2:-}" 0 && seed=$2 && shift 2 ;;
        library | exec | any | systemd | systemd-exec) services+=("$1") && shift ;;
        -h | --help) help ;;
        *) misused "unknown argument \`$1\`" ;;
    esac
done
((${#services[@]})) || services=(library exec any systemd systemd-exec)
: "${rounds:=$((minutes ? 1000000 : 100))}"
# A shell that was started with SIGHUP ignored, by nohup, cannot give it back to what it starts.
signals=(USR2)
(((16#$(sed -n 's/^SigIgn:\s*//p' /proc/$$/status) & 1) != 0)) || signals+=(HUP)

build --quiet
scratch
programs="$scratch/programs"
mkdir -m 755 "$programs"
chmod 755 "$scratch"
for program in "$handover" "$examples"/{axum,plain}; do
    ln "$program" "$programs" 2>/dev/null || cp "$program" "$programs"
done
printf '#!/bin/sh\necho no database >&2\nexit 3\n' >"$programs/exits"
printf '#!/bin/sh\nexec sleep 600\n' >"$programs/hangs"
chmod 755 "$programs"/{exits,hangs}

# pick LOW HIGH: sets $picked. Not in a subshell: that one would begin with a seed of its own.
RANDOM=$seed
pick() {
    picked=$(($1 + RANDOM % ($2 - $1 + 1)))
}

pick_of() {
    pick 1 $#
    picked=${!picked}
}

# pause LOW HIGH: so many milliseconds
pause() {
    pick "$1" "$2"
    sleep "$(printf '%d.%03d' $((picked / 1000)) $((picked % 1000)))"
}

chance() {
    pick 1 "$1"
    ((picked == 1))
}

is_supervised() {
    [[ $service != library && $service != systemd ]]
}

is_unit() {
    [[ $service == systemd* ]]
}

# install BUILD: it is what the next upgrade of the service starts
install() {
    ln -s "$1" "$programs/$service.new"
    mv -T "$programs/$service.new" "$programs/$service"
}

install_good() {
    if [[ $service == exec || $service == any ]]; then install plain; else install axum; fi
}

# in_background COMMAND...: as the service, whose processes are known by the variable
in_background() {
    SOAK_SERVICE="$scratch/$service" RUST_LOG=error PLAIN=linger=1000 job "$@" \
        >"$scratch/$service.log" 2>&1 </dev/null
}

# write_unit PROGRAM...
write_unit() {
    inside tee "$lab/units/$service.service" >/dev/null <<UNIT
[Service]
Type=notify
NotifyAccess=main
Environment=SOAK_SERVICE=$scratch/$service RUST_LOG=error
ExecStart=$*
ExecReload=$lab/programs/handover upgrade --pid \$MAINPID
ExecStop=-$lab/programs/handover stop --pid \$MAINPID
RuntimeDirectory=$service
FileDescriptorStoreMax=64
Restart=always
StandardError=append:$lab/programs/$service.log
UNIT
    inside systemctl daemon-reload
    inside timeout 60 systemctl start "$service" ||
        die "$service does not start: $(inside journalctl --unit "$service" --no-pager)"
}

start() {
    local pid_file="$programs/$service.pid" listen=() n
    for n in {1..10}; do listen+=(--listen 127.0.0.1:0); done
    install_good
    case $service in
        library) in_background "$programs/library" --listen 127.0.0.1:0 --pid-file "$pid_file" ;;
        exec) in_background "$programs/handover" exec "${listen[@]}" --workers 4 --pid-file "$pid_file" -- "$programs/exec" ;;
        any) in_background "$programs/handover" exec --pid-file "$pid_file" -- "$programs/any" poll 127.0.0.1:0 ;;
        systemd) write_unit "$lab/programs/systemd" --listen 127.0.0.1:0 --pid-file "$lab/programs/systemd.pid" ;;
        systemd-exec) write_unit "$lab/programs/handover" exec --listen http=127.0.0.1:0 --workers 2 --fd-store \
            --pid-file "$lab/programs/systemd-exec.pid" -- "$lab/programs/systemd-exec" ;;
    esac
    until_true 30 "$service does not start" started "${job:-$$}" "$pid_file"
    find_main
    address[$service]=$(field address "$(status)")
}

# All processes of the service, as seen from here. Looking at every process of the machine is for now and then only: the
# kernel makes whoever reaps one wait for those that look it up in /proc, for seconds on a busy machine (Linux 6.18).
processes() {
    if is_unit; then
        cat "$group"/*/"$service.service/cgroup.procs" 2>/dev/null || true
        return
    fi
    grep -lzxsF "SOAK_SERVICE=$scratch/$service" /proc/[0-9]*/environ | cut -d / -f 3 || true
}

# seen_from_here PID: of a process of the service, that systemd's namespace has another number for
seen_from_here() {
    local pid
    if ! is_unit; then
        echo "$1"
        return
    fi
    for pid in $(processes); do
        [[ $(sed -n 's/^NSpid:.*\s//p' "/proc/$pid/status" 2>/dev/null) != "$1" ]] || echo "$pid"
    done
}

# Sets $main: the process that serves, or the supervisor.
find_main() {
    until_true 30 "$service: nobody is named by the pid file" is_found
}

is_found() {
    main=$(seen_from_here "$(<"$programs/$service.pid")")
    [[ -n $main ]] && kill -0 "$main" 2>/dev/null
}

# A machine that stands still for a minute (docs/reliability.md) lets the command give up. One that is not there is told at once.
status() {
    local tries=5 code
    while true; do
        code=0
        timeout 120 "$handover" status --pid "${1:-$main}" --json || code=$?
        ((code != 0 && code != 7 && --tries > 0)) || return "$code"
    done
}

in_list() {
    local text
    text=$(status)
    text=${text#*\""$1"\":[} text=${text%%]*}
    grep -o '"pid":[0-9]*' <<<"$text" | cut -d : -f 2 || true
}

at_most_drain() {
    (($(in_list draining | wc -l) <= $1))
}

# Whether no upgrade is under way: of the process that was asked, which may have gone, nor of its successors, of which two may
# have come at once. In its trial the new one says that it serves, and the one before it that there is a trial.
is_over() {
    local pid before=$main older=()
    if ! is_supervised; then
        for pid in $(in_list draining); do older+=("$(seen_from_here "$pid")"); done
    fi
    for pid in "$serving" "${older[@]}" "$main"; do
        [[ ! $(status "$pid" 2>/dev/null) =~ \"state\":\"(upgrading|trial)\" ]] || return 1
    done
    find_main
    [[ $main != "$before" ]] || return 0
    serving=$before
    return 1
}

wrong() {
    die "$service, step $step (seed $seed): $*"
}

# ask VERB OPTIONS...: sets $code; what is answered is in $scratch/answer.json
ask() {
    code=0
    timeout 120 "$handover" "$1" --pid "$main" --json "${@:2}" >"$scratch/answer.json" 2>&1 || code=$?
}

# wants CODE
wants() {
    ((code == $1)) || wrong "ended with $code and not with $1: $(<"$scratch/answer.json")"
}

# Starts the command without waiting for it, until it has written so much.
ask_and_go_on() {
    # Before the command is there: what an earlier one has written would be taken for its words.
    : >"$scratch/answer.json"
    asked_at=${EPOCHREALTIME/./}
    "$handover" upgrade --pid "$main" --json "${@:2}" >>"$scratch/answer.json" 2>&1 &
    asking=$!
    until_true 30 "$service, step $step (seed $seed): not $1 in 30 s" is_said "$1"
}

is_said() {
    local running=1
    # Before what it has said is read: it may say it now.
    if has_ended "$asking"; then running=0; fi
    if grep -q "\"$1\"" "$scratch/answer.json"; then return; fi
    ((running)) || wrong "it has ended before it was $1: $(<"$scratch/answer.json")"
    return 1
}

wait_for_answer() {
    until_true 120 "$service, step $step (seed $seed): no answer" has_ended "$asking"
    code=0
    wait "$asking" || code=$?
}

has_ended() {
    ! kill -0 "$1" 2>/dev/null
}

reload() {
    code=0
    inside timeout 120 systemctl reload "$service" >"$scratch/answer.json" 2>&1 || code=$?
}

# The steps: each sets $gained, how many generations there must be more.

step_command() {
    pick 20 400
    ask upgrade --trial "${picked}ms"
    wants 0
}

step_reload() {
    reload
    wants 0
}

step_signal() {
    pick_of "${signals[@]}"
    kill -s "$picked" "$main"
    until_true 30 "$service (seed $seed): SIG$picked has begun nothing" has_moved_from "$generation"
}

has_moved_from() {
    is_found && [[ $(status 2>/dev/null) =~ \"generation\":([0-9]+) ]] && ((BASH_REMATCH[1] > $1))
}

step_storm() {
    local storm n
    pick 3 15
    storm=$picked
    for ((n = 0; n < storm; n++)); do
        pick_of "${signals[@]}"
        # Whoever is named now: the first one may have been upgraded already, and gone.
        if is_found; then kill -s "$picked" "$main" 2>/dev/null || true; fi
        pause 0 20
    done
    until_true 30 "$service (seed $seed): a storm of signals has begun nothing" has_moved_from "$generation"
    until_true 60 "$service (seed $seed): a storm of signals has no end" is_over
    find_main
    # As a rule one. What comes when the upgrade is over begins another.
    gained=$(($(field generation "$(status)") - generation))
    ((gained <= storm)) || wrong "$storm signals were $gained upgrades"
}

step_two() {
    local other other_code=0
    "$handover" upgrade --pid "$main" --trial 400ms --json >"$scratch/other.json" 2>&1 &
    other=$!
    if is_unit; then reload; else ask upgrade --trial 400ms; fi
    until_true 120 "$service, step two (seed $seed): no answer" has_ended "$other"
    wait "$other" || other_code=$?
    # A reload while one is under way waits, if systemd knows of that; else it fails with 1. So do both come to be made where
    # one of them is slow to begin.
    gained=$(((code == 0) + (other_code == 0)))
    [[ "$code $other_code" =~ ^(0 [03]|[013] 0)$ ]] ||
        wrong "ended with $code and $other_code: $(<"$scratch/answer.json") $(<"$scratch/other.json")"
}

step_alone() {
    ask_and_go_on accepted --trial 300ms
    pause 0 30
    kill -KILL "$asking" 2>/dev/null || true
    wait "$asking" 2>/dev/null || true
    until_true 30 "$service (seed $seed): an upgrade has ended with the command" has_moved_from "$generation"
}

step_restart() {
    until_true 60 "$service (seed $seed): older generations drain for a minute" at_most_drain 0
    if is_supervised; then ask restart; else ask restart --drain 30s; fi
    wants 0
}

step_self() {
    ask upgrade --self
    wants 0
    gained=0
}

step_exits() {
    install exits
    if is_unit && chance 2; then reload; else ask upgrade; fi
    wants 1
    install_good
    gained=0
}

step_hangs() {
    install hangs
    pick 100 600
    ask upgrade --ready-timeout "${picked}ms"
    wants 1
    install_good
    gained=0
}

# strike: a new process is stopped at a random moment. Sets $struck, and fails with 1 if that has accepted already, or may be
# one of the serving ones soon; with 2 if it has been given up before.
strike() {
    local spawned
    ask_and_go_on spawned --ready-timeout 3s --trial 2s
    spawned=$(field pid "$(grep -m 1 '"spawned"' "$scratch/answer.json")")
    pause 0 "$1"
    struck=$(seen_from_here "$spawned")
    if [[ -z $struck ]] || ! kill -STOP "$struck" 2>/dev/null; then
        came_late || wrong "the new process $spawned has gone"
        return 2
    fi
    until_true 10 "$service, step $step (seed $seed): SIGSTOP does not stop it" is_stopped "$struck"
    ! grep -q '"healthy"' "$scratch/answer.json" && ! has_connections "$struck"
}

# On a machine that stands still the time to be ready is over before the script has come to do anything.
came_late() {
    local since_us=$((${EPOCHREALTIME/./} - asked_at))
    wait_for_answer
    gained=0
    ((since_us > 3000000 && code == 1)) && grep -q 'not ready' "$scratch/answer.json"
}

is_stopped() {
    [[ -z $(sed -n 's/.*) \([^T]\) .*/\1/p' /proc/"$1"/task/*/stat) ]]
}

# Sockets of TCP that do not listen. One that has been killed meanwhile may have had some.
has_connections() {
    local inodes table
    inodes=$(find "/proc/$1/fd" -lname 'socket:*' -printf '%l\n' | tr -dc '0-9\n')
    table=$(cat "/proc/$1/net/tcp" 2>/dev/null) || return 0
    [[ -n $(awk 'NR > FNR && $4 != "0A" && $10 in held; NR == FNR { held[$1] }' <(echo "$inodes") <(echo "$table")) ]]
}

spare() {
    step+=+
    pause 0 100
    # It may have been killed as one that stands still.
    kill -CONT "$struck" 2>/dev/null || true
    local since_us=$((${EPOCHREALTIME/./} - asked_at))
    wait_for_answer
    # On a machine so busy that the trial, of two seconds, was over before this it has been given up, and rightly, with all that
    # it had accepted; or its time to be ready was, of three.
    if ((since_us > 2000000 && code == 1)) && grep -q 'stands still\|not ready' "$scratch/answer.json"; then
        gained=0 may_lose=1
        return
    fi
    wants 0
}

not_struck() {
    (($1 == 2)) || spare
}

step_killed() {
    strike 60 || { not_struck $? && return; }
    # On a busy machine it has stood still long enough to have been killed for that.
    kill -KILL "$struck" 2>/dev/null || true
    wait_for_answer
    wants 1
    gained=0
}

step_stopped() {
    strike 60 || { not_struck $? && return; }
    wait_for_answer
    # A supervisor has seen it wait, and knows of nothing else that a program could show.
    if is_supervised && ((code == 0)); then
        kill -CONT "$struck" || wrong "the process that serves, $struck, has gone"
        return
    fi
    wants 1
    until_true 90 "$service (seed $seed): the stopped process is left" has_ended "$struck"
    gained=0
}

step_paused() {
    local why=0
    strike 60 || why=$?
    ((why == 2)) || spare
    step=${step%+}
}

# The mix of clients: what a drained generation waits for is at most a stream, so rounds do not take long. Nobody asks
# without a pause, so that there is room for other work.
mix() {
    pick 1 4 && load=(--new "$picked")
    pick 50 300 && load+=(--rate "$picked")
    pick 1 12 && load+=(--kept "$picked")
    pick 10 40 && load+=(--think "${picked}ms")
    if chance 2; then pick 1 4 && load+=(--slow "$picked:0.$picked"); fi
    if chance 4; then pick 1 65536 && load+=(--post "$picked"); fi
    [[ $service != exec && $service != any ]] || return 0
    if chance 2; then pick 1 4 && load+=(--stream "$picked"); fi
    if chance 2; then pick 1 8 && load+=(--websocket "$picked" --interval "${picked}0ms"); fi
    # Under exec both builds accept until the old one is told to stop; and one that dies in its trial may have answered.
    is_supervised || [[ "${steps[*]}" =~ killed|stopped ]] || load+=(--monotonic)
}

# Sets $steps.
choose() {
    local all=(signal storm two alone restart exits hangs killed stopped paused) n
    if is_unit; then all+=(reload reload); else all+=(command); fi
    ! is_supervised || all+=(self)
    steps=()
    pick $(((steps_max + 1) / 2)) "$steps_max"
    for ((n = picked; n > 0; n--)); do
        pick_of "${all[@]}"
        steps+=("$picked")
    done
}

look_after_workers() {
    local workers
    mapfile -t workers < <(in_list workers)
    pick_of "${workers[@]}"
    kill -KILL "$(seen_from_here "$picked")"
    until_true 30 "$service (seed $seed): a worker was killed, and is not started again" are_others "$picked" ${#workers[@]}
    done+=' worker'
    faults[$service]=$((faults[$service] + 1))
}

# Whether as many serve, without that one.
are_others() {
    local now
    now=$(in_list workers)
    ! grep -qxF "$1" <<<"$now" && [[ $(wc -l <<<"$now") == "$2" && $(status) != *'"state":"starting"'* ]]
}

do_step() {
    local now
    step=$1 gained=1
    until_true 60 "$service (seed $seed): older generations drain for a minute" at_most_drain 2
    find_main
    generation=$(field generation "$(status)")
    serving=$main
    "step_$step"
    until_true 60 "$service, step $step (seed $seed): an upgrade is not over" is_over
    find_main
    now=$(field generation "$(status)")
    ((now == generation + gained)) ||
        wrong "generation $generation has become $now: $(<"$scratch/answer.json")"
    upgrades[$service]=$((upgrades[$service] + gained))
    case $step in
        exits | hangs | killed* | stopped* | paused | alone | storm | two) faults[$service]=$((faults[$service] + 1)) ;;
    esac
    done+=" $step"
}

round() {
    local oracle next may_lose=0
    find_main
    if is_supervised && chance 3; then look_after_workers; fi
    choose
    mix
    "$examples/oracle" --target "${address[$service]}" "${load[@]}" --json >"$scratch/oracle.json" &
    oracle=$!
    for next in "${steps[@]}"; do
        do_step "$next"
        pause 50 300
    done
    kill -TERM "$oracle"
    until_true 60 "the clients do not end" has_ended "$oracle"
    wait "$oracle" || ((may_lose)) ||
        die "$service: requests were lost (seed $seed; ${load[*]};$done): $(<"$scratch/oracle.json")"
    requests=$(of_all requests) failed=$(of_all failed)
    asked[$service]=$((asked[$service] + requests)) lost[$service]=$((lost[$service] + failed))
}

of_all() {
    sed -n "s/^  \"$1\": \([0-9]*\).*/\1/p" "$scratch/oracle.json"
}

alone() {
    local expected=1
    [[ $(status) == *'"connections":{"open":0,'*'"draining":[]'* ]] || return 1
    ! is_supervised || expected=$((1 + $(in_list workers | wc -l)))
    (($(processes | wc -l) == expected))
}

# Zombies that one of the service's processes has not reaped.
zombies() {
    cat /proc/[0-9]*/stat 2>/dev/null | sed -n 's/.*) Z \([0-9]*\) .*/\1/p' | grep -cxF "$(processes)" || true
}

has_no_zombie() {
    (($(zombies) == 0))
}

has_reaped() {
    ! grep -qsx handover-reaps "/proc/$main"/task/*/comm
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

# Sets fds, threads, kib, own_kib and dead, and compares them with the first.
look() {
    until_true 90 "$service (seed $seed): processes or connections are left when the clients have gone ($done)" alone
    # A thread of its own reaps, which the kernel may keep for long: all the longer if others look at every process.
    until_true 90 "$service (seed $seed): something is still reaped ($done)" has_reaped
    until_true 90 "$service (seed $seed): zombies are left ($done)" has_no_zombie
    fds=$(fewest_fds "$main")
    threads=$(sed -n 's/^Threads:\s*//p' "/proc/$main/status")
    kib=$(sed -n 's/^VmRSS:\s*\([0-9]*\).*/\1/p' "/proc/$main/status")
    own_kib=$(sed -n 's/^RssAnon:\s*\([0-9]*\).*/\1/p' "/proc/$main/status")
    dead=$(zombies)
}

compare() {
    : "${first[$service]:=$fds fds, $threads threads}" "${first_kib[$service]:=$kib}"
    [[ "$fds fds, $threads threads" == "${first[$service]}" ]] ||
        die "$service had ${first[$service]} after its first round: $(ls -l "/proc/$main/fd")"
    ((kib <= first_kib[$service] + first_kib[$service] / 4 + 2048)) ||
        die "$service: memory has grown from ${first_kib[$service]} KiB"
    ! is_supervised || ((own_kib <= supervisor_kib_max)) || die "$service: the supervisor has $own_kib KiB of its own"
    ((dead == 0)) || die "$service: zombies are left"
}

# A step that has failed may have left processes stopped, and workers that nobody supervises.
end_all() {
    local code=$? pid
    set +e
    if ((code != 0)); then
        printf 'what serves says: %s\n' "$(status 2>&1)" >&2
        # Those of the units lie where systemd can write; the others are shown by whoever stops everything.
        mv "$programs"/*.log "$scratch" 2>/dev/null
    fi
    [[ -z $group ]] || end_group
    for service in "${services[@]}"; do
        # A supervisor may start one more before its own turn comes.
        for _ in {1..5}; do
            for pid in $(processes); do
                kill -KILL "$pid"
                wait "$pid"
            done 2>/dev/null
        done
    done
    (exit "$code")
    stop_everything
}

trap end_all EXIT
declare -A address upgrades faults asked lost first first_kib
if [[ " ${services[*]}" == *' systemd'* ]]; then
    make_group handover-soak
    boot "$scratch" "$programs:programs"
fi
for service in "${services[@]}"; do
    upgrades[$service]=0 faults[$service]=0 asked[$service]=0 lost[$service]=0
    start
done

printf 'Soak: seed %d\n\n%s%9s %5s  %-12s %8s %7s %4s %7s %8s %7s  %s%s\n' "$seed" \
    "$bold" time round service requests failed fds threads 'RSS, KiB' zombies steps "$plain"
begun=$SECONDS n=0 turn=()
while ((n < rounds)) && ((minutes == 0 || SECONDS - begun < minutes * 60)); do
    ((${#turn[@]})) || turn=("${services[@]}")
    pick 0 $((${#turn[@]} - 1))
    service=${turn[picked]} done=''
    unset "turn[$picked]" && turn=("${turn[@]}")
    round
    look
    time=$((SECONDS - begun)) n=$((n + 1))
    printf '%6d:%02d %5d  %-12s %8d %7d %4d %7d %8d %7d %s\n' \
        $((time / 60)) $((time % 60)) "$n" "$service" "$requests" "$failed" "$fds" "$threads" "$kib" "$dead" "$done"
    compare
done

printf '\n%s%-12s %8s %7s %10s %7s   %s%s\n' "$bold" service upgrades faults requests failed '3/N' "$plain"
total() {
    printf '%-12s %8d %7d %10d %7d   %s\n' "$@" "$(awk -v n="$4" 'BEGIN { printf "%.1e", 3 / n }')"
}
u=0 f=0 r=0 l=0
for service in "${services[@]}"; do
    ((asked[$service])) || continue
    total "$service" "${upgrades[$service]}" "${faults[$service]}" "${asked[$service]}" "${lost[$service]}"
    u=$((u + upgrades[$service])) f=$((f + faults[$service])) r=$((r + asked[$service])) l=$((l + lost[$service]))
done
total all "$u" "$f" "$r" "$l"
if ((l)); then
    echo
    echo "Those that failed were with processes that the script had stopped, and this machine kept it from letting them go on in time."
    exit
fi
printf '\n%sNothing was lost, and nothing has grown.%s With 95 %% confidence fewer than 3/N of the requests are lost.\n' \
    "$green" "$plain"
