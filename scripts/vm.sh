#!/usr/bin/env bash
# Runs in virtual machines what this machine does not allow: another processor, very many fds, and a clock that is set.
#
# Usage: scripts/vm.sh [--test FILTER]... [--connections N] [PART...]
#
#   --test FILTER     of the parts `aarch64` and `x86-64`: only these tests, as `cargo test` takes it
#   --connections N   of the part `idle` [100000]
#
#   aarch64   on such a processor, emulated: ten upgrades under load of a program that is intercepted, the unit tests, and the
#             tests with real processes
#   x86-64    the same on such a processor: what fails only above may be slowness
#   idle      scripts/idle.sh with more fds than this machine may have
#   clock     upgrades under load while the time of day is set a day ahead and a year back, several times a second
#
# Without a PART all but `x86-64`. Each machine has Debian's kernel, and of Debian's programs what the tests need; neither is
# installed here. What runs in it is linked statically (rustup target add aarch64-unknown-linux-musl x86_64-unknown-linux-musl).
# An emulated processor has a tenth of the speed or less, so tests that allow half a second, or load that leaves nothing of it, fail
# there. x86-64 is emulated as well where /dev/kvm boots nothing.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

release_of_debian=bookworm
userland=(linux-image-ARCHITECTURE kmod busybox-static bash coreutils dash diffutils findutils grep hostname login mawk mount
    ncurses-base base-files base-passwd passwd procps python3 sed util-linux)
# In the order in which they need each other, by what depmod says.
modules=(virtio_pci 9p 9pnet_virtio overlay)

inside='' parts=() filters=() connections=100000
while (($#)); do
    case $1 in
        --inside) inside=$2 && shift 2 ;;
        --test) filters+=("${2:?}") && shift 2 ;;
        --connections) number "$1" "${2:-}" && connections=$2 && shift 2 ;;
        -h | --help) help ;;
        aarch64 | x86-64 | idle | clock) parts+=("$1") && shift ;;
        *) misused "unknown argument \`$1\`" ;;
    esac
