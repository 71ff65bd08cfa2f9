// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* What tests/bench/packet_cost.py compares our programs with. */
#include "kon_types.h"

struct {
	__uint(type, 1); /* BPF_MAP_TYPE_HASH */
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u64);
} packets SEC(".maps");

static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, __u64 flags) = (void *)2;

/* The least an XDP program can do. */
SEC("xdp")
int kon_empty(__attribute__((unused)) struct xdp_md *context)
{
	return XDP_PASS;
}

/* What the agent in Go did: look the packet key up in a hash map, and add one to it atomically. It counted no bytes. */
SEC("xdp")
int kon_original(__attribute__((unused)) struct xdp_md *context)
{
	__u32 key = 0;
	__u64 one = 1, *count = bpf_map_lookup_elem(&packets, &key);

	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&packets, &key, &one, 0);
	return XDP_PASS;
}

char _license[] SEC("license") = "Dual MIT/GPL";
