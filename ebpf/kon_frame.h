/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * Reading a frame: its protocol, and what is worth a count of its own (enum kon_event).
 *
 * A frame is malformed where its headers contradict it or each other (ebpf/README.md lists how). All we know of a frame
 * may lie outside of the linear buffer of an skb: a header that is not readable is KON_HIDDEN, one that cannot be there
 * because the frame ends before is malformed.
 */
#ifndef KON_FRAME_H
#define KON_FRAME_H

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
#define MAX_EXTENSIONS 6 /* RFC 8200 section 4.1 names six kinds; deeper packets count as "other-ip" */
#define MAX_IP_BYTES 65535 /* what 16 bits can say: a longer datagram (BIG TCP, jumbogram) says 0 */
#define MAX_HEADERS_BYTES 4096 /* from the frame's begin on; no packet anyone sends has more */
#define KON_OFFSET 0x1fff /* a mask: beyond MAX_HEADERS_BYTES and another extension */
#define ICMP_HEADER_BYTES 8 /* also of ICMPv6: type, code, checksum, and four bytes of every message in use */

#define KON_EVENT(event) (1U << (event))
#define KON_TCP_EVENTS (KON_EVENT(KON_TCP_FIN) | KON_EVENT(KON_TCP_SYN) | KON_EVENT(KON_TCP_RST))
/* No events: a header lies outside of the buffer; extension headers of IPv6 are still to be looked at. */
#define KON_HIDDEN (1U << 7)
#define KON_EXTENDED (1U << 6)
#define KON_UNFINISHED (KON_HIDDEN | KON_EXTENDED)

/* A frame's unread rest, and what is known of it so far. */
struct frame {
	void *data;
	void *at;
	void *end; /* of the linear buffer */
	__u64 rest; /* bytes from `at` to the end of the frame, or later of the datagram, in the buffer or not */
	__u32 events; /* bits KON_EVENT(…), KON_HIDDEN and KON_EXTENDED */
	enum kon_protocol protocol;
	__u8 version; /* of IP: 4 or 6; 0: it is none, or cut short */
	__u8 number; /* of the upper layer's protocol, where `version` is not 0 */
	__u32 network; /* where the IP header begins, from `data` on, where `version` is not 0 */
	__u32 trailer; /* bytes of the frame behind the IP datagram */
	__u32 upper; /* where the header of the upper layer begins; 0: there is none here */
};

/*
 * What the verifier knows of a number is forgotten: states that differ in it alone are one from here on, and what
 * follows is looked at once and not once for each way that led here. `unknown` is any number it knows nothing of.
 */
static __always_inline __u64 forget(__u64 number, __u64 unknown)
{
	asm volatile("%0 += %1\n\t%0 -= %1" : "+r"(number) : "r"(unknown));
	return number;
}

static __always_inline int is_readable(struct frame *f, __u32 bytes)
{
	if (likely(f->at + bytes <= f->end))
		return 1;
	f->events |= f->rest < bytes ? KON_EVENT(KON_MALFORMED) : KON_HIDDEN;
	return 0;
}

static __always_inline void tcp(struct frame *f)
{
	struct tcp_header *tcp = f->at;
	__u32 header;

	if (unlikely(f->rest < sizeof(*tcp))) {
		f->events |= KON_EVENT(KON_MALFORMED);
		return;
	}
	if (!is_readable(f, sizeof(*tcp)))
		return;
	header = tcp->data_offset >> 4 << 2;
	if (unlikely(header < sizeof(*tcp) || header > f->rest))
		f->events |= KON_EVENT(KON_MALFORMED);
	f->events |= tcp->flags & KON_TCP_EVENTS;
}

static __always_inline void udp(struct frame *f)
{
	struct udp_header *udp = f->at;
	__u32 length;

	if (unlikely(f->rest < sizeof(*udp))) {
		f->events |= KON_EVENT(KON_MALFORMED);
		return;
	}
	if (!is_readable(f, sizeof(*udp)))
		return;
	length = ntohs(udp->length);
	if (unlikely(length < sizeof(*udp) || length > f->rest) && f->rest <= MAX_IP_BYTES)
		f->events |= KON_EVENT(KON_MALFORMED);
}

