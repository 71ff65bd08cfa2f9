/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The little of the kernel that our programs see: integer types, the two program contexts, map types and helpers.
 *
 * All of it is the kernel's stable user-space interface (include/uapi/linux/bpf.h, if_ether.h, ip.h, ipv6.h), written
 * down here so that a build needs clang and nothing of the host: no kernel headers, no libbpf-dev, no vmlinux.h.
 * The verifier rewrites accesses to the contexts, so their layout is the same on every kernel.
 */
#ifndef KON_TYPES_H
#define KON_TYPES_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;

_Static_assert(sizeof(__u16) == 2 && sizeof(__u32) == 4 && sizeof(__u64) == 8, "integer sizes");

#define SEC(name) __attribute__((section(name), used))
#define __always_inline inline __attribute__((always_inline))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* libbpf reads a map's definition from the BTF of these pointer types (libbpf, bpf_helpers.h). */
#define __uint(name, value) int(*name)[value]
#define __type(name, type) typeof(type) *name
#define __array(name, type) typeof(type) *name[]

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ntohs_const(x) ((__u16)((((x)&0xff) << 8) | ((x) >> 8)))
#define ntohs(x) __builtin_bswap16(x)
#else
#define ntohs_const(x) ((__u16)(x))
#define ntohs(x) (x)
#endif

enum bpf_map_type {
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PROG_ARRAY = 3,
};

enum {
	BPF_F_MMAPABLE = 1 << 10,
};

enum xdp_action {
	XDP_PASS = 2,
};

enum tc_action {
	TCX_NEXT = -1, /* also TC_ACT_UNSPEC, its name under clsact: go on with the next program */
};

struct xdp_md {
	__u32 data;
	__u32 data_end;
	__u32 data_meta;
	__u32 ingress_ifindex;
	__u32 rx_queue_index;
	__u32 egress_ifindex;
};

struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;
	__u32 data_end;
	__u32 napi_id;
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 data_meta;
	__u64 flow_keys;
	__u64 tstamp;
	__u32 wire_len;
	__u32 gso_segs;
	__u64 sk;
	__u32 gso_size;
};

_Static_assert(__builtin_offsetof(struct xdp_md, ingress_ifindex) == 12, "struct xdp_md");
_Static_assert(__builtin_offsetof(struct __sk_buff, data) == 76, "struct __sk_buff");
_Static_assert(__builtin_offsetof(struct __sk_buff, gso_segs) == 164, "struct __sk_buff");
_Static_assert(__builtin_offsetof(struct __sk_buff, gso_size) == 176, "struct __sk_buff");

/* Helpers are called by number (enum bpf_func_id). */
static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static __u32 (*const bpf_get_smp_processor_id)(void) = (void *)8;
static long (*const bpf_skb_pull_data)(struct __sk_buff *skb, __u32 len) = (void *)39;
static __u64 (*const bpf_xdp_get_buff_len)(struct xdp_md *context) = (void *)188;

struct ethernet_header {
	__u8 destination[6];
	__u8 source[6];
	__u16 type;
};

struct vlan_tag {
	__u16 tci;
	__u16 type;
};

struct ipv4_header {
	__u8 version_ihl;
	__u8 tos;
	__u16 total_length;
	__u16 id;
	__u16 fragment;
	__u8 ttl;
	__u8 protocol;
	__u16 checksum;
	__u8 source[4];
	__u8 destination[4];
};

struct ipv6_header {
	__u8 version_class_flow[4];
	__u16 payload_length;
	__u8 next_header;
	__u8 hop_limit;
	__u8 source[16];
	__u8 destination[16];
};

/* What every IPv6 extension header begins with; a fragment header has its offset in the second half. */
struct ipv6_extension {
	__u8 next_header;
	__u8 length;
	__u16 fragment_offset;
};

struct tcp_header {
	__u16 source;
	__u16 destination;
	__u32 sequence;
	__u32 acknowledgment;
	__u8 data_offset; /* upper half: header in words of four bytes */
	__u8 flags;
	__u16 window;
	__u16 checksum;
	__u16 urgent;
};

struct udp_header {
	__u16 source;
	__u16 destination;
	__u16 length;
	__u16 checksum;
};

_Static_assert(sizeof(struct ethernet_header) == 14, "Ethernet header");
_Static_assert(sizeof(struct ipv4_header) == 20, "IPv4 header");
_Static_assert(sizeof(struct ipv6_header) == 40, "IPv6 header");
_Static_assert(sizeof(struct tcp_header) == 20, "TCP header");
_Static_assert(sizeof(struct udp_header) == 8, "UDP header");

#endif
