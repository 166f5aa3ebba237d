"""CLI to run inference on a trained model.

A prompt that is piped in gives one answer on standard output and the process ends; at a terminal, prompts of several
lines are read until Ctrl-D, again and again. `--chat` holds a conversation, `--gradio` answers in a web page.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from axolotl.cli.answering import Answerer, read_prompt_format
from axolotl.cli.args import InferenceCliArgs
from axolotl.cli.config import find_config, load_cfg, read_config
from axolotl.cli.utils.load import load_model_and_tokenizer
from axolotl.cli.utils.overrides import apply_overrides
from axolotl.core.checkpoint import find_last_whole_checkpoint
from axolotl.exceptions import ConfigError, ModelError
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

DEFAULT_OUTPUT_DIR = "./model-out"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TRAINING_ONLY = ("rl", "deepspeed", "fsdp", "fsdp_config", "context_parallel_size", "tensor_parallel_size")


@dataclass(frozen=True)
class Source:
    """Which weights answer.

    Args:
        base_model: folder or hub id.
        adapter: folder of an adapter on top of it, or None.
        what: for the terminal.
    """

    base_model: str
    adapter: str | None
    what: str


def choose_source(cfg: DictDefault, *, lora_model_dir: str | None = None, base_model: str | None = None) -> Source:
    """What to answer with: what the command line names, else the newest result of the run.

    Args:
        cfg: the config as written.
        lora_model_dir: of the command line.
        base_model: of the command line.

    Raises:
        ModelError: the named folder holds no adapter.
    """
    output = Path(cfg.output_dir or DEFAULT_OUTPUT_DIR)
    if lora_model_dir:
        if Path(lora_model_dir).is_dir() and not _has_adapter(Path(lora_model_dir)):
            raise ModelError(
                f"`--lora-model-dir {lora_model_dir}` holds no adapter (adapter_config.json and adapter_model.safetensors)."
            )
        base = base_model or cfg.base_model
        return Source(base, lora_model_dir, f"the adapter {lora_model_dir} on {base}")
    if base_model:
        return Source(base_model, None, f"the model {base_model}")
    if cfg.adapter and _has_adapter(output):
        return Source(cfg.base_model, str(output), f"the adapter {output} on {cfg.base_model}")
    if not cfg.adapter and _has_model(output):
        return Source(str(output), None, f"the trained model {output}")
    if _has_model(output / "merged"):
        return Source(str(output / "merged"), None, f"the merged model {output / 'merged'}")
    checkpoint = find_last_whole_checkpoint(str(output)) if output.is_dir() else None
    if checkpoint and cfg.adapter and _has_adapter(Path(checkpoint)):
        return Source(cfg.base_model, str(checkpoint), f"the adapter of the unfinished run, {checkpoint}")
    if checkpoint and not cfg.adapter and _has_model(Path(checkpoint)):
        return Source(str(checkpoint), None, f"the model of the unfinished run, {checkpoint}")
    if cfg.adapter and cfg.lora_model_dir:
        return Source(cfg.base_model, cfg.lora_model_dir, f"the adapter {cfg.lora_model_dir} that the run starts from")
    return Source(cfg.base_model, None, f"the base model {cfg.base_model}: nothing trained was found in {output}")


def _has_adapter(folder: Path) -> bool:
    """A run writes the config of its adapter at the beginning, and the adapter at the end."""
    return (folder / "adapter_config.json").is_file() and any((folder / name).is_file() for name in ADAPTER_FILES)


def _has_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHT_FILES)


def load_inference_cfg(config: str | Path | DictDefault, **kwargs: Any) -> DictDefault:
    """The config of a run, changed so that its result answers instead of being trained."""
    path = None if isinstance(config, dict) else find_config(config)
    written = DictDefault(config if path is None else read_config(path))
    flags = {key: kwargs.pop(key, None) for key in ("lora_model_dir", "base_model")}
    apply_overrides(written, {key: value for key, value in kwargs.items() if value is not None})
    source = choose_source(written, **flags)
    LOG.info(f"answering with {source.what}")
    for key in TRAINING_ONLY:
        written.pop(key, None)
    written.update({"inference": True, "sample_packing": False, "base_model": source.base_model})
    if source.adapter:
        written["lora_model_dir"] = source.adapter
        written["adapter"] = written.adapter or "lora"
    else:
        written.pop("adapter", None)
        written.pop("lora_model_dir", None)
    saved = Path(source.adapter or source.base_model)
    if (saved / "tokenizer_config.json").is_file():
        written["tokenizer_config"] = str(saved)
    cfg = load_cfg(written)
    if path is not None:
        cfg.axolotl_config_path = str(path)
    return cfg


def load_answerer(cfg: DictDefault, prompter: str | None) -> Answerer:
    """The model and tokenizer of `cfg`, with the prompt format of the run.

    Raises:
        ConfigError: the config trains a model that gives scores, not text.
    """
    for key in ("reward_model", "process_reward_model"):
        if cfg[key]:
            raise ConfigError(f"`{key}: true` trains a model that gives scores: it has no text to answer with.")
    model, tokenizer, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
    model.eval()
    model.config.use_cache = True
    prompt_format = read_prompt_format(cfg, tokenizer, prompter)
    LOG.info(f"prompts are written with {prompt_format.name}")
    if cfg.seed is not None:
        transformers.set_seed(cfg.seed)
    return Answerer(model, tokenizer, prompt_format)


def get_multi_line_input() -> str:
    """Gets multi-line input from terminal.

    Returns:
        All lines up to the end of input (Ctrl-D), with their line ends.
    """
    if sys.stdin.isatty():
        print("=" * 80, file=sys.stderr)
        print("Give me an instruction (Ctrl-D submits it; nothing and Ctrl-D ends):", file=sys.stderr)
    return "".join(sys.stdin)


def do_inference(*, cfg: DictDefault, cli_args: InferenceCliArgs) -> None:
    """Runs inference on the command line in a loop. User input is accepted, a chat template is (optionally) applied, and
    the model specified in the axolotl config is used to generate completions according to a default generation config.

    Args:
        cfg: the config of a run, as `load_cfg` returns it.
        cli_args: `prompter` chooses another prompt format than the run's.
    """
    answerer = load_answerer(cfg, cli_args.prompter)
    piped = not sys.stdin.isatty()
    while True:
        instruction = get_multi_line_input().strip("\n" if piped else None)
        if not instruction.strip():
            if piped:
                raise ConfigError("There is no prompt on standard input.")
            return
        if not piped:
            print("-" * 40, file=sys.stderr)
        answerer.answer([{"role": "user", "content": instruction}], _show)
        print(flush=True)
        if piped:
            return


def do_inference_gradio(*, cfg: DictDefault, cli_args: InferenceCliArgs) -> None:
    """Runs inference in a Gradio interface. User input is accepted, a chat template is (optionally) applied, and the model
    specified in the axolotl config is used to generate completions according to a default generation config.

    Args:
        cfg: the config of a run, as `load_cfg` returns it.
        cli_args: `prompter` chooses another prompt format than the run's.
    """
    from axolotl.cli.gradio_app import build_app, check_gradio

    check_gradio()
    build_app(load_answerer(cfg, cli_args.prompter), cfg).queue().launch(
        show_api=False,
        share=bool(cfg.gradio_share) if cfg.gradio_share is not None else False,
        server_name=cfg.gradio_server_name or "127.0.0.1",
        server_port=cfg.gradio_server_port,
    )


def do_chat(*, cfg: DictDefault, cli_args: InferenceCliArgs) -> None:
    """A conversation on the terminal.

    Args:
        cfg: the config of a run, as `load_cfg` returns it.
        cli_args: `prompter` chooses another prompt format than the run's.
    """
    from axolotl.cli.chat import ChatSession

    ChatSession(load_answerer(cfg, cli_args.prompter)).run()


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def do_cli(
    config: Path | str | DictDefault = Path("examples/"), gradio: bool = False, chat: bool = False, **kwargs: Any
) -> None:
    """Parses axolotl config, CLI args, and calls `do_inference` or `do_inference_gradio`.

    Args:
        config: path of the config.
        gradio: answer in a web page.
        chat: answer in a conversation.
        kwargs: `prompter`, and overrides of the config.
    """
    cli_args = InferenceCliArgs(prompter=kwargs.pop("prompter", None))
    cfg = load_inference_cfg(config, **kwargs)
    mode = do_inference_gradio if gradio else do_chat if chat else do_inference
    mode(cfg=cfg, cli_args=cli_args)


if __name__ == "__main__":
    from axolotl.cli.main import run_module

    run_module("inference")
