"""Tiny tokenizers of the kinds that models have: they differ in what becomes of spaces, of unknown characters and of BOS.

All are trained on the spot on a few lines of text and know the control tokens that they are given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.tiny import TEXT

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<unk>")


def _byte_level(vocab_size: int = 500) -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: bytes, the space belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def _bytes() -> Tokenizer:
    """One token for each byte."""
    return _byte_level(vocab_size=256 + len(SPECIAL_TOKENS))


def _prefix_space() -> Tokenizer:
    """As Llama 2 and Mistral: a space is put before the text and after each control token; no byte is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL_TOKENS, *alphabet], show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _metaspace() -> Tokenizer:
    """As Unigram models of sentencepiece: a space before the first word only; unknown characters are `<unk>`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    _train(tokenizer, trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", show_progress=False))
    return tokenizer


def _word_pieces() -> Tokenizer:
    """As BERT: lower case, spaces are lost."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _train(tokenizer, trainers.WordPieceTrainer(vocab_size=300, show_progress=False))
    return tokenizer


def _train(tokenizer: Tokenizer, trainer) -> None:
    trainer.special_tokens = [AddedToken(token, special=True) for token in SPECIAL_TOKENS]
    tokenizer.train_from_iterator(TEXT, trainer)


KINDS: dict[str, tuple[Callable[[], Tokenizer], bool]] = {
    "bytes": (_bytes, False),
    "byte level": (_byte_level, False),
    "byte level, BOS": (_byte_level, True),
    "prefix space, BOS": (_prefix_space, True),
    "metaspace unigram": (_metaspace, False),
    "word pieces": (_word_pieces, False),
}
"""Kind -> how its tokenizer is made, and whether it puts BOS before each text."""


@functools.cache
def make_tokenizer_of_kind(
    kind: str, control_tokens: tuple[str, ...] = (), eos: str = "</s>"
) -> PreTrainedTokenizerFast:
    """A tokenizer that is shared by all who ask for the same; do not change it.

    Args:
        kind: a key of `KINDS`.
        control_tokens: further special tokens.
        eos: the end-of-text token, one of the special tokens.
    """
    make, adds_bos = KINDS[kind]
    tokenizer = make()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control_tokens])
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
