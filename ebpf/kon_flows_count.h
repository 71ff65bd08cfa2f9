/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * Count a packet to its flow: find the flow in this CPU's part of the table, or give it the place of the one in its
 * bucket that was seen least recently, where those that were seen but once come first.
 *
 * Called after the interface's row has counted the packet, so that who reads flows first and rows afterwards never
 * finds more in the flows than in the rows.
 */
#ifndef KON_FLOWS_COUNT_H
#define KON_FLOWS_COUNT_H

#include "kon_count.h"
#include "kon_flows.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, KON_FLOW_WAYS); /* user space sizes both before load */
	__type(key, __u32);
	__type(value, struct kon_flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kon_flow_bucket);
} flow_buckets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kon_flow_settings);
} flow_settings SEC(".maps");

#define KON_SEEN_ONCE 1 /* in `seen`: the flow has had one packet so far; 0: there is no flow */

/* Words of any alignment; the kernels we run on load them at once. */
typedef __u32 __attribute__((may_alias)) kon_u32;
typedef __u64 __attribute__((may_alias)) kon_u64;

/* Whether a protocol's header begins with two ports. */
static __always_inline int has_ports(__u8 protocol)
{
	switch (protocol) {
	case 6: /* TCP */
	case 17: /* UDP */
	case 33: /* DCCP */
	case 132: /* SCTP */
	case 136: /* UDP-Lite */
		return 1;
	}
	return 0;
}

/*
 * Write the addresses of a packet into its key; return 0 where they lie beyond the end. A key is written in whole
 * words: a word that is read after its halves were written keeps a processor waiting.
 */
static __always_inline int flow_addresses(__u64 *key, void *header, void *end, int is_ipv6)
{
	if (is_ipv6) {
		struct ipv6_header *ip = header;

		if ((void *)(ip + 1) > end)
			return 0;
		key[0] = ((kon_u64 *)ip->source)[0];
		key[1] = ((kon_u64 *)ip->source)[1];
		key[2] = ((kon_u64 *)ip->destination)[0];
		key[3] = ((kon_u64 *)ip->destination)[1];
	} else {
		struct ipv4_header *ip = header;

		if ((void *)(ip + 1) > end)
			return 0;
		key[0] = key[2] = 0;
		key[1] = 0xffff0000 | (__u64) * (kon_u32 *)ip->source << 32;
		key[3] = 0xffff0000 | (__u64) * (kon_u32 *)ip->destination << 32;
	}
	return 1;
}

/* Multilinear hashing of the key's words, and a last mixing; the upper half chooses the bucket. */
static __always_inline __u64 flow_hash(const __u64 *key, const struct kon_flow_settings *settings)
{
	__u64 hash = 0;

#pragma clang loop unroll(full)
	for (int i = 0; i < KON_FLOW_KEY_WORDS; i++)
		hash += key[i] * settings->multiplier[i];
	hash ^= hash >> 32;
	return hash * 0x9e3779b97f4a7c15ULL; /* 2^64 over the golden ratio (Knuth, TAOCP 6.4) */
}

static __always_inline int is_same(const kon_u64 *a, const __u64 *b)
{
	__u64 difference = 0;

#pragma clang loop unroll(full)
	for (int i = 0; i < KON_FLOW_KEY_WORDS; i++)
		difference |= a[i] ^ b[i];
	return !difference;
}

/* Return the entry of bucket `index` that was seen least recently, after giving it to a new flow. */
static __always_inline struct kon_flow *replace(struct kon_flow_bucket *bucket, __u32 index, __u16 tag,
						const __u64 *key)
{
	__u32 now = bucket->clock, oldest = 0, age = 0;
	struct kon_flow *flow;

	/* A place nobody has had was seen at 0. */
#pragma clang loop unroll(full)
	for (__u32 way = 0; way < KON_FLOW_WAYS; way++) {
		if (now - bucket->seen[way] > age) {
			age = now - bucket->seen[way];
			oldest = way;
		}
	}
	oldest &= KON_FLOW_WAYS - 1;
	index = index * KON_FLOW_WAYS + oldest;
	flow = bpf_map_lookup_elem(&flows, &index);
	if (!flow)
		return 0;
	/*
	 * Not `now`, but before all that were seen twice: the newcomer is the next to lose its place, until its second
	 * packet. So flows of a single packet, a scan or a flood, push out one another and not those that talk.
	 */
	bucket->seen[oldest] = KON_SEEN_ONCE;
	bucket->tag[oldest] = tag;
	/* Nothing may move over the two ends of the change: it can be interrupted for as long as a CPU is stolen. */
	*(volatile __u64 *)&flow->generation += 1;
	asm volatile("" ::: "memory");
#pragma clang loop unroll(full)
	for (int i = 0; i < KON_FLOW_KEY_WORDS; i++)
		((kon_u64 *)&flow->key)[i] = key[i];
	flow->bytes = 0;
	flow->packets = 0;
	asm volatile("" ::: "memory");
	*(volatile __u64 *)&flow->generation += 1;
	return flow;
}

