#!/usr/bin/env bash
# Installs the `handover` command from this clone, with its man pages and its completions for bash, zsh and fish.
#
# Usage: scripts/install.sh [--prefix DIR] [--root DIR] [--uninstall]
#
#   --prefix DIR   where to: DIR/bin, DIR/share/man, …; by default /usr/local for root and ~/.local for others
#   --root DIR     put all of it below DIR, for packagers: DIR/PREFIX/bin, …
#   --uninstall    remove what was installed with the same --prefix and --root
#
# Needs Rust and a C linker, and nothing else.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

if ((EUID == 0)); then prefix=/usr/local; else prefix=$HOME/.local; fi
root='' uninstall=''
while (($#)); do
    case $1 in
        -h | --help) help ;;
        --prefix | --root)
            [[ -n ${2:-} ]] || misused "$1 wants a directory"
            [[ $2 == /* ]] || misused "$1 wants an absolute path, not \`$2\`"
            if [[ $1 == --prefix ]]; then prefix=$2; else root=$2; fi
            shift 2
            ;;
        --uninstall)
            uninstall=1
            shift
            ;;
        *) misused "unknown option \`$1\`" ;;
    esac
done

base="$root${prefix%/}"
man="$base/share/man/man1"
bash_completions="$base/share/bash-completion/completions"
zsh_completions="$base/share/zsh/site-functions"
fish_completions="$base/share/fish/vendor_completions.d"

if [[ -n $uninstall ]]; then
    rm -f "$base/bin/handover" "$man"/handover.1 "$man"/handover-*.1 "$bash_completions/handover" \
        "$zsh_completions/_handover" "$fish_completions/handover.fish"
    printf 'Removed handover from %s\n' "$base"
    exit 0
fi

command -v cargo >/dev/null ||
    die "Rust is missing: see https://rustup.rs (and run \`. ~/.cargo/env\` afterwards)"
work=$(mktemp -d "${TMPDIR:-/tmp}/handover-install.XXXXXX")
trap 'rm -rf "$work"' EXIT

# In a directory of its own, so that Cargo's list of what it has installed stays out of the prefix. What the tests have
# built is good enough for a test of this script: HANDOVER_BINARY.
binary=${HANDOVER_BINARY:-}
if [[ -z $binary ]]; then
    cargo install --quiet --locked --path . --bin handover --root "$work" --target-dir "$(target_directory)" --no-track
    binary="$work/bin/handover"
fi
"$binary" generate man "$work/man"
"$binary" generate completions "$work/completions"

# `install` makes a new file, so a command that runs is not disturbed.
install -D -m 755 "$binary" "$base/bin/handover"
install -d "$man"
install -m 644 "$work"/man/*.1 "$man"
install -D -m 644 "$work/completions/handover.bash" "$bash_completions/handover"
install -D -m 644 "$work/completions/_handover" "$zsh_completions/_handover"
install -D -m 644 "$work/completions/handover.fish" "$fish_completions/handover.fish"

printf 'Installed %s, man handover, and completions for bash, zsh and fish\n' "$base/bin/handover"
if [[ -z $root && ":$PATH:" != *":$base/bin:"* ]]; then
    printf '%s is not in PATH yet: add it in your shell'\''s profile\n' "$base/bin"
fi
