#!/usr/bin/env bash
# Looks for wrong use of memory, leaks and data races, in the tests and in a real server over real upgrades.
#
# Usage: scripts/sanitize.sh [--upgrades N] [PART...]
#
#   --upgrades N   of the server, in each part that has one [10]
#
#   address    AddressSanitizer and LeakSanitizer: the unit tests, and the fixture server under load over upgrades
#   thread     ThreadSanitizer: the same
#   valgrind   memcheck with its look for leaks: unit tests of what talks to the kernel, and the fixture server under load; over
#              upgrades too if this valgrind knows the system calls that one needs (3.19 does not know pidfd_open)
#   miri       the interpreter of Rust: unit tests of what does no I/O (the wire, the machines)
#
# Without a PART all of them. All but `valgrind` need a nightly toolchain (rustup toolchain install nightly), `miri` and `thread`
# more of it (rustup component add --toolchain nightly miri rust-src). A part that misses something is left out and named at
# the end, and with CI=true it fails.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

all=(address thread valgrind miri)
upgrades=10 parts=()
while (($#)); do
    case $1 in
        --upgrades) number "$1" "${2:-}" && upgrades=$2 && shift 2 ;;
        -h | --help) help ;;
        *)
            [[ " ${all[*]} " == *" $1 "* ]] || misused "no part is named \`$1\`: there are ${all[*]}"
            parts+=("$1") && shift
            ;;
    esac
done
((${#parts[@]})) || parts=("${all[@]}")

host=$(rustc --version --verbose | sed -n 's/^host: //p')
work="$(target_directory)/sanitize"

# Says what is missing for a part, if something is.
lacks() {
    local nightly='rustup toolchain install nightly'
    case $1 in
        valgrind) command -v valgrind >/dev/null || echo 'apt install valgrind' ;;
        miri) cargo +nightly miri --version >/dev/null 2>&1 || echo "$nightly; rustup component add --toolchain nightly miri rust-src" ;;
        thread)
            [[ -d $(rustc +nightly --print sysroot 2>/dev/null)/lib/rustlib/src/rust/library ]] ||
                echo "$nightly; rustup component add --toolchain nightly rust-src"
            ;;
        *) cargo +nightly --version >/dev/null 2>&1 || echo "$nightly" ;;
    esac
}

