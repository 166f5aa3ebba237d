"""Which tokens of a conversation are learnt, once it is known which of its turns are.

In: the rendered text, its tokens, the turns and whether each is learnt. Out: labels, and what of the learnt turns is not
learnt after all, for a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from axolotl.exceptions import DatasetError
from axolotl.prompters import IGNORE_TOKEN_ID
from axolotl.utils.chat_templates.end_tokens import END_TOKEN_REACH
from axolotl.utils.chat_templates.messages import THINKING_DETAIL, TRAINING_DETAIL, Turn, for_template
from axolotl.utils.chat_templates.spans import Span, Tokens, TurnSpans


class EndTokens(NamedTuple):
    """The tokens that end turns, and which of them are learnt: `all`, those of learnt turns (`turn`), the `last`, `none`."""

    eot_ids: frozenset[int]
    eos_ids: frozenset[int]
    train_on_eot: str | None
    train_on_eos: str | None

    def kinds(self) -> tuple[tuple[frozenset[int], str | None], ...]:
        """End-of-turn tokens first: an EOS that is among them follows their rule, and then its own, which is the same."""
        return (self.eot_ids, self.train_on_eot), (self.eos_ids, self.train_on_eos)

    def any_is(self, *options: str) -> bool:
        """Whether one of the two rules is one of `options`."""
        return self.train_on_eot in options or self.train_on_eos in options


class NotLearnt(NamedTuple):
    """A learnt turn of which nothing is learnt (`text`), or not how it ends (`end`)."""

    turn: int
    what: str


class TurnLabels:
    """Makes labels from turns.

    Args:
        spans: finds the text of a turn.
        ends: the tokens that end turns.
        control_ids: all tokens that are no text.
        thinking_key: the key of a turn under which the template reads its reasoning.
    """

    def __init__(self, spans: TurnSpans, ends: EndTokens, control_ids: frozenset[int], thinking_key: str):
        self.spans = spans
        self.ends = ends
        self.control_ids = control_ids
        self.thinking_key = thinking_key
        self._other_control_ids = control_ids - ends.eot_ids - ends.eos_ids

    def label(
        self, text: str, tokens: Tokens, turns: Sequence[Turn], tools: list | None, learnt: Sequence[bool]
    ) -> tuple[list[int], list[NotLearnt]]:
        """Labels of a conversation (-100 where nothing is learnt), and what is not learnt of learnt turns.

        Args:
            text: the rendered conversation.
            tokens: its tokens.
            turns: with the keys that are for the labels.
            tools: the tools it was rendered with.
            learnt: for each turn whether it is.

        Raises:
            DatasetError: the characters that the details of a turn name are not in the text.
        """
        ids = tokens.ids
        labels = [IGNORE_TOKEN_ID] * len(ids)
        missing: list[NotLearnt] = []
        last_ends: dict[int, int] = {}
        plain = for_template(turns)
        wanted = [index for index in range(len(turns)) if learnt[index] or self.ends.any_is("all", "last")]
        for index, span in zip(wanted, self.spans.find(text, plain, tools, wanted), strict=True):
            if span is None:
                missing += [NotLearnt(index, "text")] if learnt[index] else []
                continue
            parts = self.spans.parts(text, plain, tools, index, span)
            ranges = [tokens.within(part, self.control_ids, text) for part in parts]
            if learnt[index]:
                detailed = self._detailed_ranges(turns[index], text, tokens, span)
                for first, last in ranges if detailed is None else detailed:
                    labels[first:last] = ids[first:last]
            found = [
                (kind, option, place)
                for _, end in ranges
                for kind, (wanted_ids, option) in enumerate(self.ends.kinds())
                for place in self._end_after(end, wanted_ids, text, tokens, plain, tools, index + 1)
            ]
            for kind, option, place in found:
                last_ends[kind] = place
                if option == "all" or (option == "turn" and learnt[index]):
                    labels[place] = ids[place]
            if learnt[index] and not found and self.ends.any_is("all", "turn"):
                _, end = tokens.within(span, self.control_ids, text)
                missing += [NotLearnt(index, "end")] if ids[end - 1] not in self.control_ids else []
        for kind, (_, option) in enumerate(self.ends.kinds()):
            if option == "last" and kind in last_ends:
                labels[last_ends[kind]] = ids[last_ends[kind]]
        return labels, missing

    def _end_after(
        self,
        end: int,
        wanted: frozenset[int],
        text: str,
        tokens: Tokens,
        turns: Sequence[Turn],
        tools: list | None,
        next_turn: int,
    ) -> list[int]:
        """The place of the first token of `wanted` shortly after a turn, if it is not in the content of the next one.

        `end` is the token after the last of the turn.
        """
        reach = range(end, min(end + END_TOKEN_REACH + 1, len(tokens.ids)))
        place = next((place for place in reach if tokens.ids[place] in wanted), None)
        if place is None:
            return []
        if next_turn < len(turns) and not self._other_control_ids.isdisjoint(tokens.ids[end:place]):
            (following,) = self.spans.find(text, turns, tools, [next_turn])
            if following is not None and tokens.starts[place] >= following[0]:
                return []
        return [place]

    def _detailed_ranges(self, turn: Turn, text: str, tokens: Tokens, span: Span) -> list[tuple[int, int]] | None:
        """The ranges of tokens that the details of a learnt turn say are learnt; None without details: all of the turn."""
        if not turn.get(TRAINING_DETAIL) and not turn.get(THINKING_DETAIL):
            return None
        ranges, begin = [], span[0]
        for key, detail_key in ((self.thinking_key, THINKING_DETAIL), ("content", TRAINING_DETAIL)):
            value, details = turn.get(key), turn.get(detail_key) or ()
            if not isinstance(value, str) or not value:
                continue
            place, written = _written(value, text, begin, span)
            if place == -1 and any(detail["train"] for detail in details):
                raise DatasetError(
                    f"The template changes the `{key}` of a {turn['role']} message, so the characters that its training "
                    "details name cannot be found in the text. Use a template that writes it as it is."
                )
            if place == -1:
                continue
            offset = place - value.index(written)
            begin = place + len(written)
            for detail in details:
                first = max(offset + detail["begin_offset"], place)
                last = min(offset + detail["end_offset"] + 1, begin)
                if detail["train"] and first < last:
                    ranges.append(tokens.within((first, last), self.control_ids, text))
        return ranges


def _written(value: str, text: str, begin: int, span: Span) -> tuple[int, str]:
    """Where `value` stands in `span`, first from `begin` on, and what of it the template wrote; -1 when it is not there."""
    for start in (begin, span[0]):
        for written in (value, value.rstrip(), value.lstrip(), value.strip()):
            place = text.find(written, start, span[1])
            if place != -1:
                return place, written
    return -1, value
