#!/usr/bin/env bash
# Throws bytes at everything that reads from outside, guided by coverage (libFuzzer under AddressSanitizer).
#
# Usage: scripts/fuzz.sh [--seconds N] [--jobs N] [TARGET...]
#        scripts/fuzz.sh --keep [TARGET...]
#        scripts/fuzz.sh --list
#
#   --seconds N   for each target [60]
#   --jobs N      so many targets at the same time [1]
#   --keep        adds to tests/data/fuzz what reaches code that nothing there reaches, 6 KB for a target at the most
#   --list        the targets
#
# All targets unless some are named. What is found stays in Cargo's target directory, under fuzz/corpus, and the next run
# begins with it. Fails when an input makes a target panic, hang for 10 s or take 1 GiB, and names the file that it is in.
# `cargo test` gives each file of tests/data/fuzz to its target, without any of this.
#
# Needs a nightly toolchain and cargo-fuzz: rustup toolchain install nightly; cargo install cargo-fuzz
set -euo pipefail
source "$(dirname "$0")/lib.sh"

seconds=60 jobs=1 keep=no chosen=()
kept_bytes_max=6000
mapfile -t all < <(find tests/data/fuzz -mindepth 1 -maxdepth 1 -type d -printf '%f\n' | sort)
while (($#)); do
    case $1 in
        --seconds) number "$1" "${2:-}" && seconds=$2 && shift 2 ;;
        --jobs) number "$1" "${2:-}" && jobs=$2 && shift 2 ;;
        --keep) keep=yes && shift ;;
        --list) printf '%s\n' "${all[@]}" && exit ;;
        -h | --help) help ;;
        *)
            [[ " ${all[*]} " == *" $1 "* ]] || misused "no target is named \`$1\`: there are ${all[*]}"
            chosen+=("$1") && shift
            ;;
    esac
done
((${#chosen[@]})) || chosen=("${all[@]}")

cargo +nightly --version >/dev/null 2>&1 || die "a nightly toolchain is missing: rustup toolchain install nightly"
cargo fuzz --version >/dev/null 2>&1 || die "cargo-fuzz is missing: cargo install cargo-fuzz"

work="$(target_directory)/fuzz"
# The directory whose Cargo.toml says that it is of cargo-fuzz.
cargo +nightly fuzz build --fuzz-dir tests/fuzz --target-dir "$work/build" fuzz
program=$(find "$work/build" -path '*/release/fuzz' -type f)

# run_target TARGET OPTIONS...
run_target() {
    local target=$1
    shift
    HANDOVER_FUZZ=$target "$program" -rss_limit_mb=1024 -timeout=10 -artifact_prefix="$work/found/$target-" "$@"
}

# An input that took too long once, and does not by itself: it was the machine that stood still.
was_interrupted() {
    local target=$1 input=$2
    [[ $input == *-timeout-* ]] && run_target "$target" "$input" >/dev/null 2>&1
}

fuzz_one() {
    local target=$1 log="$work/log/$1" end=$((SECONDS + seconds)) left=$seconds input
    mkdir -p "$work/corpus/$target"
    : >"$log.before"
    while ((left > 0)) && ! run_target "$target" -max_total_time="$left" -print_final_stats=1 \
        "$work/corpus/$target" "tests/data/fuzz/$target" >"$log" 2>&1; do
        input=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
        was_interrupted "$target" "$input" || {
            printf '%s%-14s found something: %s%s\n' "$red" "$target" "$log" "$plain"
            grep -m 3 -E 'panicked at|ERROR:|Test unit written' "$log" || true
            return 1
        }
        cat "$log" >>"$log.before"
        left=$((end - SECONDS))
    done
    times >"$log.times"
    awk -v target="$target" '
        FILENAME ~ /times$/ { if (FNR == 2) { split($0, time, /[ms ]+/); processor = time[1] + time[3] + (time[2] + time[4]) / 60 } }
        / cov: / { for (i = 1; i < NF; i++) { if ($i == "cov:") cov = $(i + 1); if ($i == "ft:") ft = $(i + 1) } }
        /number_of_executed_units/ { runs += $2 }
        END { printf "%-16s %6.1f minutes of a processor, %12d runs, %6d edges, %6d features\n", target, processor, runs, cov, ft }
    ' "$log.times" "$log.before" "$log"
}

# What reaches code that nothing reaches which is kept already; how often it is reached does not count here, or thousands
# would be kept.
keep_one() {
    local target=$1 kept="tests/data/fuzz/$1" more file bytes room=$kept_bytes_max
    more=$(mktemp -d "$work/more.XXXXXX")
    cp "$kept"/* "$more/"
    run_target "$target" -merge=1 -set_cover_merge=1 -use_counters=0 "$more" "$work/corpus/$target" >"$work/log/$target.merge" 2>&1 ||
        die "$target: $(tail -n 3 "$work/log/$target.merge")"
    # The large ones reach most, and the repository should not carry more than a few.
    while read -r file; do
        bytes=$(stat -c %s "$more/$file")
        if [[ ! -e $kept/$file ]] && ((bytes <= room)); then
            cp "$more/$file" "$kept/"
            room=$((room - bytes))
        fi
    done < <(ls -S "$more")
    rm -rf "$more"
    printf '%-14s %4d files, %7d bytes\n' "$target" "$(find "$kept" -type f | wc -l)" "$(cat "$kept"/* | wc -c)"
}

mkdir -p "$work/corpus" "$work/found" "$work/log"
if [[ $keep == yes ]]; then
    for target in "${chosen[@]}"; do keep_one "$target"; done
    exit
fi
failed=0 running=0
for target in "${chosen[@]}"; do
    ((running < jobs)) || { wait -n || failed=1; running=$((running - 1)); }
    fuzz_one "$target" &
    running=$((running + 1))
done
while ((running-- > 0)); do wait -n || failed=1; done
((failed == 0)) || die "what was found is in $work/found; a test first, then the mend"
