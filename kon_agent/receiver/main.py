"""The receiver's process: what it needs is put together here, run until a signal, and taken apart in order.

At the end: reading stops, what has been taken in is committed and acknowledged, the agents are told, the
store closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from kon_agent.config.receiver import ReceiverConfig
from kon_agent.config.server import ServerAddress, parse_listen
from kon_agent.errors import ConfigError
from kon_agent.linux.notify import notify
from kon_agent.receiver import pki
from kon_agent.receiver.batch import Batch, Loss, Outcome
from kon_agent.receiver.committer import Committer
from kon_agent.receiver.identity import Gate, load_authority, load_tokens
from kon_agent.receiver.store import Store
from kon_agent.receiver.transport import Endpoint, Report, configure
from kon_agent.wire import kon_agent_pb2 as pb

log = logging.getLogger(__name__)


def run(config: ReceiverConfig, is_verbose: bool = False) -> None:
    """Accept agents until SIGTERM or SIGINT.

    Args:
        is_verbose: print a line for every batch on standard output.

    Raises:
        KonError: it cannot start.
    """
    logging.getLogger("quic").setLevel(logging.ERROR)  # aioquic says at info what ours say better
    asyncio.run(_serve(config, _print_summary if is_verbose else _say_nothing))


async def _serve(config: ReceiverConfig, report: Report) -> None:
    address = _listen_address(config.listen)
    gate = _gate(config)
    store = Store(Path(config.store))
    try:
        cert, key = _certificate(config)
        committer = Committer(store)
        endpoint = Endpoint(address, configure(cert, key), gate, committer, report)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        _welcome(endpoint, config, gate)
        committer.crashed.add_done_callback(lambda _: stop.set())
        await stop.wait()
        notify("STOPPING=1")
        endpoint.stop_reading()
        await committer.close()
        endpoint.close()
        if committer.crashed.done():
            await committer.crashed  # raises what went wrong
    finally:
        store.close()


def _welcome(endpoint: Endpoint, config: ReceiverConfig, gate: Gate) -> None:
    if gate.is_open:
        log.warning("any agent is accepted: restrict it with --client-ca or --token-file")
    print(f"listening on {endpoint.address}, storing in {config.store}", file=sys.stderr, flush=True)
    notify("READY=1")


def _listen_address(text: str) -> ServerAddress:
    try:
        return parse_listen(text)
    except ValueError as err:
        raise ConfigError(f"listen: {err}") from err


def _gate(config: ReceiverConfig) -> Gate:
    authority = load_authority(Path(config.client_ca)) if config.client_ca else None
    tokens = load_tokens(Path(config.token_file)) if config.token_file else None
    return Gate(authority, tokens)


def _certificate(config: ReceiverConfig) -> tuple[Path, Path]:
    """Return the server's certificate and key; without any, some made once, beside the store."""
    if config.cert and config.key:
        return Path(config.cert), Path(config.key)
    if config.cert or config.key:
        given, missing = ("cert", "key") if config.cert else ("key", "cert")
        raise ConfigError(f"{given} is given without {missing}: give both, or neither to have them made")
    folder = Path(config.store).absolute().parent / "pki"
    if not (folder / "server.pem").exists():
        pki.init(folder, [])
        log.warning("made a certificate authority and a server certificate in %s", folder)
    log.info("agents verify this receiver with tls.ca: %s", folder / "ca.pem")
    return folder / "server.pem", folder / "server.key"


def summary(batch: Batch, outcome: Outcome, latency_s: float) -> str:
    """Return a batch in one line: agent, records per plugin, what became of them, time until durable."""
    counts: dict[str, int] = {}
    for segment in batch.segments:
        counts[segment.plugin] = counts.get(segment.plugin, 0) + len(segment.metrics)
    plugins = ", ".join(f"{plugin} {count}" for plugin, count in counts.items()) or "no records"
    lost = _lost(batch.losses)
    rejected = sum(each.count for each in batch.rejections)
    parts = [f"{outcome.stored} stored", f"{outcome.duplicates} duplicates"]
    parts += [f"{rejected} rejected"] if rejected else []
    parts += [f"lost: {lost}"] if lost else []
    return f"{batch.agent_id} {plugins} · {', '.join(parts)}, {latency_s * 1000:.1f} ms"


def _lost(losses: Iterable[Loss]) -> str:
    counts: dict[str, int] = {}
    for loss in losses:
        reason = pb.LossReason.Name(loss.reason).lower()
        counts[reason] = counts.get(reason, 0) + loss.count
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())


def _print_summary(batch: Batch, outcome: Outcome, latency_s: float) -> None:
    with contextlib.suppress(BrokenPipeError):  # who read along has gone; the work goes on
        print(f"{time.strftime('%H:%M:%S')} {summary(batch, outcome, latency_s)}", flush=True)


def _say_nothing(batch: Batch, outcome: Outcome, latency_s: float) -> None:
    pass
