// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * kon_net.bpf.c, and flows besides: programs that take the place of kon_net's on their links. At load they are given
 * kon_net's maps `counters` and `interfaces`, so that the totals go on, and flows and totals are of the same packets.
 */
#include "kon_flows_count.h"

static __always_inline void ingress(struct xdp_md *context, int has_pieces)
{
	struct kon_interface interface;
	struct frame f = {}; /* the compiler may read it early, the verifier refuses that */
	struct burst b = {};

	interface = count_ingress(context, has_pieces, &f, &b);
	if (interface.ifindex)
		kon_flow_xdp(context, flow_headers(&f), flow_what(&f, interface, KON_INGRESS), b.packets, bytes_of(&b));
}

SEC("xdp")
int kon_xdp_ingress(struct xdp_md *context)
{
	ingress(context, 0);
	return XDP_PASS;
}

SEC("xdp.frags")
int kon_xdp_frags(struct xdp_md *context)
{
	ingress(context, 1);
	return XDP_PASS;
}

SEC("tc")
int kon_tc_egress(struct __sk_buff *skb)
{
	struct kon_interface interface;
	struct frame f = {}; /* the compiler may read it early, the verifier refuses that */
	struct burst b = {};

	interface = count_egress(skb, &f, &b);
	if (interface.ifindex)
		kon_flow_tc(skb, flow_headers(&f), flow_what(&f, interface, KON_EGRESS), b.packets, bytes_of(&b));
	return TCX_NEXT;
}

char _license[] SEC("license") = "Dual MIT/GPL";
