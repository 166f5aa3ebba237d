"""Make everything the quickstart needs from what Python ships: text, questions and answers, a tokenizer, a model shape.

The text is the documentation of the standard library. The questions ask what a function does and how it is called. Writes
into the folder given as first argument:

    data/pretrain.jsonl       {"text": ...}                        one documentation text a line
    data/sft.jsonl            {"messages": [user, assistant]}      one question and answer a line
    base/                     a byte-level BPE tokenizer with a chat template, and a Llama config without weights
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import random
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

VOCAB_SIZE = 4096
MAX_QUESTIONS = 5000
# Modules that open windows, print, or need what a plain install may lack.
SKIPPED = {"antigravity", "this", "idlelib", "tkinter", "turtle", "turtledemo", "lib2to3", "test", "__main__", "msilib"}
SUBMODULES = ("os.path", "collections.abc", "concurrent.futures", "email.message", "http.client", "http.server",
              "importlib.metadata", "json.decoder", "logging.handlers", "multiprocessing.pool", "unittest.mock",
              "urllib.parse", "urllib.request", "xml.dom.minidom", "xml.etree.ElementTree")  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def library_modules() -> Iterator:
    names = sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIPPED)
    for name in [*names, *SUBMODULES]:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            try:
                yield importlib.import_module(name)
            except ImportError:  # a module for another platform
                continue


def documented(module) -> Iterator[tuple[str, object]]:
    """(qualified name, object) of the public functions, classes and methods of a module that carry documentation."""
    for name, value in sorted(vars(module).items()):
        if (
            name.startswith("_")
            or not (inspect.isroutine(value) or inspect.isclass(value))
            or not inspect.getdoc(value)
        ):
            continue
        yield f"{module.__name__}.{name}", value
        if inspect.isclass(value) and value.__module__ == module.__name__:
            for method_name, method in sorted(vars(value).items()):
                if not method_name.startswith("_") and inspect.isroutine(method) and inspect.getdoc(method):
                    yield f"{module.__name__}.{name}.{method_name}", method


def first_sentence(doc: str) -> str:
    paragraph = " ".join(doc.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph)[0][:240]


def call_of(name: str, value) -> str | None:
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (ValueError, TypeError):
        return None
    names = [p.name for p in parameters if p.name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD][:5]
    return f"{name}({', '.join(names)})"


def collect() -> tuple[list[str], list[dict]]:
    texts, rows, seen = [], [], set()
    for module in library_modules():
        if module.__doc__:
            texts.append(f"{module.__name__}\n\n{inspect.getdoc(module)}")
        for name, value in documented(module):
            doc = inspect.getdoc(value) or ""
            if name in seen or doc in seen or len(doc) < 20:
                continue
            seen.update((name, doc))
            call = call_of(name, value)
            texts.append(f"{call or name}\n\n{doc}")
            rows.append(chat(f"What does {name} do?", f"{name}: {first_sentence(doc)}"))
            if call:
                rows.append(chat(f"How do I call {name}?", f"Call it as `{call}`."))
    return texts, rows


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        model_max_length=512,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def save_model_shape(folder: Path) -> None:
    """A Llama of about four million parameters: the shape alone, `reinit_weights: true` draws the weights."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=3,
    ).save_pretrained(folder)


def main(folder: Path) -> None:
    texts, rows = collect()
    random.Random(0).shuffle(rows)
    rows = rows[:MAX_QUESTIONS]
    write_jsonl(folder / "data" / "pretrain.jsonl", [{"text": text} for text in texts])
    write_jsonl(folder / "data" / "sft.jsonl", rows)
    save_tokenizer(folder / "base", texts + [message["content"] for row in rows for message in row["messages"]])
    save_model_shape(folder / "base")
    print(f"{len(texts):,} texts, {len(rows):,} questions and answers, tokenizer and model shape in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart-out"))
