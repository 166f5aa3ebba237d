"""What tests of several rooms share: a small tokenizer that is trained on the spot."""

from __future__ import annotations

import pytest

SPECIAL_TOKENS = [
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *(
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<think>",
        "</think>",
    ),
]
TEXT = [
    "The quick brown fox jumps over the lazy dog. How many apples does Natalia have? She has 48 + 24 = 72 apples.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "user assistant system tool model Hello, how are you? I am fine. Goodbye! \n\n### Response:\nüñí 😀",
]


def make_tokenizer(add_bos: bool = True):
    """A byte-level BPE tokenizer with a few hundred tokens, the usual special tokens and no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def tiny_tokenizer():
    """The tokenizer of `make_tokenizer`, which puts BOS first."""
    return make_tokenizer()
