/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * A histogram of durations, as the probes of the scheduler and of the block layer share it with user space.
 * kon_agent/bpf/latency.py mirrors it.
 *
 * Bucket i counts durations of at most 2^i microseconds (and more than the bucket before), the last one those above
 * 2^20 µs = 1.05 s. Sum and counts are exact: each duration is in one bucket, and in the sum to the nanosecond.
 */
#ifndef KON_LATENCY_H
#define KON_LATENCY_H

#include "kon_core.h"

#define KON_LATENCY_BUCKETS 22
#define KON_NS_PER_US 1000
#define KON_LATENCY_TOP_NS (1ULL << 31) /* beyond every bound, and a number of 32 bits, which are cheap to divide */

struct kon_latency {
	__u64 bucket[KON_LATENCY_BUCKETS];
	__u64 sum_ns;
};

_Static_assert(sizeof(struct kon_latency) == 184, "latency.py: LATENCY_WORDS");
_Static_assert((1ULL << (KON_LATENCY_BUCKETS - 2)) * KON_NS_PER_US < KON_LATENCY_TOP_NS, "the greatest bound");

static __always_inline __u32 kon_latency_bucket(__u64 ns)
{
	__u32 top = ns < KON_LATENCY_TOP_NS ? ns : KON_LATENCY_TOP_NS;

	/* Rounded up, for whoever is above a bound by a nanosecond is above it. */
	return kon_bucket_of((top + KON_NS_PER_US - 1) / KON_NS_PER_US, 0, KON_LATENCY_BUCKETS);
}

/* What has passed between two readings of the clock; nothing where another CPU's clock was a little ahead. */
static __always_inline __u64 kon_elapsed_ns(__u64 from, __u64 to)
{
	return to > from ? to - from : 0;
}

#endif
