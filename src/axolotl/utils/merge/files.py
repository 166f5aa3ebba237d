"""The folders of a merge: where the base lies, what of it is copied beside the weights, and how the result gets its place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import GenerationConfig

from axolotl.exceptions import ModelError, OutputError

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.index.json")
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "additional_chat_templates", "*.model", "*.tiktoken", "tekken.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def local_base(base: str, revision: str | None) -> Path:
    """The folder of a base model, downloaded when it is a name on the hub."""
    if Path(base).is_dir():
        return Path(base)
    if Path(base).is_absolute() or base.startswith("."):
        raise ModelError(f"`base_model: {base}` is not a folder.")
    ignore = ["*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.pth", "original/*"]
    return Path(snapshot_download(base, revision=revision, ignore_patterns=ignore))


def copy_side_files(base: Path, adapter: Path, folder: Path) -> None:
    """Everything of the base but its weights and page, then the tokenizer that training saved."""
    skipped = shutil.ignore_patterns(*WEIGHTS, "README*", "*.md", ".*", "adapter_*", "original")
    shutil.copytree(base, folder, ignore=skipped, dirs_exist_ok=True)
    if not any(adapter.glob("tokenizer*")):
        return
    for pattern in TOKENIZER_FILES:
        for old in folder.glob(pattern):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        for new in adapter.glob(pattern):
            if new.is_dir():
                shutil.copytree(new, folder / new.name)
            elif new.suffix != ".bin":
                shutil.copy2(new, folder / new.name)


def copy_generation_config(base: Path, adapter: Path, folder: Path) -> None:
    """That of training, else that of the base."""
    for source in (adapter, base):
        if (source / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(source)  # unreadable ones fail here and not at the first answer
            shutil.copy2(source / "generation_config.json", folder / "generation_config.json")
            return


def fresh_folder(output: Path, suffix: str) -> Path:
    """An empty folder beside `output`, so that a rename puts it in place."""
    folder = output.with_name(f"{output.name}.{suffix}")
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"`{folder}` cannot be written: {error.strerror}. Choose another `output_dir`.") from error
    return folder


def put_in_place(aside: Path, output: Path) -> None:
    """Replace `output` by `aside`; whoever looks finds the old folder or the new one, whole."""
    old = output.with_name(f"{output.name}.old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(output, old)
    os.replace(aside, output)
    shutil.rmtree(old, ignore_errors=True)
