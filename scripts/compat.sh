#!/usr/bin/env bash
# Builds an earlier version from its tag, and lets it and this one hand over to each other, with a load that counts what is
# lost; and fail, roll back and take over in both directions.
#
# Usage: scripts/compat.sh [--from REVISION] [TEST...]
#
#   --from REVISION   the earlier version [the newest tag v* before this commit]
#
# What it has built stays in Cargo's target directory. Needs the history of the repository: `git fetch --unshallow --tags`.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

# As long as nothing is released: the oldest that this script can start and stop.
first=60caf3d

revision='' tests=()
while (($#)); do
    case $1 in
        --from) revision=${2:-} && shift 2 ;;
        -h | --help) help ;;
        -*) misused "unknown argument \`$1\`" ;;
        *) tests+=("compat::$1") && shift ;;
    esac
done
((${#tests[@]})) || tests=(compat::)
[[ -n $revision ]] || revision=$(git describe --tags --abbrev=0 --match 'v*' HEAD~ 2>/dev/null) || revision=$first
commit=$(git rev-parse --verify --quiet "$revision^{commit}") ||
    die "this clone has no \`$revision\`: git fetch --unshallow --tags"

target=$(target_directory)
earlier="$target/compat/$commit"
if [[ ! -x $earlier/examples/fixture ]]; then
    source=$(mktemp -d "${TMPDIR:-/tmp}/handover-compat.XXXXXX")
    trap 'rm -rf "$source"' EXIT
    # Not a worktree: that would be written down in the repository.
    git archive "$commit" | tar -x -C "$source"
    printf 'Building %s\n' "$(git log -1 --format='%h %s' "$commit")"
    # What comes of it stands apart; the dependencies that are the same are built once (Cargo 1.91 and later).
    CARGO_BUILD_BUILD_DIR="$target" CARGO_TARGET_DIR="$target/compat/target" cargo build --quiet --all-features --bins --example fixture \
        --manifest-path "$source/Cargo.toml"
    mkdir -p "$earlier/examples"
    cp "$target/compat/target/debug/handover" "$earlier/"
    cp "$target/compat/target/debug/examples/fixture" "$earlier/examples/"
fi

cargo build --quiet --all-features --examples --bins
printf 'With %s\n' "$(git log -1 --format='%h %s' "$commit")"
HANDOVER_EARLIER=$(realpath "$earlier") cargo test --quiet --all-features --test it -- --ignored "${tests[@]}"
