"""From the arguments of a command line to click options and back."""

from __future__ import annotations

import dataclasses
import functools
import textwrap
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import click

from axolotl.cli.utils.overrides import describe_unknown, read_config_options, sort_arguments, unknown_keys

if TYPE_CHECKING:
    from pydantic import BaseModel


class ConfigCommand(click.Command):
    """A command whose CONFIG argument may be followed by any `--config-key value` and by `-- launcher arguments`.

    The overrides reach the callback as keywords; the launcher arguments are `ctx.args`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and self.no_args_is_help:
            return super().parse_args(ctx, args)
        own_options = {"--help": False} | {
            name: not parameter.is_flag
            for parameter in self.params
            if isinstance(parameter, click.Option)
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        sorted_args = sort_arguments(args, own_options)
        super().parse_args(ctx, sorted_args.own)
        if ctx.resilient_parsing:
            return ctx.args
        self._check_known(sorted_args.overrides, str(ctx.params.get("config", "")))
        clash = set(sorted_args.overrides) & set(ctx.params)
        if clash:
            raise click.UsageError(f"`--{min(clash)}` cannot be set twice.", ctx)
        ctx.params.update(sorted_args.overrides)
        ctx.args = sorted_args.launcher_args
        return ctx.args

    @staticmethod
    def _check_known(overrides: dict[str, Any], config: str) -> None:
        """Refuse a flag that names no key, before anything is started.

        Keys of third-party plugins are not in the generated list: a config that lists plugins may be given any key, which
        validation then judges.
        """
        unknown = unknown_keys(overrides)
        if not unknown:
            return
        from axolotl.cli.config import keys_of_file

        written = keys_of_file(config)
        for key in unknown:
            if "plugins" not in written and key.partition(".")[0] not in written:
                raise click.UsageError(describe_unknown(key))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        groups: dict[str, list[str]] = {}
        for option in read_config_options().values():
            if "." not in option.key:
                groups.setdefault(option.group or "Config keys", []).append("--" + option.key.replace("_", "-"))
        if not groups:
            return
        with formatter.section("Config overrides"):
            formatter.write_text(
                "Every key of the config is an option: `--key value`, `--key=value`, `--parent.key value`, and `--key` or "
                "`--no-key` for a switch. `axolotl config-schema --field KEY` describes one."
            )
        for group, flags in groups.items():
            with formatter.section(group):
                indent = " " * formatter.current_indent
                # Click's own wrapping would break a flag at its dashes.
                formatter.write(
                    textwrap.fill(
                        " ".join(sorted(flags)),
                        width=formatter.width,
                        initial_indent=indent,
                        subsequent_indent=indent,
                        break_on_hyphens=False,
                        break_long_words=False,
                    )
                    + "\n"
                )


def add_options_from_config(config_class: type[BaseModel]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Create Click options from the fields of a Pydantic model.

    A boolean becomes `--x/--no-x`; a nested model gives `--parent.child`, passed as `parent__child`. An option that is not
    given is None.

    Args:
        config_class: the model with the fields.

    Returns:
        A decorator that adds the options to a command.
    """

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, field in reversed(config_class.model_fields.items()):
            nested = _nested_model(field.annotation)
            children = nested.model_fields.items() if nested else ()
            for child_name, child in reversed(children):
                function = _config_option(f"{name}.{child_name}", child.annotation, child.description)(function)
            if not nested:
                function = _config_option(name, field.annotation, field.description)(function)
        return function

    return decorator


def add_options_from_dataclass(config_class: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Create Click options from the fields of a dataclass.

    Args:
        config_class: the dataclass; a field's default is the option's, and `metadata["help"]` its help.

    Returns:
        A decorator that adds the options to a command.
    """

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(config_class)
        for field in reversed(dataclasses.fields(config_class)):
            flag = "--" + field.name.replace("_", "-")
            kind = _strip_optional(hints[field.name])
            help_line = field.metadata.get("help")
            if kind is bool:
                declaration = f"{flag}/--no-{flag[2:]}"
                function = click.option(declaration, field.name, default=field.default, help=help_line)(function)
            else:
                click_type = kind if kind in (int, float) else str
                function = click.option(flag, field.name, type=click_type, default=field.default, help=help_line)(
                    function
                )
        return function

    return decorator


def filter_none_kwargs(func: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps function to remove None-valued kwargs."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **{key: value for key, value in kwargs.items() if value is not None})

    return wrapper


def split_cli_args(args_class: type[Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The dataclass of a command's own arguments, and what remains: the overrides.

    Args:
        args_class: a dataclass of `axolotl.cli.args`.
        kwargs: keywords of `do_cli`, of both kinds.
    """
    names = {field.name for field in dataclasses.fields(args_class)}
    own = {key: value for key, value in kwargs.items() if key in names and value is not None}
    return args_class(**own), {key: value for key, value in kwargs.items() if key not in names}


def _config_option(name: str, annotation: Any, description: str | None) -> Callable[..., Any]:
    flag = "--" + name.replace("_", "-")
    declaration = f"{flag}/--no-{flag[2:]}" if _strip_optional(annotation) is bool else flag
    return click.option(declaration, name.replace(".", "__"), default=None, help=description)


def _strip_optional(annotation: Any) -> Any:
    """`int | None` -> `int`; anything else as it is."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else annotation
    return annotation


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    from pydantic import BaseModel

    kind = _strip_optional(annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
