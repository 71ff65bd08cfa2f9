// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Count what crosses an interface: packets and bytes per direction and protocol. Every packet passes, whatever it is.
 *
 * kon_xdp_ingress  at the driver's receive path (XDP; native, or generic where the driver has none)
 * kon_tc_egress    where the stack hands frames to the device (TCX; clsact runs the same program on older kernels)
 *
 * Counters live in one array that user space freezes after load and maps read-only: reading costs no system call and
 * needs no privilege, and nobody but these programs can change them.
 */
#include "kon_types.h"
#include "kon_net.h"

enum {
	ETHERTYPE_IPV4 = 0x0800,
	ETHERTYPE_ARP = 0x0806,
	ETHERTYPE_VLAN = 0x8100,
	ETHERTYPE_IPV6 = 0x86dd,
	ETHERTYPE_QINQ = 0x88a8,
};

enum {
	IPPROTO_HOPOPTS = 0,
	IPPROTO_ICMP = 1,
	IPPROTO_TCP = 6,
	IPPROTO_UDP = 17,
	IPPROTO_ROUTING = 43,
	IPPROTO_FRAGMENT = 44,
	IPPROTO_AH = 51,
	IPPROTO_ICMPV6 = 58,
	IPPROTO_DSTOPTS = 60,
};

#define MAX_VLAN_TAGS 2 /* 802.1ad service and customer tag */
#define MAX_EXTENSIONS 6 /* RFC 8200 section 4.1 names six kinds; deeper packets count as "ip" */
#define HEADERS_BYTES 128 /* two tags, IPv6 and 66 bytes of extensions */
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

/* A frame's unread rest, and what is known of it so far. */
struct cursor {
	void *at;
	void *end;
	enum kon_protocol protocol;
};

static __always_inline void ipv4(struct cursor *c)
{
	struct ipv4_header *ip = c->at;

	c->protocol = KON_IP;
	if ((void *)(ip + 1) > c->end)
		return;
	switch (ip->protocol) {
	case IPPROTO_TCP:
		c->protocol = KON_TCP;
		break;
	case IPPROTO_UDP:
		c->protocol = KON_UDP;
		break;
	case IPPROTO_ICMP:
		c->protocol = KON_ICMP;
		break;
	}
}

/* Tell an IPv6 upper-layer protocol; extension headers and all others are KON_IP. */
static __always_inline enum kon_protocol ipv6_upper_layer(__u8 next)
{
	switch (next) {
	case IPPROTO_TCP:
		return KON_TCP;
	case IPPROTO_UDP:
		return KON_UDP;
	case IPPROTO_ICMPV6:
		return KON_ICMPV6;
	}
	return KON_IP;
}

static __always_inline void ipv6(struct cursor *c)
{
	struct ipv6_header *ip = c->at;
	__u8 next;

	c->protocol = KON_IP;
	if ((void *)(ip + 1) > c->end)
		return;
	next = ip->next_header;
	c->at = ip + 1;
#pragma clang loop unroll(disable)
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		struct ipv6_extension *extension = c->at;

		c->protocol = ipv6_upper_layer(next);
		if (c->protocol != KON_IP || (void *)(extension + 1) > c->end)
			return;
		switch (next) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
			c->at += (extension->length + 1) * 8;
			break;
		case IPPROTO_AH:
			c->at += (extension->length + 2) * 4;
			break;
		case IPPROTO_FRAGMENT:
			c->at += 8;
			if (extension->fragment_offset & ntohs_const(0xfff8)) {
				/* not the first fragment: what follows is payload, not a header */
				c->protocol = ipv6_upper_layer(extension->next_header);
				return;
			}
			break;
		default:
			return;
		}
		next = extension->next_header;
	}
	c->protocol = ipv6_upper_layer(next);
}

/* Read the Ethernet header and its VLAN tags; return the type of what follows, 0 where the frame is too short. */
static __always_inline __u16 ethernet(struct cursor *c)
{
	struct ethernet_header *frame = c->at;
	__u16 type;

	if ((void *)(frame + 1) > c->end)
		return 0;
	type = frame->type;
	c->at = frame + 1;
#pragma clang loop unroll(full)
	for (int i = 0; i < MAX_VLAN_TAGS; i++) {
		struct vlan_tag *tag = c->at;

		if (type != ntohs_const(ETHERTYPE_VLAN) && type != ntohs_const(ETHERTYPE_QINQ))
			break;
		if ((void *)(tag + 1) > c->end)
			return 0;
		type = tag->type;
		c->at = tag + 1;
	}
	return type;
}

