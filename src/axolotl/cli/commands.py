"""The click commands: their arguments, and which door they open.

Only what parses arguments is imported here; a callback imports its door when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from axolotl.cli.args import EvaluateCliArgs, InferenceCliArgs, PreprocessCliArgs, TrainerCliArgs
from axolotl.cli.utils.args import ConfigCommand, add_options_from_dataclass, filter_none_kwargs
from axolotl.cli.utils.train import LAUNCHERS, refuse_cloud

CONFIG_HELP = "CONFIG is a YAML or JSON file, a folder of them, an https:// URL, or - for standard input."


def config_command(help_line: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A command with a CONFIG argument and override flags."""

    def decorator(function: Callable[..., Any]) -> click.Command:
        with_argument = click.argument("config", type=str)(filter_none_kwargs(function))
        return click.command(cls=ConfigCommand, help=f"{help_line}\n\n{CONFIG_HELP}", short_help=help_line)(
            with_argument
        )

    return decorator


def launcher_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the commands that may run in several processes."""
    for option in (
        click.option("--main-process-port", type=int, default=None, help="Port of the main process, for the launcher."),
        click.option("--num-processes", type=int, default=None, help="Number of processes, for the launcher."),
        click.option(
            "--launcher",
            type=click.Choice(LAUNCHERS),
            default=None,
            help="What starts the processes. Without it: this process where one is enough, accelerate for several GPUs. "
            "Its arguments follow after --.",
        ),
    ):
        function = option(function)
    return function


def cloud_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--cloud", default=None, help="Path of a cloud config (not implemented here yet).")(function)


def start(config: str) -> str:
    """What every command does first: logging, the environment, and the path of the config."""
    from axolotl.cli.config import find_config
    from axolotl.cli.utils.env import prepare_environment
    from axolotl.cli.utils.errors import end_cleanly_on_signals
    from axolotl.logging_config import configure_logging

    end_cleanly_on_signals()
    configure_logging()
    prepare_environment()
    return str(find_config(config))


@config_command("Preprocess datasets before training.")
@cloud_option
@add_options_from_dataclass(PreprocessCliArgs)
def preprocess(config: str, cloud: str | None = None, **kwargs: Any) -> None:
    """Preprocess datasets before training.

    Args:
        config: path of the config.
        cloud: path of a cloud config.
        kwargs: fields of `PreprocessCliArgs`, and overrides.
    """
    refuse_cloud(cloud)
    config = start(config)
    from axolotl.cli.preprocess import do_cli

    do_cli(config=config, **kwargs)


@config_command("Train or fine-tune a model.")
@launcher_options
@cloud_option
@click.option("--sweep", default=None, help="YAML file of lists of values; trains every combination.")
@add_options_from_dataclass(TrainerCliArgs)
@click.pass_context
def train(
    ctx: click.Context,
    config: str,
    launcher: str | None = None,
    cloud: str | None = None,
    sweep: str | None = None,
    **kwargs: Any,
) -> int:
    """Train or fine-tune a model.

    Args:
        ctx: its `args` are the launcher's arguments.
        config: path of the config.
        launcher: what starts the processes.
        cloud: path of a cloud config.
        sweep: path of a sweep file.
        kwargs: fields of `TrainerCliArgs`, and overrides.

    Returns:
        The exit code: 1 when a run of a sweep failed.
    """
    from axolotl.cli.utils.train import launch_training, run_sweep

    refuse_cloud(cloud)
    config = start(config)
    if sweep:
        return 1 if run_sweep(config, sweep, launcher, kwargs, ctx.args) else 0
    launch_training(config, launcher, cloud, kwargs, ctx.args, use_exec=True)
    return 0


@config_command("Evaluate a model on the train and eval sets.")
@launcher_options
@add_options_from_dataclass(EvaluateCliArgs)
@click.pass_context
def evaluate(ctx: click.Context, config: str, launcher: str | None = None, **kwargs: Any) -> None:
    """Evaluate a model.

    Args:
        ctx: its `args` are the launcher's arguments.
        config: path of the config.
        launcher: what starts the processes.
        kwargs: fields of `EvaluateCliArgs`, and overrides.
    """
    from axolotl.cli.utils.train import launch

    launch("evaluate", start(config), launcher, kwargs, ctx.args)


@config_command("Evaluate a model with the lm-evaluation-harness.")
@cloud_option
def lm_eval(config: str, cloud: str | None = None, **kwargs: Any) -> None:
    """Evaluate a model on the tasks of `lm_eval_tasks`.

    Args:
        config: path of the config.
        cloud: path of a cloud config.
        kwargs: overrides.
    """
    refuse_cloud(cloud)
    config = start(config)
    from axolotl.cli.lm_eval import do_cli

    do_cli(config, **kwargs)


@config_command("Run inference with a trained model.")
@launcher_options
@click.option("--gradio", is_flag=True, help="Answer in a web page.")
@click.option("--chat", is_flag=True, help="Answer in a conversation on the terminal.")
@add_options_from_dataclass(InferenceCliArgs)
@click.pass_context
def inference(
    ctx: click.Context,
    config: str,
    launcher: str | None = None,
    gradio: bool = False,
    chat: bool = False,
    **kwargs: Any,
) -> None:
    """Run inference with a trained model.

    Args:
        ctx: its `args` are the launcher's arguments.
        config: path of the config.
        launcher: what starts the processes.
        gradio: answer in a web page.
        chat: answer in a conversation.
        kwargs: fields of `InferenceCliArgs`, and overrides.
    """
    from axolotl.cli.utils.train import launch

    if gradio and chat:
        raise click.UsageError("`--gradio` and `--chat` are two ways to talk to the model. Choose one.")
    modes = {name: True for name, chosen in (("gradio", gradio), ("chat", chat)) if chosen}
    launch("inference", start(config), launcher, {**kwargs, **modes}, ctx.args)


@config_command("Merge trained LoRA adapters into a base model.")
@click.option("--dequant/--no-dequant", default=None, help="Merge into the base model's full-precision weights.")
@click.option("--override-quantizer", default=None, help="Quantize the merged weights in this format.")
def merge_lora(config: str, **kwargs: Any) -> None:
    """Merge trained LoRA adapters into a base model.

    Args:
        config: path of the config.
        kwargs: options, and overrides.
    """
    config = start(config)
    from axolotl.cli.merge_lora import do_cli

    do_cli(config=config, **kwargs)


@config_command("Show what a run will do, cost and need, before it starts.")
@click.option("--gpu", default=None, help="Forecast the memory for this GPU, such as h200, a100-80gb, rtx4090.")
@click.option("--memory", default=None, help="Forecast for a GPU with this much memory, such as 24GiB.")
def plan(config: str, **kwargs: Any) -> None:
    """Show what a run will do.

    Args:
        config: path of the config.
        kwargs: options, and overrides.
    """
    config = start(config)
    from axolotl.cli.plan import do_cli

    do_cli(config=config, **kwargs)


@config_command("Show what a run will change in other libraries, and why.")
def patches(config: str, **kwargs: Any) -> None:
    """Show the patches of a run.

    Args:
        config: path of the config.
        kwargs: overrides.
    """
    config = start(config)
    from axolotl.cli.patches import do_cli

    do_cli(config=config, **kwargs)


@click.command("config-schema")
@click.option("--format", "output_format", type=click.Choice(["json", "yaml"]), default="json", show_default=True)
@click.option("--field", default=None, help="Only this key.")
def config_schema(output_format: str, field: str | None) -> None:
    """Print the JSON schema of the config, for editors that complete and check YAML."""
    from axolotl.cli.config_schema import print_config_schema

    print_config_schema(output_format, field)


@click.command("fetch")
@click.argument("directory", type=click.Choice(["examples", "deepspeed_configs", "docs"]))
@click.option("--dest", default=None, help="Folder to write to; by default a folder of that name right here.")
def fetch(directory: str, dest: str | None) -> None:
    """Fetch example configs or other resources.

    Available directories:
    - examples: Example configuration files
    - deepspeed_configs: DeepSpeed configuration files
    - docs: documentation

    They come from the installed package; no network is needed. A file that you changed is kept, and the shipped one is
    written beside it as FILE.new.
    """
    from axolotl.cli.fetch import do_fetch

    do_fetch(directory, dest)
