"""Networks that lose, delay, double, damage, reorder and swallow; and a server that takes all and says nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fault.conftest import Matrix
from tests.support.faults import IS_LONG, Case, times
from tests.support.program import Program
from tests.support.udp_proxy import CUT, Weather
from tests.support.waiting import wait_for

OUTAGE_S = 7.0  # an acknowledgement is overdue after five
MAX_IN_FLIGHT_RECORDS = 8 * 1000  # eight batches
MAX_GROWTH_BYTES = 4 * 1024 * 1024  # of the sender in an outage: what the issue allows

ALL_WEATHERS = {
    "1 % loss": Weather(loss=0.01),
    "10 % loss": Weather(loss=0.1),
    "30 % loss": Weather(loss=0.3),
    "30 % out of order": Weather(overtake=0.3),
    "30 % doubled": Weather(double=0.3),
    "10 % damaged": Weather(damage=0.1),
    "500 ms delay each way": Weather(delay_s=0.5),
    "all of it at once": Weather(loss=0.05, overtake=0.1, double=0.1, damage=0.05, delay_s=0.1),
}

SHORT = ("30 % loss", "500 ms delay each way", "all of it at once")
WEATHERS = ALL_WEATHERS if IS_LONG else {name: ALL_WEATHERS[name] for name in SHORT}


def connections(case: Case) -> int:
    """Return how often the agent has connected."""
    return case.agent.log().count("connected to ") - case.agent.log().count("not connected to ")


@pytest.mark.parametrize("name", WEATHERS)
def test_bad_weather(matrix: Matrix, name: str) -> None:
    """Handshake, records and acknowledgements come through, each record once."""
    case, proxy = matrix.case_over_proxy(f"network: {name}")
    proxy.up = proxy.down = WEATHERS[name]
    case.start()
    case.agent.wait_until_running()
    time.sleep(times(2, 20))
    assert "connected" == case.status().server.state
    made = proxy.tally["up"] + proxy.tally["down"]
    proxy.heal()
    tally = {kind: count for kind, count in proxy.tally.items() if kind not in ("up", "down") and count}
    case.line.injections = sum(tally.values()) if tally else made
    case.finish(note=f"{made} datagrams, {connections(case)} connection(s)")


WAYS = ("to the receiver", "to the agent", *(("both ways", "both ways, then all replayed") if IS_LONG else ()))


@pytest.mark.parametrize("way", WAYS)
def test_a_black_hole(matrix: Matrix, way: str) -> None:
    """Silence is noticed by the acknowledgement that does not come; what was on its way is sent again.

    Without client certificates sessions are resumed with early data: an attacker who repeats it all stores nothing.
    """
    is_replayed = way.endswith("replayed")
    case, proxy = matrix.case_over_proxy(f"silent black hole, {way}", is_open=is_replayed)
    case.start()
    case.is_up()
    replayed = 0
    for _ in range(times(1, 6)):
        if way != "to the agent":
            proxy.up = CUT
        if way != "to the receiver":
            proxy.down = CUT
        wait_for(lambda: "connected" != case.status().server.state, "the silence is noticed", OUTAGE_S + 3)
        case.wait_spooled(100)
        proxy.heal()
        case.line.injections += 1
        case.is_up(more=1)
        if is_replayed:
            replayed += proxy.replay()
    case.finish(note=f"{replayed} datagrams" if replayed else "")


def test_a_nat_forgets_us(matrix: Matrix) -> None:
    """The connection goes on from the new port: nothing is lost, nobody shakes hands again."""
    case, proxy = matrix.case_over_proxy("NAT rebinding")
    case.start()
    case.is_up()
    before = connections(case)
    for _ in range(times(3, 30)):
        case.nap(0.3)
        proxy.rebind()
        case.line.injections += 1
        case.is_up(more=1)
    again = connections(case) - before
    case.finish(note=f"{again} new handshakes")
    assert 0 == again


def test_the_local_address_changes(matrix: Matrix) -> None:
    """A new socket takes the connection over; nothing is lost, nobody shakes hands again."""
    case, _ = matrix.case_over_proxy("local address changes in flight")
    case.start()
    case.is_up()
    before = connections(case)
    here = matrix.here
    try:
        for at in range(times(1, 20)):
            case.nap(0.3)
            here = here.move(f"10.78.0.{101 + at % 2}")
            case.line.injections += 1
            case.is_up(more=1)
    finally:
        here.move(matrix.here.address)
    again = connections(case) - before
    case.finish(note=f"{again} new handshakes")


class MuteServer(Program):
    """A server that never acknowledges."""

    def __init__(self, folder: Path, pki: Path, port: int, prefix: tuple[str, ...]) -> None:
        super().__init__("mute", folder, prefix)
        self._arguments = ["tests.fault.mute_server", str(port), str(pki / "server.pem"), str(pki / "server.key")]

    def arguments(self) -> list[str]:
        return self._arguments


def test_a_receiver_that_never_acknowledges(matrix: Matrix) -> None:
    """What is in flight stays within its bound, the sender's memory too; the records go to the spool."""
    case = matrix.case("receiver never acknowledges", has_receiver=False)
    mute = MuteServer(matrix.folder, matrix.pki, case.receiver.port, tuple(matrix.here.prefix))
    matrix.stack.callback(mute.clear)
    mute.start()
    case.start()
    case.agent.wait_until_running()
    case.wait_spooled(times(200, 1000))
    before = private_bytes(case.agent.sender())
    in_flight = 0
    until = time.monotonic() + times(5, 120)
    while time.monotonic() < until:
        in_flight = max(in_flight, sum(plugin.in_flight for plugin in case.status().plugins))
        time.sleep(0.05)
    growth = private_bytes(case.agent.sender()) - before
    case.line.injections = case.agent.log().count("acknowledgement is overdue")
    mute.kill()
    case.receiver.start()
    case.finish(note=f"at most {in_flight} in flight, sender {growth / 1e6:+.1f} MB")
    assert in_flight <= MAX_IN_FLIGHT_RECORDS
    assert growth <= MAX_GROWTH_BYTES


def private_bytes(pid: int) -> int:
    """Return the memory that is a process's own."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