static __always_inline void icmp(struct frame *f)
{
	if (unlikely(f->rest < ICMP_HEADER_BYTES))
		f->events |= KON_EVENT(KON_MALFORMED);
}

/* Judge the header of the upper layer, which begins here. */
static __always_inline void upper_layer(struct frame *f)
{
	f->upper = f->at - f->data;
	if (likely(f->protocol == KON_TCP))
		tcp(f);
	else if (f->protocol == KON_UDP)
		udp(f);
	else if (f->protocol == KON_ICMP || f->protocol == KON_ICMPV6)
		icmp(f);
}

/* Tell the upper layer of IPv4; all others are KON_OTHER_IP. */
static __always_inline enum kon_protocol ipv4_protocol(__u8 number)
{
	if (likely(number == IPPROTO_TCP))
		return KON_TCP;
	switch (number) {
	case IPPROTO_UDP:
		return KON_UDP;
	case IPPROTO_ICMP:
		return KON_ICMP;
	}
	return KON_OTHER_IP;
}

static __always_inline void ipv4(struct frame *f)
{
	struct ipv4_header *ip = f->at;
	__u64 header, total;
	__u32 has_more;

	f->protocol = KON_OTHER_IP;
	if (!is_readable(f, sizeof(*ip)))
		return;
	header = (ip->version_ihl & 0xf) * 4;
	if (unlikely(ip->version_ihl != 0x45 && (ip->version_ihl >> 4 != 4 || header < sizeof(*ip)))) {
		f->events |= KON_EVENT(KON_MALFORMED);
		return;
	}
	f->version = 4;
	f->network = f->at - f->data;
	f->number = ip->protocol;
	f->protocol = ipv4_protocol(f->number);
	total = ntohs(ip->total_length);
	if (unlikely(total == 0 && f->rest > MAX_IP_BYTES))
		total = f->rest;
	if (unlikely(total < header || total > f->rest)) {
		f->events |= KON_EVENT(KON_MALFORMED);
		return;
	}
	if (unlikely(ip->fragment & ntohs_const(0x1fff)))
		return; /* not the first fragment: what follows is payload, not a header */
	has_more = ip->fragment & ntohs_const(0x2000);
	f->trailer = f->rest - total;
	f->at += header;
	f->rest = total - header;
	upper_layer(f);
	if (unlikely(has_more)) /* a fragment may end anywhere */
		f->events &= ~KON_EVENT(KON_MALFORMED);
}

/* Tell the upper layer of IPv6; extension headers and all others are KON_OTHER_IP. */
static __always_inline enum kon_protocol ipv6_protocol(__u8 next)
{
	if (likely(next == IPPROTO_TCP))
		return KON_TCP;
	switch (next) {
	case IPPROTO_UDP:
		return KON_UDP;
	case IPPROTO_ICMPV6:
		return KON_ICMPV6;
	}
	return KON_OTHER_IP;
}

/*
 * Walk the extension headers, the first of which is at `offset` and of the type f->number, and judge the upper layer.
 *
 * Between two headers there is no pointer, only the offset: so to the verifier all ways through one header are one at
 * the next.
 */
static __always_inline void ipv6_extensions(struct frame *f, __u64 offset)
{
	__u32 has_more = 0;

#pragma clang loop unroll(disable)
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		struct ipv6_extension *extension;
		__u32 bytes = 8;
		__u8 type = f->number;

		f->protocol = ipv6_protocol(type);
		if (f->protocol != KON_OTHER_IP)
			break;
		if (type != IPPROTO_HOPOPTS && type != IPPROTO_ROUTING && type != IPPROTO_DSTOPTS &&
		    type != IPPROTO_AH && type != IPPROTO_FRAGMENT)
			break;
		if (offset > MAX_HEADERS_BYTES)
			return;
		f->at = extension = f->data + offset;
		if (f->rest < bytes) {
			f->events |= KON_EVENT(KON_MALFORMED);
			return;
		}
		if (!is_readable(f, bytes))
			return;
		f->number = extension->next_header;
		if (type == IPPROTO_FRAGMENT) {
			if (extension->fragment_offset & ntohs_const(0xfff8)) {
				/* not the first fragment: what follows is payload, not a header */
				f->protocol = ipv6_protocol(f->number);
				return;
			}
			has_more |= extension->fragment_offset & ntohs_const(1);
		} else {
			bytes = type == IPPROTO_AH ? (extension->length + 2) * 4 : (extension->length + 1) * 8;
		}
		if (f->rest < bytes) {
			f->events |= KON_EVENT(KON_MALFORMED);
			return;
		}
		f->rest -= bytes;
		offset += bytes;
	}
	f->protocol = ipv6_protocol(f->number);
	if (offset > MAX_HEADERS_BYTES)
		return;
	f->at = f->data + offset;
	upper_layer(f);
	if (has_more) /* a fragment may end anywhere */
		f->events &= ~KON_EVENT(KON_MALFORMED);
}

