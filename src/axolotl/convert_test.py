from __future__ import annotations

import json

import pytest

from axolotl.convert import FileReader, FileWriter, JsonlSerializer, JsonParser, JsonToJsonlConverter, StdoutWriter


def converter(writer):
    return JsonToJsonlConverter(FileReader(), writer, JsonParser(), JsonlSerializer())


def test_a_list_becomes_one_line_per_object(tmp_path):
    rows = [{"a": 1}, {"text": "two\nlines, ünï"}]
    source, target = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps(rows), encoding="utf-8")
    converter(FileWriter(target)).convert(source)
    assert [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()] == rows


def test_standard_output(tmp_path, capsys):
    source = tmp_path / "in.json"
    source.write_text('[{"a": 1}, {"b": 2}]')
    converter(StdoutWriter()).convert(source)
    assert capsys.readouterr().out == '{"a": 1}\n{"b": 2}\n'


def test_an_object_is_refused(tmp_path):
    source = tmp_path / "in.json"
    source.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="list of objects"):
        converter(StdoutWriter()).convert(source)
