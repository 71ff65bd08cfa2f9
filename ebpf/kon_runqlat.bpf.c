// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Measure how long tasks that could run wait for a CPU: from their waking, or from the moment another task took their
 * place, until they run.
 *
 * kon_rq_wakeup    a sleeping task became runnable
 * kon_rq_new       a task was made
 * kon_rq_switch    one task leaves a CPU, another takes it
 *
 * When a wait began stands in a table with a place for each pid: a plain store and a plain load, no lock, no
 * allocation. All three run inside of the scheduler, some hundred thousand times a second on a busy machine; a hash map
 * would take two of its locks there for each wait, and task storage would allocate under the run queue's lock.
 *
 * The lock orders the accesses too: a task is made runnable, and then chosen, under the lock of its run queue.
 */
#include "kon_runqlat.h"

/*
 * The table: 2^16 places, 512 KiB. A pid has at most 22 bits (PID_MAX_LIMIT): the lower 16 choose the place, the upper
 * 6 stand in it, below the time. So two tasks that meet in one place, which takes pids 65536 apart, are told apart: the
 * later one has it, the other's wait is missed, and counted so.
 */
#define PLACE_BITS 16
#define TAG_BITS 6
#define TAG_MASK ((1 << TAG_BITS) - 1)

/* A thread pool's pids follow each other: the places of neighbours are a cache line apart. */
#define LINE_BITS 3

struct task_struct {
	int pid;
	unsigned int __state; /* 0: TASK_RUNNING */
} KON_CORE;

struct task_struct___before_5_14 {
	volatile long state;
} KON_CORE;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << PLACE_BITS);
	__type(key, __u32);
	__type(value, __u64);
} began SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* set at load to the number of CPUs */
	__type(key, __u32);
	__type(value, struct kon_runqlat_row);
} rows SEC(".maps");

static __always_inline __u64 *place_of(__u32 pid)
{
	__u32 spread = pid << LINE_BITS | (pid & ((1 << PLACE_BITS) - 1)) >> (PLACE_BITS - LINE_BITS);
	__u32 place = spread & ((1 << PLACE_BITS) - 1);

	return bpf_map_lookup_elem(&began, &place);
}

static __always_inline __u64 stamp(__u32 pid, __u64 now)
{
	return now << TAG_BITS | (pid >> PLACE_BITS & TAG_MASK); /* the clock's 58 bits last nine years after boot */
}

static __always_inline int is_stamp_of(__u32 pid, __u64 found)
{
	return found && (found & TAG_MASK) == (pid >> PLACE_BITS & TAG_MASK);
}

/* TASK_RUNNING says that a task wants to run, not that it does. */
static __always_inline int wants_to_run(struct task_struct *task)
{
	struct task_struct___before_5_14 *old = (void *)task;

	return (KON_HAS_FIELD(task->__state) ? task->__state : old->state) == 0;
}

static __always_inline void wake(struct task_struct *task)
{
	__u32 pid = task->pid;
	__u64 *place = place_of(pid);

	/* A task that waits already is also woken where it was preempted on its way to sleep: it goes on waiting. */
	if (place && !is_stamp_of(pid, *place))
		*place = stamp(pid, bpf_ktime_get_ns());
}

SEC("tp_btf/sched_wakeup")
int kon_rq_wakeup(unsigned long long *ctx)
{
	wake((struct task_struct *)ctx[0]);
	return 0;
}

SEC("tp_btf/sched_wakeup_new")
int kon_rq_new(unsigned long long *ctx)
{
	wake((struct task_struct *)ctx[0]);
	return 0;
}

/* Begin the wait of a task that is put aside; forget a wake-up it had while it ran. */
static __always_inline void leave(__u32 pid, int is_waiting, __u64 now)
{
	__u64 *place = place_of(pid);

	if (!place)
		return;
	if (is_waiting)
		*place = stamp(pid, now);
	else if (is_stamp_of(pid, *place))
		*place = 0;
}

/* Plain increments: a row belongs to one CPU, whose interrupts are off while it switches tasks. */
static __always_inline void enter(__u32 pid, __u64 now)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct kon_runqlat_row *row = bpf_map_lookup_elem(&rows, &cpu);
	__u64 *place = place_of(pid);
	__u64 ns;
	__u32 bucket;

	if (!row || !place)
		return;
	if (!is_stamp_of(pid, *place)) {
		row->missed++;
		return;
	}
	ns = kon_elapsed_ns(*place >> TAG_BITS, now);
	*place = 0;
	bucket = kon_latency_bucket(ns);
	if (bucket < KON_LATENCY_BUCKETS)
		row->wait.bucket[bucket]++;
	row->wait.sum_ns += ns;
}

/* Arguments: preempt, prev, next (and prev's state, since 5.18). Each CPU's idle task, pid 0, neither waits nor counts.
 */
SEC("tp_btf/sched_switch")
int kon_rq_switch(unsigned long long *ctx)
{
	struct task_struct *prev = (struct task_struct *)ctx[1];
	struct task_struct *next = (struct task_struct *)ctx[2];
	__u32 leaving = prev->pid, entering = next->pid;
	/* Who is preempted stays runnable whatever its state says: it may have been about to sleep (__schedule). */
	int is_waiting = ctx[0] || wants_to_run(prev);
	__u64 now = 0;

	if (entering || is_waiting)
		now = bpf_ktime_get_ns();
	if (leaving)
		leave(leaving, is_waiting, now);
	if (entering)
		enter(entering, now);
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
