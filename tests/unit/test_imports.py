"""Imports point one way, and what is dangerous or heavy is imported where it belongs and nowhere else.

The tree is read, not run: every import statement counts, also one inside a function.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kon_agent
from kon_agent.plugins import BUILTIN
from tests.support.program import environment_of

ROOT = Path(kon_agent.__file__).parent

LAYERS: tuple[set[str], ...] = (
    {  # leaf nouns
        *("", "backoff", "breaker", "catalog", "clock", "errors", "importpath", "lifecycle", "linkreport", "linux"),
        *("logs", "metric", "nearest", "page", "ranges", "ring", "schedule", "spoolreport", "stderrpipe", "tapping"),
    },
    {  # adapters: to the kernel, the disk, the wire, the user's files, the other processes
        *("bpf", "channel", "config", "control_protocol", "credentials", "inquiry", "process", "spool", "telemetry"),
        "wire",
    },
    {"examination", "plugins", "spec"},
    {"examinee", "receiver", "sender", "worker"},  # process bodies and their parts
    {"supervisor"},
    {"doctor"},
    {"cli"},
)
"""The parts of kon_agent from the ground up; each imports from its own layer and those below."""

APART: tuple[set[str], ...] = ({"worker"}, {"sender"}, {"receiver"}, {"supervisor"})
"""Processes: what runs in one imports nothing of the others."""

ONLY_IN = {
    "aioquic": {"sender.transport", "receiver.transport"},
    "asyncio": {"sender", "receiver"},
    "cryptography": {"sender.transport", "receiver"},
    "ctypes": {"linux", "bpf"},
    "multiprocessing": set[str](),
    "pylibbpf": {"bpf"},
    "ruamel": {"config"},
    "sqlite3": {"receiver"},
    "subprocess": {"cli", "plugins.program"},
    "threading": {"plugins"},
    "zstandard": {"sender", "receiver"},
}
"""Foreign packages, and the modules or packages that may import them."""


def module_name(path: Path) -> str:
    """Return the module in a file, below kon_agent; the package itself is the empty string."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


@cache
def trees() -> dict[str, ast.Module]:
    """Return every module of kon_agent, parsed."""
    return {module_name(path): ast.parse(path.read_text(), str(path)) for path in sorted(ROOT.rglob("*.py"))}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the absolute name of every module a tree imports, by a statement or by calling importlib."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".import_module", ".find_spec")):
            yield from (str(each.value) for each in node.args if isinstance(each, ast.Constant))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name.removeprefix("kon_agent.") in trees() else node.module


def type_checking_only(tree: ast.Module) -> set[str]:
    """Return what is imported under `if TYPE_CHECKING`, which nothing ever runs."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    guarded = [node for node in blocks if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"]
    return {name for node in guarded for name in imports(ast.Module(node.body, []))}


@cache
def own_imports() -> dict[str, set[str]]:
    """Return, for each module, the modules of kon_agent that it imports when it runs."""
    graph = {}
    for module, tree in trees().items():
        names = set(imports(tree)) - type_checking_only(tree)
        own = {name for name in names if name.partition(".")[0] == "kon_agent"}
        graph[module] = {name.removeprefix("kon_agent").removeprefix(".") for name in own} - {module}
    return graph


def part(module: str) -> str:
    """Return the first name of a module, which is its part of kon_agent, or its package elsewhere."""
    return module.partition(".")[0]


def is_within(module: str, place: str) -> bool:
    """Whether a module is `place`, or in the package of that name."""
    return f"{module}.".startswith(f"{place}.")


def test_every_part_has_its_layer() -> None:
    """A new module is given a place in LAYERS."""
    assert set() == {part(module) for module in trees()}.difference(*LAYERS)


def test_imports_point_one_way() -> None:
    """No module imports from a layer above its own."""
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    wrong = [
        f"{module} imports {imported}"
        for module, names in own_imports().items()
        for imported in names
        if level[part(imported)] > level[part(module)]
    ]
    assert [] == wrong


def test_no_cycle() -> None:
    """The modules can be put in an order in which each comes after all that it imports."""
    packages = {name for name in own_imports() if (ROOT / name.replace(".", "/") / "__init__.py").exists()}
    graph = {  # a package's own names come from its modules; importing it is no edge back
        module: {name for name in names if not (name in packages and module.startswith(f"{name}."))}
        for module, names in own_imports().items()
    }
    list(TopologicalSorter(graph).static_order())


def test_processes_know_nothing_of_each_other() -> None:
    """Neither worker, sender, receiver nor supervisor imports another: they meet in messages and shared memory."""
    wrong = [
        f"{module} imports {imported}"
        for process in APART
        for module, names in own_imports().items()
        if part(module) in process
        for imported in names
        if any(part(imported) in other for other in APART if other is not process)
    ]
    assert [] == wrong


def test_the_supervisor_names_plugins_but_imports_none() -> None:
    """Of kon_agent.plugins it imports the registry and what a collector is given, no collector."""
    collectors = {target.partition(":")[0].removeprefix("kon_agent.") for target in BUILTIN.values()}
    for module, names in own_imports().items():
        if part(module) in ("supervisor", "worker", "spec", "process"):
            assert not names & collectors, module


@pytest.mark.parametrize("package", ONLY_IN)
def test_where_foreign_packages_may_be_imported(package: str) -> None:
    """What is heavy or dangerous is met in its adapters only."""
    found = {module for module, tree in trees().items() if package in map(part, imports(tree))}
    assert [] == [module for module in found if not any(is_within(module, place) for place in ONLY_IN[package])]


def test_only_process_forks() -> None:
    """`os.fork` is called in one place, where a child is stripped of every privilege."""
    forks = {
        module
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("fork", "forkpty", "vfork", "posix_spawn")
    }
    assert {"process"} == forks


def loaded_by(module: str) -> set[str]:
    """Return the modules a fresh interpreter has loaded after importing one."""
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment_of(), capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_supervisor_stays_small_and_blind() -> None:
    """Importing it loads neither the network, nor cryptography, nor an event loop, nor a collector."""
    loaded = loaded_by("kon_agent.supervisor")
    forbidden = {"aioquic", "asyncio", "cryptography", "ssl", "sqlite3", "zstandard", "multiprocessing"}
    assert set() == loaded & forbidden
    assert set() == loaded & {target.partition(":")[0] for target in BUILTIN.values()}


def test_a_worker_loads_no_network() -> None:
    """A worker's body brings no network library and no YAML parser of its own."""
    assert set() == loaded_by("kon_agent.worker") & {"aioquic", "asyncio", "cryptography", "ssl", "ruamel"}
