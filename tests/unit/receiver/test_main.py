"""What the receiver says of a batch, and what its command line understands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kon_agent.cli.receiver import _since_ns, _time, main
from kon_agent.errors import ConfigError
from kon_agent.receiver.batch import Batch, Loss, Outcome, Segment
from kon_agent.receiver.main import summary
from kon_agent.receiver.store import Store
from kon_agent.wire import kon_agent_pb2 as pb

GOOD = pb.Metric(timestamp=1_700_000_000_123_000_000, name="load", value=0.1, labels={"core": "0"})
NOW_NS = 1_700_000_000_000_000_000


def batch(losses: list[Loss], rejections: list[Loss]) -> Batch:
    segments = [Segment("cpu", 5, 0, [GOOD] * 2), Segment("memory", 6, 0, [GOOD]), Segment("cpu", 5, 9, [GOOD])]
    return Batch("edge-1", 1, segments, losses, rejections, 100, 0.0)


def test_a_batch_is_one_line() -> None:
    """Records per plugin, what became of them, and how long it took."""
    expected = "edge-1 cpu 3, memory 1 · 3 stored, 1 duplicates, 9.2 ms"
    assert expected == summary(batch([], []), Outcome(3, 1), 0.00921)


def test_what_was_lost_is_in_the_line() -> None:
    """Losses are summed by reason, rejections counted; a batch may hold nothing else."""
    losses = [Loss("cpu", 5, 20, 2, pb.RING_FULL), Loss("cpu", 5, 30, 3, pb.RING_FULL)]
    line = summary(batch(losses, [Loss("cpu", 5, 8, 1, pb.REJECTED)]), Outcome(4, 0), 0.0)
    assert line.endswith("4 stored, 0 duplicates, 1 rejected, lost: ring_full 5, 0.0 ms")
    nothing = Batch("edge-1", 1, [], losses, [], 1, 0.0)
    assert summary(nothing, Outcome(0, 0), 0.0).startswith("edge-1 no records · 0 stored")


def test_since_is_a_duration_or_a_time() -> None:
    """`5m` counts back from now; a time is exact, with or without its zone's letter."""
    assert NOW_NS - 300 * 10**9 == _since_ns("5m", NOW_NS)
    assert NOW_NS == _since_ns("2023-11-14T22:13:20Z", NOW_NS + 1)
    assert NOW_NS + 500_000_000 == _since_ns("2023-11-14T23:13:20.5+01:00", NOW_NS)
    with pytest.raises(ConfigError, match="neither a duration"):
        _since_ns("yesterday", NOW_NS)


def test_any_time_stamp_can_be_shown() -> None:
    """An agent's clock may be off by all of time."""
    assert _time(NOW_NS + 7_000_000).endswith(".007")
    assert f"{-(2**63)} ns" == _time(-(2**63)) or _time(-(2**63)).startswith("1677-")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store.db"
    store = Store(path)
    store.commit([batch([Loss("cpu", 5, 2, 5, pb.EXPIRED)], [])])
    store.close()
    return path


def test_query_prints_json_lines(store: Path) -> None:
    """One object per record and line, with exactly the keys of the contract."""
    done = CliRunner().invoke(main, ["query", "--store", str(store), "--json", "--plugin", "memory"])
    [line] = done.output.splitlines()
    record = {"agent": "edge-1", "plugin": "memory", "epoch": f"{6:016x}", "seq": 0, "ts_ns": GOOD.timestamp}
    assert record | {"name": "load", "value": 0.1, "labels": {"core": "0"}} == json.loads(line)


def test_ledger_prints_json(store: Path) -> None:
    """One array, with exactly the keys of the contract."""
    done = CliRunner().invoke(main, ["ledger", "--store", str(store), "--json"])
    entry = {"agent": "edge-1", "plugin": "cpu", "epoch": f"{5:016x}", "stored": 3, "ranges": [[0, 1], [9, 9]]}
    entry |= {"missing": 2, "declared_lost": {"expired": 5}, "duplicates_refused": 0}
    assert entry == json.loads(done.output)[0]


def test_people_get_tables(store: Path) -> None:
    """Without --json: columns, and a word when not all is shown."""
    done = CliRunner().invoke(main, ["query", "--store", str(store), "--limit", "2"])
    assert "core=0" in done.output
    assert "the newest 2; --limit 0 shows all" in done.stderr
    assert "expired=5" in CliRunner().invoke(main, ["ledger", "--store", str(store)]).output


def test_errors_are_words_and_a_code(tmp_path: Path) -> None:
    """An absent store, half a certificate, an unusable address: a message and a code, no traceback."""
    there = ["--store", str(tmp_path / "s.db")]
    for arguments, code, text in (
        (["query", *there], 1, "there is no store at"),
        (["run", *there, "--cert", "x.pem"], 78, "cert is given without key"),
        (["run", *there, "--listen", "nowhere"], 78, "listen"),
        (["run", *there, "--client-ca", str(tmp_path / "no.pem")], 78, "no.pem"),
        (["run", *there, "--listen", "192.0.2.1:0"], 1, "cannot listen on 192.0.2.1:0"),
    ):
        done = CliRunner().invoke(main, arguments)
        assert code == done.exit_code, done.output
        assert text in done.stderr
