"""Attention: the table of backends, PyTorch's varlen kernel for transformers, and the borders of packed documents.

In: `attn_implementation` and the model's config. Out: a name that transformers knows, and batches in the form that it reads.
One more backend is one more row of `table.ATTENTION`.
"""

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ATTENTION": "axolotl.monkeypatch.attention.table",
        "AttentionBackend": "axolotl.monkeypatch.attention.table",
        "resolve_attention": "axolotl.monkeypatch.attention.table",
        "add_document_hook": "axolotl.monkeypatch.attention.documents",
    },
)
