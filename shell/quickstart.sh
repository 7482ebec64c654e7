#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# From nothing to a mesh of one: the server, the network `default`, this machine as its first node, and the line that
# joins the next machine.
#
#   sudo sh shell/quickstart.sh           set up, or print a fresh line: every run withdraws the key of the run before
#   sudo sh shell/quickstart.sh --stop    end the server; the mesh goes on without it
#   sudo sh shell/quickstart.sh --demo    two homes and a public server on this machine alone; all gone at the end
#
# It runs on Debian and its kin, installs what is missing, and may be run again at any time, also after an interruption.
# The line goes to stdout, everything else to stderr.
#
# Settings, from the environment:
#   NM_HOST     the name or address by which other machines reach this one (SERVER_HOST; else the default route's address)
#   NM_PORT     the server's port (API_PORT; 8081)
#   NM_RANGE    the network's addresses (the first free of a few private ranges)
#   NM_DATA     the server's folder (/var/lib/netmaker-lite)
#   NM_VENV     where the programs go (/opt/netmaker-lite)
#   NM_USER     whom the server runs as (netmaker-lite)
#   NM_PYTHON   the Python to use (/usr/bin/python3)
set -eu
umask 022

NM_HOST=${NM_HOST:-${SERVER_HOST:-}}
NM_PORT=${NM_PORT:-${API_PORT:-}}
NM_RANGE=${NM_RANGE:-}
NM_DATA=${NM_DATA:-/var/lib/netmaker-lite}
NM_VENV=${NM_VENV:-/opt/netmaker-lite}
NM_USER=${NM_USER:-netmaker-lite}
NM_PYTHON=${NM_PYTHON:-}
# For tests.
NM_BIN=${NM_BIN:-/usr/local/bin}
NM_RUN=${NM_RUN:-/run}
NM_LOG=${NM_LOG:-/var/log}
NM_UNITS=${NM_UNITS:-/etc/systemd/system}

NETWORK=default
KEY=quickstart
RANGES='10.20.30.0/24 10.101.0.0/24 10.213.64.0/24 172.29.101.0/24 192.168.213.0/24'
SERVER=netmaker-lite
DAEMON=netclient-lite
lists_fresh=no
updated=no

say() {
	printf '%s\n' "$*" >&2
}

die() {
	say "quickstart: $*"
	exit 1
}

usage() {
	sed -n 's/^# \{0,1\}//; 3,/^set -eu/p' "$0" | sed '$d'
}

have() {
	command -v "$1" >/dev/null 2>&1
}

quietly() { # COMMAND…: what it says is shown only if it fails
	local said
	said=$(DEBIAN_FRONTEND=noninteractive "$@" 2>&1) && return
	say "$said"
	return 1
}

# --- checks that change nothing --------------------------------------------------------------------------------------

need_root() {
	[ "$(id -u)" -eq 0 ] || die "this sets up interfaces, so it must be root: run sudo sh shell/quickstart.sh${*:+ $*}"
}

need_checkout() {
	local file
	for file in netmaker_lite.py netmaker_core.py netmaker_admin.py netclient_lite.py setup.cfg requirements/server.txt; do
		[ -f "$here/$file" ] || die "$here/$file is missing: run this from a complete copy of the project"
	done
}

only_one() { # the lock is held as long as this process lives; what it leaves running closes it
	exec 9>"$NM_RUN/$SERVER.quickstart.lock"
	have flock && ! flock -n 9 || return 0
	say "another quickstart is running: waiting until it has ended"
	flock -w 300 9 || die "the other quickstart still runs after 5 minutes: end it, then run this again"
}

choose_python() { # the system's first: the server's user can run it, root's own Pythons it cannot
	local python
	for python in ${NM_PYTHON:+"$NM_PYTHON"} /usr/bin/python3 python3; do
		if have "$python" && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))'; then
			NM_PYTHON=$python
			return
		fi
	done
	die "no Python >= 3.8 found: install it (apt-get install python3) or name one with NM_PYTHON"
}

