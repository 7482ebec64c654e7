#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes this machine a node: what the agent needs, the agent, the join. The server hands it out at
# /meshclient/files/install.sh, with the agent's hash in it; the line that `netmaker-lite key add` prints fetches it, compares
# its own hash and runs it. usage() has the options, docs/install.md the why.
#
# For dash and BusyBox' ash, with no other tool than OpenWrt has by itself.
set -eu

AGENT_SHA256=
LOOK_SHA256=

NM_SERVER=${NM_SERVER:-}
# For tests.
NM_OPENWRT=${NM_OPENWRT:-/etc/openwrt_release}
NM_OSTREE=${NM_OSTREE:-/run/ostree-booted}
NM_SBIN=${NM_SBIN:-/usr/sbin:/sbin}

# What is missing is installed: for each family of systems, what is needed and the packages that have it.
PACKAGES='debian python3 python3
debian wg wireguard-tools
debian ip iproute2
debian wireguard wireguard-go
openwrt python3 python3-light python3-openssl
openwrt wg wireguard-tools
openwrt ip ip-tiny
openwrt wireguard kmod-wireguard
entware python3 python3-light python3-openssl
entware wg wireguard-tools
entware ip ip-full
entware wireguard wireguard-go
alpine python3 python3
alpine wg wireguard-tools-wg
alpine ip iproute2
alpine wireguard wireguard-go
redhat python3 python3
redhat wg wireguard-tools
redhat ip iproute
suse python3 python3
suse wg wireguard-tools
suse ip iproute2
arch python3 python
arch wg wireguard-tools
arch ip iproute2'
# Kilobytes on flash or disk that Python takes there, and all the rest.
ROOM='debian 65536 4096
openwrt 8192 1024
entware 8192 1024
alpine 49152 4096
redhat 65536 4096
suse 65536 4096
arch 65536 4096'

HOME_OF_AGENT=${NETCLIENT_ROOT:-}/etc/netclient

family=none
manager=none
dry=no
installed=
scratch=

usage() {
	cat <<'END'
install.sh: makes this machine a node of a netmaker-lite network

    KEY=TOKEN NM_SERVER=http://HOST:8081 sh install.sh [--dry-run] [FLAGS OF JOIN…]
    sh install.sh --uninstall [--dry-run]

It installs what is missing (Python, wg, ip, WireGuard) with apt, opkg, apk, dnf, yum, rpm-ostree, zypper or pacman, fetches
netclient_lite.py and netclient-look from the server, compares their SHA-256 and runs the agent's join. Again on a joined machine
it updates the agent and the settings.

    KEY, NM_TOKEN, -t TOKEN   the access token; -t shows it to whoever lists the processes
    NM_SERVER                 the server's address; by itself the first one in the token
    --dry-run                 print the commands, change nothing
    --uninstall               leave all networks and remove the agent; packages stay
    everything else           goes to `netclient_lite.py join`: --name, --daemon, --port …
END
}

say() {
	printf 'install: %s\n' "$*" >&2
}

die() {
	say "$*"
	exit 1
}

have() {
	command -v "$1" >/dev/null 2>&1
}

run() { # COMMAND…: what changes the machine goes through here
	if [ $dry = yes ]; then
		printf '%s\n' "$*"
	else
		"$@"
	fi
}

quietly() { # COMMAND…: what it says is shown only if it fails
	if [ $dry = yes ]; then
		run "$@"
	elif ! "$@" >"$scratch/said" 2>&1; then
		cat "$scratch/said" >&2
		return 1
	fi
}

# --- the machine -----------------------------------------------------------------------------------------------------

find_platform() { # another family: a case here, its rows in PACKAGES and ROOM, its MANAGER_add
	if [ -f "$NM_OPENWRT" ]; then
		family=openwrt
		if have apk; then manager=apk; else manager=opkg; fi
	elif have apt-get; then
		family=debian manager=apt
	elif [ -f "$NM_OSTREE" ] && have rpm-ostree; then
		family=redhat manager=ostree
	elif have dnf; then
		family=redhat manager=dnf
	elif have yum; then
		family=redhat manager=yum
	elif have zypper; then
		family=suse manager=zypper
	elif have pacman; then
		family=arch manager=pacman
	elif have apk; then
		family=alpine manager=apk
	elif have opkg; then
		family=entware manager=opkg
	fi
}

