/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * What kon_runqlat.bpf.c and user space share; kon_agent/bpf/runqlat.py mirrors it. One row per CPU: the waits of the
 * tasks that then ran on it.
 */
#ifndef KON_RUNQLAT_H
#define KON_RUNQLAT_H

#include "kon_latency.h"

struct kon_runqlat_row {
	struct kon_latency wait;
	__u64 missed; /* tasks that ran and whose wait's beginning is not known */
} __attribute__((aligned(64)));

_Static_assert(sizeof(struct kon_runqlat_row) == 192, "runqlat.py: ROW_BYTES");

#endif
