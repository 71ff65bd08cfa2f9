/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * What kon_tcp.bpf.c and user space share. kon_agent/bpf/tcp.py mirrors every number here; a unit test reads this file
 * and holds the two together, and loading checks the sizes of the maps once more.
 *
 * rows: one row per possible CPU; a value is the sum over them. Everything counts from the load of the object on.
 */
#ifndef KON_TCP_H
#define KON_TCP_H

/* Why a connection attempt of ours came to nothing. */
enum kon_tcp_failure {
	KON_FAILED_REFUSED = 0, /* answered with a reset, or ICMP port unreachable: ECONNREFUSED */
	KON_FAILED_TIMEOUT = 1, /* no answer to any SYN: ETIMEDOUT */
	KON_FAILED_RESET = 2, /* ECONNRESET: a reset after a simultaneous open's SYN */
	KON_FAILED_UNREACHABLE = 3, /* ICMP said so: EHOSTUNREACH, ENETUNREACH */
	KON_FAILED_ABANDONED = 4, /* no error: its program closed it first, or no local port was free */
	KON_FAILED_OTHER = 5, /* any other error */
	KON_FAILURES = 6,
};

/* Why an established connection ended without a proper close. */
enum kon_tcp_abort {
	KON_ABORTED_RESET = 0, /* the peer's reset: ECONNRESET, or EPIPE after its FIN */
	KON_ABORTED_TIMEOUT = 1, /* retransmissions or keepalives went unanswered: ETIMEDOUT */
	KON_ABORTED_UNREACHABLE = 2, /* the same, and ICMP said why: EHOSTUNREACH, ENETUNREACH */
	KON_ABORTED_LOCAL = 3, /* reset by this end: linger time 0, data left unread, or never accepted */
	KON_ABORTED_OTHER = 4, /* any other error */
	KON_ABORTS = 5,
};

enum kon_tcp_retransmit {
	KON_RETRANSMIT_SYN = 0, /* SYN and SYN+ACK */
	KON_RETRANSMIT_DATA = 1, /* everything after the handshake, FIN included */
	KON_RETRANSMITS = 2,
};

/*
 * Both histograms are of microseconds, rounded up, and have the bounds 2^6 … 2^26: 64 µs, a local network's least, to
 * 67 s, beyond what five retransmitted SYNs take (1 + 2 + 4 + 8 + 16 + 32 s). The last bucket has no bound.
 */
#define KON_TCP_FIRST_BOUND 6 /* log2 of microseconds */
#define KON_TCP_BUCKETS 22

struct kon_tcp_histogram {
	__u64 sum; /* connect: nanoseconds; rtt: microseconds */
	__u64 bucket[KON_TCP_BUCKETS]; /* each alone, not cumulative */
};

struct kon_tcp_row {
	__u64 opened;
	__u64 accepted;
	__u64 closed;
	__u64 failed[KON_FAILURES];
	__u64 aborted[KON_ABORTS]; /* part of closed */
	__u64 retransmits[KON_RETRANSMITS];
	__u64 resets_sent;
	__u64 resets_received;
	struct kon_tcp_histogram connect;
	struct kon_tcp_histogram rtt;
} __attribute__((aligned(64)));

struct kon_tcp_settings {
	__u32 cpus;
	__u32 netns; /* count what happens in this network namespace only (its inode number); 0: in all */
};

_Static_assert(sizeof(struct kon_tcp_row) == 512, "a row is eight cache lines; tcp.py: ROW_BYTES");
_Static_assert(sizeof(struct kon_tcp_settings) == 8, "tcp.py: SETTINGS_BYTES");

#endif
