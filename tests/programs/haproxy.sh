#!/bin/sh
# HAProxy in the foreground, answering by itself, with a configuration of this generation.
set -eu
file=$1/haproxy.$HANDOVER_GENERATION.$HANDOVER_WORKER.cfg
cat >"$file" <<CONF
global
    maxconn 256
defaults
    mode http
    timeout client 60s
    timeout connect 5s
    timeout server 60s
frontend http
    bind fd@3
    http-request return status 200 content-type text/plain lf-string "gen=$HANDOVER_GENERATION pid=%pid"
CONF
exec haproxy -db -f "$file"
