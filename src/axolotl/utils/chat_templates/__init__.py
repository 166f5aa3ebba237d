"""This module provides functionality for selecting chat templates based on user choices.

In: the `chat_template:` of a config and a tokenizer. Out: the text of a jinja template. The templates that ship stand
in `templates/`, one file per name; one more is one more file there, or `register_chat_template(name, text)`.
"""

from axolotl._lazy import lazy_names

_BASE = "axolotl.utils.chat_templates.base"

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "get_chat_template": _BASE,
        "extract_chat_template_args": _BASE,
        "get_chat_template_from_config": _BASE,
        "register_chat_template": _BASE,
        "chat_template_names": _BASE,
        "_CHAT_TEMPLATES": _BASE,
    },
)
