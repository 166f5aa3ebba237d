"""Module loading the CreativePromptTokenizingStrategy and similar classes

Rows of creative writing in three steps: an answer, its critique with scores, and a revised answer. `load_answer` learns the
revision as the answer to the instruction, `load_critique` the scores and critiques of the first answer, `load_revise` the
revision, given both. The first answer itself is never learnt. `load` is `load_answer`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import yaml

from axolotl.prompt_tokenizers import InstructionPromptTokenizingStrategy, check_text
from axolotl.prompters import Prompter
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class CreativeAnsweringPromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for Creative Answering"""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        return prompt["instruction"], "", prompt["revision"]


class CreativeCritiquePromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for Creative Critique"""

    user_prompt = (
        "Given the following question and answer, evaluate the answer. First give scores, then a critique.\n\n"
        "Question: {question}\n\nAnswer: {answer}"
    )

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        question, answer = prompt["instruction"], prompt["answer"]
        check_text(prompt, question, answer)
        return self.user_prompt.format(question=question, answer=answer), "", _evaluation(prompt)


class CreativeRevisePromptTokenizingStrategy(InstructionPromptTokenizingStrategy):
    """Tokenizing strategy for Creative Revise"""

    user_prompt = (
        "Given the following question, answer and evaluation of the answer, write a better answer.\n\n"
        "Question: {question}\n\nAnswer: {answer}\n\nEvaluation:\n{evaluation}"
    )

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str]:
        question, answer = prompt["instruction"], prompt["answer"]
        check_text(prompt, question, answer)
        text = self.user_prompt.format(question=question, answer=answer, evaluation=_evaluation(prompt))
        return text, "", prompt["revision"]


def _evaluation(row: dict[str, Any]) -> str:
    """The scores of a row as YAML, in their order, and its critiques below them."""
    scores, critiques = row["scores"], row["critiques"]
    if isinstance(scores, Mapping):
        # Arrow fills in null for scores that only other rows have.
        given = {name: score for name, score in scores.items() if score is not None}
        scores = yaml.safe_dump(given, default_flow_style=False, sort_keys=False, allow_unicode=True)
    if isinstance(critiques, list) and all(isinstance(critique, str) for critique in critiques):
        critiques = "\n".join(critiques)
    check_text({"scores": scores, "critiques": critiques}, scores, critiques)
    return f"{scores.rstrip()}\n{critiques}"


class CreativePrompterBase(Prompter):
    """Base class for Creative Prompters"""

    system_prompt = ""

    def build_prompt(
        self, instruction: str, input: str | None = None, output: str | None = None
    ) -> Generator[str, None, None]:
        """Yield the prompt, followed by `output` when it is given."""
        system = f"{self.system_prompt}\n" if self.system_prompt else ""
        yield f"{system}USER: {instruction}\nASSISTANT:{output or ''}"


class CreativeAnswerPrompter(CreativePrompterBase):
    """Prompter for Creative Answering"""

    system_prompt = (
        "Answer the following question in a comprehensive, in-depth, and creative way. "
        "Additionally your response should be relevant, accurate, and free of any ambiguity."
    )


class CreativeCritiquePrompter(CreativePrompterBase):
    """Prompter for Creative Critique"""


class CreativeRevisePrompter(CreativePrompterBase):
    """Prompter for Creative Revise"""


def load(tokenizer, cfg) -> CreativeAnsweringPromptTokenizingStrategy:
    return load_answer(tokenizer, cfg)


def load_answer(tokenizer, cfg) -> CreativeAnsweringPromptTokenizingStrategy:
    return CreativeAnsweringPromptTokenizingStrategy(
        CreativeAnswerPrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len
    )


def load_critique(tokenizer, cfg) -> CreativeCritiquePromptTokenizingStrategy:
    _name_prompt("load_critique", CreativeCritiquePromptTokenizingStrategy.user_prompt)
    return CreativeCritiquePromptTokenizingStrategy(
        CreativeCritiquePrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len
    )


def load_revise(tokenizer, cfg) -> CreativeRevisePromptTokenizingStrategy:
    _name_prompt("load_revise", CreativeRevisePromptTokenizingStrategy.user_prompt)
    return CreativeRevisePromptTokenizingStrategy(
        CreativeRevisePrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len
    )


def _name_prompt(function: str, user_prompt: str) -> None:
    """Say the wording, which no publication fixes: a model that was trained elsewhere may know another."""
    LOG.warning(
        f"`type: creative_acr.{function}` asks in these words: {user_prompt!r}. For a model that knows others, subclass the strategy "
        "in a module of your own and set `user_prompt`."
    )
