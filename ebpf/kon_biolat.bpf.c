// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Measure how long block devices take to answer: from the moment a request is given to the driver until it is done.
 *
 * kon_bio_issue    a request is given to the driver; given once more (requeued), it begins anew
 * kon_bio_done     a request is done, or the first part of it
 *
 * Devices that pass their requests on before there is a request (dm, md, zram, nvme's multipath head) are not seen; the
 * disks below them are.
 *
 * Linux 5.12 or later: before, the programs cannot compare and swap, and before 5.11 the tracepoints' first argument is
 * the queue. An older kernel refuses the object for the former and so never comes to misread the latter.
 */
#include "kon_biolat.h"

#define MAX_IN_FLIGHT 8192 /* requests at once, of all devices: 640 KiB; a fast NVMe disk has some hundred */

#define REQ_OP_MASK                                                                                                    \
	0xff /* linux/blk_types.h; the operations' numbers are part of no interface, but these never moved */
#define REQ_OP_READ 0
#define REQ_OP_WRITE 1

struct gendisk {
	int major;
	int first_minor;
} KON_CORE;

struct request_queue {
	struct gendisk *disk; /* since 5.15 */
} KON_CORE;

struct request {
	struct request_queue *q;
	__u32 cmd_flags;
} KON_CORE;

struct request___before_5_17 {
	struct gendisk *rq_disk;
} KON_CORE;

struct devices {
	__u32 number[KON_DEVICES]; /* 0: free; claimed in order, never given back */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_IN_FLIGHT);
	__type(key, __u64); /* the request's address: it stays the same until it is done */
	__type(value, __u64);
} issued SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct devices);
} devices SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kon_biolat_settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, KON_SLOTS); /* set at load to so many per CPU */
	__type(key, __u32);
	__type(value, struct kon_biolat_row);
} rows SEC(".maps");

/* The number of a request's whole disk; 0 where it has none: commands to a controller, or to a disk not yet set up. */
static __always_inline __u32 device_of(struct request *request)
{
	struct request___before_5_17 *old = (void *)request;
	struct gendisk *disk = KON_HAS_FIELD(old->rq_disk) ? old->rq_disk : request->q->disk;

	return disk->major << KON_MINOR_BITS | disk->first_minor;
}

/* Return the slot of a device, a new one for a new device; the last one where none is left. */
static __always_inline __u32 slot_of(__u32 device, __u32 cpus)
{
	__u32 zero = 0;
	struct devices *known = bpf_map_lookup_elem(&devices, &zero);

	if (!known)
		return KON_DEVICES;
#pragma clang loop unroll(disable)
	for (__u32 slot = 0; slot < KON_DEVICES; slot++) {
		__u32 owner = known->number[slot];

		if (!owner) {
			owner = __sync_val_compare_and_swap(&known->number[slot], 0, device);
			if (!owner) {
				__u32 first = slot * cpus;
				struct kon_biolat_row *row = bpf_map_lookup_elem(&rows, &first);

				if (row)
					row->device = device;
				return slot;
			}
		}
		if (owner == device)
			return slot;
	}
	return KON_DEVICES;
}

/* This CPU's row of the device; none for a request without one, or of one that is left out. */
static __always_inline struct kon_biolat_row *row_of(struct request *request)
{
	__u32 zero = 0, device = device_of(request), major = device >> KON_MINOR_BITS;
	struct kon_biolat_settings *wanted = bpf_map_lookup_elem(&settings, &zero);
	__u32 row;

	if (!wanted || !device || (major < 32 && wanted->excluded >> major & 1))
		return 0;
	row = slot_of(device, wanted->cpus) * wanted->cpus + bpf_get_smp_processor_id();
	return bpf_map_lookup_elem(&rows, &row);
}

SEC("tp_btf/block_rq_issue")
int kon_bio_issue(unsigned long long *ctx)
{
	struct request *request = (struct request *)ctx[0];
	__u64 key = ctx[0], now = bpf_ktime_get_ns();
	struct kon_biolat_row *row;

	if (bpf_map_update_elem(&issued, &key, &now, BPF_ANY)) {
		row = row_of(request);
		if (row)
			KON_ADD(row->missed, 1);
	}
	return 0;
}

/*
 * Atomic additions: a request may be done in a process, and an interrupt in the midst of it may bring the next one.
 * (Since 5.19 the kernel does not let a program interrupt itself; then it leaves the second one out.)
 */
SEC("tp_btf/block_rq_complete")
int kon_bio_done(unsigned long long *ctx)
{
	struct request *request = (struct request *)ctx[0];
	__u64 key = ctx[0], ns;
	__u64 *began = bpf_map_lookup_elem(&issued, &key);
	struct kon_biolat_row *row;
	__u32 operation, bucket;

	if (!began) /* given before we were there, or a further part */
		return 0;
	ns = kon_elapsed_ns(*began, bpf_ktime_get_ns());
	bpf_map_delete_elem(&issued, &key);
	row = row_of(request);
	if (!row)
		return 0;
	operation = request->cmd_flags & REQ_OP_MASK;
	if (operation != REQ_OP_READ && operation != REQ_OP_WRITE)
		operation = KON_OTHER;
	bucket = kon_latency_bucket(ns);
	if (operation < KON_OPERATIONS && bucket < KON_LATENCY_BUCKETS) {
		KON_ADD(row->latency[operation].bucket[bucket], 1);
		KON_ADD(row->latency[operation].sum_ns, ns);
	}
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
