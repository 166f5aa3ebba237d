"""The plugin class of `axolotl.integrations.llm_compressor`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class LLMCompressorPlugin(BasePlugin):
    """LLM Compressor: train models that it made sparse."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.llm_compressor.args.LLMCompressorArgs"
