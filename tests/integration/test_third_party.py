"""Plugins of others in the real agent: dropped or installed, right and wrong, and what the wrong ones cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kon_agent.control_protocol import Op, PluginStatus
from kon_agent.linux import landlock, seccomp
from tests.support.agent import Agent
from tests.support.holdings import descriptors
from tests.support.program import environment_of
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: workers change their user"),
    pytest.mark.skipif(seccomp.current_architecture() is None, reason="no seccomp filter for this machine"),
]
needs_landlock = pytest.mark.skipif(landlock.supported_abi() < 1, reason="needs Landlock in the kernel")

CALM = {"period": "200ms"}  # so that a busy machine alone makes nobody miss a tick
STEADY = {"cpu": CALM, "memory": CALM}
HEAD = "from kon_agent.plugins import Context, Metric, NoData, PluginConfig, plugin\n"
GREETING = (
    HEAD
    + """
class GreetingConfig(PluginConfig):
    times: int = 1

@plugin("greeting", config=GreetingConfig)
class Greeting:
    "Say hello."
    def __init__(self, config: GreetingConfig, context: Context) -> None:
        self.times = config.times
    def collect(self):
        return [Metric("greetings", self.times)]
"""
)

Drop = Callable[[str, str], None]
Start = Callable[..., Agent]


@pytest.fixture
def plugin_dir(folder: Path) -> Path:
    """Return a plugin folder that only root can write."""
    made = folder / "plugins.d"
    made.mkdir(mode=0o755)
    return made


@pytest.fixture
def drop(plugin_dir: Path) -> Drop:
    """Return what puts a plugin into the folder."""

    def put(name: str, code: str) -> None:
        file = plugin_dir / f"{name}.py"
        file.write_text(code)
        file.chmod(0o644)

    return put


@pytest.fixture
def start(start_agent: Start, plugin_dir: Path) -> Start:
    """Return what starts an agent that looks for plugins in the folder."""

    def begin(plugins: Mapping[str, Any], **options: Any) -> Agent:
        return start_agent(plugins, sections={"plugin_dir": str(plugin_dir)}, **options)

    return begin


def collecting(name: str, body: str, arguments: str = "") -> str:
    """Return a plugin whose `collect` has this body."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    return (
        f"import os, threading, time\n{HEAD}\n@plugin({name!r}{arguments})\nclass Found:\n"
        f"    def __init__(self, config, context):\n        self.kept = []\n    def collect(self):\n{lines}"
    )


def statuses(agent: Agent) -> dict[str, PluginStatus]:
    return {plugin.name: plugin for plugin in agent.status().plugins}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `kon-agent` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "kon_agent.cli.agent", *arguments],
        env=environment_of(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_undisturbed(before: Mapping[str, PluginStatus], agent: Agent) -> None:
    """Assert that the steady plugins have the workers they had, and have kept every tick."""
    agent.wait_for_acks(*STEADY, more=5)
    after = statuses(agent)
    for name in STEADY:
        assert (before[name].pid, 0, 0) == (
            after[name].pid,
            after[name].restarts,
            after[name].missed_ticks - before[name].missed_ticks,
        )


# ── found and run ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dropped_file_is_run_after_a_reload(start: Start, drop: Drop, receiver: Receiver) -> None:
    """Its records arrive; its options decide; a changed file replaces its worker only; a removed section ends it."""
    agent = start(STEADY)
    agent.wait_until_running()
    before = statuses(agent)
    drop("greeting", GREETING)
    agent.configure({**STEADY, "greeting": {"times": 3}, "twice": {"type": "greeting", "times": 2}})
    assert 0 == agent.control("reload").returncode
    agent.wait_for_acks("greeting", "twice", more=3)
    assert {3.0} == {record.value for record in receiver.query("greeting", "greetings")}
    assert {2.0} == {record.value for record in receiver.query("twice", "greetings")}
    first = agent.plugin("greeting").pid
    drop("greeting", GREETING.replace("self.times)", "self.times + 40)"))
    changed = json.loads(agent.control("reload", "--json").stdout)["changed"]
    assert ["plugins.greeting", "plugins.twice"] == sorted(changed)
    wait_for(lambda: receiver.query("greeting")[-1].value == 43.0, "the new code's records are stored")
    assert first != agent.plugin("greeting").pid
    agent.configure(STEADY)
    assert 0 == agent.control("reload").returncode
    wait_for(lambda: "greeting" not in statuses(agent), "it is forgotten")
    assert_undisturbed(before, agent)


def test_an_installed_plugin_is_found_by_its_entry_point(start: Start, folder: Path, receiver: Receiver) -> None:
    """A package that names a class in the group `kon_agent.plugins` is run by the entry point's name."""
    site = folder / "site"
    info = site / "acme_greeting-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-greeting\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[kon_agent.plugins]\ngreeting = acme_greeting:Greeting\n")
    (site / "acme_greeting.py").write_text(GREETING)
    agent = start({**STEADY, "greeting": {"times": 7}}, environment={"PYTHONPATH": str(site)})
    agent.wait_for_acks("greeting", more=3)
    assert {7.0} == {record.value for record in receiver.query("greeting", "greetings")}


