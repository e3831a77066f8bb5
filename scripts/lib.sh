# shellcheck shell=bash
# What the scripts share: building, starting a server, upgrading it, and stopping whatever was started. Sourced, never
# run. Needs nothing beside bash, coreutils and Rust, so that demo.sh works on a fresh machine; no JSON parser either:
# what is read here is written by this repository.

# Set here for whoever sources this:
# shellcheck disable=SC2034

script=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

bold='' red='' green='' dim='' plain=''
if [[ -t 1 && ${TERM:-dumb} != dumb && -z ${NO_COLOR:-} ]]; then
    bold=$'\e[1m' red=$'\e[31m' green=$'\e[32m' dim=$'\e[2m' plain=$'\e[0m'
fi

die() {
    printf '%s%s: %s%s\n' "$red" "${0##*/}" "$*" "$plain" >&2
    exit 1
}

# Wrong usage: 2, as the command has it.
misused() {
    printf '%s%s: %s (see --help)%s\n' "$red" "${0##*/}" "$*" "$plain" >&2
    exit 2
}

# namespace ARGUMENTS...: starts the script again with `--inside` before them, in a network namespace of its own. Returns
# if none can be made. The caller has built everything: inside there is no network but lo.
namespace() {
    local as=(unshare --net)
    ((EUID == 0)) || as=(unshare --map-root-user --net)
    "${as[@]}" ip link set lo up 2>/dev/null || return 0
    exec "${as[@]}" "$script" --inside "$@"
}

# The comment at the top of a script is its help.
help() {
    sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p }' "$script"
    exit 0
}

# The value of an option that wants a number.
number() {
    [[ ${2:-} =~ ^[0-9]+$ && $2 -ge ${3:-1} ]] ||
        misused "$1 wants a number of at least ${3:-1}, not \`${2:-}\`"
}

# Where Cargo puts what it builds, wherever the user has told it to.
target_directory() {
    [[ $(cargo metadata --format-version 1 --no-deps) =~ \"target_directory\":\"([^\"]*)\" ]]
    printf '%s' "${BASH_REMATCH[1]}"
}

# build [Cargo's arguments]: release, and where it is: $handover, $examples. Nothing, if HANDOVER_BUILT says where all of it
# is already.
build() {
    if [[ -n ${HANDOVER_BUILT:-} ]]; then
        release=$HANDOVER_BUILT handover="$HANDOVER_BUILT/handover" examples="$HANDOVER_BUILT/examples"
        return
    fi
    command -v cargo >/dev/null ||
        die "Rust is missing: see https://rustup.rs (and run \`. ~/.cargo/env\` afterwards)"
    command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
        die "a C linker is missing: apt install gcc, or what your system calls it"
    cargo build --release --features axum --bins --examples "$@"
    release="$(target_directory)/release"
    handover="$release/handover"
    examples="$release/examples"
}

# A directory of our own for everything, gone at the end with every process that was started.
scratch() {
    scratch=$(mktemp -d "${TMPDIR:-/tmp}/handover.XXXXXX")
    export HANDOVER_DIR="$scratch/control"
    mkdir -m 700 "$HANDOVER_DIR"
    trap stop_everything EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

# Every server that lives has a control socket named by its pid; ours are those that were given our directory.
our_servers() {
    local socket pid
    for socket in "$HANDOVER_DIR"/*.sock; do
        pid=${socket##*/} pid=${pid%.sock}
        if [[ -r /proc/$pid/environ ]] && grep -qzxF "HANDOVER_DIR=$HANDOVER_DIR" "/proc/$pid/environ" 2>/dev/null; then
            printf '%s\n' "$pid"
        fi
    done
}

stop_everything() {
    local code=$? pid round
    trap - EXIT INT TERM HUP
    for pid in $(jobs -pr); do kill "$pid" 2>/dev/null || true; done
    # One that is just being spawned shows up in a later round.
    for round in 1 2 3 4 5; do
        for pid in $(our_servers); do
            if ((round < 3)); then kill "$pid"; else kill -KILL "$pid"; fi 2>/dev/null || true
        done
        [[ -n $(our_servers) ]] || break
        sleep 0.3
    done
    wait 2>/dev/null || true
    if ((code != 0)) && compgen -G "$scratch/*.log" >/dev/null; then
        printf 'the last lines of the logs:\n' >&2
        tail -n 20 "$scratch"/*.log >&2 || true
    fi
    rm -rf "$scratch"
    exit "$code"
}

# job COMMAND...: in the background until the end of the script; its pid is in $job
job() {
    "$@" &
    job=$!
}

# until_true SECONDS WHAT COMMAND...: waits for it
until_true() {
    local tries=$(($1 * 50)) what=$2
    shift 2
    until "$@"; do
        ((tries-- > 0)) || die "$what"
        sleep 0.02
    done
}

# field NAME JSON: its first value
field() {
    local pattern="\"$1\": ?\"?([^]\",}]*)"
    [[ $2 =~ $pattern ]] || die "no \`$1\` in: $2"
    printf '%s' "${BASH_REMATCH[1]}"
}

# serve NAME PROGRAM ARGUMENTS...: starts a server on a port of the kernel's choice. Sets $pid_file and $address; what it
# writes is in $scratch/NAME.log
serve() {
    local name=$1
    shift
    pid_file="$scratch/$name.pid"
    rm -f "$pid_file"
    RUST_LOG=${RUST_LOG:-warn} job "$@" --listen 127.0.0.1:0 --pid-file "$pid_file" >"$scratch/$name.log" 2>&1 </dev/null
    until_true 30 "$name did not start" started "$job" "$pid_file"
    address=$(field address "$("$handover" status --pid-file "$pid_file" --json)")
}

started() {
    kill -0 "$1" 2>/dev/null || die "the server ended at once"
    [[ -s $2 ]]
}

# The generations of the server that are still draining.
draining() {
    local text
    text=$("$handover" status --pid-file "$pid_file" --json)
    text=${text#*\"draining\":[} text=${text%%]*}
    grep -o '"pid"' <<<"$text" | wc -l
}

may_upgrade() {
    (($(draining) < 4))
}

# upgrade [options]: once not too many older generations drain. Sets $upgraded to what the command wrote, a JSON object a
# line, $server to the new pid and $committed to the milliseconds from the trigger to the commit.
upgrade() {
    until_true 120 "too many older generations drain" may_upgrade
    upgraded=$("$handover" upgrade --pid-file "$pid_file" --json "$@") || die "the upgrade failed: $upgraded"
    server=$(field pid "${upgraded##*\"event\":\"result\"}")
    [[ $upgraded =~ \"stage\":\"committed\",\"at_ms\":([0-9.]+) ]]
    committed=${BASH_REMATCH[1]}
}

# median: of the numbers on standard input; quantile Q likewise
quantile() {
    sort -g | awk -v q="$1" '{ v[NR] = $1 } END { i = q * (NR - 1) + 1; l = int(i);
        if (NR) print v[l] + (i - l) * (v[l < NR ? l + 1 : l] - v[l]) }'
}

median() {
    quantile 0.5
}
