"""`PatchManager`: runs the ledger of patches, stage by stage, while a model is loaded."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from axolotl.monkeypatch.ledger import Stage, rows_for
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class PatchManager:
    """Applies the rows of `axolotl.monkeypatch.ledger` that a config needs.

    Attributes:
        cfg: the config.
        model_config: the config of the model.
        inference: whether the model is loaded to answer and not to learn.
    """

    def __init__(self, cfg: DictDefault, model_config: PretrainedConfig | dict | None, inference: bool = False):
        self.cfg = cfg
        self.model_config = model_config
        self.inference = inference

    def _apply(self, stage: Stage, model: nn.Module | None = None) -> None:
        for patch in rows_for(self.cfg):
            if patch.stage == stage:
                LOG.debug(f"patch: {patch.name}: {patch.what}")
                patch.apply(self.cfg, model)

    def apply_pre_model_load_patches(self) -> None:
        """Rows that come before anything is loaded."""
        self._apply("pre_model_load")

    def apply_post_plugin_pre_model_load_patches(self) -> None:
        """Rows that come after the plugins' `pre_model_load` and before the model."""
        self._apply("post_plugin_pre_model_load")

    def apply_post_model_build_patches(self, model: nn.Module) -> None:
        """Rows that need the model, before any adapter."""
        self._apply("post_model_build", model)

    def apply_post_model_load_patches(self, model: nn.Module) -> None:
        """Rows that need the finished model, adapter included."""
        self._apply("post_model_load", model)
