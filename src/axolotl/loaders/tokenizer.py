"""The tokenizer: from disk or hub, with the config's tokens, padding rules and chat template.

A token id is fixed by the order in which tokens are added: `special_tokens` as written, then `tokens`, then
`additional_special_tokens`.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from axolotl.exceptions import ConfigError, MissingExtraError, TokenizerError
from axolotl.loaders.plain_config import only_prepares, read_config_for_tokenizer
from axolotl.loaders.utils import (
    check_new_tokens_are_trained,
    explain_load_error,
    find_class,
    load_model_config,
    read_revision,
)
from axolotl.utils.chat_templates.base import NAMED_PREFIX, TOKENIZER_DEFAULT, get_chat_template_from_config
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

LLAMA_TOKENIZERS = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
CHATML_DEFAULT_SYSTEM = "You are a helpful assistant."


def _write_json(path: Path, value: Any) -> None:
    """Replace a file in one step: other ranks may be reading it, and all of them write the same."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
    os.replace(temporary, path)


def modify_tokenizer_files(
    tokenizer_path: str, token_mappings: dict[int, str], output_dir: str | Path, revision: str | None = None
) -> str:
    """Give reserved tokens new names: `{id: new string}`.

    Works for added tokens only (those under `added_tokens` of tokenizer.json), not for tokens of the base vocabulary, whose
    merges would no longer lead to them.

    Args:
        tokenizer_path: folder or hub name.
        token_mappings: id -> new string.
        output_dir: the changed tokenizer is written to `<output_dir>/tokenizer`.
        revision: of the hub repository.

    Returns:
        The folder with the changed tokenizer.

    Raises:
        ConfigError: an id is not an added token, or a new string is already another token.
    """
    folder = Path(output_dir) / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, use_fast=True, revision=revision)
    mappings = {int(token_id): text for token_id, text in token_mappings.items()}
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.get_vocab()
    for token_id, text in mappings.items():
        if token_id not in added:
            raise ConfigError(
                f"`added_tokens_overrides: {{{token_id}: {text}}}`: Token ID {token_id} not found in added_tokens_decoder. Only "
                f"added tokens can be renamed; these have the ids {_ranges(sorted(added))}."
            )
        other = vocabulary.get(text)
        if other is not None and other != token_id and mappings.get(other, text) == text:
            raise ConfigError(
                f"`added_tokens_overrides: {{{token_id}: {text}}}`: {text!r} is already the token {other}."
            )
    renamed = {added[token_id]: text for token_id, text in mappings.items()}
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for source in Path(temporary).iterdir():
            if source.suffix != ".json":
                target = folder / source.name
                part = target.with_name(f".{target.name}.{os.getpid()}")
                part.write_bytes(source.read_bytes())
                os.replace(part, target)
                continue
            content = json.loads(source.read_text(encoding="utf-8"))
            _rename_tokens(content, renamed, mappings, is_vocabulary=source.name == "tokenizer.json")
            _write_json(folder / source.name, content)
    return str(folder)


def _ranges(ids: list[int]) -> str:
    shown = ", ".join(str(token_id) for token_id in ids[:20])
    return f"{shown}, ... {ids[-1]}" if len(ids) > 20 else shown


def _rename_tokens(content: Any, renamed: dict[str, str], by_id: dict[int, str], *, is_vocabulary: bool) -> None:
    """Rename tokens in the parsed content of a tokenizer file, in place."""
    if is_vocabulary:
        for token in content.get("added_tokens", []):
            token["content"] = by_id.get(token["id"], token["content"])
        model = content.get("model") or {}
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {renamed.get(token, token): token_id for token, token_id in model["vocab"].items()}
        _rename_strings(content.get("post_processor"), renamed)
        return
    for token_id, token in (content.get("added_tokens_decoder") or {}).items():
        token["content"] = by_id.get(int(token_id), token["content"])
    for key in [key for key in content if key.endswith(("_token", "special_tokens"))]:
        content[key] = _rename_strings(content[key], renamed)


def _rename_strings(value: Any, renamed: dict[str, str]) -> Any:
    """`value` with every string that is exactly an old token replaced; dicts and lists are changed in place too."""
    if isinstance(value, str):
        return renamed.get(value, value)
    if isinstance(value, list):
        value[:] = [_rename_strings(item, renamed) for item in value]
    elif isinstance(value, dict):
        items = [(renamed.get(key, key), _rename_strings(item, renamed)) for key, item in value.items()]
        value.clear()
        value.update(items)
    return value


def _tokenizer_class(cfg: DictDefault) -> Any:
    if cfg.tokenizer_use_mistral_common:
        try:
            from transformers import MistralCommonBackend
        except ImportError as error:
            raise MissingExtraError("mistral_common", "mistral", "`tokenizer_use_mistral_common: true`") from error
        return MistralCommonBackend
    return find_class("tokenizer_type", cfg.tokenizer_type, "AutoTokenizer")


