#!/bin/sh
# nginx with the configuration that Debian ships, but for paths and ports: DIRECTORY PORT|unix:PATH [nginx's arguments]. The
# configuration is the same in each generation; only its prefix, where the files are, is another.
set -eu
directory=$1 listen=$2
shift 2
prefix=$directory/nginx.$HANDOVER_GENERATION
mkdir -p "$prefix/html" "$directory/logs"
ln -sfn /usr/lib/nginx/modules "$prefix/modules"
# Its workers run as www-data.
chmod 755 "$directory"
echo "gen=$HANDOVER_GENERATION pid=$$" >"$prefix/html/index.html"
if [ ! -e "$directory/nginx.conf" ]; then
    # The default site listens on IPv4 and IPv6, or on one path.
    case $listen in
        unix:*) v6='/listen \[::\]/d' ;;
        *) v6="s,listen \[::\]:80,listen [::]:$listen," ;;
    esac
    sed -e "$v6" -e "s,listen 80,listen $listen," -e 's,root /var/www/html,root html,' \
        /etc/nginx/sites-available/default >"$directory/site"
    sed -e "s,/run/,$directory/," -e "s,/var/log/nginx/,$directory/logs/," \
        -e "s,/etc/nginx/sites-enabled/\*,$directory/site," /etc/nginx/nginx.conf >"$directory/nginx.conf"
fi
exec nginx -p "$prefix" -c "$directory/nginx.conf" -g 'daemon off;' "$@"