dnf_add() {
	quietly dnf -q -y install "$@"
}

yum_add() {
	quietly yum -q -y install "$@"
}

ostree_add() { # into the running system too
	quietly rpm-ostree install -y --idempotent --apply-live "$@"
}

zypper_add() {
	quietly zypper -n -q install --no-recommends "$@"
}

pacman_add() {
	quietly pacman -S --noconfirm --needed "$@"
}

apt_add() { # without recommended packages, of which wireguard-tools has a whole kernel
	quietly apt-get -q update || say "apt-get update failed: going on with the package lists that are here"
	quietly env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 install "$@"
}

opkg_add() {
	quietly opkg update || say "opkg update failed: going on with the package lists that are here"
	quietly opkg install "$@"
}

apk_add() {
	quietly apk update || say "apk update failed: going on with the package lists that are here"
	quietly apk add "$@"
}

has_python3() { # the modules that OpenWrt and Debian have in packages of their own, too
	python3 -c 'import sys, argparse, ipaddress, json, ssl, subprocess
sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1
}

has_wg() {
	have wg
}

has_ip() {
	have ip
}

has_wireguard() { # asked by making a link: the module loads by itself, and only this tells for sure
	if [ -n "${WG_QUICK_USERSPACE_IMPLEMENTATION:-}" ] || have wireguard-go || have boringtun-cli || have boringtun; then
		return 0
	elif [ $dry = yes ]; then
		modinfo wireguard >/dev/null 2>&1
	else
		ip link add dev "nm-probe$$" type wireguard >/dev/null 2>&1 && ip link del dev "nm-probe$$"
	fi
}

packages_for() { # NEED…: prints their packages
	local system need names wanted
	for wanted; do
		printf '%s\n' "$PACKAGES" | while read -r system need names; do
			if [ "$system $need" = "$family $wanted" ]; then printf '%s ' "$names"; fi
		done
	done
}

missing() { # NEED…: prints those that are not here
	local need
	for need; do
		"has_$need" || printf '%s ' "$need"
	done
}

by_hand() {
	printf '%s' "Python 3.8 or newer with ssl, wg (wireguard-tools), ip (iproute2 or BusyBox)," \
		" and WireGuard in the kernel or wireguard-go"
}

need_room() { # NEED…: before anything is written
	local system python rest wanted available
	wanted=1024
	while read -r system python rest; do
		[ "$system" = $family ] || continue
		case " $* " in *' python3 '*) wanted=$((wanted + python)) ;; esac
		if [ $# -gt 0 ]; then wanted=$((wanted + rest)); fi
	done <<END
$ROOM
END
	available=$(available_on "${NETCLIENT_ROOT:-/}")
	case $available in
	'' | *[!0-9]*) ;; # a df that answers otherwise: what does not fit fails by itself
	*)
		[ "$available" -ge $wanted ] ||
			die "only $available KB are free on / and $wanted are needed: make room, or extend the flash by USB (extroot)"
		;;
	esac
}

available_on() { # PATH: prints its free kilobytes
	# shellcheck disable=SC2046 # df's columns
	set -- $(df -k "$1" 2>/dev/null | tail -n 1)
	while [ $# -gt 3 ]; do shift; done # from the right: a long device name breaks the line
	printf '%s' "${1:-}"
}

provide() { # NEED…: installs what they need and checks that it came
	local packages left
	[ $# -gt 0 ] || return 0
	packages=$(packages_for "$@")
	[ -n "$packages" ] || [ $dry = no ] || return 0 # only making a link would tell whether it is missing
	[ -n "$packages" ] || die "no package for this system is known that brings ${*}: this system needs $(by_hand)"
	[ $dry = yes ] || say "installing ${packages% }"
	# shellcheck disable=SC2086 # one word per package
	if ! "${manager}_add" $packages; then
		left=$(missing "$@")
		die "$manager could not install ${packages% } (missing: ${left% }): its message above tells why; then run this again"
	fi
	[ $dry = no ] || return 0
	installed="$installed ${packages% }"
	left=$(missing "$@")
	[ -z "$left" ] || die "${packages% } came, but ${left% } is still missing or too old: this system needs $(by_hand)"
}

# --- the agent -------------------------------------------------------------------------------------------------------

sha256_of() { # FILE
	if have sha256sum; then
		sha256sum <"$1" | cut -d ' ' -f 1
	else
		python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
	fi
}

fetch_with() { # TOOL URL FILE
	local trust=''
	case $2 in https:*) trust=--no-check-certificate ;; esac # the hash proves the file, with or without a certificate
	case $1 in
	uclient-fetch) run uclient-fetch -q -T 20 $trust -O "$3" "$2" ;;
	curl) run curl -fgksSL -m 120 -o "$3" "$2" ;;
	wget)
		case $(wget --version 2>&1) in GNU*) trust="$trust -T 20 -t 1" ;; esac # it would try for hours; BusyBox' may not have -T
		# shellcheck disable=SC2086 # one word per option
		run wget -q $trust -O "$3" "$2"
		;;
	python3) run python3 -c 'import ssl, sys, urllib.request
