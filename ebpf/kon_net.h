/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * What kon_net.bpf.c and user space share. kon_agent/bpf/layout.py mirrors every number here; a unit test reads this
 * file and holds the two together, and loading checks the sizes of the maps once more.
 *
 * counters: rows of 256 bytes. An interface owns one row per possible CPU, side by side, so that no two CPUs ever write
 * the same cache line and plain increments are exact:
 *
 *     row = first_row + cpu        first_row = slot * possible CPUs, chosen by user space
 *
 * interfaces: buckets of one cache line. Bucket `ifindex % KON_BUCKETS` holds up to KON_BUCKET_ENTRIES interfaces, so
 * finding one is a single array lookup and at most eight compares within one line.
 */
#ifndef KON_NET_H
#define KON_NET_H

#define KON_ROWS 4096 /* 1 MiB: 64 interfaces on 64 CPUs, 16 on 256; user space picks rows, so any split works */
#define KON_BUCKETS 128
#define KON_BUCKET_ENTRIES 8

enum kon_direction {
	KON_INGRESS = 0,
	KON_EGRESS = 1,
	KON_DIRECTIONS = 2,
};

enum kon_protocol {
	KON_TCP = 0,
	KON_UDP = 1,
	KON_ICMP = 2,
	KON_ICMPV6 = 3,
	KON_IP = 4, /* any other payload of IPv4 or IPv6, and IP too short or too deep to tell */
	KON_ARP = 5,
	KON_OTHER = 6, /* neither IP nor ARP, and frames too short to tell */
	KON_PROTOCOLS = 8, /* a power of two, so that masking an index bounds it; 7 is not in use */
};

struct kon_count {
	__u64 packets;
	__u64 bytes; /* frame lengths, Ethernet header and VLAN tags included, checksum excluded */
};

struct kon_row {
	struct kon_count count[KON_DIRECTIONS][KON_PROTOCOLS];
} __attribute__((aligned(64)));

#define KON_IS_RAW_IP 1 /* frames begin with the IP header: tun, wireguard, ipip */

struct kon_interface {
	__u32 ifindex; /* 0: free */
	__u16 first_row;
	__u16 flags;
};

struct kon_bucket {
	struct kon_interface entry[KON_BUCKET_ENTRIES];
} __attribute__((aligned(64)));

_Static_assert(sizeof(struct kon_row) == 256, "a row is four cache lines; layout.py: ROW_BYTES");
_Static_assert(sizeof(struct kon_bucket) == 64, "a bucket is one cache line; layout.py: BUCKET_BYTES");
_Static_assert(KON_ROWS <= 65536, "first_row is 16 bits wide");
_Static_assert((KON_BUCKETS & (KON_BUCKETS - 1)) == 0, "buckets are found by masking");
_Static_assert((KON_PROTOCOLS & (KON_PROTOCOLS - 1)) == 0, "protocols are bounded by masking");

#endif
