"""The control socket's language."""

from __future__ import annotations

import json

import pytest

from kon_agent.config.schema import Size
from kon_agent.control_protocol import (
    MAX_REQUEST_BYTES,
    Op,
    PluginStatus,
    Reload,
    Request,
    Stopping,
    decode_request,
    decode_response,
    encode_error,
    encode_request,
    encode_result,
    unknown_plugin,
)
from kon_agent.errors import ControlError


def test_request_is_one_line_of_what_was_set() -> None:
    """A request on the wire is one JSON line without the fields that were left alone."""
    assert encode_request(Request(op=Op.PLUGIN_ENABLE, plugin="cpu")) == (b'{"op":"plugin_enable","plugin":"cpu"}\n')


@pytest.mark.parametrize("op", [Op.STATUS, Op.PLUGINS_LIST, Op.RELOAD, Op.SHUTDOWN])
def test_request_survives_the_wire(op: Op) -> None:
    """What was asked is what is understood."""
    assert Request(op=op) == decode_request(encode_request(Request(op=op)))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe\n",
        b"[]\n",
        b'{"op": "explode"}\n',
        b'{"op": 1}\n',
        b'{"op": "plugin_info"}\n',
        b'{"op": "plugin_info", "plugin": 7}\n',
        b'{"op": "plugin_set_period", "plugin": "cpu"}\n',
        b'{"op": "status", "x": "' + b"a" * MAX_REQUEST_BYTES + b'"}\n',
        b"[" * 10_000,
    ],
)
def test_nonsense_is_a_bad_request(line: bytes) -> None:
    """Whatever is no request is refused with one stable code, never another exception."""
    with pytest.raises(ControlError) as caught:
        decode_request(line)
    assert caught.value.code == "bad_request"


def test_unknown_fields_are_ignored() -> None:
    """A newer client's additions do not stop an older agent."""
    assert Request(op=Op.STATUS) == decode_request(b'{"op": "status", "colour": "green"}\n')


def test_result_survives_the_wire(cpu: PluginStatus) -> None:
    """A typed result comes out as it went in, also inside a list."""
    assert [cpu] == decode_response(encode_result([cpu]), list[PluginStatus])


def test_answers_look_as_documented() -> None:
    """The two forms of an answer are those of the module's drawing."""
    assert {"ok": True, "result": {"stopping": True}} == json.loads(encode_result(Stopping()))
    assert {"ok": False, "error": {"code": "busy", "message": "not now", "hint": "wait"}} == json.loads(
        encode_error(ControlError("busy", "not now", "wait"))
    )


def test_error_survives_the_wire() -> None:
    """The agent's error is raised at the client with its code, message and hint."""
    with pytest.raises(ControlError, match="not now") as caught:
        decode_response(encode_error(ControlError("busy", "not now", "wait")), Reload)
    assert ("busy", "wait") == (caught.value.code, caught.value.hint)


@pytest.mark.parametrize("line", [b"hello\n", b'{"ok": false}\n', b'{"ok": true}\n', b'{"ok": true, "result": 3}\n'])
def test_nonsense_is_a_bad_reply(line: bytes) -> None:
    """Whatever is no answer is reported as such."""
    with pytest.raises(ControlError) as caught:
        decode_response(line, Reload)
    assert caught.value.code == "bad_reply"


def test_unknown_plugin_suggests_the_nearest() -> None:
    """A slip of the finger gets the name that was meant, anything else the names there are."""
    assert "did you mean 'memory'?" == unknown_plugin("memroy", ["cpu", "memory"]).hint
    assert "the plugins are cpu, memory" == unknown_plugin("zzz", ["memory", "cpu"]).hint


def test_a_size_in_an_answer_is_a_number() -> None:
    """The configuration's own kinds of numbers can be answered with: none of them ends the supervisor."""
    line = encode_result(Stopping(stopping=Size(1)))  # type: ignore[arg-type]
    assert b'{"ok":true,"result":{"stopping":1}}\n' == line
