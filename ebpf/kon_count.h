/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * Counting frames in the rows of kon_net.h.
 *
 * Counters live in one array that user space freezes after load and maps read-only: reading costs no system call and
 * needs no privilege, and nobody but the programs can change them.
 */
#ifndef KON_COUNT_H
#define KON_COUNT_H

#include "kon_types.h"
#include "kon_net.h"
#include "kon_frame.h"

#define KON_COLUMNS 8 /* lines of a direction: those of the protocols, and the events */
#define HEADERS_BYTES 128 /* two tags, IPv6, 46 bytes of extensions and a TCP header */
#define VLAN_TAG_BYTES 4

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, KON_ROWS);
	__type(key, __u32);
	__type(value, struct kon_row);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, KON_BUCKETS);
	__type(key, __u32);
	__type(value, struct kon_bucket);
} interfaces SEC(".maps");

_Static_assert(sizeof(struct kon_counts) == KON_COLUMNS * sizeof(struct kon_line), "a column is masked, not compared");

/* The frames one skb becomes: `packets` in all; all but the last are `full` bytes long. */
struct burst {
	__u32 packets;
	__u64 full;
	__u64 last;
};

/* Return the watched interface of this index, by value: ifindex 0 where there is none. */
static __always_inline struct kon_interface find(__u32 ifindex)
{
	__u32 index = ifindex & (KON_BUCKETS - 1);
	struct kon_bucket *bucket = bpf_map_lookup_elem(&interfaces, &index);
	struct kon_interface found = {};

	if (!bucket)
		return found;
#pragma clang loop unroll(full)
	for (int i = 0; i < KON_BUCKET_ENTRIES; i++) {
		if (bucket->entry[i].ifindex == ifindex) {
			found = bucket->entry[i];
			break;
		}
	}
	found.first_row = forget(found.first_row, ifindex);
	found.flags = forget(found.flags, ifindex);
	return found;
}

static __always_inline enum kon_size size_of(__u64 bytes)
{
	if (bytes <= 64)
		return KON_SIZE_64;
	if (bytes <= 128)
		return KON_SIZE_128;
	if (bytes <= 256)
		return KON_SIZE_256;
	if (bytes <= 512)
		return KON_SIZE_512;
	if (bytes <= 1024)
		return KON_SIZE_1024;
	if (bytes <= 1518)
		return KON_SIZE_1518;
	return KON_SIZE_LARGER;
}

/*
 * Count a frame in the row of its interface; return that, or one without ifindex where there is no row.
 * Plain increments: a row belongs to one CPU, and both hooks run with bottom halves disabled.
 */
static __always_inline struct kon_interface count(struct kon_interface interface, enum kon_direction direction,
						  const struct frame *f, const struct burst *b)
{
	__u32 number = interface.first_row + bpf_get_smp_processor_id();
	struct kon_row *row = bpf_map_lookup_elem(&counters, &number);
	__u64 protocol = f->protocol & (KON_COLUMNS - 1);
	struct kon_counts *counts;
	struct kon_line *line;

	if (!row)
		return (struct kon_interface){};
	counts = &row->direction[direction];
	line = (void *)counts + protocol * sizeof(*line);
	line->bytes += b->full * (b->packets - 1) + b->last;
	line->packets[size_of(b->last)]++;
	if (b->packets > 1)
		line->packets[size_of(b->full)] += b->packets - 1;
	if (likely(!f->events))
		return interface;
#pragma clang loop unroll(full)
	for (int event = 0; event < KON_EVENTS; event++)
		counts->events.count[event] += (f->events >> event & 1) * (event < KON_BROADCAST ? 1 : b->packets);
	return interface;
}

KON_DEFINE_EXTENSIONS(kon_xdp_extend, struct xdp_md)
KON_DEFINE_EXTENSIONS(kon_tc_extend, struct __sk_buff)

/* Read a frame of `length` bytes whose headers are more than the usual ones: with all extension headers of IPv6. */
__attribute__((noinline)) __u64 kon_xdp_reread(struct xdp_md *context, __u32 length, int is_raw_ip)
{
	struct frame f;

	read_frame(&f, (void *)(long)context->data, (void *)(long)context->data_end, length, is_raw_ip);
	return f.events & KON_EXTENDED ? kon_xdp_extend(context, pack(&f), f.at - f.data, f.rest) : pack(&f);
}

