/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * What kon_net.bpf.c and user space share. kon_agent/bpf/layout.py mirrors every number here; a unit test reads this
 * file and holds the two together, and loading checks the sizes of the maps once more.
 *
 * counters: rows of 1 KiB. An interface owns one row per possible CPU, side by side, so that no two CPUs ever write the
 * same cache line and plain increments are exact:
 *
 *     row = first_row + cpu        first_row = slot * possible CPUs, chosen by user space
 *
 * A row is eight cache lines per direction: one per protocol, with the bytes and the packets by size of frame, so that
 * a packet writes one line and no more; and one of events, which few packets are.
 *
 * interfaces: buckets of one cache line. Bucket `ifindex % KON_BUCKETS` holds up to KON_BUCKET_ENTRIES interfaces, so
 * finding one is a single array lookup and at most eight compares within one line.
 */
#ifndef KON_NET_H
#define KON_NET_H

#define KON_ROWS 4096 /* at most, 4 MiB; user space makes the map as large as slots and CPUs need */
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
	KON_OTHER_IP = 4, /* any other payload of IPv4 or IPv6, and IP too short or too deep to tell */
	KON_ARP = 5,
	KON_OTHER = 6, /* neither IP nor ARP, and frames too short to tell */
	KON_PROTOCOLS = 7,
};

/* Frame lengths, Ethernet header and VLAN tags included, checksum excluded; each class up to and including its bound.
 */
enum kon_size {
	KON_SIZE_64 = 0,
	KON_SIZE_128 = 1,
	KON_SIZE_256 = 2,
	KON_SIZE_512 = 3,
	KON_SIZE_1024 = 4,
	KON_SIZE_1518 = 5, /* the longest untagged frame of Ethernet */
	KON_SIZE_LARGER = 6,
	KON_SIZES = 7,
};

/* What is worth a count of its own. The first three are in the order of their bits in a TCP header. */
enum kon_event {
	KON_TCP_FIN = 0,
	KON_TCP_SYN = 1,
	KON_TCP_RST = 2,
	KON_MALFORMED = 3,
	KON_BROADCAST = 4,
	KON_MULTICAST = 5,
	KON_EVENTS = 6,
};

struct kon_line {
	__u64 bytes; /* frame lengths */
	__u64 packets[KON_SIZES];
};

struct kon_events {
	__u64 count[KON_EVENTS];
	__u64 spare[2];
};

struct kon_counts {
	struct kon_line line[KON_PROTOCOLS];
	struct kon_events events;
};

struct kon_row {
	struct kon_counts direction[KON_DIRECTIONS];
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

_Static_assert(sizeof(struct kon_line) == 64, "a protocol's line is a cache line; layout.py: LINE_BYTES");
_Static_assert(sizeof(struct kon_events) == 64, "so is the line of events");
_Static_assert(sizeof(struct kon_row) == 1024, "a row is sixteen cache lines; layout.py: ROW_BYTES");
_Static_assert(sizeof(struct kon_bucket) == 64, "a bucket is one cache line; layout.py: BUCKET_BYTES");
_Static_assert(KON_ROWS <= 65536, "first_row is 16 bits wide");
_Static_assert((KON_BUCKETS & (KON_BUCKETS - 1)) == 0, "buckets are found by masking");

#endif
