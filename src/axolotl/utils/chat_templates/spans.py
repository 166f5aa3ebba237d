"""Where each turn stands in the text of a rendered conversation.

A turn's span is what the template writes because of that turn's content: content, reasoning and tool calls, without the
header before it and the end-of-turn token after it. It is found by rendering again with a marker in the place of the
content, and every answer is checked against the text itself:

1. all turns are replaced by markers at once. The text between the markers depends on the roles alone, so it is kept and
   used for every conversation with the same roles. It holds when text and contents put together give the conversation.
2. where that fails (tool calls, reasoning, templates that look into the content), one turn at a time is replaced, first
   in the whole conversation, then in the conversation up to that turn.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from axolotl.utils.chat_templates.messages import Turn

if TYPE_CHECKING:
    from tokenizers import Encoding

Span = tuple[int, int]
Render = Callable[..., str]
"""`render(turns, tools=None, add_generation_prompt=False) -> str`."""

_MARKER = "zzturn{}markerzz"
_PLAIN_KEYS = frozenset({"role", "content"})
RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_MAX_SKELETONS = 4096


class Borders(Sequence[int]):
    """The first character of every token (`side=0`), or the one after its last (`side=1`).

    They stay in the encoding that `tokenizers` made: few are ever looked at, and Python numbers for all of them take a third
    of the time of tokenizing.
    """

    def __init__(self, encoding: Encoding, side: int):
        self._find = encoding.token_to_chars
        self._num_tokens = len(encoding)
        self._side = side

    def __len__(self) -> int:
        return self._num_tokens

    def __getitem__(self, token: Any) -> Any:
        if isinstance(token, slice):
            return [self[index] for index in range(self._num_tokens)[token]]
        found = self._find(token if token >= 0 else token + self._num_tokens)
        if found is None:
            raise IndexError(token)
        return found[self._side]


class Tokens(NamedTuple):
    """A tokenized text: ids, and the first character of each token and the one after its last."""

    ids: list[int]
    starts: Sequence[int]
    ends: Sequence[int]

    def within(self, span: Span, control_ids: frozenset[int], text: str) -> tuple[int, int]:
        """The tokens that reach into the characters of `span`, as a half-open range.

        A control token that swallows the white space beside it (`rstrip`, `lstrip`) is no part of the turn.
        """
        first, last = bisect_right(self.ends, span[0]), bisect_left(self.starts, span[1])
        if first < last and self.starts[first] < span[0] and self.ids[first] in control_ids:
            first += not text[span[0] : self.ends[first]].strip()
        if first < last and self.ends[last - 1] > span[1] and self.ids[last - 1] in control_ids:
            last -= not text[self.starts[last - 1] : span[1]].strip()
        return first, last


class Skeleton(NamedTuple):
    """The text of a conversation between its contents: `literals[0] content[order[0]] literals[1] ...`."""

    order: tuple[int, ...]
    literals: tuple[str, ...]


class TurnSpans:
    """Finds the spans of turns in rendered conversations.

    Args:
        render: renders turns as text, always with the same template.
    """

    def __init__(self, render: Render):
        self.render = render
        self._skeletons: dict[Any, Skeleton | None] = {}

    def find(self, text: str, turns: Sequence[Turn], tools: list | None, wanted: Sequence[int]) -> list[Span | None]:
        """The spans of the turns `wanted`, as character offsets in `text`; None where a turn has no text of its own.

        Args:
            text: the rendered conversation.
            turns: without the keys that are for the labels only.
            tools: the tools it was rendered with.
            wanted: indices of turns.
        """
        if all(turn.keys() <= _PLAIN_KEYS and isinstance(turn.get("content"), str) for turn in turns):
            spans = self._match(text, turns, self._skeleton(turns, tools))
            if spans is not None:
                return [spans[index] for index in wanted]
        return [self._one(text, turns, tools, index) for index in wanted]

    def parts(self, text: str, turns: Sequence[Turn], tools: list | None, index: int, span: Span) -> list[Span]:
        """`span`, the span of turn `index`, without the answers of tools in it.

        Some templates (Gemma 4) write what a tool answers into the turn that called it. Another one wrote that.
        """
        after = index + 1
        while after < len(turns) and turns[after].get("role") == "tool":
            after += 1
        if after == index + 1 or not turns[index].get("tool_calls"):
            return [span]
        contents = [turn.get("content") for turn in turns[index + 1 : after]]
        inside = text[span[0] : span[1]]
        if not any(content in inside if isinstance(content, str) else True for content in contents):
            return [span]
        found = self.find(text, turns, tools, range(index + 1, after))
        answers = [answer for answer in found if answer and span[0] <= answer[0] and answer[1] <= span[1]]
        if not answers:
            return [span]
        own = str(turns[index].get("content") or "").strip()
        marker = _unused_marker(text)
        turn = {**turns[index], "content": marker} if own else turns[index]
        without = self._try_render([*turns[:index], turn, *turns[after:]], tools) or ""
        begin = min(common_prefix(text, without.partition(marker)[0]), answers[0][0])
        end = span[1] - len(own) if text.endswith(own, answers[-1][1], span[1]) else span[1]
        return [part for part in ((span[0], begin), (end, span[1])) if part[0] < part[1]]

    def _skeleton(self, turns: Sequence[Turn], tools: list | None) -> Skeleton | None:
        key = (tuple(turn.get("role") for turn in turns), json.dumps(tools, sort_keys=True) if tools else None)
        if key not in self._skeletons:
            if len(self._skeletons) >= _MAX_SKELETONS:
                self._skeletons.clear()
            self._skeletons[key] = self._render_skeleton(turns, tools)
        return self._skeletons[key]

    def _render_skeleton(self, turns: Sequence[Turn], tools: list | None) -> Skeleton | None:
        markers = [_MARKER.format(index) for index in range(len(turns))]
        marked = [{**turn, "content": marker} for turn, marker in zip(turns, markers, strict=True)]
        try:
            text = self.render(marked, tools=tools)
        except RENDER_ERRORS:
            return None
        if any(text.count(marker) > 1 for marker in markers):
            return None
        places = sorted((text.index(marker), index) for index, marker in enumerate(markers) if marker in text)
        literals, position = [], 0
        for place, index in places:
            literals.append(text[position:place])
            position = place + len(markers[index])
        return Skeleton(tuple(index for _, index in places), (*literals, text[position:]))

    @staticmethod
    def _match(text: str, turns: Sequence[Turn], skeleton: Skeleton | None) -> list[Span | None] | None:
        """The spans of all turns, when skeleton and contents together are exactly `text`."""
        if skeleton is None or not text.startswith(skeleton.literals[0]):
            return None
        spans: list[Span | None] = [None] * len(turns)
        position = len(skeleton.literals[0])
        for place, index in enumerate(skeleton.order):
            literal = skeleton.literals[place + 1]
            last = place + 1 == len(skeleton.order)
            content = turns[index]["content"]
            for written in (content, content.strip(), content.rstrip(), content.lstrip()):
                end = position + len(written)
                if not text.startswith(written, position) or not text.startswith(literal, end):
                    continue
                if not last or end + len(literal) == len(text):
                    break
            else:
                return None
            spans[index] = (position, end) if written else None
            position = end + len(literal)
        return spans if position == len(text) else None

    def _one(self, text: str, turns: Sequence[Turn], tools: list | None, index: int) -> Span | None:
        """The span of one turn, from renders in which only that turn is replaced."""
        marker = _unused_marker(text)
        role = turns[index].get("role")
        # An answer keeps the name of its tool. Other turns lose their reasoning and calls, which belong to the span.
        dummy = {**turns[index], "content": marker} if role == "tool" else {"role": role, "content": marker}
        whole = self._try_render([*turns[:index], dummy, *turns[index + 1 :]], tools)
        if whole is not None and whole.count(marker) == 1:
            before, after = whole.split(marker)
            if len(before) + len(after) <= len(text) and text.startswith(before) and text.endswith(after):
                return _span(len(before), len(text) - len(after))
        return self._in_prefix(text, turns, tools, index, dummy) or self._in_whole(
            text, turns, tools, index, whole, marker
        )

    def _in_prefix(self, text: str, turns: Sequence[Turn], tools: list | None, index: int, dummy: Turn) -> Span | None:
        """The span found in the conversation up to the turn, when the text begins with it."""
        upto = self._try_render(turns[: index + 1], tools)
        marked = self._try_render([*turns[:index], dummy], tools)
        if upto is None or marked is None or marked.count(dummy["content"]) != 1:
            return None
        before, after = marked.split(dummy["content"])
        start = common_prefix(upto, before)
        end = len(upto) - _common_suffix(upto[start:], after)
        if upto[:end] != text[:end]:
            return None
        if start < len(before):
            start = self._generated_from(text, turns, tools, index, start)
        return _span(start, end)

    def _in_whole(
        self, text: str, turns: Sequence[Turn], tools: list | None, index: int, whole: str | None, marker: str
    ) -> Span | None:
        """What differs between the text and `whole`, when none of it belongs to the turns beside."""
        if whole is None or whole.count(marker) != 1:
            return None
        before, after = whole.split(marker)
        start = common_prefix(text, before)
        end = len(text) - _common_suffix(text[start:], after)
        own = str(turns[index].get("content") or "") + json.dumps(turns[index].get("tool_calls"), ensure_ascii=False)
        for beside in (index - 1, index + 1):
            other = str(turns[beside].get("content") or "").strip() if 0 <= beside < len(turns) else ""
            if other and other in text[start:end] and other not in own:
                return None
        if start < len(before):
            start = self._generated_from(text, turns, tools, index, start)
        return _span(start, end)

    def _generated_from(self, text: str, turns: Sequence[Turn], tools: list | None, index: int, start: int) -> int:
        """Where the assistant begins to write.

        A template that writes `<think>` differently for turns with and without reasoning makes the turns differ only
        after the part that both have. The model has to write that part too: it begins after the generation prompt.
        """
        if turns[index].get("role") != "assistant":
            return start
        prompt = self._try_render(turns[:index], tools, add_generation_prompt=True)
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        return start

    def _try_render(self, turns: Sequence[Turn], tools: list | None, add_generation_prompt: bool = False) -> str | None:
        try:
            return self.render(turns, tools=tools, add_generation_prompt=add_generation_prompt)
        except RENDER_ERRORS:
            return None


def _unused_marker(text: str) -> str:
    marker = _MARKER.format("x")
    while marker in text:
        marker += "z"
    return marker


def _span(start: int, end: int) -> Span | None:
    return (start, end) if start < end else None


def common_prefix(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def _common_suffix(one: str, other: str) -> int:
    return common_prefix(one[::-1], other[::-1])
