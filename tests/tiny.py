"""Tiny tokenizers and models for tests: real `save_pretrained` folders, made on the spot, with random but seeded weights.

Everything is deterministic. A model has two layers and a hidden size of 32, so that a forward pass takes milliseconds on
one core. Import it with `from tests.tiny import make_tiny_llama`, or as `tiny` where `tests` is not on the path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "The quick brown fox jumps over the lazy dog. How many legs has a dog? A dog has four legs.",
    "user assistant system tool question answer instruction input output response",
    "Natalia sold 48 clips in April and half as many in May: 48 + 24 = 72.\n#### 72",
    "def add(a, b):\n    return a + b\n",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_tokenizer(
    path: str | Path,
    *,
    vocab_size: int = 384,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    chat_template: str | dict[str, str] | None = None,
    extra_special_tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"),
    add_bos: bool = True,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on a few lines, save it to `path` and return it.

    Args:
        path: folder to write; made when missing.
        vocab_size: at least 256 bytes plus the special tokens.
        bos: beginning-of-text token, or None for none. Written in front of each text when `add_bos`.
        eos: end-of-text token, or None.
        pad: padding token, or None.
        chat_template: jinja text, or several by their names; `tests.tiny.CHATML` is one.
        extra_special_tokens: further special tokens of the vocabulary.
        add_bos: whether tokenizing with special tokens puts `bos` in front.
    """
    from tokenizers.processors import TemplateProcessing

    specials = [token for token in (bos, eos, pad, *extra_special_tokens) if token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos and add_bos:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, clean_up_tokenization_spaces=False
    )
    fast.chat_template = chat_template
    fast.save_pretrained(path)
    return fast


TINY_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

# What an architecture needs beyond TINY_SHAPE to be itself: head size, windows, soft caps.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
}


def make_tiny_model(
    path: str | Path, architecture: str = "llama", *, vocab_size: int = 384, seed: int = 0, **config: Any
):
    """Save a causal language model with seeded random weights to `path` and return it (fp32, CPU, eval mode).

    Args:
        path: folder to write.
        architecture: a key of `ARCHITECTURES`, or the name of a config class of transformers.
        vocab_size: rows of the embedding.
        seed: seed of the weights; the global generator is left as it was.
        **config: further fields of the model's config.
    """
    class_name, own = ARCHITECTURES.get(architecture, (architecture, {}))
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model_config = getattr(transformers, class_name)(**{**TINY_SHAPE, "vocab_size": vocab_size, **ids, **own, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        with torch.no_grad():
            # Initial weights are so small that attention is almost uniform; a wrong mask would hardly show in the loss.
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.15)
    model.eval()
    model.save_pretrained(path)
    return model


def make_tiny_llama(path: str | Path, vocab_size: int = 384, *, seed: int = 0, **config: Any):
    """`make_tiny_model` for a Llama."""
    return make_tiny_model(path, "llama", vocab_size=vocab_size, seed=seed, **config)


def make_tiny_base(
    path: str | Path, architecture: str = "llama", *, chat_template: str | None = CHATML, **config: Any
) -> Path:
    """A folder with both a tokenizer and a model that fits it, as `base_model` of a config. Returns the folder."""
    tokenizer = make_tiny_tokenizer(path, chat_template=chat_template)
    make_tiny_model(path, architecture, vocab_size=len(tokenizer), **config)
    return Path(path)