def test_events_are_published_as_they_come(start: Start, drop: Drop, folder: Path, receiver: Receiver) -> None:
    """An event-style plugin that waits is alive, publishes what comes when it comes, and ends on request."""
    fifo = folder / "events"
    os.mkfifo(fifo, 0o644)
    drop(
        "listener",
        f"import os\n{HEAD}\n"
        f"@plugin('listener', reads=({str(fifo)!r},))\nclass Listener:\n"
        "    def __init__(self, config, context):\n        pass\n"
        "    def run(self, emit):\n"
        f"        with open(os.open({str(fifo)!r}, os.O_RDONLY | os.O_NONBLOCK), 'rb', buffering=0) as source:\n"
        "            while True:\n"
        "                if (yield source):\n"
        "                    emit(Metric('event_bytes', len(source.read(4096) or b'')))\n"
        "                else:\n"
        "                    emit(Metric('quiet', 1))\n",
    )
    agent = start({"listener": {"period": "200ms", "deadline": "1s"}})
    agent.wait_for_acks("listener", more=10)
    assert "RUNNING" == agent.plugin("listener").state
    with open(fifo, "wb", buffering=0) as writer:
        writer.write(b"12345")
        wait_for(lambda: [r.value for r in receiver.query("listener", "event_bytes")][:1] == [5.0], "the event")
    stopped = agent.change(Op.PLUGIN_DISABLE, "listener")
    assert (None, None) == (stopped.pid, stopped.last_exit)  # it was not killed


def test_an_event_plugin_that_never_yields_is_hung(start: Start, drop: Drop) -> None:
    """One that no longer comes to a yield is taken for hung, as one that collects is."""
    drop(
        "stuck",
        f"import time\n{HEAD}\n@plugin('stuck')\nclass Stuck:\n    def __init__(self, config, context):\n"
        "        pass\n    def run(self, emit):\n        yield\n        time.sleep(1000)\n",
    )
    agent = start({"stuck": {"deadline": "500ms"}})
    wait_for(lambda: agent.plugin("stuck").restarts, "it is replaced")
    assert "hung: silent for" in (agent.plugin("stuck").last_exit or "")


