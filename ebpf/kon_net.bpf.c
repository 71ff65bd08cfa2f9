// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Count what crosses an interface. Every packet passes, whatever it is.
 *
 * kon_xdp_ingress  at the driver's receive path (XDP; native, or generic where the driver has none)
 * kon_xdp_frags    the same for drivers whose frames may come in several pieces (Linux 5.18): jumbo frames
 * kon_tc_egress    where the stack hands frames to the device (TCX; clsact runs the same program on older kernels)
 */
#include "kon_count.h"

SEC("xdp")
int kon_xdp_ingress(struct xdp_md *context)
{
	struct frame f = {};
	struct burst b = {};

	count_ingress(context, 0, &f, &b);
	return XDP_PASS;
}

SEC("xdp.frags")
int kon_xdp_frags(struct xdp_md *context)
{
	struct frame f = {};
	struct burst b = {};

	count_ingress(context, 1, &f, &b);
	return XDP_PASS;
}

SEC("tc")
int kon_tc_egress(struct __sk_buff *skb)
{
	struct frame f = {};
	struct burst b = {};

	count_egress(skb, &f, &b);
	return TCX_NEXT;
}

char _license[] SEC("license") = "Dual MIT/GPL";
