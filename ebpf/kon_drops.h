/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * What kon_drops.bpf.c and user space share. kon_agent/bpf/drops.py mirrors every number here; a unit test reads this
 * file and holds the two together, and loading checks the sizes of the maps once more.
 *
 * rows: one row per possible CPU, a column per reason. A reason's upper half is the subsystem that gives it its meaning
 * (enum skb_drop_reason_subsys), 0 being the core; reasons of other subsystems share one column for each subsystem.
 * What the numbers mean differs from kernel to kernel: user space reads it from the kernel's BTF.
 *
 *     0 … 239     reasons of the core (6.18 has 128)
 *     240 … 254   subsystems 1 to 15 (6.18 has 2)
 *     255         whatever is above these
 *
 * Kernels before 5.17 give no reasons: all of theirs are in column 0, which no drop of a later one has.
 */
#ifndef KON_DROPS_H
#define KON_DROPS_H

#define KON_CORE_REASONS 240
#define KON_REASON_COLUMNS 256
#define KON_OTHER_COLUMN 255
#define KON_SUBSYSTEM_SHIFT 16 /* include/net/dropreason.h: SKB_DROP_REASON_SUBSYS_SHIFT */

struct kon_drops_row {
	__u64 packets[KON_REASON_COLUMNS];
} __attribute__((aligned(64)));

struct kon_drops_settings {
	__u32 cpus;
	__u32 netns; /* count what happens in this network namespace only (its inode number); 0: in all */
};

_Static_assert(sizeof(struct kon_drops_row) == 2048, "a row is 32 cache lines; drops.py: ROW_BYTES");
_Static_assert(sizeof(struct kon_drops_settings) == 8, "drops.py: SETTINGS_BYTES");

#endif
