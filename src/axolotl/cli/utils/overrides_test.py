from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl.cli.utils.overrides import (
    apply_overrides,
    coerce_override,
    describe_unknown,
    sort_arguments,
    unknown_keys,
)
from axolotl.exceptions import ConfigError

OWN = {"--launcher": True, "--debug": False, "--no-debug": False, "--debug-num-examples": True, "--help": False}


def overrides_of(*args: str) -> dict:
    return sort_arguments(list(args), OWN).overrides


@pytest.mark.parametrize(
    "args",
    [
        ["--micro-batch-size", "2"],
        ["--micro_batch_size", "2"],
        ["--micro-batch-size=2"],
        ["--micro_batch_size=2"],
    ],
)
@pytest.mark.usefixtures("config_options")
def test_spellings_of_a_flag(args):
    assert overrides_of(*args) == {"micro_batch_size": "2"}


@pytest.mark.usefixtures("config_options")
def test_nested_flag():
    assert overrides_of("--trl.beta", "0.1", "--trl.use-vllm") == {"trl__beta": "0.1", "trl__use_vllm": True}


def test_a_checkpoint_is_a_value_though_it_holds_the_config_of_its_run(tmp_path):
    for name in ("axolotl_config.yaml", "trainer_state.json"):
        (tmp_path / name).touch()
    assert overrides_of("cfg.yml", "--resume-from-checkpoint", str(tmp_path)) == {
        "resume_from_checkpoint": str(tmp_path)
    }
    (tmp_path / "trainer_state.json").unlink()
    sorted_args = sort_arguments(["--resume-from-checkpoint", str(tmp_path)], OWN)
    assert (sorted_args.own, sorted_args.overrides) == ([str(tmp_path)], {"resume_from_checkpoint": True})


@pytest.mark.usefixtures("config_options")
def test_switches_do_not_swallow_the_config():
    sorted_args = sort_arguments(["--sample-packing", "cfg.yml", "--bf16", "other.yaml"], OWN)
    assert sorted_args.own == ["cfg.yml", "other.yaml"]
    assert sorted_args.overrides == {"sample_packing": True, "bf16": True}


@pytest.mark.usefixtures("config_options")
def test_values_of_switches():
    assert overrides_of("--no-sample-packing") == {"sample_packing": False}
    assert overrides_of("--no_sample_packing") == {"sample_packing": False}
    assert overrides_of("--sample-packing", "false") == {"sample_packing": "false"}
    assert overrides_of("--sample-packing=False") == {"sample_packing": "False"}
    assert overrides_of("--bf16", "auto") == {"bf16": "auto"}
    assert overrides_of("--no-trl.use-vllm") == {"trl__use_vllm": False}


@pytest.mark.usefixtures("config_options")
def test_a_negative_number_is_a_value():
    assert overrides_of("--learning-rate", "-1") == {"learning_rate": "-1"}


@pytest.mark.usefixtures("config_options")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--micro-batch-size"], "needs a value"),
        (["--micro-batch-size", "--sample-packing"], "needs a value"),
        (["--no-micro-batch-size"], "not a switch"),
        (["--no-sample-packing=true"], "takes no value"),
        (["--debug=maybe"], "switch"),
        (["--trl..beta", "1"], "not the name of a key"),
    ],
)
def test_misuse_is_refused(args, message):
    with pytest.raises(click.UsageError, match=message):
        overrides_of(*args)


@pytest.mark.usefixtures("config_options")
def test_own_options_and_launcher_args():
    args = [
        "cfg.yml",
        "--debug_num_examples",
        "3",
        "--debug=True",
        "--launcher=torchrun",
        "--bf16",
        "--",
        "--nnodes=2",
        "-x",
    ]
    sorted_args = sort_arguments(args, OWN)
    assert sorted_args.own == ["cfg.yml", "--debug-num-examples", "3", "--debug", "--launcher=torchrun"]
    assert sorted_args.launcher_args == ["--nnodes=2", "-x"]
    assert sorted_args.overrides == {"bf16": True}
    assert sort_arguments(["--debug=False"], OWN).own == ["--no-debug"]


@pytest.mark.usefixtures("no_config_options")
def test_any_key_is_taken_before_the_options_file_exists():
    assert overrides_of("--anything", "1", "--no-else", "--flag") == {"anything": "1", "else": False, "flag": True}
    assert unknown_keys({"anything": "1"}) == []


@pytest.mark.usefixtures("config_options")
def test_unknown_keys_and_the_nearest():
    given_keys = {"micro_batch_sise": "2", "trl__beta": "1", "trl__bata": "1", "lr_scheduler_kwargs__x__y": "1"}
    assert unknown_keys(given_keys) == ["micro_batch_sise", "trl.bata"]
    assert "`--micro-batch-size`" in describe_unknown("micro_batch_sise")
    assert "`--trl.beta`" in describe_unknown("trl.bata")


@pytest.mark.usefixtures("config_options")
@pytest.mark.parametrize(
    ("key", "text", "existing", "expected"),
    [
        ("k", "2", 1, 2),
        ("k", "0.05", 0, 0.05),
        ("k", "1", 0.5, 1.0),
        ("k", "1e-4", 1, 1e-4),
        ("k", "yes", False, True),
        ("k", "0", True, False),
        ("k", "auto", True, "auto"),
        ("k", "null", 3, None),
        ("k", "none", 3, None),
        ("k", "~", "text", None),
        ("k", "none", "epoch", "none"),
        ("k", "no", "epoch", "no"),
        ("k", "true", None, True),
        ("k", "no", None, False),
        ("k", "None", None, None),
        ("k", "12", None, 12),
        ("k", "-3", None, -3),
        ("k", "2e-5", None, 2e-5),
        ("k", ".5", None, 0.5),
        ("k", "nan", None, "nan"),
        ("k", "1_000", None, "1_000"),
        ("k", "text", None, "text"),
        ("k", "", None, ""),
        ("k", "[q_proj, k_proj]", None, ["q_proj", "k_proj"]),
        ("k", "{a: 1}", None, {"a": 1}),
        ("k", "[1]", "text", "[1]"),
        ("k", 5, "text", 5),
        ("wandb_name", "001", None, "001"),
        ("wandb_name", "1e10", None, "1e10"),
        ("wandb_name", "null", None, None),
        ("eval_strategy", "no", None, "no"),
    ],
)
def test_coercion(key, text, existing, expected):
    value = coerce_override(key, text, existing)
    assert value == expected
    assert type(value) is type(expected)


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans())
def test_what_is_passed_on_as_text_comes_back(value):
    assert coerce_override("some_key", str(value)) == value
    assert coerce_override("some_key", str(value), existing=value) == value


def test_apply_makes_the_path_and_keeps_siblings():
    cfg = {"trl": {"beta": 0.5, "use_vllm": True}}
    assert apply_overrides(cfg, {"trl__beta": "0.1", "vllm__host": "here", "seed": "3"}) == []
    assert cfg == {"trl": {"beta": 0.1, "use_vllm": True}, "vllm": {"host": "here"}, "seed": 3}


def test_strict_keeps_new_keys_out_and_says_so():
    cfg = {"strict": True, "seed": 1, "trl": {"beta": 1.0}}
    assert apply_overrides(cfg, {"seed": "2", "max_steps": "5", "trl__x": "1"}) == ["max_steps", "trl.x"]
    assert cfg == {"strict": True, "seed": 2, "trl": {"beta": 1.0}}


def test_a_key_below_a_plain_value_is_refused():
    with pytest.raises(ConfigError, match="holds no keys"):
        apply_overrides({"trl": "text"}, {"trl__beta": "1"})
