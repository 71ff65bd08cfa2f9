"""Whatever a file looks like: a change touches its own lines only, and the file then says what was intended."""

from __future__ import annotations

import difflib

from hypothesis import given
from hypothesis import strategies as st

from kon_agent.config.edit import Addition, Change, Removal, Setting, edited
from kon_agent.config.load import check_text
from kon_agent.config.schema import Config, Duration
from kon_agent.config.section import parse_section

SETTINGS = {"type": "exec", "command": "[/bin/ups, -v]", "period": "1s"}
UPS = Addition("ups", parse_section("ups", SETTINGS, Config()), SETTINGS)
NAMES = ("cpu", "memory", "netdev", "load")

comments = st.sampled_from(["", "# text: {", "#enable: true", "# 'quoted", "#", "# ümläut – \U0001f600"])


@st.composite
def fillers(draw: st.DrawFn) -> list[str]:
    """Lines that say nothing: blank ones, comments at any column."""
    lines = st.builds(lambda column, comment: " " * column + comment, st.integers(0, 9), comments)
    return draw(st.lists(lines, max_size=3))


@st.composite
def values(draw: st.DrawFn) -> dict[str, str]:
    """A section's keys, as they are written."""
    written = {
        "enable": st.sampled_from(["true", "false"]),
        "period": st.sampled_from(["5s", '"5s"', "'1m'", "0.5"]),
        draw(st.sampled_from(["ring_size", "ring-size"])): st.sampled_from(["64KiB", "'16KiB'"]),
        "deadline": st.sampled_from(["~", "7s", ""]),
    }
    keys = draw(st.permutations(sorted(written)))[: draw(st.integers(0, 4))]
    return {key: draw(written[key]) for key in keys}


@st.composite
def sections(draw: st.DrawFn, name: str, column: int, step: int) -> list[str]:
    """One plugin's lines."""
    pad, tail = " " * column, draw(st.sampled_from(["", "  # why", " #"]))
    keys = draw(values())
    way = draw(st.sampled_from(["block", "flow", "wide flow"]))
    if way == "flow":
        return [f"{pad}{name}: {{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}{tail}"]
    if way == "wide flow":
        inner = [f"{pad}   {key}: {value}," for key, value in keys.items()]
        return [f"{pad}{name}: {{{tail}", *inner, f"{pad}}}"]
    lines = [f"{pad}{name}:{tail}"]
    for key, value in keys.items():
        lines += [*draw(fillers()), f"{pad}{' ' * step}{key}: {value}{draw(st.sampled_from(['', ' # so']))}"]
    return lines


@st.composite
def files(draw: st.DrawFn) -> str:
    """A configuration."""
    lines = [*draw(fillers()), *draw(st.sampled_from([[], ["---"], ["client_id: x"], ["log: {level: info} # l"]]))]
    column, step = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    if draw(st.booleans()):
        lines += [*draw(fillers()), "plugins:" + draw(st.sampled_from(["", " # all"]))]
        for name in draw(st.lists(st.sampled_from(NAMES), unique=True)):
            lines += [*draw(fillers()), *draw(sections(name, column, step))]
        if draw(st.booleans()):
            lines += [*draw(fillers()), f"{' ' * column}other: {{type: cpu}}", *draw(fillers())]
    lines += [*draw(fillers()), *draw(st.sampled_from([[], ["tls:", "  insecure_skip_verify: true"], ["user: me"]]))]
    end = draw(st.sampled_from(["\n", "\r\n"]))
    return end.join([*lines, *draw(fillers())]) + draw(st.sampled_from(["", end]))


changes = st.one_of(
    st.builds(Setting, st.sampled_from(NAMES), st.just("enable"), st.booleans()),
    st.builds(Setting, st.sampled_from(NAMES), st.just("period"), st.builds(Duration, st.integers(1, 600))),
    st.just(UPS),
    st.just(Removal("other")),
)


def loaded(text: str) -> Config:
    """Return what a text means."""
    config, mistakes = check_text(text, "agent.yaml")
    assert config is not None, (text, mistakes)
    return config


@given(text=files(), change=changes)
def test_a_change_is_made_and_nothing_else(text: str, change: Change) -> None:
    """It loads to the intended settings; every line taken out or put in is about the change."""
    before = loaded(text)
    new = edited(text, change)
    assert change.applied(before) == loaded(new)
    assert ("\r\n" in text) <= ("\n" not in new.replace("\r\n", ""))
    lines = list(difflib.ndiff(text.splitlines(), new.splitlines()))
    gone = [line[2:] for line in lines if line.startswith("- ")]
    come = [line[2:] for line in lines if line.startswith("+ ")]
    if isinstance(change, Removal):
        assert [] == come
        assert all(line.lstrip().startswith(("other:", "#")) or not line.strip() for line in gone)
        return
    assert len(gone) <= 1
    words = ("plugins:", f"{change.plugin}:", "enable:", *(SETTINGS if change is UPS else ("period:",)))
    assert all(any(word in line for word in words) for line in gone + come)


@given(text=files())
def test_what_is_added_can_be_removed(text: str) -> None:
    """It means what it meant; a heading may be left, comments that stood in it be gone."""
    back = edited(edited(text, UPS), Removal("ups"))
    assert loaded(text) == loaded(back)
    lines = list(difflib.ndiff(text.splitlines(), back.splitlines()))
    assert all(line[2:].lstrip().startswith("#") or not line[2:].strip() for line in lines if line.startswith("- "))
    assert [line[2:] for line in lines if line.startswith("+ ")] in ([], ["plugins:"])
