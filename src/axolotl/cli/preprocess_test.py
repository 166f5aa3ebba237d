from __future__ import annotations

import pytest

from axolotl.cli.args import PreprocessCliArgs
from axolotl.cli.plan import parse_memory
from axolotl.cli.preprocess import do_preprocess
from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault


@pytest.mark.parametrize("key", ["streaming", "pretraining_dataset", "skip_prepare_dataset"])
def test_rows_that_are_made_while_training_are_refused(key):
    with pytest.raises(ConfigError, match=f"`{key}`.*axolotl train"):
        do_preprocess(DictDefault({key: True}), PreprocessCliArgs())


def test_iterable_is_refused():
    with pytest.raises(ConfigError, match="--iterable"):
        do_preprocess(DictDefault(), PreprocessCliArgs(iterable=True))


@pytest.mark.parametrize(
    ("text", "gib"), [("24GiB", 24), ("24", 24), ("1.5 tib", 1536), ("80GB", 80e9 / 2**30), ("512MiB", 0.5)]
)
def test_amounts_of_memory(text, gib):
    assert parse_memory(text) == pytest.approx(gib)


@pytest.mark.parametrize("text", ["", "lots", "-3GiB", "0", "24GiBit"])
def test_what_is_no_amount(text):
    with pytest.raises(ConfigError, match="24GiB"):
        parse_memory(text)
