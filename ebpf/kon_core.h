/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * What of the kernel's inside our tracing programs see, and what they share.
 *
 * Unlike kon_types.h this is no stable interface: a structure here names the few members that are read, in any order,
 * and the loader finds where they are in the running kernel by name (CO-RE; relocations are resolved from the kernel's
 * BTF). A member this kernel lacks makes only its own access fail to load, so ask KON_HAS_FIELD first where it may.
 * A name may carry a suffix `___anything`: the loader ignores it, so that two shapes of one type can be described.
 *
 * Arguments of a tp_btf program are ctx[0], ctx[1], …; the verifier knows their types, so that they are followed like
 * ordinary pointers, and a pointer that leads nowhere reads as zero.
 */
#ifndef KON_CORE_H
#define KON_CORE_H

#include "kon_types.h"

#define KON_CORE __attribute__((preserve_access_index))

/* Whether this kernel's structure has the member, as in KON_HAS_FIELD(sock->sk_protocol): a constant after loading. */
#define KON_HAS_FIELD(access) __builtin_preserve_field_info(access, 2 /* BPF_FIELD_EXISTS */)

/*
 * Whether this kernel has the type; of a tracepoint's function type `btf_trace_NAME`, whether it takes that many
 * arguments of these kinds (the first of which is none of the program's). A structure an argument points to must be
 * defined, and followed somewhere in the object: one that is not is only a name in its BTF, which is another kind.
 */
#define KON_HAS_TYPE(type) __builtin_preserve_type_info(*(type *)0, 0 /* BPF_TYPE_EXISTS */)

/*
 * Add to a counter of this CPU's row. Atomic, for a program that interrupts another on the same CPU may add to the same
 * counter; a statement, for BPF before v3 has no atomic that returns the old value.
 */
#define KON_ADD(counter, amount)                                                                                       \
	do {                                                                                                           \
		__sync_fetch_and_add(&(counter), (amount));                                                            \
	} while (0)

/* The greatest power of two's exponent not above `value`; 0 of 0. */
static __always_inline __u32 kon_log2(__u64 value)
{
	__u32 exponent = 0;

#pragma clang loop unroll(full)
	for (__u32 step = 32; step; step >>= 1) {
		if (value >> step) {
			value >>= step;
			exponent += step;
		}
	}
	return exponent;
}

/*
 * The bucket of `value` in a histogram whose bounds are 2^first, 2^(first+1), …: the first one that `value` does not
 * exceed, and buckets - 1, the one without a bound, where it exceeds them all.
 */
static __always_inline __u32 kon_bucket_of(__u64 value, __u32 first, __u32 buckets)
{
	__u32 exponent = value > 1 ? kon_log2(value - 1) + 1 : 0;
	__u32 bucket = exponent > first ? exponent - first : 0;

	return bucket < buckets ? bucket : buckets - 1;
}

enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_SK_STORAGE = 24,
};

enum {
	BPF_F_NO_PREALLOC = 1 << 0,
};

enum {
	BPF_ANY = 0,
};

enum {
	BPF_SK_STORAGE_GET_F_CREATE = 1 << 0,
};

struct sock;
struct tcp_sock;

static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static long (*const bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static __u64 (*const bpf_ktime_get_ns)(void) = (void *)5;
static void *(*const bpf_sk_storage_get)(void *map, const struct sock *sk, void *value, __u64 flags) = (void *)107;
static long (*const bpf_sk_storage_delete)(void *map, const struct sock *sk) = (void *)108;
static long (*const bpf_probe_read_kernel)(void *to, __u32 size, const void *from) = (void *)113;
static struct tcp_sock *(*const bpf_skc_to_tcp_sock)(const struct sock *sk) = (void *)137;

/*
 * Whether an argument that is a pointer is none. A comparison alone is not enough: from 6.4 to 6.12 the verifier takes
 * every argument of a tp_btf program for valid, and so takes the comparison away, and the guard of the access behind it
 * as well. To follow one that is none (tcp_send_reset's since 6.10, kfree_skb's since 6.11) is then an oops. Here the
 * value is fetched in a way the verifier cannot see through. Later kernels know better, and want the comparison, too.
 */
static __always_inline int kon_is_null(unsigned long long *ctx, __u32 argument)
{
	__u64 value = 0;

	__asm__("" : "+r"(ctx)); /* else the address made here serves the access, too, which the verifier forbids */
	bpf_probe_read_kernel(&value, sizeof(value), &ctx[argument]);
	return !value;
}

/* Networking: namespaces, sockets, packets, devices. */

struct ns_common {
	__u32 inum; /* the inode number of /proc/PID/ns/net */
} KON_CORE;

struct net {
	struct ns_common ns;
} KON_CORE;

typedef struct {
	struct net *net;
} KON_CORE possible_net_t;

struct sock_common {
	volatile __u8 skc_state;
	possible_net_t skc_net;
} KON_CORE;

struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
	int sk_err;
} KON_CORE;

struct tcp_sock {
	__u32 srtt_us; /* smoothed round trip time in eighths of a microsecond */
} KON_CORE;

struct net_device {
	possible_net_t nd_net;
} KON_CORE;

struct sk_buff {
	struct net_device *dev;
	struct sock *sk;
} KON_CORE;

/* The inode number of a socket's network namespace; 0 without a socket. Any kind: full, request or time-wait. */
static __always_inline __u32 kon_netns_of_sock(const struct sock *sk)
{
	return sk ? sk->__sk_common.skc_net.net->ns.inum : 0;
}

static __always_inline __u32 kon_netns_of_device(const struct net_device *device)
{
	return device ? device->nd_net.net->ns.inum : 0;
}

#endif
