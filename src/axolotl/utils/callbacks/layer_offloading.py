"""`layer_offloading`: sends the frozen weights of the layers to host memory when training begins."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from axolotl.monkeypatch.layer_offloading import LayerOffloader, offload_layers
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class LayerOffloadingCallback(TrainerCallback):
    """Works once model and device are final: the trainer has moved the model, and checkpointing is switched on.

    Attributes:
        offloader: what moves the weights; None before training.
    """

    def __init__(self) -> None:
        self.offloader: LayerOffloader | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.offloader is None:
            self.offloader = offload_layers(model, args.device)
            LOG.info(
                f"The frozen weights of the layers wait in host memory: {self.offloader.num_bytes / 2**30:.2f} GiB."
            )
