// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Count how TCP connections begin, fare and end, from the kernel's own tracepoints. Nothing is changed or held up.
 *
 * kon_tcp_state    every change of a connection's state: opened, accepted, closed, failed, aborted, latency, RTT
 * kon_tcp_rtx      a segment is sent again; a SYN by its sender's state
 * kon_tcp_synack   a SYN+ACK is sent again
 * kon_tcp_rst_tx   a reset is sent
 * kon_tcp_rst_rx   a reset is received by a socket
 *
 * Connections there were before the load are seen from their next event on: they can be closed without having been
 * opened. Kernels before 6.10 report the resets a socket sends only, not those for ports nobody listens on.
 */
#include "kon_types.h"
#include "kon_core.h"
#include "kon_tcp.h"

/* include/net/tcp_states.h; the numbers are user-space interface (ss, /proc/net/tcp). */
enum {
	TCP_ESTABLISHED = 1,
	TCP_SYN_SENT = 2,
	TCP_SYN_RECV = 3,
	TCP_CLOSE = 7,
	TCP_CLOSE_WAIT = 8,
	TCP_LISTEN = 10,
};

/* include/uapi/asm-generic/errno.h */
enum {
	EPIPE = 32,
	ENETUNREACH = 101,
	ECONNRESET = 104,
	ETIMEDOUT = 110,
	ECONNREFUSED = 111,
	EHOSTUNREACH = 113,
};

enum {
	IPPROTO_TCP = 6,
};

/* Since 6.14 the tracepoint tells of a retransmission that failed, too, and has a fourth argument to say so. */
typedef void (*btf_trace_tcp_retransmit_skb)(void *, const struct sock *, const struct sk_buff *, int);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* possible CPUs, set by the loader */
	__type(key, __u32);
	__type(value, struct kon_tcp_row);
} rows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kon_tcp_settings);
} settings SEC(".maps");

/* When a socket sent its first SYN, ns; a socket that has one is an active opener. Freed with its socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u64);
} started SEC(".maps");

static __always_inline struct kon_tcp_row *row_of_cpu(void)
{
	__u32 cpu = bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&rows, &cpu);
}

/* This CPU's row; none where the namespace is not asked for. */
static __always_inline struct kon_tcp_row *row_for(__u32 netns)
{
	__u32 zero = 0;
	struct kon_tcp_settings *wanted = bpf_map_lookup_elem(&settings, &zero);

	if (!wanted || (wanted->netns && wanted->netns != netns))
		return 0;
	return row_of_cpu();
}

static __always_inline enum kon_tcp_failure failure_of(int error)
{
	switch (error) {
	case 0:
		return KON_FAILED_ABANDONED;
	case ECONNREFUSED:
		return KON_FAILED_REFUSED;
	case ETIMEDOUT:
		return KON_FAILED_TIMEOUT;
	case ECONNRESET:
		return KON_FAILED_RESET;
	case EHOSTUNREACH:
	case ENETUNREACH:
		return KON_FAILED_UNREACHABLE;
	}
	return KON_FAILED_OTHER;
}

static __always_inline enum kon_tcp_abort abort_of(int error)
{
	switch (error) {
	case 0:
		return KON_ABORTED_LOCAL;
	case ECONNRESET:
	case EPIPE:
		return KON_ABORTED_RESET;
	case ETIMEDOUT:
		return KON_ABORTED_TIMEOUT;
	case EHOSTUNREACH:
	case ENETUNREACH:
		return KON_ABORTED_UNREACHABLE;
	}
	return KON_ABORTED_OTHER;
}

static __always_inline void observe_rtt(struct kon_tcp_row *row, const struct sock *sk)
{
	struct tcp_sock *tcp = bpf_skc_to_tcp_sock(sk);
	__u64 rtt_us = tcp ? tcp->srtt_us >> 3 : 0;

	if (!rtt_us) /* nothing was ever acknowledged */
		return;
	KON_ADD(row->rtt.sum, rtt_us);
	KON_ADD(row->rtt.bucket[kon_bucket_of(rtt_us, KON_TCP_FIRST_BOUND, KON_TCP_BUCKETS)], 1);
}

static __always_inline void observe_connect(struct kon_tcp_row *row, __u64 latency_ns)
{
	__u64 latency_us = (latency_ns + 999) / 1000;

	KON_ADD(row->connect.sum, latency_ns);
	KON_ADD(row->connect.bucket[kon_bucket_of(latency_us, KON_TCP_FIRST_BOUND, KON_TCP_BUCKETS)], 1);
}

