"""From what a person types to what the model was trained to read, and from its tokens back to text.

The prompt is built by the code that built the training rows: the chat template of the run, or the prompter of its
instruction dataset. Used by `inference` (a prompt, a loop), `chat` (a conversation) and `gradio_app` (a web page).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from axolotl.exceptions import AxolotlError, ConfigError
from axolotl.prompt_strategies.resolve import load as load_strategy
from axolotl.prompt_tokenizers import InstructionPromptTokenizingStrategy
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

GENERATION_DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 1024,
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": None,
    "repetition_penalty": 1.1,
}
NO_PROMPTER = ("none", "null", "")
CHAT_TEMPLATE = "chat_template"
SENTINEL = "zxqanswerqxz"

Message = dict[str, str]


@dataclass
class PromptFormat:
    """How a conversation becomes token ids.

    Args:
        name: what to call it on the terminal.
        encode: messages (`role`, `content`) and template arguments -> ids of the prompt, up to where the answer begins.
        is_chat: whether it can hold more than one turn and a system message.
        stop_ids: ids that end a turn in this format, besides the tokenizer's EOS.
    """

    name: str
    encode: Callable[..., list[int]]
    is_chat: bool = False
    stop_ids: list[int] = field(default_factory=list)


def read_prompt_format(
    cfg: DictDefault, tokenizer: PreTrainedTokenizerBase, prompter: str | None = None
) -> PromptFormat:
    """The prompt format that the run was trained with, or the one that `prompter` names.

    `prompter` wins; then the first dataset's own instruction format; then the chat template of the run or of its
    datasets; else the text as it is typed.

    Args:
        prompter: None to follow the config; `None` (as text) for no format; `chat_template`; or the name of a class of
            `axolotl.prompters`, or the path of one of the user's.

    Raises:
        ConfigError: there is no such prompter.
    """
    if prompter is not None:
        return _named_format(cfg, tokenizer, prompter)
    datasets = list(cfg.datasets or ())
    first = datasets[0] if datasets else DictDefault()
    chat_dataset = next((ds for ds in datasets if _is_chat_type(ds.type)), None)
    if first.type and chat_dataset is None and not cfg.rl:
        strategy = load_strategy(first.type, tokenizer, cfg, first)
        if isinstance(strategy, InstructionPromptTokenizingStrategy):
            name = first.type if isinstance(first.type, str) else "user_defined"
            if cfg.chat_template:
                LOG.info(
                    f"the dataset was trained as `type: {name}`, so that format is used and not `chat_template: "
                    f"{cfg.chat_template}`; `--prompter chat_template` chooses the other"
                )
            return PromptFormat(f"the prompter of `type: {name}`", _instruction_encoder(strategy, tokenizer))
    if cfg.chat_template or chat_dataset is not None:
        return _chat_format(cfg, tokenizer, chat_dataset)
    return _plain_format(tokenizer)


def _is_chat_type(dataset_type: Any) -> bool:
    return isinstance(dataset_type, str) and dataset_type.rpartition(".")[2].startswith("chat_template")


def _named_format(cfg: DictDefault, tokenizer: PreTrainedTokenizerBase, prompter: str) -> PromptFormat:
    if prompter.lower() in NO_PROMPTER:
        return _plain_format(tokenizer)
    if prompter == CHAT_TEMPLATE:
        chat_dataset = next((ds for ds in cfg.datasets or () if _is_chat_type(ds.type)), None)
        return _chat_format(cfg, tokenizer, chat_dataset)
    module_name, _, class_name = prompter.rpartition(".")
    module = importlib.import_module(module_name or "axolotl.prompters")
    if class_name not in vars(module):
        known = sorted(name for name in vars(module) if name.endswith("Prompter"))
        raise ConfigError(
            f"`--prompter {prompter}`: `{module.__name__}` has no such class. Write `None` for no format, `chat_template`, "
            f"or one of {', '.join(known)}."
        )
    build = vars(module)[class_name]().build_prompt

    def encode(messages: list[Message], **_: Any) -> list[int]:
        return _one_bos(tokenizer, tokenizer(next(iter(build(_last_text(messages)))))["input_ids"])

    return PromptFormat(f"`{class_name}`", encode)


def _plain_format(tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    def encode(messages: list[Message], **_: Any) -> list[int]:
        return _one_bos(tokenizer, tokenizer(_last_text(messages))["input_ids"])

    return PromptFormat("no format (the text as typed)", encode)


def _instruction_encoder(
    strategy: InstructionPromptTokenizingStrategy, tokenizer: PreTrainedTokenizerBase
) -> Callable[..., list[int]]:
    def encode(messages: list[Message], **_: Any) -> list[int]:
        text = next(iter(strategy.prompter.build_prompt(_last_text(messages), "")))
        return _one_bos(tokenizer, list(strategy._tokenize(text, add_eos_token=False)["input_ids"]))

    return encode


def _chat_format(cfg: DictDefault, tokenizer: PreTrainedTokenizerBase, dataset: DictDefault | None) -> PromptFormat:
    template = get_chat_template_from_config(cfg, dataset, tokenizer)
    template_kwargs = dict(cfg.chat_template_kwargs or {})

    def render(messages: list[Message], **kwargs: Any) -> str:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            **({"add_generation_prompt": True} | template_kwargs | kwargs),
        )
        return cast("str", text)  # what one conversation gives with `tokenize=False`

    def encode(messages: list[Message], **kwargs: Any) -> list[int]:
        return tokenizer(render(messages, **kwargs), add_special_tokens=False)["input_ids"]

    choice = (dataset or {}).get("chat_template") or cfg.chat_template or "tokenizer_default"
    written = render(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": SENTINEL}], add_generation_prompt=False
    )
    tail = tokenizer(written.rpartition(SENTINEL)[2], add_special_tokens=False)["input_ids"]
    added = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    stops = [token for token in tail if token in added][:1]
    stops += [tokenizer.convert_tokens_to_ids(token) for token in cfg.eot_tokens or ()]
    return PromptFormat(f"`chat_template: {choice}`", encode, is_chat=True, stop_ids=stops)


def _last_text(messages: list[Message]) -> str:
    return messages[-1]["content"]


def _one_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """A format that writes the BOS itself, read by a tokenizer that adds one, must not give two."""
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


class _Pieces(TextStreamer):
    """Hands over the answer's text as it grows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, receive: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self._receive = receive

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._receive(text)


