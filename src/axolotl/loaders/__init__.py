"""Tokenizer, processor, model and adapter, from disk or hub.

In: a resolved `cfg`. Out: objects of transformers and peft, ready to train or to answer. Each reader here takes `cfg`; a
change to a library is a row of `axolotl.monkeypatch.ledger`, a quirk of an architecture a row of `axolotl.model_support`.
"""

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ModelLoader": "axolotl.loaders.model",
        "PatchManager": "axolotl.loaders.patch_manager",
        "load_adapter": "axolotl.loaders.adapter",
        "load_lora": "axolotl.loaders.adapter",
        "load_model_config": "axolotl.loaders.utils",
        "load_processor": "axolotl.loaders.processor",
        "load_tokenizer": "axolotl.loaders.tokenizer",
    },
)
