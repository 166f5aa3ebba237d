"""TensorBoard: the config on one of its pages."""

from __future__ import annotations

import textwrap
from pathlib import Path

from transformers.integrations import TensorBoardCallback

from axolotl.utils.callbacks.save_config import SaveConfigCallback


class SaveAxolotlConfigtoTensorBoardCallback(SaveConfigCallback):
    """Writes the config to the page "Text" of TensorBoard, as `axolotl_config`.

    Args:
        axolotl_config_path: the file to show, with its secrets already removed.
        tensorboard: the callback that has the writer.
    """

    def __init__(self, axolotl_config_path: str, tensorboard: TensorBoardCallback):
        super().__init__(axolotl_config_path)
        self.tensorboard = tensorboard

    def upload(self) -> None:
        if self.tensorboard.tb_writer is not None:
            text = Path(self.axolotl_config_path).read_text(encoding="utf-8")
            # Indented text is shown as it is.
            self.tensorboard.tb_writer.add_text("axolotl_config", textwrap.indent(text, "    "))