/* The same, after fetching headers that lie in a page. */
__attribute__((noinline)) __u64 kon_tc_reread(struct __sk_buff *skb, int is_raw_ip)
{
	struct frame f;

	if (skb->data_end - skb->data < HEADERS_BYTES && skb->data_end - skb->data < skb->len)
		bpf_skb_pull_data(skb, skb->len < HEADERS_BYTES ? skb->len : HEADERS_BYTES);
	read_frame(&f, (void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, is_raw_ip);
	return f.events & KON_EXTENDED ? kon_tc_extend(skb, pack(&f), f.at - f.data, f.rest) : pack(&f);
}

/*
 * Whether a frame may go on in other pieces than the first. Asking the kernel is a call, so it is asked only where no
 * IP datagram fills the first piece: the shortest frames apart, which may be padded.
 */
static __always_inline int may_go_on(const struct frame *f, __u64 length)
{
	return !f->version || f->events & (KON_UNFINISHED | KON_EVENT(KON_MALFORMED)) || (f->trailer && length > 64);
}

/* Count a frame that has arrived, in one piece or perhaps several; return its interface, without ifindex where not
 * counted. */
static __always_inline struct kon_interface count_ingress(struct xdp_md *context, int has_pieces, struct frame *f,
							  struct burst *b)
{
	struct kon_interface interface = find(context->ingress_ifindex);
	void *data = (void *)(long)context->data;
	void *end = (void *)(long)context->data_end;
	__u64 length = end - data;
	int is_raw_ip;

	if (!interface.ifindex)
		return interface;
	is_raw_ip = interface.flags & KON_IS_RAW_IP;
	if (is_raw_ip || !likely(read_common(f, data, end, length)))
		read_frame(f, data, end, length, is_raw_ip);
	if (has_pieces && unlikely(may_go_on(f, length))) {
		length = bpf_xdp_get_buff_len(context);
		unpack(f, kon_xdp_reread(context, length, is_raw_ip));
	} else if (unlikely(f->events & KON_UNFINISHED)) {
		unpack(f, kon_xdp_reread(context, length, is_raw_ip));
	}
	*b = (struct burst){.packets = 1, .last = length};
	return count(interface, KON_INGRESS, f, b);
}

/*
 * How many frames a GSO super packet becomes besides the first. Of one from a guest (SKB_GSO_DODGY: a tap, a packet
 * socket) the kernel does not keep the number: it is counted here as it is there, from what follows the headers.
 */
static __always_inline __u32 further_frames(const struct __sk_buff *skb, const struct frame *f)
{
	struct tcp_header *tcp = (void *)(long)skb->data + (f->upper & KON_OFFSET);
	__u32 headers = f->upper + sizeof(struct udp_header);

	if (likely(skb->gso_segs))
		return skb->gso_segs - 1;
	if (f->upper && f->protocol == KON_TCP && (void *)(tcp + 1) <= (void *)(long)skb->data_end)
		headers = f->upper + (tcp->data_offset >> 4 << 2);
	return skb->len > headers ? (skb->len - headers - 1) / skb->gso_size : 0;
}

/*
 * A GSO super packet is counted as the frames it becomes: wire_len already holds the headers of all of them
 * (qdisc_pkt_len_init in net/core/dev.c). A tag outside of the data goes into each.
 */
static __always_inline struct burst frames_of(const struct __sk_buff *skb, const struct frame *f)
{
	__u32 tag = skb->vlan_present ? VLAN_TAG_BYTES : 0;
	struct burst b = {.packets = 1, .last = skb->wire_len};
	__u32 more = unlikely(skb->gso_size) ? further_frames(skb, f) : 0;
	__u32 full;

	if (unlikely(more)) {
		full = (skb->wire_len - skb->len) / more + skb->gso_size;
		if (full > skb->wire_len / more)
			full = skb->wire_len / (more + 1); /* the kernel's numbers disagree: the sum stays right */
		b = (struct burst){.packets = more + 1, .full = full, .last = skb->wire_len - more * full};
		b.full += tag;
	}
	b.last += tag;
	return b;
}

/* Count the frames that a packet on its way out becomes; return its interface, without ifindex where not counted. */
static __always_inline struct kon_interface count_egress(struct __sk_buff *skb, struct frame *f, struct burst *b)
{
	struct kon_interface interface = find(skb->ifindex);
	int is_raw_ip;

	if (!interface.ifindex)
		return interface;
	is_raw_ip = interface.flags & KON_IS_RAW_IP;
	read_frame(f, (void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, is_raw_ip);
	if (unlikely(f->events & KON_UNFINISHED))
		unpack(f, kon_tc_reread(skb, is_raw_ip));
	*b = frames_of(skb, f);
	return count(interface, KON_EGRESS, f, b);
}

#endif
