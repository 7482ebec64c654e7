#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# All tests of netmaker-lite, with everything that they need.
#
#   sh shell/test.sh [--fast] [STEP…] [-- PYTEST ARGUMENTS]
#
#   lint      ruff check and ruff format --check
#   types     mypy --strict
#   shell     shellcheck on every shell script
#   tests     pytest, with the lab's real WireGuard where this is root
#   pythons   the agent's tests on every CPython >= 3.8 found here, the server's on the oldest and the newest of them
#   venv      only make the virtual environment with the pinned packages
#
# No STEP: the first five. --fast leaves out the lab and the other Pythons. On Debian and as root, missing packages are
# installed by apt; without root it runs what needs none and says what it left out. The exit status is 0 when all passed.
#
# Settings: NM_TEST_VENV (.venv), NM_TEST_PYTHON (the system's python3), PYENV_ROOT (~/.pyenv), NM_TEST_WORKERS (how many tests run
# at once: two for each core, 4 at least; 0: one after the other); for longer tests NM_SECONDS (how long the many clients go on: 8)
# and NM_EVERY=yes (kill -9 at every step of a key refresh, not at every other).
set -eu

NM_TEST_VENV=${NM_TEST_VENV:-.venv}
NM_TEST_PYTHON=${NM_TEST_PYTHON:-}
NM_TEST_WORKERS=${NM_TEST_WORKERS:-}
PYENV_ROOT=${PYENV_ROOT:-${HOME:-/root}/.pyenv}

# A command that the tests use, and the Debian package that has it.
TOOLS='wg wireguard-tools
wireguard-go wireguard-go
nft nftables
iptables iptables
ip iproute2
ping iputils-ping
conntrack conntrack
busybox busybox-static
dnsmasq dnsmasq-base
dbus-daemon dbus-daemon
valgrind valgrind
zbarimg zbar-tools
curl curl
qemu-system-x86_64 qemu-system-x86
systemd-analyze systemd
make make'

# Packages that would take over this machine's resolver, or its kernel, or exclude one of TOOLS (a BusyBox that asks the PATH before
# its own applets): they are unpacked beside the virtual environment's programs, and run by tests alone.
PARTS='systemd-resolved openresolv resolvconf linux-image-cloud-amd64 busybox runit'
COREDNS=github.com/coredns/coredns@v1.11.3

fast=no
passed=
failed=
left_out=

say() {
	printf '%s\n' "$*" >&2
}

die() {
	say "test.sh: $*"
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

leave_out() { # WHAT: names it in the closing line
	left_out="${left_out:+$left_out; }$*"
}

check() { # NAME COMMAND…: runs it, goes on after a failure, remembers both
	local name="$1"
	shift
	say "== $name"
	if "$@"; then
		passed="${passed:+$passed, }$name"
	else
		failed="${failed:+$failed, }$name"
	fi
}

# --- what the tests need ---------------------------------------------------------------------------------------------

can_install() {
	[ "$(id -u)" -eq 0 ] && have apt-get
}

apt_install() { # PACKAGE…: without recommended packages, of which wireguard-tools has a whole kernel
	say "installing $*"
	quietly apt-get -q update || say "going on with the package lists that are here"
	quietly apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 "$@" ||
		die "apt could not install $*: see its message above, then run this again"
}

choose_python() { # the system's first: version managers' shims depend on who asks
	local python
	for python in ${NM_TEST_PYTHON:+"$NM_TEST_PYTHON"} /usr/bin/python3 python3; do
		if have "$python" && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))'; then
			NM_TEST_PYTHON=$python
			return
		fi
	done
	die "no Python >= 3.8 found: install python3 or name one with NM_TEST_PYTHON"
}

can_make_venv() { # PYTHON
	"$1" -c 'import ensurepip, ssl, venv' 2>/dev/null
}

need_venv() {
	can_make_venv "$NM_TEST_PYTHON" && return
	can_install && apt_install python3-venv
	can_make_venv "$NM_TEST_PYTHON" ||
		die "$NM_TEST_PYTHON cannot make virtual environments: install python3-venv (apt-get install python3-venv)"
}

missing_tools() { # prints a package per line
	local tool package
	printf '%s\n' "$TOOLS" | while read -r tool package; do
		have "$tool" || printf '%s\n' "$package"
	done
}

need_tools() {
	local missing
	missing=$(missing_tools | tr '\n' ' ')
	[ -n "$missing" ] || return 0
	# shellcheck disable=SC2086 # one word per package
	if can_install; then
		apt_install $missing
	else
		leave_out "what needs ${missing% } (not installed)"
	fi
}

kernel_of() { # PACKAGE: the one with the kernel, on which that depends
	apt-cache depends --important "$1" | sed -n '/ linux-image-[0-9]/{s/.*: //;p;q;}'
}

