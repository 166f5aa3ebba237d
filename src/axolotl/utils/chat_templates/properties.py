"""Whether the messages of a dataset have the properties that its config names.

A property that some messages lack is left out there, which is right for reasoning or tool calls. One that no message has is a
misspelt name, and would be left out everywhere.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from axolotl.exceptions import DatasetError
from axolotl.utils.chat_templates.messages import read_messages
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

ROWS_TO_DESCRIBE = 100

NEEDED = ("role", "content")
"""What every message has, under one name or another."""


@dataclass(frozen=True)
class NamedProperties:
    """The properties of messages that the config of a dataset names.

    Attributes:
        mapped: `message_property_mappings` as it was written: key of the template -> property.
        others: further keys of the dataset that name a property -> property. Without it everything is as if the key were not there.
        field_messages: column of the messages.
        columns: keys of the dataset that name a column which rows may lack -> column.
    """

    mapped: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    field_messages: str = "messages"
    columns: Mapping[str, str] = field(default_factory=dict)

    def check(self, dataset: Dataset) -> None:
        """Look through the messages of all rows, as Arrow keeps them, until each property was found.

        Raises:
            DatasetError: `message_property_mappings` names a property that no message has.
        """
        for key, name in self.columns.items():
            if name not in dataset.column_names:
                LOG.warning(_no_column(key, name, dataset.column_names))
        if self.field_messages not in dataset.column_names or not len(dataset):
            return
        chunks = dataset.data.column(self.field_messages).chunks

        def is_missing(name: str) -> bool:
            return not any(_has(chunk, name) for chunk in chunks)

        for key, name in self.others.items():
            if is_missing(name):
                LOG.warning(f"`{key}: {name}` has no effect: {self._found(name, dataset)}")
        for key, name in self.mapped.items():
            if not is_missing(name):
                continue
            said = f"`message_property_mappings: {{{key}: {name}}}`: {self._found(name, dataset)}"
            if key != name or key in NEEDED:
                raise DatasetError(said)
            LOG.warning(said)  # a property under its own name: nothing is left out that is there

    def warn_of_missing(self, rows: list[Mapping[str, Any]], name: str) -> None:
        """What can be said of a stream: the first rows have none of a property.

        Args:
            rows: the first rows.
            name: the dataset, for messages.
        """
        columns = list(dict.fromkeys(column for row in rows for column in row))
        for key, wanted in self.columns.items():
            if columns and wanted not in columns:
                LOG.warning(
                    f"dataset {name}: {_no_column(key, wanted, columns)} These are the first {len(rows)} rows of the stream; it goes on."
                )
        found = set(_properties_of(rows, self.field_messages))
        written = {f"message_property_mappings: {{{key}: {value}}}": value for key, value in self.mapped.items()}
        written |= {f"{key}: {value}": value for key, value in self.others.items()}
        for text, wanted in written.items():
            if found and wanted not in found:
                LOG.warning(
                    f"dataset {name}: `{text}`: {self._found(wanted, rows)} These are the first {len(rows)} rows of the stream; it goes on."
                )

    def _found(self, name: str, rows: Iterable[Mapping[str, Any]]) -> str:
        first = list(itertools.islice(rows, ROWS_TO_DESCRIBE))
        known = list(dict.fromkeys(_properties_of(first, self.field_messages)))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        columns = ", ".join(f"`{column}`" for column in first[0])
        return (
            f"no message has the property `{name}`.{hint} Those in `{self.field_messages}` have "
            f"{', '.join(f'`{one}`' for one in known) or 'none'}; the columns are {columns}. Correct the name, or remove the key."
        )


def _no_column(key: str, name: str, columns: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, columns, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    known = ", ".join(f"`{column}`" for column in columns)
    return f"`{key}: {name}`: the rows have no field `{name}`.{hint} They have {known}. Correct the name, or remove the key."


def _properties_of(rows: Iterable[Mapping[str, Any]], field_messages: str) -> Iterator[str]:
    """The properties that messages have a value for. Rows that are none are for the one who tokenizes them to explain."""
    for row in rows:
        try:
            messages = read_messages(row, field_messages)
        except DatasetError:
            continue
        for message in messages:
            yield from (name for name, value in message.items() if value is not None)


def _has(values: pa.Array, name: str) -> bool:
    """Whether any of the messages has a value for a property. True of what is none of the ways in which messages are kept."""
    kind = values.type
    if isinstance(values, pa.ExtensionArray):
        return _has(values.storage, name)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _has(values.flatten(), name)
    if pa.types.is_struct(kind):
        index = kind.get_field_index(name)
        return index >= 0 and values.field(index).null_count < len(values)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return bool(pc.any(pc.match_substring_regex(values, _key_in_json(name))).as_py())
    return True


def _key_in_json(name: str) -> str:
    """A pattern for a key of JSON text with a value other than null. Quotes within a text are escaped, so that none matches there."""
    written = {json.dumps(name), json.dumps(name, ensure_ascii=False)}
    return rf"(?:{'|'.join(re.escape(text) for text in sorted(written))})\s*:\s*[^n\s]"
