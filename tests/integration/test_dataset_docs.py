"""The examples of `docs/datasets.md` are configs that load, and its types exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from axolotl.prompt_strategies.resolve import BASE_TYPES, _function
from axolotl.utils.chat_templates import chat_template_names
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "datasets.md").read_text("utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)


def names_in_table(start: str, end: str) -> set[str]:
    """The names in the first column of the table between two headings."""
    section = PAGE[PAGE.index(start) : PAGE.index(end)]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([\w.:]+)`", row.split("|")[1])}


TYPES = names_in_table("## Types", "### Conversations") - {"_synthetic", "my_package.my_module"}


@pytest.mark.parametrize("block", BLOCKS)
def test_example_is_valid(block):
    cfg = DictDefault(
        {"base_model": "m", "micro_batch_size": 1, "learning_rate": 1e-4, "gradient_accumulation_steps": 1}
    )
    checked = validate_config(DictDefault({**cfg, **yaml.safe_load(block)}))
    assert checked.datasets or checked.pretraining_dataset


@pytest.mark.parametrize("name", sorted(TYPES))
def test_type_exists(name):
    assert name.partition(":")[0] in BASE_TYPES or _function(name) is not None


def test_every_template_that_ships_is_in_the_table():
    assert names_in_table("### Conversations", "**Messages.**") == set(chat_template_names())
