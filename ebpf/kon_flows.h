/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The table of flows that kon_flows.bpf.c and user space share. kon_agent/bpf/flows.py mirrors every number here; a
 * unit test reads this file and holds the two together, and loading checks the sizes of the maps once more.
 *
 * A set-associative cache in two arrays, a part for each possible CPU, so that plain increments are exact:
 *
 *     flow_buckets: one cache line per bucket: 16 bits of each flow's hash, and when it was last seen
 *     flows:        one cache line per flow; those of bucket b are KON_FLOW_WAYS * b and the next seven
 *
 *     bucket = cpu * settings.buckets + (hash * settings.buckets >> 32)
 *
 * User space freezes `flows` and maps it read-only. `generation` is odd while an entry passes to another flow, and even
 * again when all of it is the new one's; it never goes back, so half of it is how many flows the entry has had.
 */
#ifndef KON_FLOWS_H
#define KON_FLOWS_H

#define KON_FLOW_WAYS 8 /* flows in a bucket: what fits a line with their ages */
#define KON_FLOW_KEY_WORDS 5

struct kon_flow_key {
	__u8 source[16]; /* IPv4 as ::ffff:a.b.c.d (RFC 4291 section 2.5.5.2) */
	__u8 destination[16];
	__u16 source_port; /* network byte order; of TCP, UDP, UDP-Lite, SCTP and DCCP, else 0 */
	__u16 destination_port;
	__u8 protocol; /* IP's number of the upper layer */
	__u8 direction; /* enum kon_direction */
	__u16 first_row; /* of the interface, in `counters` */
};

struct kon_flow {
	struct kon_flow_key key;
	__u64 bytes;
	__u64 packets;
	__u64 generation;
} __attribute__((aligned(64)));

struct kon_flow_bucket {
	__u32 seen[KON_FLOW_WAYS]; /* the clock at the flow's last packet but its first: that is 1 */
	__u16 tag[KON_FLOW_WAYS];
	__u32 clock; /* packets of the bucket */
} __attribute__((aligned(64)));

struct kon_flow_settings {
	__u32 buckets; /* per CPU; 0: count no flows */
	__u32 unused;
	__u64 multiplier[KON_FLOW_KEY_WORDS]; /* of the hash: odd and random, so that nobody can aim at a bucket */
};

_Static_assert(sizeof(struct kon_flow_key) == 40, "a key is five words; flows.py: ENTRY");
_Static_assert(sizeof(struct kon_flow) == 64, "a flow is one cache line; flows.py: ENTRY_BYTES");
_Static_assert(sizeof(struct kon_flow_bucket) == 64, "a bucket is one cache line; flows.py: BUCKET_BYTES");
_Static_assert(sizeof(struct kon_flow_settings) == 48, "flows.py: SETTINGS_BYTES");

#endif
