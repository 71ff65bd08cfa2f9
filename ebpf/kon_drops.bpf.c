// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Count the packets the kernel drops, by the reason it gives.
 *
 * kon_drops    kfree_skb: a packet is let go of that has not reached where it was meant to go
 *
 * The end of a packet that has served its purpose is another tracepoint (consume_skb) and not counted.
 */
#include "kon_types.h"
#include "kon_core.h"
#include "kon_drops.h"

enum skb_drop_reason {
	SKB_NOT_DROPPED_YET = 0,
};

/* kfree_skb's arguments since 6.11, and since 5.17; before, there were the packet and the location alone. */
typedef void (*btf_trace_kfree_skb___socket)(void *, struct sk_buff *, void *, enum skb_drop_reason, struct sock *);
typedef void (*btf_trace_kfree_skb___reason)(void *, struct sk_buff *, void *, enum skb_drop_reason);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* possible CPUs, set by the loader */
	__type(key, __u32);
	__type(value, struct kon_drops_row);
} rows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kon_drops_settings);
} settings SEC(".maps");

static __always_inline __u32 column_of(__u32 reason)
{
	__u32 subsystem = reason >> KON_SUBSYSTEM_SHIFT;

	if (!subsystem)
		return reason < KON_CORE_REASONS ? reason : KON_OTHER_COLUMN;
	if (subsystem <= KON_OTHER_COLUMN - KON_CORE_REASONS)
		return KON_CORE_REASONS + subsystem - 1;
	return KON_OTHER_COLUMN;
}

/*
 * The packet's network namespace: that of the socket it was for, else of the device it is at, else of the socket it
 * came from; 0 where it has none of them. The order matters: behind a veth a packet still has its sender's socket, of
 * another namespace, and in a UDP socket's queue it has something else where its device was (skb->dev_scratch).
 */
static __always_inline __u32 netns_of(unsigned long long *ctx, const struct sk_buff *skb)
{
	__u32 netns = 0;

	if (KON_HAS_TYPE(btf_trace_kfree_skb___socket) && !kon_is_null(ctx, 3))
		netns = kon_netns_of_sock((const struct sock *)ctx[3]);
	if (!netns)
		netns = kon_netns_of_device(skb->dev);
	if (!netns)
		netns = kon_netns_of_sock(skb->sk);
	return netns;
}

/* kfree_skb(skb, location[, reason[, rx_sk]]) */
SEC("tp_btf/kfree_skb")
int kon_drops(unsigned long long *ctx)
{
	const struct sk_buff *skb = (const struct sk_buff *)ctx[0];
	__u32 zero = 0, cpu = bpf_get_smp_processor_id(), reason = 0;
	struct kon_drops_settings *wanted = bpf_map_lookup_elem(&settings, &zero);
	struct kon_drops_row *row;

	if (!wanted || (wanted->netns && wanted->netns != netns_of(ctx, skb)))
		return 0;
	row = bpf_map_lookup_elem(&rows, &cpu);
	if (!row)
		return 0;
	if (KON_HAS_TYPE(btf_trace_kfree_skb___socket) || KON_HAS_TYPE(btf_trace_kfree_skb___reason))
		reason = (__u32)ctx[2];
	KON_ADD(row->packets[column_of(reason)], 1);
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