remembered() { # NAME: a setting of the last start
	sed -n "s/^$1=\([A-Za-z0-9.:_-]*\)\$/\1/p" "$NM_DATA/quickstart" 2>/dev/null | head -n 1
}

settings() { # those given now, else those of the last start: a second run must not move the server
	NM_PORT=${NM_PORT:-$(remembered port)}
	NM_PORT=${NM_PORT:-8081}
	NM_HOST=${NM_HOST:-$(remembered host)}
	case $NM_PORT in
	*[!0-9]* | ??????*) die "NM_PORT=$NM_PORT is no port number: choose one from 1024 to 65535" ;;
	esac
	if [ "$NM_PORT" -lt 1024 ] || [ "$NM_PORT" -gt 65535 ]; then
		die "NM_PORT=$NM_PORT cannot be used, the server does not run as root: choose a port from 1024 to 65535"
	fi
	case $NM_HOST in
	*[!A-Za-z0-9.:_-]*) die "NM_HOST=$NM_HOST is no host name or address: give it without scheme, port or path" ;;
	esac
	case $NM_DATA$NM_VENV in
	*[!A-Za-z0-9/._-]*) die "NM_DATA and NM_VENV take letters, digits and / . _ - only: choose plain paths" ;;
	esac
	case $NM_DATA:$NM_VENV in
	/*:/*) ;;
	*) die "NM_DATA and NM_VENV must be absolute paths: put the folder's full path" ;;
	esac
	case $NM_USER in
	'' | [!a-z_]* | *[!a-z0-9_-]*) die "NM_USER=$NM_USER is no user name: use small letters, digits, - and _" ;;
	esac
	if [ -n "$NM_RANGE" ]; then
		"$NM_PYTHON" -I -c 'import ipaddress, sys; ipaddress.IPv4Network(sys.argv[1])' "$NM_RANGE" 2>/dev/null ||
			die "NM_RANGE=$NM_RANGE is no range of addresses: write it like 10.20.30.0/24"
	fi
}

need_range() { # before anything is installed; where the network is there already, it stays as it is
	if [ -n "$NM_RANGE" ] && ! [ -e "$NM_DATA/netmaker.db" ] && have ip; then
		free_range "$NM_RANGE" >/dev/null || die "NM_RANGE=$NM_RANGE overlaps a route of this machine: choose another"
	fi
}

need_port() { # free, or served by ours already
	[ "$(server_setting port)" != "$NM_PORT" ] || return 0
	"$NM_PYTHON" -I -c 'import socket, sys
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("", int(sys.argv[1])))' "$NM_PORT" 2>/dev/null ||
		die "port $NM_PORT is in use by another program: end that one, or choose another port with NM_PORT"
}

# --- packages --------------------------------------------------------------------------------------------------------

apt_install() { # PACKAGE…: without recommended packages, of which wireguard-tools has a whole kernel
	have apt-get || die "missing here: $*; there is no apt, so install it by this system's own means, then run this again"
	say "installing $*"
	if [ $lists_fresh = no ]; then
		quietly dpkg --configure -a || die "dpkg cannot finish what was interrupted before: see its message above"
		quietly apt-get -q update || say "going on with the package lists that are here"
		lists_fresh=yes
	fi
	quietly apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 "$@" ||
		die "apt could not install $*: see its message above, then run this again"
}

need_packages() { # COMMAND PACKAGE …: installs those whose command is missing
	local missing=''
	"$NM_PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing=python3-venv
	while [ $# -gt 0 ]; do
		have "$1" || missing="$missing $2"
		shift 2
	done
	# shellcheck disable=SC2086 # one word per package
	[ -z "$missing" ] || apt_install $missing
}

kernel_wireguard() {
	ip link add "nm-probe$$" type wireguard 2>/dev/null && ip link delete "nm-probe$$"
}

need_wireguard() { # in the kernel, else in userspace
	kernel_wireguard && return
	if ! have wireguard-go && ! have boringtun-cli; then
		apt_install wireguard-go
	fi
	[ -c /dev/net/tun ] ||
		die "this kernel has neither WireGuard nor /dev/net/tun: load a module (modprobe wireguard, or modprobe tun)"
}

# --- programs --------------------------------------------------------------------------------------------------------

packages_stamp() {
	"$NM_PYTHON" -c 'import sys; print(sys.version)'
	cksum <"$here/requirements/server.txt"
}

project_stamp() {
	(cd "$here" && cksum netmaker_lite.py netmaker_core.py netmaker_admin.py netclient_lite.py setup.cfg pyproject.toml shell/*)
}

content() { # FILE: prints it, or nothing
	cat "$1" 2>/dev/null || :
}

install_packages() { # the pinned ones, into a virtual environment of their own
	[ "$(packages_stamp)" = "$(content "$NM_VENV/.packages")" ] && return
	if [ -d "$NM_VENV" ] && ! [ -f "$NM_VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$NM_VENV")" ]; then
		die "$NM_VENV is there and is no virtual environment: move it away, or choose another folder with NM_VENV"
	fi
	say "making $NM_VENV"
	"$NM_PYTHON" -m venv --clear "$NM_VENV" >&2 ||
		die "$NM_VENV could not be made: see the message above, then run this again"
	"$NM_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes \
		-r "$here/requirements/server.txt" >&2 ||
		die "the packages could not be installed: see pip's message above, check the network, then run this again"
	packages_stamp >"$NM_VENV/.packages"
}

install_project() { # from a copy, so that building leaves nothing in the checkout
	[ "$(project_stamp)" = "$(content "$NM_VENV/.project")" ] && return
	say "installing netmaker-lite"
	updated=yes
	copy=$(mktemp -d)
	trap 'rm -rf "$copy"' EXIT
	tar -C "$here" --exclude=./.git --exclude='./.venv*' --exclude=./build --exclude='./*.egg-info' -cf - . |
		tar -C "$copy" -xf -
	"$NM_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
		--force-reinstall "$copy" >&2 ||
		die "netmaker-lite could not be installed into $NM_VENV: see pip's message above, then run this again"
	rm -rf "$copy"
}

link_program() { # NAME PROGRAM
	if [ -e "$NM_BIN/$1" ] && ! [ -L "$NM_BIN/$1" ]; then
		die "$NM_BIN/$1 is there and not from here: move it away, then run this again"
	fi
	ln -sf "$NM_VENV/bin/$2" "$NM_BIN/$1"
}

link_programs() {
	mkdir -p "$NM_BIN"
	link_program netmaker-lite netmaker-lite
	link_program netclient-lite netclient-lite
	link_program netclient_lite.py netclient-lite
}

# --- processes: systemd where it runs, else in the background with a pid file ------------------------------------------

has_systemd() {
	[ -d "$NM_RUN/systemd/system" ]
}

pid_of() { # NAME WORD: prints the number in the pid file if that process lives and is what the word says
	local pid=''
	read -r pid 2>/dev/null <"$NM_RUN/$1.pid" || :
	case $pid in '' | *[!0-9]*) return 1 ;; esac
	tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q -e "$1.* $2" && echo "$pid"
}

start_process() { # NAME COMMAND…: in the background, in a session of its own, with a log and a pid file
	local name="$1" pid
	shift
	( # writes its own number before it becomes the command: killed at any point, this leaves nothing unknown running
		cd /
		read -r pid _ </proc/self/stat
		echo "$pid" >"$NM_RUN/$name.pid"
		"$@"
	) </dev/null >>"$NM_LOG/$name.log" 2>&1 9>&- &
}

end_process() { # NAME WORD: kindly first
	local pid tries=0
	pid=$(pid_of "$1" "$2") || return 0
	say "ending $1 $2"
	kill "$pid" 2>/dev/null || :
	while pid_of "$1" "$2" >/dev/null; do
		tries=$((tries + 1))
		[ $tries -ne 50 ] || kill -KILL "$pid" 2>/dev/null || :
		[ $tries -lt 100 ] || die "process $pid does not end: see $NM_LOG/$1.log"
		sleep 0.2
	done
	rm -f "$NM_RUN/$1.pid"
}

# --- the server ------------------------------------------------------------------------------------------------------

become() { # COMMAND…: goes on as the server's user, so call it in a subshell
	exec setpriv --reuid="$NM_USER" --regid="$NM_USER" --init-groups --no-new-privs \
		env HOME="$NM_DATA" NETMAKER_DATA="$NM_DATA" "$@"
}

as_server() {
	(cd / && become "$@")
}

admin() { # ARGUMENTS…: the server's own command line
	as_server "$NM_VENV/bin/netmaker-lite" "$@"
}

need_user() {
	id "$NM_USER" >/dev/null 2>&1 && return
	useradd --system --user-group --home-dir "$NM_DATA" --no-create-home --shell /usr/sbin/nologin "$NM_USER" ||
		die "the user $NM_USER could not be made: see the message above, or name one that exists with NM_USER"
}

need_data() { # private, and the server's own
	if ! [ -d "$NM_DATA" ] || [ -z "$(ls -A "$NM_DATA")" ]; then
		install -d -m 0700 -o "$NM_USER" -g "$(id -g "$NM_USER")" "$NM_DATA" ||
			die "$NM_DATA could not be made: see the message above, or choose another folder with NM_DATA"
	fi
	as_server test -w "$NM_DATA" ||
		die "$NM_DATA is not $NM_USER's: run chown -R $NM_USER: $NM_DATA, or choose another folder with NM_DATA"
	as_server "$NM_VENV/bin/python" -c '' ||
		die "$NM_USER cannot run $NM_VENV/bin/python: choose NM_VENV and NM_PYTHON outside of private folders"
}

remember() { # as the server's user: its folder is no place for root to write
	# shellcheck disable=SC2016 # for the inner shell
	printf 'port=%s\nhost=%s\n' "$NM_PORT" "$NM_HOST" |
		as_server sh -c 'umask 077; cat >"$1.new" && mv "$1.new" "$1"' sh "$NM_DATA/quickstart"
}

server_pid() {
	local pid
	if has_systemd; then
		pid=$(systemctl show --property=MainPID --value "$SERVER" 2>/dev/null) && [ "${pid:-0}" != 0 ] && echo "$pid"
	else
		pid_of "$SERVER" serve
	fi
}

server_setting() { # port|host: what the running server was started with
	local pid
	pid=$(server_pid) || return 0
	case $1 in
	port) tr '\0' '\n' <"/proc/$pid/cmdline" | sed -n '/^--port$/{n;p;}' ;;
	host) tr '\0' '\n' <"/proc/$pid/environ" | sed -n 's/^SERVER_HOST=//p' ;;
	esac
}

unit() {
	cat <<-END
		# Written by shell/quickstart.sh of netmaker-lite; own changes belong in a drop-in: systemctl edit $SERVER
		[Unit]
		Description=netmaker-lite server
		Wants=network-online.target
		After=network-online.target

		[Service]
		User=$NM_USER
		Environment=NETMAKER_DATA=$NM_DATA
		${NM_HOST:+Environment=SERVER_HOST=$NM_HOST}
		ExecStart=$NM_VENV/bin/netmaker-lite serve --port $NM_PORT
		Restart=on-failure
		RestartSec=2
		UMask=0077
		CapabilityBoundingSet=
		NoNewPrivileges=yes
		PrivateDevices=yes
		PrivateTmp=yes
		ProtectHome=read-only
		ProtectSystem=strict
		ReadWritePaths=$NM_DATA

		[Install]
		WantedBy=multi-user.target
	END
}

start_with_systemd() {
	unit >"$NM_UNITS/$SERVER.service"
	systemctl daemon-reload && systemctl enable --quiet "$SERVER" && systemctl restart "$SERVER"
}

start_server() { # unless it runs as it should
	if [ $updated = no ] && [ "$(server_setting port):$(server_setting host)" = "$NM_PORT:$NM_HOST" ]; then
		return
	fi
	has_systemd || end_process "$SERVER" serve
	say "starting the server on port $NM_PORT"
	if has_systemd; then
		start_with_systemd || die "systemd could not start the server: see journalctl -u $SERVER"
	else
		start_process "$SERVER" become ${NM_HOST:+"SERVER_HOST=$NM_HOST"} \
			setsid "$NM_VENV/bin/netmaker-lite" serve --port "$NM_PORT"
	fi
}

healthy() {
	"$NM_VENV/bin/python" -I -c 'import http.client, sys
c = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=2)
c.request("GET", "/api/health")
sys.exit(c.getresponse().status != 200)' "$NM_PORT" 2>/dev/null
}

wait_for_server() {
	local tries=0 log="$NM_LOG/$SERVER.log"
	has_systemd && log="journalctl -u $SERVER"
	until healthy; do
		tries=$((tries + 1))
		if [ $tries -ge 5 ] && ! server_pid >/dev/null; then
			has_systemd || tail -n 3 "$log" >&2
			die "the server ended again: see $log, then run this again"
		fi
		[ $tries -lt 100 ] || die "the server does not answer at port $NM_PORT: see $log, then run this again"
		sleep 0.3
	done
	project_stamp >"$NM_VENV/.project" # only now: a run that was interrupted before this installs and starts again
}

stop_server() {
	if ! server_pid >/dev/null && ! [ -f "$NM_UNITS/$SERVER.service" ]; then
		say "no server of the quickstart runs here"
		return
	fi
	if has_systemd && [ -f "$NM_UNITS/$SERVER.service" ]; then
		systemctl disable --quiet --now "$SERVER" || die "systemd could not stop the server: see journalctl -u $SERVER"
	fi
	end_process "$SERVER" serve
	end_process "$DAEMON" daemon
	say "the server is stopped; this machine's tunnels stay (netclient-lite leave -n $NETWORK takes them down)"
}

# --- the network, its first node, and the line for the next -----------------------------------------------------------

free_range() { # prints the first of the ranges given that overlaps no route of this machine
	ip -4 route show table all | "$NM_PYTHON" -I -c 'import ipaddress, sys
routes = []
for line in sys.stdin:
    for word in line.split()[:2]:
        try:
            routes.append(ipaddress.IPv4Network(word))
        except ValueError:
            pass
for wish in map(ipaddress.IPv4Network, sys.argv[1:]):
    if not any(r.prefixlen >= 8 and r.overlaps(wish) for r in routes):
        print(wish)
        break
else:
    sys.exit(1)' "$@"
}

need_network() {
	local range
	admin network show "$NETWORK" >/dev/null 2>&1 && return
	# shellcheck disable=SC2086 # one word per range
	range=$(free_range ${NM_RANGE:-$RANGES}) ||
		die "${NM_RANGE:-every range that this script knows} overlaps a route of this machine: choose another NM_RANGE"
	say "creating the network $NETWORK, $range"
	admin network add "$NETWORK" --range "$range" >&2 || die "the network $NETWORK could not be created: see above"
}

fresh_token() { # KEY EXPIRY: prints a token for one join; a key of that name from before is withdrawn
	local key
	admin key remove "$NETWORK" "$1" >/dev/null 2>&1 || : # there may be none
	key=$(admin key add "$NETWORK" --name "$1" --uses 1 --expires "$2" --json) ||
		die "no key for $NETWORK could be made: see the message above"
	printf '%s\n' "$key" |
		"$NM_VENV/bin/python" -I -c 'import json, sys; print(json.load(sys.stdin)["accessstring"])'
}

servers() { # prints those that the token coming in names
	"$NM_VENV/bin/python" -I -c 'import base64, json, sys
token = sys.stdin.read()
print(" or ".join(json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))["server"]))'
}

agent() {
	"$NM_VENV/bin/netclient-lite" "$@" 9>&-
}

joined() {
	agent list --json | "$NM_VENV/bin/python" -I -c 'import json, sys
sys.exit(sys.argv[1] not in [node["network"] for node in json.load(sys.stdin)])' "$NETWORK"
}

need_node() { # `netmaker`, which the agent makes of this machine by what the server's folder says
	if joined; then
		agent checkin -n "$NETWORK" >&2 ||
			die "this machine's check-in to $NETWORK fails: see above; where its server is gone for good, run" \
				"netclient-lite leave -n $NETWORK and then this again"
	else
		say "joining this machine"
		agent checkin --server-data "$NM_DATA" >&2 || die "this machine could not join: see the message above, then run this again"
		joined || die "this machine is not to be in $NETWORK: see CLIENT_MODE in $NM_DATA/netmaker.env"
	fi
}

daemon_unit() {
	cat <<-END
		# Written by shell/quickstart.sh of netmaker-lite; own changes belong in a drop-in: systemctl edit $DAEMON
		[Unit]
		Description=netclient-lite: this host in the networks of its server
		After=$SERVER.service network-online.target

		[Service]
		ExecStart=$NM_VENV/bin/netclient-lite daemon --server-data $NM_DATA
		Restart=always
		RestartSec=5
		# a userspace WireGuard, our child, outlives the daemon
		KillMode=process

		[Install]
		WantedBy=multi-user.target
	END
}

start_daemon() { # with systemd
	daemon_unit >"$NM_UNITS/$DAEMON.service"
	systemctl daemon-reload && systemctl enable --quiet "$DAEMON" && systemctl restart "$DAEMON"
}

need_daemon() {
	if has_systemd; then
		start_daemon || die "systemd could not start the agent: see journalctl -u $DAEMON"
		return
	fi
	[ $updated = no ] || end_process "$DAEMON" daemon
	pid_of "$DAEMON" daemon >/dev/null && return
	start_process "$DAEMON" exec setsid "$NM_VENV/bin/netclient-lite" daemon --server-data "$NM_DATA"
	say "systemd does not run here: after a restart of this machine, run this again"
}

next_line() {
	local token
	token=$(fresh_token "$KEY" 24h)
	say "Other machines must reach this server at $(printf '%s' "$token" | servers) (NM_HOST sets the name or address; behind a" \
		"NAT: the public one, with TCP port $NM_PORT and this node's UDP port forwarded)."
	say "To join one, as root, beside a copy of netclient_lite.py there (good once, for 24 hours):"
	echo "python3 netclient_lite.py join -t $token"
}

# --- the three things this does ---------------------------------------------------------------------------------------

set_up() {
	settings
	need_port
	need_range
	need_packages wg wireguard-tools ip iproute2 setpriv util-linux
	need_wireguard
	install_packages
	install_project
	need_user
	need_data
	link_programs
	remember
	start_server
	wait_for_server
	need_network
	need_node
	need_daemon
	next_line
}

demo() {
	[ -f "$here/tests/demo.py" ] || die "$here/tests/demo.py is missing: run this from a complete copy of the project"
	need_packages wg wireguard-tools ip iproute2 wireguard-go wireguard-go nft nftables ping iputils-ping conntrack conntrack
	install_packages
	install_project
	server_pid >/dev/null || project_stamp >"$NM_VENV/.project"
	PYTHONDONTWRITEBYTECODE=1 exec "$NM_VENV/bin/python" "$here/tests/demo.py" 9>&-
}

main() {
	local action="${1:-set_up}"
	case $action in
	-h | --help) usage && exit ;;
	set_up | --stop | --demo) ;;
	*)
		say "quickstart: no option named $1 (see --help)"
		exit 2
		;;
	esac
	here=$(cd "$(dirname "$0")/.." && pwd)
	PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
	need_root "$@"
	need_checkout
	only_one
	choose_python
	case $action in
	set_up) set_up ;;
	--stop) stop_server ;;
	--demo) demo ;;
	esac
}

main "$@"