static __always_inline struct kon_flow *find_flow(const __u64 *key, const struct kon_flow_settings *settings)
{
	__u64 hash = flow_hash(key, settings);
	__u32 index = bpf_get_smp_processor_id() * settings->buckets + ((hash >> 32) * settings->buckets >> 32);
	struct kon_flow_bucket *bucket = bpf_map_lookup_elem(&flow_buckets, &index);
	__u16 tag = hash;

	if (!bucket)
		return 0;
	bucket->clock += 1;
#pragma clang loop unroll(disable)
	for (__u32 way = 0; way < KON_FLOW_WAYS; way++) {
		__u32 at = index * KON_FLOW_WAYS + way;
		struct kon_flow *flow;

		if (bucket->tag[way] != tag)
			continue;
		flow = bpf_map_lookup_elem(&flows, &at);
		if (flow && is_same((const kon_u64 *)&flow->key, key)) {
			bucket->seen[way] = bucket->clock;
			return flow;
		}
	}
	return replace(bucket, index, tag, key);
}

static __always_inline int count_flow(void *data, void *end, __u32 headers, __u32 what, __u64 packets, __u64 bytes)
{
	__u32 only = 0, network = headers & KON_OFFSET, upper = headers >> 16 & KON_OFFSET;
	struct kon_flow_settings *settings = bpf_map_lookup_elem(&flow_settings, &only);
	kon_u32 *ports = data + upper;
	__u8 version = what >> 8 & 7;
	struct kon_flow *flow;
	__u64 key[KON_FLOW_KEY_WORDS];

	/* A malformed packet belongs to no flow: its addresses may be anything. */
	if (!settings || !settings->buckets || !version || what >> 11 & 1)
		return 0;
	if (!flow_addresses(key, data + network, end, version == 6))
		return 0;
	key[4] = (__u64)(what & 0xff) << 32 | (__u64)(what >> 15 & 1) << 40 | (__u64)(what >> 16) << 48;
	if (upper && has_ports(what) && (void *)(ports + 1) <= end)
		key[4] |= *ports;
	flow = find_flow(key, settings);
	if (flow) {
		flow->packets += packets;
		flow->bytes += bytes;
	}
	return 0;
}

/*
 * Global functions, verified once for themselves (kernel 5.6): inlined, their paths would multiply with those of
 * reading the headers, beyond what the verifier looks at. For the same reason their arguments are numbers, of which
 * those who call decide nothing:
 *
 * headers: where the IP header begins, and from bit 16 on what follows all headers; 0: nothing that shows ports
 * what:    IP's protocol number; from bit 8 the version, 11 whether malformed, 15 the direction, 16 the first row
 */
__attribute__((noinline)) int kon_flow_xdp(struct xdp_md *context, __u32 headers, __u32 what, __u64 packets,
					   __u64 bytes)
{
	return count_flow((void *)(long)context->data, (void *)(long)context->data_end, headers, what, packets, bytes);
}

__attribute__((noinline)) int kon_flow_tc(struct __sk_buff *skb, __u32 headers, __u32 what, __u64 packets, __u64 bytes)
{
	return count_flow((void *)(long)skb->data, (void *)(long)skb->data_end, headers, what, packets, bytes);
}

static __always_inline __u32 flow_headers(const struct frame *f)
{
	return f->network | f->upper << 16;
}

static __always_inline __u32 flow_what(const struct frame *f, struct kon_interface interface,
				       enum kon_direction direction)
{
	return f->number | f->version << 8 | (f->events >> KON_MALFORMED & 1) << 11 | direction << 15 |
	       (__u32)interface.first_row << 16;
}

/* All the bytes of the frames that one skb becomes. */
static __always_inline __u64 bytes_of(const struct burst *b)
{
	return (__u64)b->full * (b->packets - 1) + b->last;
}

#endif
