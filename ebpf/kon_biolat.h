/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * What kon_biolat.bpf.c and user space share; kon_agent/bpf/biolat.py mirrors it. A slot is a device, the last slot is
 * all devices that came when the others were taken:
 *
 *     row = slot * possible CPUs + cpu
 */
#ifndef KON_BIOLAT_H
#define KON_BIOLAT_H

#include "kon_latency.h"

#define KON_DEVICES 32
#define KON_SLOTS 33
#define KON_MINOR_BITS 20 /* of a device number, as the kernel has it: MINORBITS */

enum kon_operation {
	KON_READ = 0,
	KON_WRITE = 1,
	KON_OTHER = 2, /* flush, discard, write zeroes, zones, commands passed through */
	KON_OPERATIONS = 3,
};

struct kon_biolat_row {
	struct kon_latency latency[KON_OPERATIONS];
	__u64 device; /* number of the slot's device, in its first row alone: the sum over its rows is the number */
	__u64 missed; /* requests that were not measured, because too many were in flight */
} __attribute__((aligned(64)));

struct kon_biolat_settings {
	__u32 cpus; /* possible ones */
	__u32 excluded; /* a bit for each major number whose devices are left out; of the first 32 */
};

_Static_assert(sizeof(struct kon_biolat_settings) == 8, "biolat.py: SETTINGS_BYTES");
_Static_assert(sizeof(struct kon_biolat_row) == 576, "biolat.py: ROW_BYTES");
_Static_assert(KON_SLOTS == KON_DEVICES + 1, "one more for those that have none of their own");

#endif
