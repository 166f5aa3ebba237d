"""The conversation, with an answerer that repeats what it was asked."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from axolotl.cli.answering import GENERATION_DEFAULTS
from axolotl.cli.chat import COMMANDS, ChatSession, ThinkFolder
from axolotl.cli.utils.errors import Terminated
from axolotl.exceptions import AxolotlError


class Echo:
    """Answers with the number of messages it saw and the last text; keeps what it was given."""

    def __init__(self):
        self.options = dict(GENERATION_DEFAULTS)
        self.format = SimpleNamespace(name="test", is_chat=True)
        self.seen = []
        self.kwargs = None

    def answer(self, messages, receive, template_kwargs=None):
        self.seen, self.kwargs = list(messages), template_kwargs
        if messages[-1]["content"] == "too long":
            raise AxolotlError("no room")
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        if messages[-1]["content"] == "end":
            raise Terminated
        text = f"<think>hm</think>\n{len(messages)}:{messages[-1]['content']}"
        for letter in text:
            receive(letter)
        return text


@pytest.fixture
def talk():
    """(session, function that takes lines and returns what was shown since)."""
    shown: list[str] = []
    session = ChatSession(Echo(), show=shown.append)

    def say(*lines):
        shown.clear()
        for line in lines:
            session.take(line)
        return "".join(shown)

    return session, say


def test_turns_are_remembered_and_thinking_is_folded(talk):
    session, say = talk
    assert say("one") == "[thinking ... /expand shows it]\n1:one\n"
    assert "3:two" in say("two")
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    assert session.messages[1]["content"].startswith("<think>hm</think>")


def test_undo_and_retry(talk):
    session, say = talk
    say("one", "two")
    assert "3:two" in say("/retry") and len(session.messages) == 4
    say("/undo")
    assert len(session.messages) == 2
    say("/undo", "/undo")
    assert session.messages == [] and "Nothing" in say("/retry")


def test_system_starts_anew_and_is_sent_first(talk):
    session, say = talk
    say("one", "/system be brief", "two")
    assert session.answerer.seen == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}]


@pytest.mark.parametrize(("line", "name", "value"), [
    ("/set temperature 0.5", "temperature", 0.5), ("/set top_k=7", "top_k", 7), ("/set min_p 0.1", "min_p", 0.1),
    ("/set seed 3", "seed", 3), ("/set max_new_tokens 9", "max_new_tokens", 9),
])  # fmt: skip
def test_set(talk, line, name, value):
    session, say = talk
    assert f"{name} = {value}" in say(line)
    assert session.answerer.options[name] == value
    say(f"/set {name} default")
    assert session.answerer.options[name] == GENERATION_DEFAULTS.get(name)


@pytest.mark.parametrize("line", ["/set", "/set nothing 1", "/set top_p 2", "/set top_k x", "/set max_new_tokens 0"])
def test_a_wrong_setting_changes_nothing(talk, line):
    session, say = talk
    assert say(line)
    assert session.answerer.options == GENERATION_DEFAULTS


def test_think_reaches_the_template(talk):
    session, say = talk
    for line, kwargs in [
        ("/think on", {"enable_thinking": True}),
        ("/think off", {"enable_thinking": False}),
        ("/think default", {}),
    ]:
        say(line, "x")
        assert session.answerer.kwargs == kwargs


def test_expand_shows_and_collapse_hides(talk):
    _, say = talk
    assert "<think>hm</think>" in say("/expand", "one")
    assert "hm" not in say("/collapse", "two")
    assert "1:one" in say("/history")


def test_a_failed_or_stopped_turn_is_taken_back(talk):
    session, say = talk
    assert "no room" in say("too long") and session.messages == []
    assert "stopped" in say("stop") and session.messages == []


def test_a_wish_to_end_the_process_is_no_wish_to_stop_the_answer(talk):
    _session, say = talk
    with pytest.raises(Terminated):
        say("end")


def test_save_writes_a_training_row(talk, tmp_path):
    _session, say = talk
    say("/system s", "one", f"/save {tmp_path / 'chat.jsonl'}", f"/save {tmp_path / 'chat.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["messages"][0] == {"role": "system", "content": "s"}
    assert "cannot be written" in say(f"/save {tmp_path}")


def test_every_command_is_listed_and_unknown_ones_are_named(talk):
    session, say = talk
    text = say("/help")
    assert all(f"/{name}" in text for name in COMMANDS)
    assert "/nothing is not a command" in say("/nothing")
    assert "temperature" in say("/status")
    say("/quit")
    assert session.over


def test_run_reads_until_the_end_and_joins_continued_lines():
    lines = iter(["one\\", "more"])
    session = ChatSession(Echo(), show=lambda _: None, read=lambda _: next(lines, None) or _end())
    session.run()
    assert session.messages[0]["content"] == "one\nmore"


def _end():
    raise EOFError


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(("text", "folded"), [
    ("a<think>b</think>c", "a[thinking ... /expand shows it]\nc"), ("a < b <thin air", "a < b <thin air"),
    ("<think>never ends", "[thinking ... unfinished]"), ("x<think></think><think>y</think>", "x" + "[thinking ... /expand shows it]\n" * 2),
])  # fmt: skip
def test_folding_does_not_depend_on_the_pieces(text, folded, size):
    for collapsed, expected in ((True, folded), (False, text)):
        shown: list[str] = []
        folder = ThinkFolder(shown.append, collapsed)
        for start in range(0, len(text), size):
            folder(text[start : start + size])
        folder.close()
        assert "".join(shown) == expected