with urllib.request.urlopen(sys.argv[1], timeout=20, context=ssl._create_unverified_context()) as answer:
    open(sys.argv[2], "wb").write(answer.read())' "$2" "$3" ;;
	esac
}

fetch() { # URL FILE: with whatever is there, and with the next where one fails
	local tool tried='' said
	for tool in uclient-fetch curl wget python3; do
		have $tool || continue
		if [ $dry = yes ]; then
			fetch_with $tool "$1" "$2"
			return
		fi
		fetch_with $tool "$1" "$2" 2>"$scratch/said" && return
		tried=$tool
	done
	[ -n "$tried" ] || die "there is no uclient-fetch, curl, wget or python3 here: install one of them"
	said=$(tail -n 1 "$scratch/said")
	die "cannot fetch $1 ($tried${said:+: $said}): is the server up, and reachable from this machine?"
}

fetch_checked() { # FILE SHA256: what the server has under that name
	local url="$NM_SERVER/meshclient/files/${1##*/}"
	have sha256sum || have python3 ||
		die "sha256sum is missing, without which the agent cannot be checked: install coreutils or BusyBox"
	fetch "$url" "$1"
	if [ $dry = yes ]; then
		printf '%s\n' "sha256sum $1    must be $2"
	elif [ "$(sha256_of "$1")" != "$2" ]; then
		case $(head -c 2 "$1") in
		'#!')
			die "$url is another file than this script was made for: the server was updated," \
				"or somebody changes it on the way; ask for a new line"
			;;
		*) die "$url answered with something that is no agent: does a captive portal or a proxy stand between?" ;;
		esac
	fi
}

bin_folder() { # prints where a program is found by cron and init systems
	if [ $family = entware ]; then printf '%s' /opt/bin; else printf '%s' "${NETCLIENT_ROOT:-}/usr/bin"; fi
}

install_look() { # FILE: a check-in without Python, for `netclient-lite cron on`
	local folder
	folder=$(bin_folder)
	if ! { run mkdir -p "$folder" && run cp "$1" "$folder/.netclient-look" && run chmod 755 "$folder/.netclient-look" &&
		run mv "$folder/.netclient-look" "$folder/netclient-look"; }; then
		say "netclient-look could not be put into $folder: check-ins start Python then"
	fi
}

server_of() { # TOKEN: prints the first server that it names, where there is a base64
	printf '%s' "$1" | tr -- '-_' '+/' | base64 -d 2>/dev/null | sed -n 's/.*"server":\["\([^"]*\)".*/\1/p'
}

# --- install and uninstall -------------------------------------------------------------------------------------------

need_root() {
	[ $dry = yes ] || [ "$(id -u)" -eq 0 ] ||
		die "this sets up WireGuard, so it must be root: become it (sudo -i, su -), then run the same line again"
}

need_token() { # TOKEN FLAGS…
	case $1 in
	'')
		case " $* " in
		*apiserver*) ;; # a join without a key, which the administrator approves
		*) die "there is no access token: KEY=TOKEN sh install.sh, with a token of netmaker-lite key add NETWORK" ;;
		esac
		;;
	*[!A-Za-z0-9+/=_-]*) die "the access token is damaged: copy the whole line again, with nothing around it" ;;
	esac
}

need_server() { # TOKEN
	[ -n "$NM_SERVER" ] || NM_SERVER=$(server_of "$1") || :
	NM_SERVER=${NM_SERVER%/}
	case $NM_SERVER in
	http://?* | https://?*) ;;
	*) die "the server's address is not known here: give it as NM_SERVER=http://HOST:8081" ;;
	esac
}

