"""Which chat template a config means, and its text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

from axolotl.exceptions import ConfigError, TokenizerError, did_you_mean
from axolotl.utils.logging import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = get_logger(__name__)

TEMPLATES_DIR = Path(__file__).parent / "templates"
TOKENIZER_DEFAULT = "tokenizer_default"
NAMED_PREFIX = "tokenizer_default:"
FALLBACK_PREFIX = "tokenizer_default_fallback_"
TOOL_USE = "tool_use"
"""What tokenizers with several templates call the one for conversations with tools."""

_CHAT_TEMPLATES: dict[str, str] = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES_DIR.glob("*.jinja"))
}
"""Name -> text of every template that ships, and of those registered by plugins."""

# The larger models of Gemma 4 differ in the header of the next answer alone.
_CHAT_TEMPLATES["gemma4_unified"] = (
    "{%- set empty_thought = empty_thought | default(true) -%}" + _CHAT_TEMPLATES["gemma4"]
)


def chat_template_names() -> list[str]:
    """The names that `chat_template:` takes, besides `jinja` and the `tokenizer_default` forms."""
    return sorted(_CHAT_TEMPLATES)


def register_chat_template(template_name: str, chat_template: str) -> None:
    """Make a template known by name.

    Raises:
        ValueError: the name is taken.
    """
    if template_name in _CHAT_TEMPLATES:
        raise ValueError(f"Template '{template_name}' already exists.")
    _CHAT_TEMPLATES[template_name] = chat_template


def get_chat_template(
    user_choice: str,
    jinja_template: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    with_tools: bool = False,
) -> str:
    """The text of the chat template that the user chose.

    Args:
        user_choice: a name, `jinja`, `tokenizer_default`, `tokenizer_default:<name>` for one of several that the tokenizer has,
            or `tokenizer_default_fallback_<name>`.
        jinja_template: for `jinja`, the template itself or the path of a file that holds it.
        tokenizer: for the `tokenizer_default` forms.
        with_tools: for conversations with tools; of several templates of the tokenizer these take `tool_use`.

    Raises:
        ValueError: there is no such template.
    """
    if user_choice == "jinja":
        if not jinja_template:
            raise ConfigError(
                "`chat_template: jinja` needs a template: write it, or the path of a file, as `chat_template_jinja`."
            )
        return read_jinja(jinja_template)

    if user_choice == TOKENIZER_DEFAULT:
        if tokenizer is None:
            raise ConfigError("`chat_template: tokenizer_default` needs a tokenizer, and none was given.")
        if not tokenizer.chat_template:
            raise TokenizerError(
                "`chat_template choice is tokenizer_default but tokenizer's chat_template is null. "
                "Please add a chat_template in tokenizer config`, or choose one by name, such as `chat_template: chatml`."
            )
        return _tokenizer_template(tokenizer, with_tools)

    if user_choice.startswith(NAMED_PREFIX):
        return _template_of_name(tokenizer, user_choice)

    if user_choice.startswith(FALLBACK_PREFIX):
        if tokenizer is None:
            raise ConfigError(f"`chat_template: {user_choice}` needs a tokenizer, and none was given.")
        if tokenizer.chat_template:
            return _tokenizer_template(tokenizer, with_tools)
        name = user_choice.removeprefix(FALLBACK_PREFIX)
        LOG.warning_once(f"No chat template found on tokenizer, falling back to {name}")
        return _named(name, user_choice)

    return _named(user_choice, user_choice)


def read_jinja(jinja_template: str) -> str:
    """`jinja_template`, or what the file of that path holds."""
    looks_like_path = "\n" not in jinja_template and "{" not in jinja_template and len(jinja_template) < 4096
    if not looks_like_path:
        return jinja_template
    path = Path(os.path.expanduser(jinja_template))
    if os.path.isfile(path):
        return path.read_text(encoding="utf-8")
    if path.suffix in {".jinja", ".jinja2", ".j2", ".txt"} or "/" in jinja_template:
        raise ConfigError(f"`chat_template_jinja: {jinja_template}` looks like a file, but there is none at that path.")
    return jinja_template


def extract_chat_template_args(cfg, ds_cfg: Mapping[str, Any] | None = None) -> tuple[str, str | None]:
    """The choice and the jinja text or path that apply to a dataset; the dataset's own go first."""
    if ds_cfg and ds_cfg.get("chat_template"):
        choice = ds_cfg["chat_template"] or TOKENIZER_DEFAULT
        jinja_template = ds_cfg.get("chat_template_jinja")
    else:
        choice = cfg.get("chat_template") or TOKENIZER_DEFAULT
        jinja_template = cfg.get("chat_template_jinja")
    return str(choice), jinja_template


def get_chat_template_from_config(
    cfg,
    ds_cfg: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    with_tools: bool = False,
) -> str:
    """The text of the chat template that applies to a dataset, or to the whole run; with tools it may be another one."""
    choice, jinja_template = extract_chat_template_args(cfg=cfg, ds_cfg=ds_cfg)
    template = get_chat_template(choice, jinja_template, tokenizer, with_tools)
    try:
        _compile_jinja_template(template)
    except jinja2.TemplateSyntaxError as error:
        origin = "`chat_template_jinja`" if choice == "jinja" else f"The template of `chat_template: {choice}`"
        raise ConfigError(f"{origin} is not a valid jinja template. Line {error.lineno}: {error.message}") from error
    return template


def _tokenizer_template(tokenizer: PreTrainedTokenizerBase, with_tools: bool) -> str:
    """The only template of the tokenizer; of several the one that transformers would take too."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return templates
    if with_tools and TOOL_USE in templates:
        return templates[TOOL_USE]
    if "default" in templates:
        return templates["default"]
    raise TokenizerError(
        f"The tokenizer has several chat templates ({', '.join(sorted(templates))}) and none is named `default`. "
        f"Choose one by its name, such as `chat_template: {NAMED_PREFIX}{min(templates)}`."
    )


def _template_of_name(tokenizer: PreTrainedTokenizerBase | None, user_choice: str) -> str:
    templates = tokenizer.chat_template if tokenizer is not None else None
    named = templates if isinstance(templates, dict) else {}
    name = user_choice.removeprefix(NAMED_PREFIX)
    if name in named:
        return named[name]
    has = "It has one template" if templates else "It has none"
    if named:
        has = f"Its templates are {', '.join(sorted(named))}"
    raise TokenizerError(
        f"`chat_template: {user_choice}`: the tokenizer has no chat template of the name `{name}`. {has}. Write "
        f"`{NAMED_PREFIX}<one of its names>` or `{TOKENIZER_DEFAULT}`."
    )


def _named(name: str, user_choice: str) -> str:
    if name in _CHAT_TEMPLATES:
        return _CHAT_TEMPLATES[name]
    hint = did_you_mean(name, _CHAT_TEMPLATES, n=3, cutoff=0.5)
    raise ConfigError(
        f"Template '{user_choice}' not found.{hint} `chat_template` takes `tokenizer_default`, `jinja` (with "
        f"`chat_template_jinja`) or one of: {', '.join(chat_template_names())}."
    )
