"""Multipack patching for v2 of sample packing.

Nothing in transformers is changed per architecture: `add_document_hook` puts every packed batch into the form in which the
model's attention backend sees the borders of documents.
"""

from __future__ import annotations

from axolotl.monkeypatch.attention.documents import add_document_hook

__all__ = ["add_document_hook"]