# ── wrong ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_section_changes_nothing(start: Start, drop: Drop) -> None:
    """Reload and check name the place of every mistake in a plugin's own keys; the agent goes on as it is."""
    drop("greeting", GREETING)
    agent = start(STEADY)
    agent.wait_until_running()
    before = statuses(agent)
    agent.configure({**STEADY, "greeting": {"times": "many", "tiems": 3}, "greting": {}})
    reloaded = agent.control("reload")
    checked = command("check", "-c", str(agent.config_path))
    for said, code in ((reloaded.stderr, reloaded.returncode), (checked.stderr, checked.returncode)):
        assert code != 0
        assert "plugins.greeting.times: expected a whole number, got 'many'" in said
        assert "plugins.greeting.tiems: unknown key; did you mean 'times'?" in said
        assert "plugins.greting: unknown plugin; did you mean 'greeting'?" in said
        assert f"{agent.config_path}:" in said
    assert before.keys() == statuses(agent).keys()
    assert_undisturbed(before, agent)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('not today')", "RuntimeError: not today"),
        ("import os\nos._exit(3)", "its process exited with 3"),
        ("import time\ntime.sleep(1000)", "hung: no answer within"),
        ("hog = []\nwhile True: hog.append(bytearray(1 << 20))", "MemoryError"),
        ("x = 1", "has no class with @plugin('broken', …)"),
        ("def f(:", "SyntaxError: invalid syntax"),
    ],
    ids=["raises", "exits", "hangs", "leaks", "nothing", "syntax"],
)
def test_a_broken_plugin_keeps_nobody_from_starting(start: Start, drop: Drop, code: str, reason: str) -> None:
    """The agent starts without it and says why; a reload refuses it; once it is mended, a reload makes it run."""
    drop("broken", code)
    agent = start({**STEADY, "broken": {}})
    agent.wait_until_running(*STEADY)
    before = statuses(agent)
    assert (None, True) == (before["broken"].pid, before["broken"].enabled)
    assert reason in agent.plugin("broken").detail
    refused = agent.control("reload")
    assert refused.returncode != 0
    assert "plugins.broken: cannot be used: " in refused.stderr and reason in refused.stderr
    drop("broken", GREETING.replace('"greeting"', '"broken"'))
    assert 0 == agent.control("reload").returncode
    agent.wait_for_acks("broken", more=2)
    assert_undisturbed(before, agent)


def test_a_file_others_can_write_is_refused(start: Start, drop: Drop, plugin_dir: Path) -> None:
    """A plugin somebody else could have written is not run, and what to do is said."""
    drop("greeting", GREETING)
    (plugin_dir / "greeting.py").chmod(0o664)
    agent = start({**STEADY, "greeting": {}})
    agent.wait_until_running(*STEADY)
    assert "chmod go-w" in agent.plugin("greeting").detail
    assert agent.plugin("greeting").pid is None


# ── hostile ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_leak_ends_its_own_worker_only(start: Start, drop: Drop) -> None:
    """A plugin that allocates without end is replaced, with the reason; the others never notice."""
    drop("leak", collecting("leak", "while True:\n    self.kept.append(bytearray(1 << 20))"))
    agent = start({**STEADY, "leak": {"memory_limit": "16MiB"}})
    agent.wait_until_running(*STEADY)
    before = statuses(agent)
    wait_for(lambda: agent.plugin("leak").restarts, "the leak is replaced")
    last_exit = agent.plugin("leak").last_exit or ""
    assert "MemoryError: far above its memory_limit of 16MiB" in last_exit or "its memory" in last_exit, last_exit
    assert_undisturbed(before, agent)


def test_a_flood_of_words_fills_no_disk(start: Start, drop: Drop) -> None:
    """What a plugin says on standard error reaches the log within bounds, and the log cannot be cut off by it."""
    body = """
os.write(2, b'hello\\n')
try:
    os.ftruncate(2, 0)
except OSError:
    pass
while True:
    os.write(2, b'y' * 1_000_000)"""
    drop("flood", collecting("flood", body))
    agent = start({**STEADY, "flood": {"deadline": "1s", "period": "500ms"}})
    agent.wait_until_running(*STEADY)
    before = statuses(agent)
    wait_for(lambda: "yyyy" in agent.log(), "its words are in the log")
    agent.wait_for_acks(*STEADY)
    assert "hello" in agent.log() and "supervisor: agent" in agent.log()
    assert len(agent.log()) < 1_000_000
    assert_undisturbed(before, agent)


