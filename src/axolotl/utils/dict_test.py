import copy
import pickle

import pytest

from axolotl.utils.dict import DictDefault, remove_none_values


def test_missing_key_reads_as_none():
    cfg = DictDefault({"a": {"b": 1}})
    assert cfg.missing is None and cfg["missing"] is None and cfg.a.missing is None
    assert "missing" not in cfg


def test_nested_mappings_become_attributes_also_in_lists():
    cfg = DictDefault({"datasets": [{"path": "x", "type": {"field_input": "q"}}]})
    assert cfg.datasets[0].type.field_input == "q"
    cfg.trl = {"beta": 0.1}
    assert cfg.trl.beta == 0.1


def test_or_keeps_the_left_value():
    left = DictDefault({"a": {"b": "left"}, "c": 1})
    merged = left | DictDefault({"a": {"b": "right", "d": 2}, "e": 3})
    assert merged == {"a": {"b": "left", "d": 2}, "c": 1, "e": 3}
    assert left == {"a": {"b": "left"}, "c": 1}


def test_update_merges_nested():
    cfg = DictDefault({"a": {"b": 1}})
    cfg.update({"a": {"c": 2}})
    assert cfg == {"a": {"b": 1, "c": 2}}


def test_copies_and_pickles():
    cfg = DictDefault({"a": {"b": [1, {"c": 2}]}})
    deep = copy.deepcopy(cfg)
    deep.a.b[1].c = 3
    assert cfg.a.b[1].c == 2
    again = pickle.loads(pickle.dumps(cfg))
    assert again == cfg and isinstance(again.a, DictDefault)
    assert type(cfg.to_dict()["a"]["b"][1]) is dict


def test_delete_and_method_names():
    cfg = DictDefault({"a": 1})
    del cfg.a
    assert cfg.a is None
    with pytest.raises(AttributeError):
        del cfg.a
    with pytest.raises(AttributeError, match="is a method"):
        cfg.items = 3


def test_remove_none_values():
    assert remove_none_values({"a": None, "b": [{"c": None, "d": 1}, None]}) == {"b": [{"d": 1}]}