need_parts() { # unpacks PARTS into the virtual environment, as parts/PACKAGE
	local part package missing='' folder="$NM_TEST_VENV/parts"
	for part in $PARTS; do
		[ -d "$folder/$part" ] || missing="$missing $part"
	done
	[ -n "$missing" ] && have apt-get || return 0
	say "fetching$missing"
	quietly apt-get -q update || say "going on with the package lists that are here"
	for part in $missing; do
		mkdir -p "$folder/new"
		package=$part
		case $part in linux-image-*) package=$(kernel_of "$part") ;; esac
		if (cd "$folder/new" && quietly apt-get -q download "$package" && quietly dpkg -x "$package"_*.deb root); then
			mv "$folder/new/root" "$folder/$part"
		else
			leave_out "what needs $part (it could not be fetched)"
		fi
		rm -rf "$folder/new"
	done
}

need_coredns() { # built where Go is
	local go
	have coredns && return
	for go in go /usr/local/go/bin/go; do
		have "$go" || continue
		say "building CoreDNS"
		GOBIN=$(cd "$NM_TEST_VENV/bin" && pwd) quietly "$go" install -ldflags '-s -w' "$COREDNS" && return
	done
	leave_out "what needs CoreDNS (no Go here that builds it)"
}

lock_stamp() { # PYTHON: what a virtual environment was made from
	"$1" -c 'import sys; print(sys.version)'
	printf '%s\n' "$PWD"
	cksum <requirements/test.txt
}

make_venv() { # PYTHON FOLDER: made anew only when the lock file or the Python changed
	local python="$1" folder="$2"
	[ "$(lock_stamp "$python")" = "$(cat "$folder/.lock" 2>/dev/null)" ] && return
	if [ -d "$folder" ] && ! [ -f "$folder/pyvenv.cfg" ] && [ -n "$(ls -A "$folder")" ]; then
		die "$folder is there and is no virtual environment: remove it or set NM_TEST_VENV"
	fi
	say "making $folder"
	"$python" -m venv --clear "$folder" &&
		"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes \
			-r requirements/test.txt &&
		"$folder/bin/python" -m pip download --quiet --disable-pip-version-check --require-hashes \
			-r requirements/server.txt -d "$folder/wheels" && # for the quickstart, tested where there is no network
		lock_stamp "$python" >"$folder/.lock"
}

give_back() { # files made as root belong to whom the checkout belongs
	local owner
	[ "$(id -u)" -eq 0 ] || return 0
	owner=$(stat -c %u:%g . 2>/dev/null) || return 0
	[ "$owner" = 0:0 ] && return
	find . -user 0 \( -path './.venv*' -o -path './.*_cache*' -o -path './.hypothesis*' -o -path '*/__pycache__*' \) \
		-exec chown -h "$owner" {} +
}

# --- the steps -------------------------------------------------------------------------------------------------------

step_venv() {
	check "$NM_TEST_VENV" "$NM_TEST_VENV/bin/python" -m pip check --quiet --disable-pip-version-check
}

step_lint() {
	check "ruff check" "$NM_TEST_VENV/bin/ruff" check .
	check "ruff format" "$NM_TEST_VENV/bin/ruff" format --check --output-format concise .
}

step_types() {
	check "mypy" "$NM_TEST_VENV/bin/mypy"
}

shell_scripts() { # prints "DIALECT FILE" for every shell script, known by its first line or its name
	local file first
	find . \( -path ./.git -o -path './.venv*' -o -path ./build -o -path ./dist \) -prune -o -type f -print |
		sort | while read -r file; do
		first=
		IFS= read -r first <"$file" 2>/dev/null || :
		case $file:$first in
		*:'#!'*/rc.common | *:'#!'*busybox*) printf 'busybox %s\n' "$file" ;;
		*:'#!'*bash*) printf 'bash %s\n' "$file" ;;
		*:'#!'*[/\ ]sh | *:'#!'*[/\ ]sh\ * | *:'#!'*[/\ ]dash* | *.sh:*) printf 'dash %s\n' "$file" ;;
		esac
	done
}

shellcheck_all() {
	local dialect file result=0
	shell_scripts >"$scratch"
	while read -r dialect file; do
		"$NM_TEST_VENV/bin/shellcheck" -s "$dialect" "$file" || result=1
	done <"$scratch"
	return $result
}

step_shell() {
	check "shellcheck" shellcheck_all
}

why_no_lab() { # prints why the lab's tests cannot run here; nothing where they can
	if [ $fast = yes ]; then
		echo "--fast"
	elif [ "$(id -u)" -ne 0 ]; then
		echo "not root"
	elif ! unshare -n -m -u true 2>/dev/null; then
		echo "no network namespaces here"
	elif ! [ -c /dev/net/tun ]; then
		echo "no /dev/net/tun here"
	fi
}

