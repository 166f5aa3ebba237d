"""LLM Compressor: train models that it made sparse.

List `axolotl.integrations.llm_compressor.LLMCompressorPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "LLMCompressorPlugin": "axolotl.integrations.llm_compressor.plugin",
        "LLMCompressorArgs": "axolotl.integrations.llm_compressor.args",
        "CompressionArgs": "axolotl.integrations.llm_compressor.args",
    },
)
