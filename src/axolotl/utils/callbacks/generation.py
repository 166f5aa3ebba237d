"""Text that the model writes at evaluations: prompts cut from evaluation rows, generation that leaves no trace in the training.

`SFTGenerationCallback` shows a few samples (`generate_samples`, and its older form `eval_table_size`); `causal_lm_eval`
measures the answers to all rows with the same functions.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from axolotl.core.trainers.causal_loss import IGNORE_INDEX
from axolotl.core.trainers.utils import evaluation_mode, kept_random_state
from axolotl.utils.callbacks.sample_trackers import Sample, log_samples
from axolotl.utils.distributed import compute_and_broadcast
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)
T = TypeVar("T")

SHOWN_CHARACTERS = 500


@dataclass(frozen=True)
class GenerationSettings:
    """What to generate, and where it goes.

    Args:
        name: name of the file in `output_dir` (`name.jsonl`) and of the table in the trackers.
        num_samples: rows to write an answer for.
        max_new_tokens: longest answer.
        prompt_ratio: share of a row that is its prompt, where the row has no part without loss.
        do_sample: draw tokens at random instead of taking the most probable one.
        sampling: arguments of `GenerationConfig` such as `temperature`; None for those of the model.
        seed: draws at a step follow from it and from the number of the step alone.
    """

    name: str
    num_samples: int
    max_new_tokens: int
    prompt_ratio: float = 0.5
    do_sample: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 42


def split_row(ids: Sequence[int], labels: Sequence[int], prompt_ratio: float) -> tuple[list[int], list[int]]:
    """A row's prompt and the answer it was trained to give.

    The answer is the last part of the row that carries loss, the prompt all that stands before it. A row that carries loss from
    its beginning, or nowhere, is cut at `prompt_ratio`.

    Args:
        ids: token ids of the row.
        labels: as many labels, `IGNORE_INDEX` where there is no loss.
        prompt_ratio: from 0 to 1; the prompt has at least one token.
    """
    end = len(ids)
    while end and labels[end - 1] == IGNORE_INDEX:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    if start < 2 or start == end:  # a first token, such as BOS, is no prompt
        start, end = max(1, int(len(ids) * prompt_ratio)), len(ids)
    return list(ids[:start]), list(ids[start:end])


def tokenizer_of(trainer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a trainer that may hold a processor."""
    found = trainer.processing_class
    return found.tokenizer if isinstance(found, ProcessorMixin) else found


def is_sharded(trainer: Any) -> bool:
    """Whether a forward pass needs all ranks, because each holds a part of the weights."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return True
    return any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())


def share_of(trainer: Any) -> tuple[int, int]:
    """(rank, number of ranks) by which rows are dealt out. Where weights are sharded, all ranks answer all rows, in step."""
    return (0, 1) if is_sharded(trainer) else (trainer.args.process_index, max(1, trainer.args.world_size))


def on_first_rank(trainer: Any, function: Callable[[], T]) -> T:
    """Run a function that uses the model on the first rank, or on all where the weights are sharded; all get the result.

    The others wait in a collective, so an error of the first rank is an error of all.
    """
    return function() if is_sharded(trainer) else compute_and_broadcast(function)


@contextlib.contextmanager
def generating(trainer: Any) -> Iterator[Any]:
    """The unwrapped model, ready to generate. Mode, random state and gradients are afterwards what they were."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    # The trainer's autocast stands around the forward of the outermost module, which `generate` of an adapter passes by.
    with kept_random_state(), evaluation_mode(model), trainer.accelerator.autocast():
        yield model


def find_stops(tokenizer: PreTrainedTokenizerBase, model: Any, references: Sequence[list[int]]) -> list[int]:
    """Ids that end an answer: the EOS of tokenizer and model, and the special tokens that end the answers of the rows.

    The latter are the ends of turns of a chat template, which need not be an EOS.
    """
    own = model.generation_config.eos_token_id if model.generation_config else None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    found += [ids[-1] for ids in references if ids and ids[-1] in special]
    return sorted({token for token in found if isinstance(token, int)})