done
((${#parts[@]})) || parts=(aarch64 idle clock)

# --- in the machine

run_tests() {
    local binary failed=0
    ulimit -n 20000
    while read -r binary; do
        printf '%s\n' "${binary##*/}"
        # The model checker is pure, and the faults are timed; neither is of any use here.
        "$binary" --test-threads "$TEST_THREADS" --skip model:: --skip faults:: "${filters[@]}" 2>&1 || failed=1
    done </run/vm/tests
    return "$failed"
}

# serve_intercepted ADDRESS: a program that binds its own socket, and knows nothing of us
serve_intercepted() {
    address=$1 pid_file="$scratch/plain.pid"
    job "$handover" exec --pid-file "$pid_file" -- "$examples/plain" epoll "$address" >"$scratch/plain.log" 2>&1
    until_true 60 'the program did not start' started "$job" "$pid_file"
    until_true 60 'it does not serve' serves "${address%:*}" "${address##*:}"
}

upgrades_of_a_plain_program() {
    local load n report="$scratch/oracle.json"
    serve_intercepted 127.0.0.1:8080
    job "$examples/oracle" --target "$address" --new 2 --kept 2 --slow 1:1 --json >"$report"
    load=$job
    for ((n = 1; n <= 10; n++)); do
        upgrade --ready-timeout 60s
        printf 'upgrade %d of an intercepted program: committed after %s ms\n' "$n" "$committed"
    done
    kill -TERM "$load"
    wait "$load" || die "requests were lost: $(<"$report")"
    printf '10 upgrades of an intercepted program, %s requests, %s failed\n' \
        "$(field requests "$(<"$report")")" "$(field failed "$(<"$report")")"
}

serves() {
    (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null
}

inside_processor() {
    local failed=0
    scratch
    (upgrades_of_a_plain_program) || failed=1
    run_tests || failed=1
    return "$failed"
}

inside_idle() {
    sysctl -qw fs.nr_open=2000000 fs.file-max=4000000 net.core.somaxconn=65535 net.ipv4.tcp_max_syn_backlog=65535 \
        'net.ipv4.ip_local_port_range=1024 65535'
    scripts/idle.sh --connections "$IDLE_CONNECTIONS" --seconds 1200
}

# now_ms: by the clock that nobody sets
now_ms() {
    awk '{ printf "%d", $1 * 1000 }' /proc/uptime
}

# Sets the time of day by turns a day ahead of what it was and a year behind, for as long as it lives.
jump_about() {
    local at_first=$1 turn=0 days
    while sleep 0.3; do
        if ((turn++ % 2)); then days=-365; else days=1; fi
        date --set "@$((at_first + days * 86400))" >/dev/null
        printf '%d\n' "$turn" >"$scratch/jumps"
    done
}

# takes WHAT FROM TO COMMAND...: it ends with $wanted, after so many milliseconds
takes() {
    local what=$1 from=$2 to=$3 begun took code=0
    shift 3
    begun=$(now_ms)
    "$@" >"$scratch/taken" 2>&1 || code=$?
    took=$(($(now_ms) - begun))
    printf '%s: %d ms, exit code %d\n' "$what" "$took" "$code"
    ((code == wanted)) || die "$what: exit code $code and not $wanted: $(<"$scratch/taken")"
    ((took >= from && took <= to)) || die "$what: $took ms, which is not within $from and $to"
}

# at STAGE JSON: when it was reached
at() {
    [[ $2 =~ \"stage\":\"$1\",\"at_ms\":([0-9]+) ]] || die "no stage \`$1\` in: $2"
    printf '%s' "${BASH_REMATCH[1]}"
}

# upgrades_while_the_clock_jumps NAME ADDRESS BEGIN_OF_TRIAL HANGING: of the server with $pid_file
upgrades_while_the_clock_jumps() {
    local name=$1 host=${2%:*} port=${2##*:} trial_since=$3 hanging=$4 load n trial since jumps report="$scratch/oracle.json"
    job "$examples/oracle" --target "$2" --new 1 --kept 1 --slow 1:2 --json >"$report"
    load=$job
    for n in 1 2 3; do
        upgrade --ready-timeout 60s --trial 3s --wait drained
        trial=$(($(at healthy "$upgraded") - $(at "$trial_since" "$upgraded")))
        printf '%s, upgrade %d: committed after %s ms, a trial of %d ms\n' "$name" "$n" "$committed" "$trial"
        ((trial >= 2900 && trial <= 12000)) || die "$name: the trial of 3 s took $trial ms"
    done
    wanted=1 takes "$name, ready timeout of 3 s" 3000 15000 \
        "$handover" upgrade --pid-file "$pid_file" --env "$hanging" --ready-timeout 3s
    kill -TERM "$load"
    wait "$load" || die "$name: requests were lost: $(<"$report")"
    exec 9<>"/dev/tcp/$host/$port"
    printf 'GET /slow/600 HTTP/1.1\r\nHost: clock\r\n\r\n' >&9
    sleep 1
    wanted=5 takes "$name, drain timeout of 3 s" 3000 25000 "$handover" upgrade --pid-file "$pid_file" \
        --ready-timeout 60s --trial 0s --drain-timeout 3s --wait drained
    exec 9>&-
    # Of a process that has begun a year later, too.
    "$handover" status --pid-file "$pid_file" || die "$name: no status"
    "$handover" ps || die "$name: no list"
    since=$(field since_unix_ms "$("$handover" status --pid-file "$pid_file" --json)")
    ((since / 1000 >= begun_at - 366 * 86400 && since / 1000 <= begun_at + 2 * 86400)) || die "$name: since $since"
    ! grep -i panicked "$scratch"/*.log || die "$name: a panic"
    jumps=$(<"$scratch/jumps")
    ((jumps > 20)) || die "the clock was set $jumps times only"
    printf '%s: %s requests, %s failed; the clock was set %d times so far\n' "$name" \
        "$(field requests "$(<"$report")")" "$(field failed "$(<"$report")")" "$jumps"
}

inside_clock() {
    local begun_at wanted
    scratch
    begun_at=$(date +%s)
    job jump_about "$begun_at"
    serve_intercepted 127.0.0.1:8081
    upgrades_while_the_clock_jumps exec "$address" ready PLAIN=hang
    serve fixture "$examples/fixture"
    upgrades_while_the_clock_jumps library "$address" committed FIXTURE_FAULT=hang-after-adopted
}

if [[ -n $inside ]]; then
    mapfile -t filters </run/vm/filters
    handover="$HANDOVER_BUILT/handover" examples="$HANDOVER_BUILT/examples"
    printf 'in %s\n' "$(uname -srm)"
    "inside_$inside"
    exit
fi

# --- on this machine

# The commands that are needed, and the package of each.
needs=(mmdebstrap:mmdebstrap cpio:cpio modprobe:kmod qemu-system-x86_64:qemu-system-x86 qemu-system-aarch64:qemu-system-arm)

install_missing() {
    local need packages=()
    for need in "${needs[@]}"; do
        command -v "${need%:*}" >/dev/null || packages+=("${need#*:}")
    done
    ((${#packages[@]})) || return 0
    printf 'Installing %s\n' "${packages[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null ||
        die "apt install ${packages[*]}"
}

# debian ARCHITECTURE: unpacked into $root, once; nothing of it is run here
debian() {
    root="$work/$1"
    if [[ ! -e $root.complete ]]; then
        rm -rf "$root"
        local include="${userland[*]}"
        mmdebstrap --quiet --variant=extract --architectures="$1" --aptopt='APT::Install-Recommends "false"' \
            --include="${include//ARCHITECTURE/$1}" "$release_of_debian" "$root" >/dev/null
        cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
        cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
        ln -s mawk "$root/usr/bin/awk"
        touch "$root.complete"
    fi
    kernels=("$root"/lib/modules/*)
    kernel=${kernels[0]##*/}
    depmod -b "$root" "$kernel"
}

# The first program in the machine: finds the file systems of this one, and starts the script again.
init() {
    cat <<INIT
#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /lower /over /new
/bin/busybox --install -s /bin
mount -t proc none /proc && mount -t sysfs none /sys && mount -t devtmpfs none /dev
stty -onlcr
for module in $*; do insmod /modules/\$module; done
options=trans=virtio,version=9p2000.L,msize=262144
mount -t 9p -o ro,cache=loose,\$options root /lower
mount -t tmpfs none /over && mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/lower,upperdir=/over/upper,workdir=/over/work none /new
for name in proc sys dev; do mkdir -p /new/\$name && mount --move /\$name /new/\$name; done
mkdir -p /new/dev/pts /new/dev/shm /new/tmp
mount -t devpts none /new/dev/pts
for directory in dev/shm tmp run; do mount -t tmpfs -o mode=1777 none /new/\$directory; done
chmod 755 /new/run
mount -t cgroup2 none /new/sys/fs/cgroup
ln -s /proc/self/fd /new/dev/fd
mkdir -p /new/run/vm /new$PWD /new$target
mount -t 9p -o cache=none,\$options shared /new/run/vm
mount -t 9p -o ro,cache=loose,\$options repository /new$PWD
mount -t 9p -o ro,cache=loose,\$options target /new$target
ip link set lo up
exec switch_root /new /bin/sh /run/vm/run
INIT
}

# A /dev/kvm inside another virtual machine may boot nothing. Here the kernel ends by finding no file system.
kvm_works() {
    timeout --kill-after=5 30 qemu-system-x86_64 -M q35 -cpu host -accel kvm -m 512M -nodefaults -display none -no-reboot \
        -kernel "$root/boot/vmlinuz-$kernel" -append panic=-1 </dev/null >/dev/null 2>&1
}

# machine ARCHITECTURE PART SECONDS MEMORY: boots it, runs the part in it, and fails if that does
machine() {
    local architecture=$1 part=$2 seconds=$3 memory=$4 guest shared file names=() qemu
    debian "$architecture"
    guest=$(mktemp -d "$scratch/guest.XXXXXX") shared=$(mktemp -d "$scratch/shared.XXXXXX")
    mkdir -p "$guest/bin" "$guest/modules"
    cp "$root/bin/busybox" "$guest/bin"
    for file in $(for module in "${modules[@]}"; do
        modprobe --dirname "$root" --set-version "$kernel" --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'); do
        cp "$file" "$guest/modules"
        names+=("${file##*/}")
    done
    init "${names[@]}" >"$guest/init"
    chmod 755 "$guest/init"
    (cd "$guest" && find . | cpio --quiet -o -H newc) >"$shared/initramfs"
    case $architecture in
        # One processor: of two that are emulated on a busy machine one was seen to stand still for 20 s. Signatures of pointers are
        # slow as they are by default.
        arm64) qemu=(qemu-system-aarch64 -M virt -cpu "max,pauth-impdef=on" -accel "tcg,thread=multi") console=ttyAMA0 threads=1 ;;
        amd64)
            console=ttyS0 threads=2
            if kvm_works; then
                qemu=(qemu-system-x86_64 -M q35 -cpu host -accel kvm)
            else
                printf '%s\n' 'no /dev/kvm that boots: the processor is emulated'
                qemu=(qemu-system-x86_64 -M pc -cpu qemu64 -accel "tcg,thread=multi")
            fi
            ;;
    esac
    printf '%s\n' "${filters[@]}" >"$shared/filters"
    printf '%s\n' "${tests[@]}" >"$shared/tests"
    cat >"$shared/run" <<RUN
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb
export HANDOVER_BUILT=$built TEST_THREADS=$threads IDLE_CONNECTIONS=$connections
cd $PWD
setsid scripts/vm.sh --inside $part </dev/null
echo \$? >/run/vm/status
busybox poweroff -f
RUN
    for name in root:"$root":on repository:"$PWD":on target:"$target":on shared:"$shared":off; do
        IFS=: read -r tag path readonly <<<"$name"
        qemu+=(-virtfs "local,path=$path,mount_tag=$tag,security_model=none,readonly=$readonly,multidevs=remap")
    done
    job timeout --kill-after=10 "$seconds" "${qemu[@]}" -smp "$threads" -m "$memory" -nodefaults -display none -no-reboot \
        -chardev stdio,id=console,signal=off -serial chardev:console -kernel "$root/boot/vmlinuz-$kernel" \
        -initrd "$shared/initramfs" -append "console=$console quiet panic=-1 rdinit=/init" </dev/null
    wait "$job" || die "the machine ended with status $?; the limit is $seconds s"
    [[ -s $shared/status ]] || die 'the machine has ended before the test'
    [[ $(<"$shared/status") == 0 ]] || die "$part: failed"
}

# built_for TARGET: the programs and the tests, linked statically with what Rust brings
built_for() {
    local variable=${1//-/_}
    variable=CARGO_TARGET_${variable^^}
    export "${variable}_LINKER=rust-lld" "${variable}_RUSTFLAGS=-C link-self-contained=yes"
    rustc --print target-libdir --target "$1" | { read -r directory && [[ -d $directory ]]; } ||
        die "Rust cannot build for it: rustup target add $1"
}

# programs_for TARGET: with what only the tests have
programs_for() {
    built_for "$1"
    export CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_TEST_DEBUG=0
    cargo build --quiet --all-features --bins --examples --target "$1"
    built="$target/$1/debug"
}

tests_for() {
    programs_for "$1"
    mapfile -t tests < <(cargo test --quiet --no-run --all-features --lib --bins --test it --target "$1" \
        --message-format json | sed -n '/"test":true}/s/.*"executable":"\([^"]*\)".*/\1/p')
    ((${#tests[@]})) || die 'there are no tests'
}

run() {
    tests=()
    case $1 in
        aarch64)
            tests_for aarch64-unknown-linux-musl
            machine arm64 processor 10800 3G
            ;;
        x86-64)
            tests_for x86_64-unknown-linux-musl
            machine amd64 processor 10800 3G
            ;;
        clock)
            programs_for aarch64-unknown-linux-musl
            machine arm64 clock 1200 2G
            ;;
        idle)
            built_for x86_64-unknown-linux-musl
            cargo build --quiet --release --features axum --bins --examples --target x86_64-unknown-linux-musl
            built="$target/x86_64-unknown-linux-musl/release"
            machine amd64 idle 3600 6G
            ;;
    esac
}

install_missing
target=$(target_directory)
work="$target/vm"
mkdir -p "$work"
scratch
for part in "${parts[@]}"; do
    begun=$SECONDS
    printf '\n%s--- %s%s\n' "$bold" "$part" "$plain"
    run "$part"
    printf '%s--- %s: %d s%s\n' "$bold" "$part" $((SECONDS - begun)) "$plain"
done