/* Tell IPv4 from IPv6 where no Ethernet header does; return the type one would have said. */
static __always_inline __u16 raw_ip(struct cursor *c)
{
	__u8 *version = c->at;

	if ((void *)(version + 1) > c->end)
		return 0;
	switch (*version >> 4) {
	case 4:
		return ntohs_const(ETHERTYPE_IPV4);
	case 6:
		return ntohs_const(ETHERTYPE_IPV6);
	}
	return 0;
}

static __always_inline enum kon_protocol classify(void *data, void *end, const struct kon_interface *interface)
{
	struct cursor c = {.at = data, .end = end, .protocol = KON_OTHER};

	switch (interface->flags & KON_IS_RAW_IP ? raw_ip(&c) : ethernet(&c)) {
	case ntohs_const(ETHERTYPE_IPV4):
		ipv4(&c);
		break;
	case ntohs_const(ETHERTYPE_IPV6):
		ipv6(&c);
		break;
	case ntohs_const(ETHERTYPE_ARP):
		c.protocol = KON_ARP;
		break;
	}
	return c.protocol;
}

/* Return the watched interface of this index, or none. */
static __always_inline struct kon_interface *find(__u32 ifindex)
{
	__u32 index = ifindex & (KON_BUCKETS - 1);
	struct kon_bucket *bucket = bpf_map_lookup_elem(&interfaces, &index);

	if (!bucket)
		return 0;
#pragma clang loop unroll(full)
	for (int i = 0; i < KON_BUCKET_ENTRIES; i++) {
		if (bucket->entry[i].ifindex == ifindex)
			return &bucket->entry[i];
	}
	return 0;
}

/* Plain increments: a row belongs to one CPU, and both hooks run with bottom halves disabled. */
static __always_inline void count(const struct kon_interface *interface, enum kon_direction direction,
				  enum kon_protocol protocol, __u64 packets, __u64 bytes)
{
	__u32 row = interface->first_row + bpf_get_smp_processor_id();
	struct kon_row *counter = bpf_map_lookup_elem(&counters, &row);

	if (!counter)
		return;
	protocol &= KON_PROTOCOLS - 1;
	counter->count[direction][protocol].packets += packets;
	counter->count[direction][protocol].bytes += bytes;
}

SEC("xdp")
int kon_xdp_ingress(struct xdp_md *context)
{
	void *data = (void *)(long)context->data;
	void *end = (void *)(long)context->data_end;
	struct kon_interface *interface = find(context->ingress_ifindex);

	if (interface)
		count(interface, KON_INGRESS, classify(data, end, interface), 1, end - data);
	return XDP_PASS;
}

SEC("tc")
int kon_tc_egress(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	struct kon_interface *interface = find(skb->ifindex);
	/* A GSO super packet is counted as the frames it becomes: wire_len already holds all their headers. */
	__u32 packets = skb->gso_segs > 1 ? skb->gso_segs : 1;
	__u32 bytes = skb->wire_len;
	enum kon_protocol protocol;

	if (!interface)
		return TCX_NEXT;
	if (skb->vlan_present) /* the tag is not in the data yet */
		bytes += packets * VLAN_TAG_BYTES;
	protocol = classify(data, end, interface);
	/* "ip" and "other" may only mean that the headers lie in a page: fetch them and look again. */
	if ((protocol == KON_IP || protocol == KON_OTHER) && end - data < HEADERS_BYTES && end - data < skb->len) {
		bpf_skb_pull_data(skb, skb->len < HEADERS_BYTES ? skb->len : HEADERS_BYTES);
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
		protocol = classify(data, end, interface);
	}
	count(interface, KON_EGRESS, protocol, packets, bytes);
	return TCX_NEXT;
}

/*
 * Each program sits in slot 0 of a program array of its own (an array takes one program type only): looking the slot up
 * from user space gives the program's id, without searching the kernel for it by name.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__array(values, int(void *));
} xdp_programs SEC(".maps") = {
	.values = {(void *)&kon_xdp_ingress},
};

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__array(values, int(void *));
} tc_programs SEC(".maps") = {
	.values = {(void *)&kon_tc_egress},
};

char _license[] SEC("license") = "Dual MIT/GPL";