shown() { # FLAGS…: prints them, without the secrets among them
	local word secret=no
	for word; do
		if [ $secret = yes ]; then word=…; fi
		secret=no
		case $word in
		-k | -key | --key | -priv*key | --priv*key) secret=yes ;;
		-k=* | -key=* | --key=* | -priv*key=* | --priv*key=*) word=${word%%=*}=… ;;
		esac
		printf ' %s' "$word"
	done
}

make_scratch() { # private, and gone at the end whatever happens
	scratch=${TMPDIR:-/tmp}/netmaker-lite-install
	[ $dry = no ] || return 0
	scratch=$(mktemp -d "$scratch.XXXXXX") || die "no temporary folder can be made: is ${TMPDIR:-/tmp} full or read-only?"
	trap 'rm -rf "$scratch"' EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
}

install() { # TOKEN FLAGS OF JOIN…
	local token="$1" needs agent result=0
	[ -n "$AGENT_SHA256" ] ||
		die "this copy has no hash of the agent: take the server's, from http://HOST:8081/meshclient/files/install.sh"
	need_token "$@"
	need_root
	need_server "$token"
	shift
	make_scratch
	find_platform
	needs=$(missing python3 wg ip)
	if [ -n "$needs" ] && [ $family = none ]; then
		die "no package manager that I know is here (apt, dnf, yum, zypper, pacman, apk, opkg), and missing: ${needs% }." \
			"Install by hand $(by_hand); then run this again"
	fi
	# shellcheck disable=SC2086 # one word per need
	need_room $needs
	agent=$scratch/netclient_lite.py
	fetch_checked "$agent" "$AGENT_SHA256"
	[ -z "$LOOK_SHA256" ] || fetch_checked "$scratch/netclient-look" "$LOOK_SHA256"
	# shellcheck disable=SC2086
	provide $needs
	if [ $family != none ]; then
		# shellcheck disable=SC2046
		provide $(missing wireguard)
	fi
	if [ $dry = yes ]; then
		printf '%s\n' "NETCLIENT_ACCESSTOKEN=… python3 $agent join$(shown "$@")"
		return
	fi
	NETCLIENT_ACCESSTOKEN=$token python3 "$agent" join "$@" || result=$?
	if [ $result -ne 0 ]; then
		die "the join failed, for the reason above${installed:+; the packages stay, for another try:$installed}"
	fi
	[ -z "$LOOK_SHA256" ] || install_look "$scratch/netclient-look"
	say "done: $HOME_OF_AGENT/netclient status shows the peers; the same line with --uninstall takes all away again"
}

uninstall() {
	local launcher="$HOME_OF_AGENT/netclient" file
	need_root
	if ! grep -q netclient-lite "$launcher" 2>/dev/null; then
		say "no netclient-lite is installed in $HOME_OF_AGENT: nothing to do"
		return
	fi
	run "$launcher" uninstall || die "the agent could not leave its networks: see above; files of it stay"
	find_platform
	file=$(bin_folder)/netclient-look
	! grep -q 'A check-in without starting Python' "$file" 2>/dev/null || run rm -f "$file"
	[ $dry = yes ] || [ ! -d "$HOME_OF_AGENT" ] || say "$HOME_OF_AGENT stays: it holds files that are not the agent's"
}

main() {
	local token="${KEY:-${NM_TOKEN:-${NETCLIENT_ACCESSTOKEN:-}}}" verb=install count=$#
	unset KEY NM_TOKEN NETCLIENT_ACCESSTOKEN # not for apt and its children
	while [ "$count" -gt 0 ]; do
		case $1 in
		-h | --help) usage && exit ;;
		--dry-run) dry=yes ;;
		--uninstall) verb=uninstall ;;
		-t | --token | -token)
			[ "$count" -gt 1 ] || die "$1 needs the token after it"
			token=$2
			shift
			count=$((count - 1))
			;;
		-t=* | --token=* | -token=*) token=${1#*=} ;;
		*) set -- "$@" "$1" ;;
		esac
		shift
		count=$((count - 1))
	done
	PATH=$PATH:$NM_SBIN # `su` without a dash leaves it out, and dpkg needs it
	case $verb in
	install) install "$token" "$@" ;;
	uninstall) uninstall ;;
	esac
}

{ main "$@"; } # the braces, so that a download cut off after `main` is no command either