/*
 * Rare work is done by global functions: the verifier looks at each once (kernel 5.6), and not in every state its
 * caller can be in. So their arguments are numbers, and what they have found is one, too.
 */
static __always_inline __u64 pack(const struct frame *f)
{
	return f->events | (__u64)f->number << 8 | (__u64)f->protocol << 16 | (__u64)f->version << 24 |
	       (__u64)f->upper << 32 | (__u64)f->network << 48;
}

static __always_inline void unpack(struct frame *f, __u64 found)
{
	f->events = found & 0xff;
	f->number = found >> 8;
	f->protocol = found >> 16 & 0xff;
	f->version = found >> 24;
	f->upper = found >> 32 & 0xffff;
	f->network = found >> 48;
}

/* Define the function that finishes a frame left KON_EXTENDED: `found`, packed, is what is known of it so far. */
#define KON_DEFINE_EXTENSIONS(name, type)                                                                              \
	__attribute__((noinline)) __u64 name(type *context, __u64 found, __u32 offset, __u32 rest)                     \
	{                                                                                                              \
		struct frame f = {                                                                                     \
			.data = (void *)(long)context->data,                                                           \
			.end = (void *)(long)context->data_end,                                                        \
			.rest = rest,                                                                                  \
		};                                                                                                     \
		unpack(&f, found & ~(__u64)KON_EXTENDED);                                                              \
		ipv6_extensions(&f, offset);                                                                           \
		return pack(&f);                                                                                       \
	}

_Static_assert(MAX_HEADERS_BYTES < 1 << 16, "an offset has 16 bits in what is packed");
_Static_assert(KON_EXTENDED >= 1 << KON_EVENTS && KON_HIDDEN <= 0xff, "all that are no events have bits of their own");

static __always_inline void ipv6(struct frame *f)
{
	struct ipv6_header *ip = f->at;
	__u64 payload;

	f->protocol = KON_OTHER_IP;
	if (!is_readable(f, sizeof(*ip)))
		return;
	if (unlikely(ip->version_class_flow[0] >> 4 != 6)) {
		f->events |= KON_EVENT(KON_MALFORMED);
		return;
	}
	f->version = 6;
	f->network = f->at - f->data;
	f->number = ip->next_header;
	f->protocol = ipv6_protocol(f->number);
	payload = ntohs(ip->payload_length);
	f->at = ip + 1;
	f->rest -= sizeof(*ip);
	/* A jumbogram (RFC 2675) says its length in a hop-by-hop option, BIG TCP not always anywhere. */
	if (unlikely(payload == 0 && (f->number == IPPROTO_HOPOPTS || f->rest > MAX_IP_BYTES)))
		payload = f->rest;
	if (unlikely(payload > f->rest)) {
		f->events |= KON_EVENT(KON_MALFORMED);
		return;
	}
	f->trailer = f->rest - payload;
	f->rest = payload;
	if (likely(f->protocol != KON_OTHER_IP))
		upper_layer(f);
	else
		f->events |= KON_EXTENDED;
}