def test_bombs_are_refused(start: Start, drop: Drop, receiver: Receiver) -> None:
    """No process can be made, and no more threads than a plugin needs; a thousand tries harm nobody."""
    body = """
forks = threads = 0
stop = threading.Event()
for _ in range(1000):
    try:
        if os.fork() == 0:
            os._exit(0)
        forks += 1
    except OSError:
        pass
started = []
for _ in range(1000):
    try:
        thread = threading.Thread(target=stop.wait)
        thread.start()
        started.append(thread)
    except RuntimeError:
        pass
stop.set()
for thread in started:
    thread.join()
return [Metric("forks", forks), Metric("threads", len(started))]"""
    drop("bomb", collecting("bomb", body))
    agent = start({**STEADY, "bomb": {"period": "1s"}})
    agent.wait_until_running(*STEADY)
    before = statuses(agent)
    agent.wait_for_acks("bomb", more=2)
    assert {0.0} == {record.value for record in receiver.query("bomb", "forks")}
    assert 0 < max(record.value for record in receiver.query("bomb", "threads")) <= 64
    assert_undisturbed(before, agent)


@needs_landlock
def test_only_what_is_declared_can_be_read(start: Start, drop: Drop, folder: Path, receiver: Receiver) -> None:
    """A declared file can be read, its neighbour cannot, though both are open to everybody."""
    names = {}
    for name in ("declared", "undeclared"):
        names[name] = str(folder / name)
        Path(names[name]).write_text("x")
        Path(names[name]).chmod(0o644)
    body = f"""
found = []
for name, path in {names!r}.items():
    try:
        open(path).close()
        found.append(Metric(name, 1))
    except PermissionError:
        found.append(Metric(name, 0))
return found"""
    drop("reader", collecting("reader", body, f", reads=({names['declared']!r},)"))
    agent = start({"reader": {}})
    agent.wait_for_acks("reader", more=2)
    assert {1.0} == {record.value for record in receiver.query("reader", "declared")}
    assert {0.0} == {record.value for record in receiver.query("reader", "undeclared")}


@pytest.mark.parametrize("has_network", [True, False])
def test_the_network_is_for_those_who_declare_it(
    start: Start, drop: Drop, receiver: Receiver, has_network: bool
) -> None:
    """A plugin that declares the network can connect to any port; one that does not has no socket."""
    body = """
import socket
try:
    with socket.socket() as client:
        client.settimeout(1)
        client.connect(("127.0.0.1", 9))
    return [Metric("reached", 1)]
except ConnectionRefusedError:  # by the peer, which has so been reached
    return [Metric("reached", 1)]
except PermissionError:
    return [Metric("reached", 0)]"""
    drop("caller", collecting("caller", body, f", network={has_network}"))
    agent = start({"caller": {}})
    agent.wait_for_acks("caller", more=2)
    assert {float(has_network)} == {record.value for record in receiver.query("caller", "reached")}


def test_nothing_is_left_of_an_examination(start: Start, drop: Drop) -> None:
    """Examined plugins leave no process and no descriptor behind, however their examination ends."""
    drop("greeting", GREETING)
    drop("broken", "import os\nos._exit(3)")
    agent = start(STEADY)
    agent.wait_until_running()
    agent.configure({**STEADY, "greeting": {}, "broken": {}})
    agent.control("reload")
    before, children = descriptors(agent.pid), agent.children().keys()
    for _ in range(3):
        assert agent.control("reload").returncode != 0
    wait_for(lambda: not descriptors(agent.pid) - before, f"the supervisor holds no more than {dict(before)}")
    assert children == agent.children().keys()


def test_what_tries_a_plugin_says_what_it_collects(drop: Drop, plugin_dir: Path, folder: Path) -> None:
    """`plugins test` needs neither a section nor an agent; `plugins available` lists the file without running it."""
    drop("greeting", GREETING)
    drop("broken", "raise RuntimeError")
    config = folder / "agent.yaml"
    config.write_text(f"plugin_dir: {plugin_dir}\n")
    tried = json.loads(command("plugins", "test", "greeting", "-c", str(config), "--json").stdout)
    assert ("greetings", 1.0) == (tried["name"], tried["value"])
    listed = json.loads(command("plugins", "available", "-c", str(config), "--json").stdout)
    found = {each["name"]: each for each in listed}
    assert ("file", str(plugin_dir / "broken.py")) == (found["broken"]["origin"], found["broken"]["where"])
    assert "built in" == found["cpu"]["origin"]
