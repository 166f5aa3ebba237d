from __future__ import annotations

from dataclasses import dataclass

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, Field

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.utils.args import (
    add_options_from_config,
    add_options_from_dataclass,
    filter_none_kwargs,
    split_cli_args,
)


class Nested(BaseModel):
    beta: float | None = None
    use_vllm: bool = False


class Config(BaseModel):
    micro_batch_size: int | None = Field(None, description="rows per step")
    sample_packing: bool | None = None
    trl: Nested | None = None


@dataclass
class Args:
    debug: bool = False
    num_examples: int = 1
    prompter: str | None = None


def invoke(decorator, args):
    seen = {}

    @click.command()
    @decorator
    @filter_none_kwargs
    def command(**kwargs):
        seen.update(kwargs)

    result = CliRunner().invoke(command, args)
    return result, seen


def test_options_from_a_model():
    args = ["--micro-batch-size", "2", "--no-sample-packing", "--trl.beta", "0.1", "--trl.use-vllm"]
    result, seen = invoke(add_options_from_config(Config), args)
    assert result.exit_code == 0, result.output
    assert seen == {"micro_batch_size": "2", "sample_packing": False, "trl__beta": "0.1", "trl__use_vllm": True}
    assert invoke(add_options_from_config(Config), [])[1] == {}
    assert "rows per step" in invoke(add_options_from_config(Config), ["--help"])[0].output


def test_options_from_a_dataclass():
    assert invoke(add_options_from_dataclass(Args), [])[1] == {"debug": False, "num_examples": 1}
    seen = invoke(add_options_from_dataclass(Args), ["--debug", "--num-examples", "3", "--prompter", "p"])[1]
    assert seen == {"debug": True, "num_examples": 3, "prompter": "p"}
    assert invoke(add_options_from_dataclass(Args), ["--num-examples", "x"])[0].exit_code == 2


def test_own_arguments_and_overrides_part():
    cli_args, overrides = split_cli_args(TrainerCliArgs, {"debug": True, "prompter": None, "seed": 3})
    assert cli_args == TrainerCliArgs(debug=True)
    assert overrides == {"seed": 3}


@pytest.mark.parametrize(("given", "passed"), [({"a": None, "b": 0}, {"b": 0}), ({}, {})])
def test_filter_none_kwargs(given, passed):
    assert filter_none_kwargs(lambda **kwargs: kwargs)(**given) == passed
