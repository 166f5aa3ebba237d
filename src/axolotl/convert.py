"""Module containing File Reader, File Writer, Json Parser, and Jsonl Serializer classes"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Protocol


class Writer(Protocol):
    """Where converted text goes."""

    def write(self, content: str) -> None: ...


class FileReader:
    """Reads a file and returns its contents as a string"""

    def read(self, file_path: str | Path) -> str:
        return Path(file_path).read_text(encoding="utf-8")


class FileWriter:
    """Writes a string to a file"""

    def __init__(self, file_path: str | Path):
        self.file_path = file_path

    def write(self, content: str) -> None:
        Path(self.file_path).write_text(content, encoding="utf-8")


class StdoutWriter:
    """Writes a string to stdout"""

    def write(self, content: str) -> None:
        sys.stdout.write(content)
        sys.stdout.write("\n")


class JsonParser:
    """Parses a string as JSON and returns the result"""

    def parse(self, content: str) -> Any:
        return json.loads(content)


class JsonlSerializer:
    """Serializes a list of JSON objects into a JSONL string"""

    def serialize(self, data: list[Any]) -> str:
        return "\n".join(json.dumps(item) for item in data)


class JsonToJsonlConverter:
    """Converts a JSON file to JSONL

    Args:
        file_reader: reads the JSON file.
        file_writer: takes the JSONL text.
        json_parser: turns text into objects.
        jsonl_serializer: turns objects into lines.
    """

    def __init__(
        self, file_reader: FileReader, file_writer: Writer, json_parser: JsonParser, jsonl_serializer: JsonlSerializer
    ):
        self.file_reader = file_reader
        self.file_writer = file_writer
        self.json_parser = json_parser
        self.jsonl_serializer = jsonl_serializer

    def convert(self, input_file_path: str | Path) -> None:
        """Convert the JSON file at `input_file_path`, a list of objects.

        Raises:
            ValueError: it is no JSON, or holds no list.
        """
        data = self.json_parser.parse(self.file_reader.read(input_file_path))
        if not isinstance(data, list):
            raise ValueError(
                f"{input_file_path} holds a JSON {type(data).__name__}, but JSONL is made from a list of objects."
            )
        self.file_writer.write(self.jsonl_serializer.serialize(data))
