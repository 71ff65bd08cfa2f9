"""Does a tap slow the path? The time a worker's publishing takes with four taps on its ring, and with none.

    python -m tests.bench.tap [ROUNDS]

One ring, its producer and its consumer in this process; four `kon-agent tap` streams, each a process of its own, that
decode and print every record (to /dev/null). Rounds with the taps running and with the taps stopped (SIGSTOP) take
turns, so that whatever else the machine does befalls both alike. A cycle publishes 130 records, 20 times a second:
twice what the busiest of our plugins (`agent`) does in its shortest period.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time

from kon_agent.cli.tap import Stream, Taps, yield_to_the_agent
from kon_agent.control_protocol import RingPlace, Tapping
from kon_agent.linux.memory import map_memory
from kon_agent.metric import Metric
from kon_agent.ring import CONSUMER_BYTES, Consumer, Producer, Tally, producer_bytes
from kon_agent.supervisor.sharedring import SharedRing
from kon_agent.wire.encode import encode_record

TAPS = 4
SIZE_BYTES = 256 * 1024  # the default
RECORDS = 130
CYCLES = 20
PERIOD_S = 0.05


def tap(fd: int) -> None:
    """Be one tap: everything `kon-agent tap` does, but for the socket it gets its rings from."""

    def ask(fds: list[int]) -> Tapping:
        fds.append(os.dup(fd))
        return Tapping(agent_id="bench", rings=[RingPlace(number=1, plugin="bench", epoch=1, size_bytes=SIZE_BYTES)])

    yield_to_the_agent()
    with open(os.devnull, "wb") as out:
        Stream(Taps(ask, lambda text: print(text, file=sys.stderr)), out, print).run()


def round_of_cycles(producer: Producer, consumer: Consumer) -> list[float]:
    """Return how long each cycle's publishing took, microseconds."""
    payloads = [encode_record(Metric("bench_value", 1.0, {"n": str(n)}), 1) for n in range(RECORDS)]
    took = []
    due_s = time.monotonic()
    for _ in range(CYCLES):
        time.sleep(max(0.0, due_s - time.monotonic()))
        due_s += PERIOD_S
        started_ns = time.perf_counter_ns()
        for payload in payloads:
            producer.publish(payload)
        took.append((time.perf_counter_ns() - started_ns) / 1000)
        while consumer.read(0) is not None:
            pass
        consumer.commit(Tally(consumer.cursor, consumer.cursor_seq, consumer.cursor_seq))
    return took


def figures(took: list[float]) -> str:
    """Return the median and the 99th percentile."""
    cuts = statistics.quantiles(took, n=100)
    return f"median {cuts[49]:7.1f} µs   p99 {cuts[98]:7.1f} µs"


def main(rounds: int) -> None:
    """Measure and print."""
    ring = SharedRing(1, "bench", SIZE_BYTES)
    producer_fd, consumer_fd = ring.consumer_fds()
    consumer = Consumer(
        map_memory(producer_fd, producer_bytes(SIZE_BYTES), writable=False),
        map_memory(consumer_fd, CONSUMER_BYTES, writable=True),
        SIZE_BYTES,
    )
    producer = ring.map_producer()
    taps = [
        subprocess.Popen([sys.executable, "-m", "tests.bench.tap", "--tap", str(ring.tap_fd)], pass_fds=[ring.tap_fd])
        for _ in range(TAPS)
    ]
    try:
        round_of_cycles(producer, consumer)  # their imports, our caches
        with_taps: list[float] = []
        without: list[float] = []
        for number in range(2 * rounds):
            is_tapped = number % 2 == 0
            for each in taps:
                each.send_signal(signal.SIGCONT if is_tapped else signal.SIGSTOP)
            (with_taps if is_tapped else without).extend(round_of_cycles(producer, consumer))
        assert all(each.poll() is None for each in taps), "a tap has ended"
    finally:
        for each in taps:
            each.kill()
            each.wait()
    ratio = statistics.median(with_taps) / statistics.median(without)
    print(f"{TAPS} taps   {figures(with_taps)}\nnone     {figures(without)}\nratio    {ratio:.3f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--tap"]:
        tap(int(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