@dataclass
class Answerer:
    """A loaded model that answers in the format it was trained with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format: PromptFormat
    options: dict[str, Any] = field(default_factory=lambda: dict(GENERATION_DEFAULTS))

    def stop_ids(self) -> list[int]:
        """EOS of the tokenizer and of the model, and the end of a turn of the prompt format."""
        of_model = self.model.generation_config.eos_token_id if self.model.generation_config else None
        of_model = of_model if isinstance(of_model, list) else [of_model]
        candidates = [self.tokenizer.eos_token_id, *of_model, *self.format.stop_ids]
        return sorted({token for token in candidates if token is not None})

    def answer(
        self, messages: list[Message], receive: Callable[[str], None], template_kwargs: dict[str, Any] | None = None
    ) -> str:
        """Generate the next turn. `receive` gets the text piece by piece; the whole is returned.

        Raises:
            AxolotlError: the prompt leaves no room for an answer.
        """
        prompt = torch.tensor([self.format.encode(messages, **(template_kwargs or {}))], device=self.model.device)
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            receive(piece)

        with torch.inference_mode():
            self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=self._generation_config(prompt.shape[1]),
                streamer=_Pieces(self.tokenizer, take),
            )
        return "".join(pieces)

    def stream(self, messages: list[Message]) -> Iterator[str]:
        """The answer so far, each time it has grown."""
        queue: SimpleQueue[str | BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                self.answer(messages, queue.put)
            except Exception as error:  # noqa: BLE001 - raised again where the stream is read
                queue.put(error)
            queue.put(None)

        Thread(target=work, daemon=True).start()
        text = ""
        while (piece := queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            text += piece
            yield text

    def _generation_config(self, prompt_length: int) -> GenerationConfig:
        options = {name: value for name, value in self.options.items() if value is not None and name != "seed"}
        window = self.model.config.get_text_config().max_position_embeddings
        if window and prompt_length >= window:
            raise AxolotlError(
                f"The prompt is {prompt_length} tokens long and the model reads {window}: no room is left for an answer. "
                "Shorten it, or start a new conversation."
            )
        if window:
            options["max_new_tokens"] = min(options["max_new_tokens"], window - prompt_length)
        sampled = bool(options.get("temperature"))
        if not sampled:
            for name in ("temperature", "top_p", "top_k", "min_p"):
                options.pop(name, None)
        if self.options.get("seed") is not None:
            torch.manual_seed(self.options["seed"])
        pad = self.tokenizer.pad_token_id
        return GenerationConfig(
            do_sample=sampled,
            use_cache=True,
            eos_token_id=self.stop_ids() or None,
            bos_token_id=self.tokenizer.bos_token_id,
            pad_token_id=pad if pad is not None else self.tokenizer.eos_token_id,
            **options,
        )
