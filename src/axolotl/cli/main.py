"""The `axolotl` command: the table of commands, and the one place where an error becomes a message and an exit code.

Only click is imported here. A row of `COMMANDS` says where the click command is defined; that module is imported when the
command is named on the command line.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click

from axolotl import __version__
from axolotl._lazy import lazy_names
from axolotl.exceptions import NotBuiltError, did_you_mean
from axolotl.utils.garbage import end_process, own_process

# Name -> ("module:attribute", the line that `axolotl --help` shows).
COMMANDS: dict[str, tuple[str, str]] = {
    "preprocess": ("axolotl.cli.commands:preprocess", "Preprocess datasets before training."),
    "plan": ("axolotl.cli.commands:plan", "Show what a run will do, cost and need, before it starts."),
    "train": ("axolotl.cli.commands:train", "Train or fine-tune a model."),
    "evaluate": ("axolotl.cli.commands:evaluate", "Evaluate a model on the train and eval sets."),
    "inference": ("axolotl.cli.commands:inference", "Run inference with a trained model."),
    "merge-lora": ("axolotl.cli.commands:merge_lora", "Merge trained LoRA adapters into a base model."),
    "lm-eval": ("axolotl.cli.commands:lm_eval", "Evaluate a model with the lm-evaluation-harness."),
    "config-schema": ("axolotl.cli.commands:config_schema", "Print the JSON schema of the config."),
    "patches": ("axolotl.cli.commands:patches", "Show what a run will change in other libraries, and why."),
    "fetch": ("axolotl.cli.commands:fetch", "Fetch example configs or other resources."),
}

# Third-party packages add commands through this entry-point group. They cannot shadow a command of the table.
PLUGIN_GROUP = "axolotl.cli_commands"

# The documented click commands of this module, imported when first used.
__getattr__, __dir__ = lazy_names(
    __name__,
    dict.fromkeys(
        ("evaluate", "fetch", "inference", "merge_lora", "preprocess", "train"),
        "axolotl.cli.commands",
    ),
)


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *sorted(name for name in _plugin_commands() if name not in COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = cmd_name.replace("_", "-")
        if name in COMMANDS:
            from pkgutil import resolve_name  # not for `--help`

            return resolve_name(COMMANDS[name][0])
        plugins = _plugin_commands()
        if cmd_name in plugins:
            return plugins[cmd_name].load()
        _refuse_if_not_built(name)
        return None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            hint = did_you_mean(name, self.list_commands(ctx)) or " `axolotl --help` lists the commands."
            raise click.UsageError(f"No such command `{name}`.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing any of them."""
        rows = [(name, help_line) for name, (_, help_line) in COMMANDS.items()]
        rows += [
            (name, f"From {entry.value.partition(':')[0]}.")
            for name, entry in sorted(_plugin_commands().items())
            if name not in COMMANDS
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _plugin_commands() -> dict[str, Any]:
    """Name -> entry point of the commands that installed packages add."""
    if not _any_package_adds_commands():
        return {}
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=PLUGIN_GROUP)}


def _any_package_adds_commands() -> bool:
    """Whether an installed package names the group. Looking at the files takes a tenth of the time of parsing them all."""
    group = f"[{PLUGIN_GROUP}]".encode()
    for folder in dict.fromkeys(sys.path):
        try:
            names = [name for name in os.listdir(folder or ".") if name.endswith((".dist-info", ".egg-info"))]
        except OSError:
            continue
        for name in names:
            try:
                with open(os.path.join(folder, name, "entry_points.txt"), "rb") as file:
                    if group in file.read():
                        return True
            except OSError:
                continue
    return False


def _refuse_if_not_built(name: str) -> None:
    from axolotl._not_built import COMMANDS_NOT_BUILT

    if name in COMMANDS_NOT_BUILT:
        raise NotBuiltError(
            f"`axolotl {name}` is known but not implemented here yet. {COMMANDS_NOT_BUILT[name]}".rstrip()
        )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version=__version__, prog_name="axolotl")
def cli() -> None:
    """Axolotl CLI - Train and fine-tune large language models"""


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 when it went well, 2 for a misused command, 130 when interrupted, else 1."""
    sys.exit(run(args))


def command(args: list[str] | None = None) -> NoReturn:
    """`main` as the whole of a process, which it ends."""
    own_process()
    code = run(args)
    if errors := sys.modules.get("axolotl.cli.utils.errors"):
        errors.leave()
    end_process(code)


def run(args: list[str] | None = None) -> int:
    """The exit code of a command line. Every error ends here, as a message on standard error."""
    try:
        code = cli.main(args=args, prog_name="axolotl", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        # The reader of a pipe went away (`axolotl patches c.yml | head`). Not an error, and nothing left to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt, click.Abort) as error:  # noqa: BLE001 - the last handler of the program
        from axolotl.cli.utils.errors import report_error

        return report_error(error)
    finally:
        # A program that calls this several times gets its streams back. `--help` opened no log and does not load what writes one.
        if tee := sys.modules.get("axolotl.utils.tee"):
            tee.close_debug_log()


def run_module(name: str) -> NoReturn:
    """`python -m axolotl.cli.<name> CONFIG --key=value`: the command in this process, whatever launched it."""
    from axolotl.utils.processes import stop_with_launcher  # not for `--help`

    stop_with_launcher()
    command([name, "--launcher", "python", *sys.argv[1:]])


if __name__ == "__main__":
    command()