# Fails if a tool has written a report: a process that is killed says nothing by its exit code.
no_reports() {
    local reports
    # Lines that begin otherwise are valgrind's own troubles.
    mapfile -t reports < <(grep -l '^=' "$scratch"/report.* 2>/dev/null || true)
    ((${#reports[@]} == 0)) || die "$1 has something to say: $(head -n 60 "${reports[@]}")"
}

# serve_and_upgrade WHAT PROGRAM...: upgrades under load, a failed upgrade, a rollback, and a stop
serve_and_upgrade() {
    local what=$1 n load first fault faults=(exit-after-adopted dies-in-trial) report="$scratch/oracle.json"
    shift
    serve fixture "$@"
    job "$examples/oracle" --target "$address" --new 2 --kept 2 --json >"$report"
    load=$job
    first=$("$handover" upgrade --pid-file "$pid_file" --ready-timeout 60s 2>&1) || true
    if [[ $first == *'Function not implemented'* ]]; then
        printf '%s does not know a system call that an upgrade needs: there are none in this part\n' "$what"
        upgrades=0 faults=()
        until_true 60 "$what: no load" answered 200
    fi
    for ((n = 0; n < upgrades; n++)); do upgrade --trial 300ms --ready-timeout 60s; done
    for fault in "${faults[@]}"; do
        ! "$handover" upgrade --pid-file "$pid_file" --json --trial 30s --ready-timeout 60s --env "FIXTURE_FAULT=$fault" \
            >"$scratch/$fault.json" || die "$what: an upgrade with the fault $fault succeeded"
    done
    kill -TERM "$load"
    wait "$load" || die "$what: requests were lost: $(<"$report")"
    "$handover" stop --pid-file "$pid_file" --json >/dev/null || die "$what: the server could not be stopped"
    until_true 120 "$what: a generation has not ended" all_ended
    no_reports "$what"
    printf '%s: %d upgrades, %d that failed or were rolled back; %s requests, none lost; nothing reported\n' "$what" \
        $((upgrades ? upgrades + 1 : 0)) ${#faults[@]} "$(sed -n 's/^  "requests": \([0-9]*\).*/\1/p' "$report")"
}

# answered N: the server has accepted so many connections.
answered() {
    (($(field accepted "$("$handover" status --pid-file "$pid_file" --json)") >= $1))
}

all_ended() {
    [[ -z $(our_servers) ]]
}

# with_sanitizer NAME CARGO'S OPTIONS...
with_sanitizer() {
    local name=$1
    shift
    export RUSTFLAGS="-Zsanitizer=$name -Cforce-frame-pointers=yes" RUSTDOCFLAGS="-Zsanitizer=$name"
    export CARGO_TARGET_DIR="$work/$name"
    # The model checker and what starts thousands of cases are pure, and take an hour here.
    cargo +nightly test "$@" --target "$host" --all-features --lib --bins -- --skip model:: --test-threads 2
    cargo +nightly build "$@" --target "$host" --all-features --bins --examples
    examples="$work/$name/$host/debug/examples" handover="$work/$name/$host/debug/handover"
    unset RUSTFLAGS RUSTDOCFLAGS CARGO_TARGET_DIR
    serve_and_upgrade "$name" "$examples/fixture"
}

run() {
    scratch
    case $1 in
        address)
            export ASAN_OPTIONS="log_path=$scratch/report:detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1"
            with_sanitizer address
            ;;
        thread)
            export TSAN_OPTIONS="log_path=$scratch/report:second_deadlock_stack=1"
            with_sanitizer thread -Zbuild-std
            ;;
        valgrind)
            cargo build --quiet --all-features --bins --examples
            examples="$(target_directory)/debug/examples" handover="$(target_directory)/debug/handover"
            local memcheck=(valgrind --quiet --trace-children=yes --leak-check=full --show-leak-kinds=definite
                --errors-for-leak-kinds=definite "--log-file=$scratch/report.%p") runner=${host^^}
            # Where memory that the kernel has written to is read.
            env "CARGO_TARGET_${runner//-/_}_RUNNER=${memcheck[*]}" PROPTEST_CASES=16 \
                cargo test --all-features --lib -- sys:: channel:: protocol:: sock_diag:: state:: --test-threads 1 \
                --skip a_failed_exec_is_an_error # Under valgrind posix_spawn does not hear of it.
            no_reports 'memcheck of the unit tests'
            serve_and_upgrade valgrind "${memcheck[@]}" "$examples/fixture"
            ;;
        miri)
            PROPTEST_CASES=2 MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test --target-dir "$work/miri" \
                --all-features --lib -- protocol:: upgrade::tests inherit::tests supervisor::machine every_number_has_a_place
            ;;
    esac
}

left_out=()
for part in "${parts[@]}"; do
    lacking=$(lacks "$part")
    if [[ -n $lacking ]]; then
        [[ ${CI:-} != true ]] || die "cannot run part \`$part\`: $lacking"
        left_out+=("$part: $lacking")
        continue
    fi
    begun=$SECONDS
    printf '\n%s--- %s%s\n' "$bold" "$part" "$plain"
    (run "$part")
    printf '%s--- %s: %d s%s\n' "$bold" "$part" $((SECONDS - begun)) "$plain"
done
if ((${#left_out[@]})); then
    printf '\n%sLeft out:%s\n' "$red" "$plain"
    printf '  %s\n' "${left_out[@]}"
fi
((${#left_out[@]} < ${#parts[@]})) || die 'nothing has run'
printf '\n%sNothing was found in what has run.%s\n' "$green" "$plain"