def _load_base(cfg: DictDefault) -> PreTrainedTokenizerBase:
    source = cfg.tokenizer_config or cfg.base_model
    key = "tokenizer_config" if cfg.tokenizer_config and cfg.tokenizer_config != cfg.base_model else "base_model"
    revision = read_revision(cfg, source)
    keywords: dict[str, Any] = {}
    if not cfg.tokenizer_use_mistral_common:
        keywords["trust_remote_code"] = bool(cfg.trust_remote_code)
        keywords["use_fast"] = cfg.tokenizer_use_fast is not False
    if cfg.tokenizer_legacy is not None:
        keywords["legacy"] = cfg.tokenizer_legacy
    if revision:
        keywords["revision"] = revision
    try:
        if cfg.added_tokens_overrides:
            source = modify_tokenizer_files(str(source), dict(cfg.added_tokens_overrides), cfg.output_dir, revision)
            keywords.pop("revision", None)
        tokenizer_class = _tokenizer_class(cfg)
        if tokenizer_class is AutoTokenizer and only_prepares():
            keywords["config"] = read_config_for_tokenizer(str(source), keywords.get("revision"))
        return tokenizer_class.from_pretrained(source, **keywords)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise explain_load_error(str(source), key, error) from error


def _is_new(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether the vocabulary lacks `token` as one token."""
    return token not in tokenizer.get_vocab()


def _added(token: str) -> AddedToken:
    return AddedToken(token, rstrip=False, lstrip=False, normalized=False)


def _add_tokens(cfg: DictDefault, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add `special_tokens`, `tokens` and `additional_special_tokens`, in this order.

    Raises:
        ConfigError: a new token under an adapter that does not train embeddings. A pad token is never trained.
    """
    special = {name: token for name, token in (cfg.special_tokens or {}).items() if token}
    additional = list(special.pop("additional_special_tokens", None) or [])
    tokens = list(cfg.tokens or [])
    new_special = [token for name, token in special.items() if name != "pad_token" and _is_new(tokenizer, token)]
    new_special += [token for token in additional if _is_new(tokenizer, token)]
    new_tokens = [token for token in tokens if _is_new(tokenizer, token)]
    if cfg.adapter and (new_special or new_tokens):
        model_config = load_model_config(cfg)
        check_new_tokens_are_trained(cfg, new_special, model_config, "special_tokens")
        check_new_tokens_are_trained(cfg, new_tokens, model_config, "tokens")

    for name, token in special.items():
        tokenizer.add_special_tokens({name: _added(token)})
    changes_ends = "bos_token" in special and "eos_token" in special
    update = getattr(tokenizer, "update_post_processor", None)
    if changes_ends and update is not None and type(tokenizer).__name__ in LLAMA_TOKENIZERS:
        # These classes write bos and eos by a post-processor that was built from the old tokens.
        update()
    if tokens:
        tokenizer.add_tokens([_added(token) for token in tokens])
    known = set(tokenizer.all_special_tokens)
    additional = [token for token in additional if token not in known]
    if additional:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [_added(token) for token in additional]}, replace_extra_special_tokens=False
        )


def _set_pad_token(cfg: DictDefault, tokenizer: PreTrainedTokenizerBase) -> None:
    """Choose a padding token where the tokenizer has none.

    Raises:
        TokenizerError: there is neither a padding nor an end token.
    """
    if tokenizer.pad_token is not None:
        return
    name = type(tokenizer).__name__
    if name in LLAMA_TOKENIZERS and not _is_new(tokenizer, "</s>"):
        tokenizer.pad_token = "</s>"
        reason = "the tokenizer has no pad token; Llama tokenizers pad with </s>"
    elif name.startswith("GPTNeoX"):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        reason = "the tokenizer has no pad token; GPT-NeoX tokenizers pad with [PAD]"
    elif tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        reason = "the tokenizer has no pad token; its end token is used (padding is never trained)"
    else:
        raise TokenizerError(
            f"The tokenizer of `base_model: {cfg.base_model}` has neither a pad token nor an end token. Write "
            "`special_tokens: {pad_token: ...}` with one of its tokens, and `eos_token` too."
        )
    note_choice(cfg, "special_tokens.pad_token", tokenizer.pad_token, reason)


def _set_chat_template(cfg: DictDefault, tokenizer: PreTrainedTokenizerBase) -> None:
    """Store the chosen chat template in the tokenizer, so that inference uses the one that was trained."""
    if not cfg.chat_template:
        return
    template = get_chat_template_from_config(cfg=cfg, tokenizer=tokenizer)
    if cfg.default_system_message and str(cfg.chat_template) == "chatml" and template:
        template = template.replace(CHATML_DEFAULT_SYSTEM, cfg.default_system_message)
    choice, own = str(cfg.chat_template), tokenizer.chat_template
    if not (isinstance(own, dict) and choice.startswith(TOKENIZER_DEFAULT)):
        tokenizer.chat_template = template
    elif choice.startswith(NAMED_PREFIX):
        tokenizer.chat_template = {**own, "default": template}


def load_tokenizer(cfg: DictDefault) -> PreTrainedTokenizerBase:
    """Load and configure the tokenizer.

    Raises:
        ModelError: `tokenizer_config` (by default `base_model`) cannot be read.
        ConfigError: added tokens contradict the rest of the config.
        TokenizerError: no padding token, or no chat template where one is asked for.
    """
    tokenizer = _load_base(cfg)
    if cfg.is_mistral_derived_model and cfg.attn_implementation in FLASH_ATTENTION and not cfg.sample_packing:
        tokenizer.padding_side = "left"
        note_choice(cfg, "tokenizer.padding_side", "left", "Mistral models with flash attention and without packing")
    if not cfg.tokenizer_use_mistral_common:
        _add_tokens(cfg, tokenizer)
        _set_pad_token(cfg, tokenizer)
        _set_chat_template(cfg, tokenizer)
    names = ("bos", "eos", "pad", "unk")
    LOG.debug(", ".join(f"{name}: {tokenizer.special_tokens_map.get(f'{name}_token')!r}" for name in names))
    return tokenizer
