"""`do_bench_eval`: a multiple-choice benchmark at every evaluation, answered by the most probable of the letters A to G."""

from __future__ import annotations

import inspect
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from axolotl.exceptions import DatasetError
from axolotl.loaders.utils import plain_model
from axolotl.utils.callbacks.generation import generating, share_of, tokenizer_of
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import gather_on_all_ranks
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

LETTERS = "ABCDEFG"
DEFAULT_BENCHMARK = "pharaouk/dharma-1/dharma_1_mini.json"
DEFAULT_SPLIT = "eval"
# Short names -> (dataset on the hub, split -> its file).
KNOWN = {
    "mmlu-zs": (
        "openaccess-ai-collective/mmlu-evals",
        {"eval": "zero_shot_mmlu_val.json", "test": "zero_shot_mmlu_test.json"},
    ),
    "mmlu-fs": (
        "openaccess-ai-collective/mmlu-evals",
        {"eval": "five_shot_mmlu_val.json", "test": "five_shot_mmlu_test.json"},
    ),
}


def load_benchmark(name: str | None, split: str | None) -> list[dict[str, str]]:
    """Questions as rows of `input` (the question and its choices), `output` (a letter) and `name` (the subject).

    Args:
        name: `bench_dataset`: a local file, `owner/dataset/file` or `owner/dataset` on the hub, `mmlu-zs`, `mmlu-fs`; the
            small Dharma set when None.
        split: `bench_split`, of a dataset that has several.

    Raises:
        DatasetError: there is no such dataset, or a row is not a question.
    """
    name = name or DEFAULT_BENCHMARK
    where = f"`bench_dataset: {name}`"
    try:
        rows = load_dataset_with_config(_entry(name, split))
    except DatasetError as error:
        raise DatasetError(
            f"{where} cannot be loaded: {error} A benchmark may be a local file with the fields `input`, `output` and `name`."
        ) from error
    questions = []
    for number, row in enumerate(rows):
        question, answer = row.get("input"), row.get("output")
        if not isinstance(question, str) or not isinstance(answer, str) or answer.strip()[:1] not in tuple(LETTERS):
            raise DatasetError(
                f"{where}, row {number}: a question has its text and choices in `input` and one of the letters {LETTERS[0]} to "
                f"{LETTERS[-1]} in `output`, but `output` is {answer!r}. Its subject may stand in `name`."
            )
        questions.append(
            {"input": question, "output": answer, "name": str(row.get("name") or row.get("subject") or "all")}
        )
    if not questions:
        raise DatasetError(f"{where} has no rows.")
    return questions


def _entry(name: str, split: str | None) -> DictDefault:
    """The benchmark as an entry of `datasets`."""
    if Path(name).expanduser().is_file():
        return DictDefault(path=name)
    if name in KNOWN:
        path, files = KNOWN[name]
        if (split or DEFAULT_SPLIT) not in files:
            raise DatasetError(f"`bench_split: {split}` is none of {', '.join(files)}.")
        return DictDefault(path=path, data_files=[files[split or DEFAULT_SPLIT]], split="train")
    parts = name.split("/")
    if len(parts) > 2 and not Path(name).expanduser().is_dir():
        return DictDefault(path="/".join(parts[:2]), data_files=["/".join(parts[2:])], split="train")
    return DictDefault(path=name, split=split or DEFAULT_SPLIT)


class BenchEvalCallback(TrainerCallback):
    """Adds the share of right answers, over all questions and by subject, to the metrics of an evaluation.

    Names: `<split>_bench_loss`, `<split>_bench_accuracy_<subject>`, `<split>_bench_average_accuracy` (mean over subjects) and
    `<split>_bench_total_accuracy` (over questions). Each rank answers its share.

    Args:
        trainer: the trainer.
        questions: from `load_benchmark`.
        split: prefix of the names.
    """

    def __init__(self, trainer: Any, questions: list[dict[str, str]], split: str = DEFAULT_SPLIT):
        self.trainer = trainer
        self.questions = questions
        self.split = split

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if metrics is None or not any(key.startswith("eval_") for key in metrics):
            return  # `axolotl evaluate` evaluates the training set as well
        scores = self.compute()
        metrics.update(scores)
        self.trainer.log(dict(scores))
        total = scores[f"{self.split}_bench_total_accuracy"]
        LOG.info(f"step {state.global_step}: {100 * total:.1f} % of {len(self.questions)} questions answered right.")

    def compute(self) -> dict[str, float]:
        """The metrics over all questions, the same on all ranks."""
        trainer = self.trainer
        rank, num_ranks = share_of(trainer)
        with generating(trainer) as model:
            answers = [answer(model, tokenizer_of(trainer), question) for question in self.questions[rank::num_ranks]]
        shares = gather_on_all_ranks(answers) if num_ranks > 1 else [answers]
        right: dict[str, list[bool]] = defaultdict(list)
        losses = []
        for index, share in enumerate(shares):
            for question, (chosen, loss) in zip(self.questions[index::num_ranks], share, strict=True):
                right[question["name"]].append(chosen == question["output"].strip()[0])
                losses.append(loss)
        accuracies = {name: sum(found) / len(found) for name, found in sorted(right.items())}
        return {
            f"{self.split}_bench_loss": sum(losses) / len(losses),
            **{f"{self.split}_bench_accuracy_{name}": accuracy for name, accuracy in accuracies.items()},
            f"{self.split}_bench_average_accuracy": sum(accuracies.values()) / len(accuracies),
            f"{self.split}_bench_total_accuracy": sum(map(sum, right.values())) / len(losses),
        }


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, question: dict[str, str]) -> tuple[str, float]:
    """The most probable letter, and the loss of the right one among all tokens.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        question: a row of `load_benchmark`.
    """
    output = question["output"]
    before = output[: len(output) - len(output.lstrip())]
    letters = [tokenizer(before + letter, add_special_tokens=False)["input_ids"] for letter in LETTERS]
    prompt = tokenizer(question["input"], add_special_tokens=False)["input_ids"] + letters[0][:-1]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None:
        prompt = prompt[-(window - len(bos)) :]  # the question and its choices stand at the end of a few-shot prompt
    ids_BT = torch.tensor([bos + prompt], device=model.device)
    takes = inspect.signature(plain_model(model).forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    logits_V = model(input_ids=ids_BT, use_cache=False, **last_only).logits[0, -1].float()
    candidates = logits_V[torch.tensor([ids[-1] for ids in letters], device=logits_V.device)]
    right = letters[LETTERS.index(output.strip()[0])][-1]
    return LETTERS[int(candidates.argmax())], -torch.log_softmax(logits_V, -1)[right].item()