/* Read the Ethernet header and its VLAN tags; return the type of what follows, 0 where the frame is too short. */
static __always_inline __u32 ethernet(struct frame *f)
{
	struct ethernet_header *header = f->at;
	__u32 type;

	if (!is_readable(f, sizeof(*header)))
		return 0;
	if (unlikely(header->destination[0] & 1))
		f->events |= header->destination[0] == 0xff && header->destination[1] == 0xff &&
					     header->destination[2] == 0xff && header->destination[3] == 0xff &&
					     header->destination[4] == 0xff && header->destination[5] == 0xff
				     ? KON_EVENT(KON_BROADCAST)
				     : KON_EVENT(KON_MULTICAST);
	type = header->type;
	f->at = header + 1;
	f->rest -= sizeof(*header);
#pragma clang loop unroll(full)
	for (int i = 0; i < MAX_VLAN_TAGS; i++) {
		struct vlan_tag *tag = f->at;

		if (likely(type != ntohs_const(ETHERTYPE_VLAN) && type != ntohs_const(ETHERTYPE_QINQ)))
			break;
		if (!is_readable(f, sizeof(*tag)))
			return 0;
		type = tag->type;
		f->at = tag + 1;
		f->rest -= sizeof(*tag);
	}
	return type;
}

/* Tell IPv4 from IPv6 where no Ethernet header does; return the type one would have said. */
static __always_inline __u32 raw_ip(struct frame *f)
{
	__u8 *version = f->at;

	if (!is_readable(f, sizeof(*version)))
		return 0;
	switch (*version >> 4) {
	case 4:
		return ntohs_const(ETHERTYPE_IPV4);
	case 6:
		return ntohs_const(ETHERTYPE_IPV6);
	}
	return 0;
}

/* The headers of most frames there are: IPv4 without options, TCP, no tag. */
struct common_headers {
	struct ethernet_header ethernet;
	struct ipv4_header ip;
	struct tcp_header tcp;
} __attribute__((packed));

#define COMMON_UPPER (sizeof(struct ethernet_header) + sizeof(struct ipv4_header))

/*
 * Read a frame if it is a common one: whole, well-formed, to one receiver. Return whether it was; if not, nothing is
 * known of it. It comes to what the way through all headers comes to, in half the instructions.
 */
static __always_inline int read_common(struct frame *f, void *data, void *end, __u64 length)
{
	struct common_headers *h = data;
	__u32 total, header;

	if ((void *)(h + 1) > end)
		return 0;
	if (h->ethernet.type != ntohs_const(ETHERTYPE_IPV4) || h->ethernet.destination[0] & 1)
		return 0;
	if (h->ip.protocol != IPPROTO_TCP || h->ip.version_ihl != 0x45 || h->ip.fragment & ntohs_const(0x3fff))
		return 0;
	total = ntohs(h->ip.total_length);
	header = h->tcp.data_offset >> 4 << 2;
	if (header < sizeof(h->tcp) || header + sizeof(h->ip) > total || total + sizeof(h->ethernet) > length)
		return 0;
	*f = (struct frame){
		.events = h->tcp.flags & KON_TCP_EVENTS,
		.protocol = KON_TCP,
		.version = 4,
		.number = IPPROTO_TCP,
		.network = sizeof(h->ethernet),
		.trailer = length - sizeof(h->ethernet) - total,
		.upper = COMMON_UPPER,
	};
	return 1;
}

/*
 * Read a frame of which the linear buffer from `data` to `end` is readable, and `length` bytes are there. Where that
 * leaves KON_EXTENDED, `at` and `rest` are for the function that KON_DEFINE_EXTENSIONS has made.
 */
static __always_inline void read_frame(struct frame *f, void *data, void *end, __u64 length, int is_raw_ip)
{
	__u32 type;

	*f = (struct frame){.data = data, .at = data, .end = end, .rest = length};
	f->protocol = KON_OTHER;
	type = is_raw_ip ? raw_ip(f) : ethernet(f);
	f->events = forget(f->events, length);
	if (likely(type == ntohs_const(ETHERTYPE_IPV4)))
		ipv4(f);
	else if (type == ntohs_const(ETHERTYPE_IPV6))
		ipv6(f);
	else if (type == ntohs_const(ETHERTYPE_ARP))
		f->protocol = KON_ARP;
}

#endif