def build_generation_config(
    tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings, stops: Sequence[int], max_new_tokens: int
) -> GenerationConfig:
    """What `generate` is called with. Sampling values that are None are left to the model's own generation config."""
    sampling = {key: value for key, value in settings.sampling.items() if value is not None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=settings.do_sample,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(stops) or None,
        pad_token_id=_pad_id(tokenizer),
        **(sampling if settings.do_sample else {}),
    )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if isinstance(token, int))


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    stops: Sequence[int],
    *,
    batch_size: int = 1,
    synced_gpus: bool = False,
) -> list[list[int]]:
    """Token ids that the model writes after each prompt, without those that end or pad an answer.

    Prompts of similar length share a batch, padded on the left. A prompt that fills the window of the model gets no answer.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        prompts: token ids, each at least one.
        settings: how to generate.
        stops: ids that end an answer, from `find_stops`.
        batch_size: prompts that are answered together.
        synced_gpus: go on until all ranks are done, for sharded weights.
    """
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(
        (i for i in range(len(prompts)) if window is None or len(prompts[i]) < window), key=lambda i: len(prompts[i])
    )
    if len(order) < len(prompts):
        LOG.warning_once(
            f"{len(prompts) - len(order)} prompts fill the {window} tokens that the model reads and get no answer."
        )
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in chosen)
        room = settings.max_new_tokens if window is None else min(settings.max_new_tokens, window - longest)
        ids_BT = torch.full((len(chosen), longest), _pad_id(tokenizer), dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for row, i in enumerate(chosen):
            ids_BT[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask_BT[row, longest - len(prompts[i]) :] = 1
        config = build_generation_config(tokenizer, settings, stops, room)
        written = model.generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=config,
            synced_gpus=synced_gpus,
        )
        for row, i in enumerate(chosen):
            answers[i] = _until_stop(written[row, longest:].tolist(), stops)
    return answers


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    return next((ids[:place] for place, token in enumerate(ids) if token in stops), ids)


class SFTGenerationCallback(TrainerCallback):
    """Writes samples at every evaluation: to the console, to a file in `output_dir` and to the trackers.

    The rows are the first of the evaluation set, the same each time. The training that follows is to the last bit that of a
    run without samples.

    Args:
        trainer: the trainer, whose model writes and whose evaluation set gives the prompts.
        settings: what to generate.
    """

    def __init__(self, trainer: Any, settings: GenerationSettings):
        self.trainer = trainer
        self.settings = settings

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What an earlier run wrote, or this one after the checkpoint that it resumes from, is written again.
        if state.is_world_process_zero and self._path(args).is_file():
            _keep_until(self._path(args), state.global_step)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        rows = self.trainer.eval_dataset
        # `axolotl evaluate` evaluates the training set as well, under another prefix.
        if not rows or not any(key.startswith("eval_") for key in metrics or ()):
            return
        samples = on_first_rank(self.trainer, lambda: self.write_samples(rows, state.global_step))
        if not state.is_world_process_zero:
            return
        lines = [json.dumps(sample.as_dict(state), ensure_ascii=False) + "\n" for sample in samples]
        try:
            with self._path(args).open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:  # a run can do without
            LOG.warning(f"{self._path(args)} could not be written: {error}.")
        for number, sample in enumerate(samples, 1):
            LOG.info(
                f"{self.settings.name} at step {state.global_step}, {number} of {len(samples)}:\n"
                f"  prompt: {_short(sample.prompt)}\n  generated: {_short(sample.generated)}"
            )
        log_samples(self.trainer, self.settings.name, samples, state)

    def write_samples(self, rows: Any, step: int) -> list[Sample]:
        """Samples for the first rows. Draws follow from seed and step."""
        trainer, settings = self.trainer, self.settings
        tokenizer = tokenizer_of(trainer)
        chosen = [rows[index] for index in range(min(settings.num_samples, len(rows)))]
        parts = [split_row(row["input_ids"], row["labels"], settings.prompt_ratio) for row in chosen]
        with generating(trainer) as model:
            torch.manual_seed(settings.seed + step)
            answers = generate_answers(
                model,
                tokenizer,
                [prompt for prompt, _ in parts],
                settings,
                find_stops(tokenizer, model, [reference for _, reference in parts]),
                synced_gpus=is_sharded(trainer),
            )
        return [
            Sample(
                prompt=str(tokenizer.decode(prompt)),
                generated=str(tokenizer.decode(answer)),
                reference=str(tokenizer.decode(reference, skip_special_tokens=True)),
            )
            for (prompt, reference), answer in zip(parts, answers, strict=True)
        ]

    def _path(self, args: Any) -> Path:
        return Path(args.output_dir) / f"{self.settings.name}.jsonl"


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of a file that were written after a step; all of them where a run begins at 0."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if step else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")


def _short(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"
