from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.exceptions import DatasetError
from axolotl.utils.data import json_lines

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abcd"), value, min_size=1), min_size=1, max_size=6), st.booleans())
def test_rows_come_back_as_written(tmp_path_factory, rows, as_list):
    file = tmp_path_factory.mktemp("rows") / "a.json"
    file.write_text(json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    found = json_lines.read([file]).to_list() if not json_lines.can_read([file]) else list(json_lines.read([file]))
    assert [json.dumps(row) for row in found] == [json.dumps({key: row.get(key) for key in columns}) for row in rows]


def test_a_column_that_changes_late(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "ROWS_PER_BLOCK", 3)
    rows = [{"a": n} for n in range(7)] + [{"a": "text", "b": {"z": 1, "y": None}}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    found = list(json_lines.read([file]))
    assert found[6] == {"a": 6, "b": None}
    assert found[7] == rows[7]


def test_dates_stay_text_and_ids_stay_arrow_lists(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('\ufeff{"d": "2020-01-01", "input_ids": [1, 2]}\n\n{"d": "2020-01-02", "input_ids": []}\n')
    rows = json_lines.read([file])
    assert rows["d"][:] == ["2020-01-01", "2020-01-02"]
    assert rows.features["input_ids"].feature.dtype == "int64"


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"a": 1}\n{"a": 2', r"line 2 is not valid JSON.*The line starts"),
        ('{"a": 1}\n[1]\n', "line 2: expected an object of fields"),
        ('[{"a": 1}, 5]', "row 1: expected an object"),
        ('[{"a": 1},', "is not valid JSON"),
        ("\n\n", "holds no rows"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(DatasetError, match=message):
        json_lines.read([file])


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": "ok"}\n{"a": "\xff\xfe"}\n')
    with pytest.raises(DatasetError, match="line 2 is not UTF-8 text"):
        json_lines.read([file])
    file.write_text('{"a": "ok"}\n{"a": "\\ud800"}\n')
    with pytest.raises(DatasetError, match=r"row 1.*`a`.*half of a character"):
        json_lines.read([file])
