"""The web page of `axolotl inference --gradio`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from axolotl.cli.answering import Answerer
from axolotl.exceptions import MissingExtraError
from axolotl.utils.dict import DictDefault


def check_gradio() -> None:
    """Before the model is loaded.

    Raises:
        MissingExtraError: gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MissingExtraError("gradio", "gradio", "`axolotl inference --gradio`")


def build_app(answerer: Answerer, cfg: DictDefault) -> Any:
    """The page: a text box, and the answer as it grows. `gradio_*` keys set the title and the generation."""
    import gradio

    if cfg.gradio_max_new_tokens is not None:
        answerer.options["max_new_tokens"] = cfg.gradio_max_new_tokens
    if cfg.gradio_temperature is not None:
        answerer.options["temperature"] = cfg.gradio_temperature

    def answer(instruction: str) -> Iterator[str]:
        if instruction.strip():
            yield from answerer.stream([{"role": "user", "content": instruction}])

    return gradio.Interface(fn=answer, inputs="textbox", outputs="text", title=cfg.gradio_title or "Axolotl")
