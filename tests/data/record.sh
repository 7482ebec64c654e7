#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Records what this machine's tools print about a known interface, for tests/test_parse.py.
#
#   unshare -n -m -p --fork --kill-child --mount-proc sh tests/data/record.sh FOLDER
#
# Needs root, wg, wireguard-go, iproute2 and busybox. Every file is named WHAT.TOOL-VERSION[.TOOL-VERSION].txt; a new version of a
# tool is new files beside the old ones, and test_parse.py reads them all. The keys were made for this and are used nowhere else.
set -eu
umask 022

to=$1
mkdir -p /run/wireguard
mount -t tmpfs none /run/wireguard

wg_version=wireguard-tools-$(wg --version | sed 's/^[^v]*v\([0-9.]*\).*/\1/')
go_version=wireguard-go-$(wireguard-go --version | sed -n '1s/^[^v]*v//p')
ip_version=$(ip -V | sed 's/.*\(iproute2-[0-9.]*[0-9]\).*/\1/')
busybox_version=busybox-$(busybox | sed -n '1s/^BusyBox v\([0-9.]*\).*/\1/p')
linux_version=linux-$(uname -r | sed 's/^\([0-9]*\.[0-9]*\).*/\1/')

dump() { # WHAT INTERFACE
	wg show "$2" dump >"$to/wg-dump-$1.$wg_version.$go_version.txt"
}

both() { # WHAT ARGUMENTS…: of `ip`, by iproute2 and by BusyBox
	local what="$1"
	shift
	ip "$@" >"$to/$what.$ip_version.txt"
	busybox ip "$@" >"$to/$what.$busybox_version.txt"
}

# --- a machine in a LAN, with a modem on the other side ----------------------------------------------------------------

ip link set lo up
ip link add eth0 type veth peer name lan
ip link add ppp0 type veth peer name isp
ip link add docker0 type bridge
ip addr add 192.168.1.10/24 dev eth0
ip addr add 192.168.1.11/24 dev eth0
ip -6 addr add 2001:db8:1::10/64 dev eth0 nodad
ip addr add 100.64.0.2 peer 100.64.0.1/32 dev ppp0
ip addr add 172.17.0.1/16 dev docker0
for link in eth0 lan ppp0 isp; do
	ip link set "$link" up
done
ip route add default via 192.168.1.1 dev eth0 metric 100
ip route add default via 100.64.0.1 dev ppp0 metric 600
ip neigh add 192.168.1.1 lladdr 02:00:5e:10:00:01 dev eth0 nud permanent
ip neigh add 192.168.1.77 dev eth0 nud failed 2>/dev/null || :

# --- our interface ------------------------------------------------------------------------------------------------------

wireguard-go nm-demo 2>/dev/null
wireguard-go other 2>/dev/null
dump new nm-demo
ours=$(wg genkey) theirs=$(wg genkey)
printf '%s\n' "$ours" | wg set nm-demo listen-port 51821 private-key /dev/stdin
printf '%s\n' "$theirs" | wg set other listen-port 51822 private-key /dev/stdin
dump nopeers nm-demo
ip addr add 10.20.30.2/24 dev nm-demo
ip -6 addr add fd00:20:30::2/64 dev nm-demo
ip link set dev nm-demo mtu 1280
both ip-addr-dev-down addr show dev nm-demo
ip link set nm-demo up
ip link set other up

them=$(printf '%s' "$theirs" | wg pubkey) us=$(printf '%s' "$ours" | wg pubkey)
(umask 077 && wg genpsk >/run/wireguard/psk)
wg set other peer "$us" preshared-key /run/wireguard/psk allowed-ips 10.20.30.2/32
wg set nm-demo \
	peer "$them" preshared-key /run/wireguard/psk endpoint 127.0.0.1:51822 persistent-keepalive 1 \
	allowed-ips 10.20.30.3/32,fd00:20:30::3/128,192.168.7.0/24,fd00:99::/48 \
	peer "$(wg genkey | wg pubkey)" endpoint '[2001:db8::7]:51821' persistent-keepalive 20 allowed-ips 10.20.30.4/32 \
	peer "$(wg genkey | wg pubkey)" endpoint 203.0.113.7:40007 allowed-ips 10.20.30.5/32 \
	peer "$(wg genkey | wg pubkey)" allowed-ips ''
ip route add 192.168.7.0/24 dev nm-demo
ip route add 10.99.0.1 dev nm-demo
ip route add 169.254.9.0/24 dev nm-demo
ip -6 route add fd00:99::/48 dev nm-demo
ip -6 route add fd00:98::1 dev nm-demo

tries=0
until [ "$(wg show nm-demo latest-handshakes | sort -k 2 -n | tail -n 1 | cut -f 2)" -gt 0 ]; do
	tries=$((tries + 1))
	[ $tries -lt 100 ] || exit 1
	sleep 0.1
done
dump peers nm-demo

both ip-addr addr show
both ip-addr-dev addr show dev nm-demo
both ip-route-dev route show dev nm-demo
both ip-6-route-dev -6 route show dev nm-demo
both ip-route-dev-eth0 route show dev eth0
cat /proc/net/route >"$to/proc-net-route.$linux_version.txt"
cat /proc/net/arp >"$to/proc-net-arp.$linux_version.txt"
ip link del nm-demo
ip link del other
