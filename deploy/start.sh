#!/bin/sh
# Starts the server with what a provider sets: PORT, and ours: WEIGHTS, BLOCK, NAME, SERVE_KEY, SERVE_HOST, STORE.
# More options stand after the image's name. SERVE_KEY is read by the server, and is no argument that `ps` would show.
set -eu
: "${SERVE_KEY:?set SERVE_KEY to a long random text: clients send it as Authorization: Bearer, or as X-Auth-Token}"
set -- --host "${SERVE_HOST:-0.0.0.0}" --port "${PORT:-8080}" --token-env SERVE_KEY --name "${NAME:-model}" "$@"
[ -z "${WEIGHTS:-}" ] || set -- --weights "$WEIGHTS" "$@"
[ -z "${BLOCK:-}" ] || set -- --block "$BLOCK" "$@"
[ -n "${WEIGHTS:-}" ] || set -- --allow-upload --store "${STORE:-/srv/store}" "$@"
exec apt-model serve "$@"
