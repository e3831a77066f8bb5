#!/bin/sh
# nginx in the foreground, on sockets that it is given in its own way (NGINX), with a configuration of this generation.
set -eu
directory=$1/nginx.$HANDOVER_GENERATION.$HANDOVER_WORKER
mkdir -p "$directory"
cat >"$directory/nginx.conf" <<CONF
worker_processes 2;
pid $directory/pid;
error_log stderr warn;
events { worker_connections 256; }
http {
    access_log off;
    # So that a kept connection ends only when nginx does.
    keepalive_requests 1000000000;
    client_body_temp_path $directory/body;
    proxy_temp_path $directory/proxy;
    fastcgi_temp_path $directory/fastcgi;
    uwsgi_temp_path $directory/uwsgi;
    scgi_temp_path $directory/scgi;
    server {
        listen ${SERVER_STARTER_PORT%=*};
        location / { return 200 "gen=$HANDOVER_GENERATION pid=\$pid"; }
    }
}
CONF
NGINX='3;' exec nginx -e stderr -p "$directory" -c "$directory/nginx.conf" -g 'daemon off;'
