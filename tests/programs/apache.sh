#!/bin/sh
# Apache httpd, preforking: apache.sh DIRECTORY PORT. Its two generations would share the pid file, so each has its own.
set -e
modules=/usr/lib/apache2/modules
# Its processes run as nobody.
chmod 711 "$1"
# The generation before may just be running it.
[ -e "$1/identity" ] || cat > "$1/identity" <<'END'
#!/bin/sh
body="gen=$HANDOVER_GENERATION pid=$PPID"
printf 'Content-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s' "${#body}" "$body"
END
chmod 755 "$1/identity"
cat > "$1/apache.conf" <<END
ServerRoot $1
ServerName localhost
DefaultRuntimeDir $1
PidFile $1/pid-\${HANDOVER_GENERATION}
ErrorLog $1/error.log
Listen 127.0.0.1:$2
LoadModule mpm_prefork_module $modules/mod_mpm_prefork.so
LoadModule authz_core_module $modules/mod_authz_core.so
LoadModule alias_module $modules/mod_alias.so
LoadModule env_module $modules/mod_env.so
LoadModule cgi_module $modules/mod_cgi.so
User nobody
Group nogroup
PassEnv HANDOVER_GENERATION
ScriptAliasMatch ^ $1/identity
END
exec apache2 -f "$1/apache.conf" -DFOREGROUND