/* The handshake is over: well, or not. */
static __always_inline void end_handshake(struct kon_tcp_row *row, const struct sock *sk, int before, int state)
{
	__u64 *since = bpf_sk_storage_get(&started, sk, 0, 0);
	__u64 started_ns = since ? *since : 0;
	int is_ours = since || before == TCP_SYN_SENT; /* begun before the load, it has no beginning */

	if (since)
		bpf_sk_storage_delete(&started, sk);
	if (state == TCP_CLOSE) {
		if (is_ours) /* else a half-open one of a listener */
			KON_ADD(row->failed[failure_of(sk->sk_err)], 1);
		return;
	}
	if (is_ours) {
		KON_ADD(row->opened, 1);
		if (started_ns)
			observe_connect(row, bpf_ktime_get_ns() - started_ns);
	} else {
		KON_ADD(row->accepted, 1);
	}
	observe_rtt(row, sk);
}

static __always_inline void end_connection(struct kon_tcp_row *row, const struct sock *sk, int before)
{
	int error = sk->sk_err;

	KON_ADD(row->closed, 1);
	/* A proper close comes by way of FIN_WAIT or LAST_ACK; straight from here, this end has sent a reset. */
	if (error || before == TCP_ESTABLISHED || before == TCP_CLOSE_WAIT)
		KON_ADD(row->aborted[abort_of(error)], 1);
	observe_rtt(row, sk);
}

/* inet_sock_set_state(sk, before, after); of any protocol on top of inet sockets. */
SEC("tp_btf/inet_sock_set_state")
int kon_tcp_state(unsigned long long *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[0];
	int before = (int)ctx[1];
	int after = (int)ctx[2];
	struct kon_tcp_row *row;

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	row = row_for(kon_netns_of_sock(sk));
	if (!row)
		return 0;
	if (after == TCP_SYN_SENT) {
		__u64 *since = bpf_sk_storage_get(&started, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

		if (since)
			*since = bpf_ktime_get_ns();
	} else if (after == TCP_SYN_RECV) {
		/* a listener's child, or both ends' SYNs have crossed */
	} else if (before == TCP_SYN_SENT || before == TCP_SYN_RECV) {
		end_handshake(row, sk, before, after);
	} else if (after == TCP_CLOSE && before != TCP_LISTEN && before != TCP_CLOSE) {
		end_connection(row, sk, before);
	}
	return 0;
}

/* tcp_retransmit_skb(sk, skb[, error]) */
SEC("tp_btf/tcp_retransmit_skb")
int kon_tcp_rtx(unsigned long long *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[0];
	struct kon_tcp_row *row;

	if (KON_HAS_TYPE(btf_trace_tcp_retransmit_skb) && (int)ctx[2])
		return 0;
	row = row_for(kon_netns_of_sock(sk));
	if (!row)
		return 0;
	/* In SYN_RECV it is the SYN+ACK of a simultaneous open; a listener's is the next tracepoint's. */
	if (sk->__sk_common.skc_state == TCP_SYN_SENT || sk->__sk_common.skc_state == TCP_SYN_RECV)
		KON_ADD(row->retransmits[KON_RETRANSMIT_SYN], 1);
	else
		KON_ADD(row->retransmits[KON_RETRANSMIT_DATA], 1);
	return 0;
}

/* tcp_retransmit_synack(sk, req) */
SEC("tp_btf/tcp_retransmit_synack")
int kon_tcp_synack(unsigned long long *ctx)
{
	struct kon_tcp_row *row = row_for(kon_netns_of_sock((const struct sock *)ctx[0]));

	if (row)
		KON_ADD(row->retransmits[KON_RETRANSMIT_SYN], 1);
	return 0;
}

/* tcp_send_reset(sk, skb[, reason]); either may be missing: no socket answers for a closed port, no packet for close()
 */
SEC("tp_btf/tcp_send_reset")
int kon_tcp_rst_tx(unsigned long long *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[0];
	const struct sk_buff *skb = (const struct sk_buff *)ctx[1];
	__u32 netns = kon_is_null(ctx, 0) ? 0 : kon_netns_of_sock(sk);
	struct kon_tcp_row *row;

	if (!netns && !kon_is_null(ctx, 1) && skb)
		netns = kon_netns_of_device(skb->dev);
	row = row_for(netns);
	if (row)
		KON_ADD(row->resets_sent, 1);
	return 0;
}

/* tcp_receive_reset(sk) */
SEC("tp_btf/tcp_receive_reset")
int kon_tcp_rst_rx(unsigned long long *ctx)
{
	struct kon_tcp_row *row = row_for(kon_netns_of_sock((const struct sock *)ctx[0]));

	if (row)
		KON_ADD(row->resets_received, 1);
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