workers() { # stories of the lab mostly wait
	local cores
	cores=$(nproc 2>/dev/null || echo 2)
	[ "$cores" -ge 2 ] || cores=2
	printf '%s\n' "${NM_TEST_WORKERS:-$((cores * 2))}"
}

step_tests() { # PYTEST ARGUMENTS
	local why
	why=$(why_no_lab)
	if [ -n "$why" ]; then
		leave_out "the lab's tests ($why)"
		set -- -m "not lab" "$@"
	fi
	check "pytest" "$NM_TEST_VENV/bin/python" -m pytest -n "$(workers)" --dist worksteal "$@"
}

find_pythons() { # prints "VERSION PATH" of every CPython >= 3.8, oldest first
	local python
	for python in "$PYENV_ROOT"/versions/*/bin/python3 /usr/bin/python3.[0-9] /usr/bin/python3.[0-9][0-9] \
		/usr/local/bin/python3.[0-9] /usr/local/bin/python3.[0-9][0-9] "$NM_TEST_PYTHON" python3; do
		have "$python" || continue
		"$python" -I -c 'import os, sys
if sys.implementation.name == "cpython" and sys.version_info >= (3, 8):
    print("%d.%d.%d" % sys.version_info[:3], os.path.realpath(sys.executable))' 2>/dev/null || :
	done | sort -u -t . -k 1,1n -k 2,2n -k 3,3n
}

agent_on() { # PYTHON: the agent's tests that need the standard library alone
	"$1" -I tests/agent_stdlib.py >"$scratch.out" 2>&1 && return
	cat "$scratch.out" >&2
	return 1
}

server_on() { # PYTHON FOLDER PYTEST ARGUMENTS…
	local python="$1" folder="$2"
	shift 2
	make_venv "$python" "$folder" || return 1
	env -u NM_SECONDS "$folder/bin/python" -m pytest -q -p no:cacheprovider -n "$(workers)" --dist worksteal \
		-m "not lab" "$@"
}

step_pythons() { # PYTEST ARGUMENTS
	local version python ours
	if [ $fast = yes ]; then
		leave_out "other Pythons (--fast)"
		return
	fi
	find_pythons >"$scratch"
	if [ -f tests/agent_stdlib.py ]; then
		while read -r version python; do
			check "agent on CPython $version" agent_on "$python"
		done <"$scratch"
	fi
	ours=$("$NM_TEST_VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
	sed -n '1p; $p' "$scratch" | uniq >"$scratch.ends"
	while read -r version python; do
		if [ "${version%.*}" = "$ours" ]; then
			continue # that is what the step before ran on
		elif can_make_venv "$python"; then
			check "pytest on CPython $version" server_on "$python" "$NM_TEST_VENV-${version%.*}" "$@" </dev/null
		else
			leave_out "CPython $version (it cannot make virtual environments)"
		fi
	done <"$scratch.ends"
}

main() {
	local steps='' step
	while [ $# -gt 0 ]; do
		case $1 in
		-h | --help) usage && exit ;;
		--fast) fast=yes ;;
		--)
			shift
			break
			;;
		lint | types | shell | tests | pythons | venv) steps="$steps $1" ;;
		*)
			say "test.sh: no step or option named $1 (see --help)"
			exit 2
			;;
		esac
		shift
	done
	[ -n "$steps" ] || steps='lint types shell tests pythons'

	cd "$(dirname "$0")/.."
	PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
	choose_python
	need_venv
	case $steps in *tests* | *pythons*) need_tools ;; esac
	scratch=$(mktemp)
	trap 'rm -f "$scratch" "$scratch.out" "$scratch.ends"; give_back' EXIT
	trap 'exit 130' INT TERM
	make_venv "$NM_TEST_PYTHON" "$NM_TEST_VENV" ||
		die "$NM_TEST_VENV could not be made: see above; it needs room, a network and leave to write here"
	case $NM_TEST_VENV in
	/*) PATH=$NM_TEST_VENV/bin:$PATH ;;
	*) PATH=$PWD/$NM_TEST_VENV/bin:$PATH ;;
	esac
	export PATH
	case $steps:$(why_no_lab) in
	*tests*:)
		need_parts
		need_coredns
		;;
	esac

	for step in $steps; do
		"step_$step" "$@"
	done

	if [ -n "$left_out" ]; then
		say "left out: $left_out"
	fi
	if [ -n "$failed" ]; then
		say "FAILED: $failed"
		exit 1
	fi
	say "all passed: ${passed:-nothing was asked for}"
}

main "$@"
