#!/bin/sh
# Python's own file server, as anybody would start it; its files name the generation.
set -eu
mkdir -p "$1/files.$HANDOVER_GENERATION"
echo "gen=$HANDOVER_GENERATION pid=$$" >"$1/files.$HANDOVER_GENERATION/index.html"
exec python3 -m http.server "$2" --directory "$1/files.$HANDOVER_GENERATION"
