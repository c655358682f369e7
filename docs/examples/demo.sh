#!/bin/sh
# A demonstration on this machine (make demo): a daemon, an operator that goes down for ten seconds and comes back, and
# game servers with 200 made-up players. At the end each side judges what it saw of the other. On a terminal the script
# then waits, so that you can look around in the console. Ctrl-C ends it sooner, with a report of what was seen so far.
#   LMDAEMON=command  DEMO=directory  PLAYERS=200  DURATION=30s  DOWN=10s  LATE=1s (how late an end may be)
#   PORT, API_PORT and OPERATOR_PORT, 18080 to 18082
set -eu
lmdaemon=${LMDAEMON:-lmdaemon} demo=${DEMO:-build/demo} port=${PORT:-18080}
api=${API_PORT:-18081} operator=${OPERATOR_PORT:-18082}
rm -rf "$demo" && mkdir -p "$demo"
cat >"$demo/config.toml" <<EOF
[server]
listen = "127.0.0.1:$port"
[api]
listen = "127.0.0.1:$api"
[sessions]
restart_grace = "0s"
[operators.casino]
provider_id = "luckymonaco"
notify = true
url = "http://127.0.0.1:$operator/V4/SessionExpired"
allow_private_network = true
schedule = ["1s", "2s", "4s", "4s", "4s", "4s", "4s", "4s"]
concurrency = 16
EOF

children=
trap 'kill $children 2>/dev/null || :; wait' EXIT
trap 'exit 1' TERM
broken=0
interrupted=no
trap 'interrupted=yes broken=1' INT # Ctrl-C also reaches all child processes; each ends by itself and reports
$lmdaemon simulate operator --listen "127.0.0.1:$operator" --script "count 100: down ${DOWN:-10s}; 2%: status 503" \
    --schedule 1s,2s,4s,4s,4s,4s,4s,4s --journal "$demo/journal.jsonl" >"$demo/operator.txt" 2>&1 &
children=$!
operator_pid=$!
$lmdaemon --config "$demo/config.toml" serve >"$demo/daemon.log" 2>&1 &
children="$children $!"
until $lmdaemon --config "$demo/config.toml" status >/dev/null 2>&1; do
    [ $interrupted = no ] || exit 1
    kill -0 $! 2>/dev/null || { cat "$demo/daemon.log" >&2; exit 1; }
    sleep 0.2
done

cat <<EOF
Open the console: http://127.0.0.1:$api/console/
  First all is well. At its hundredth notice the operator "casino" goes down for ${DOWN:-10s}: its deliveries wait, the breaker opens,
  and the overview says since when and when it is tried next. When it is back, everything that waited arrives.
The daemon: http://127.0.0.1:$api/health and /metrics; its log: $demo/daemon.log
The operator, live: http://127.0.0.1:$operator/ and tail -f $demo/operator.txt

== The game servers (lmdaemon simulate provider casino)
EOF
$lmdaemon --config "$demo/config.toml" simulate provider casino --players "${PLAYERS:-200}" --duration "${DURATION:-30s}" \
    --play 8s --heartbeat 1s --idle 3s --late "${LATE:-1s}" || broken=1
if [ $interrupted = no ]; then
    echo
    echo "== The daemon (lmdaemon status)"
    $lmdaemon --config "$demo/config.toml" status || broken=1
    echo
    echo "A warning with massExpired=casino comes from the end of this demonstration: all players left at the same time."
fi
if [ -t 0 ] && [ $interrupted = no ]; then
    echo
    printf 'Look around in the console as long as you like; Enter ends it. '
    read -r _ || :
fi
[ $interrupted = yes ] || kill -TERM $operator_pid
wait $operator_pid || broken=1
echo
echo "== The operator (lmdaemon simulate operator)"
grep -B1 -E "down|up again" "$demo/operator.txt" | head -5 || :
tail -3 "$demo/operator.txt"
exit $broken
