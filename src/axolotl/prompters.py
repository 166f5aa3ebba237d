"""Prompters: from the fields of a row to the text that the model reads.

A prompter has `build_prompt(instruction, input=None, output=None)`, a generator whose first value is the text. The
text ends where the answer begins; the tokenizing strategy adds the answer. To write one more, subclass `AlpacaPrompter`
and set the class attributes, or override `match_prompt_style` or `build_prompt`.
"""

from __future__ import annotations

from collections.abc import Generator
from enum import Enum
from typing import NamedTuple

from axolotl.exceptions import ConfigError

IGNORE_TOKEN_ID = -100


class PromptStyle(Enum):
    """How instruction, input and system text are laid out."""

    INSTRUCT = "instruct"
    CHAT = "chat"
    CHATML = "chatml"
    PHI = "phi"


class StyleFormats(NamedTuple):
    """Format strings of one style. Fields: {system}; {instruction} and {input}; {instruction}."""

    system: str
    turn: str
    turn_no_input: str


STYLE_FORMATS: dict[str, StyleFormats] = {
    PromptStyle.INSTRUCT.value: StyleFormats(
        system="{system}\n\n",
        turn="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        turn_no_input="### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    PromptStyle.CHAT.value: StyleFormats(
        system="SYSTEM: {system}\n",
        turn="USER: {instruction}\n{input}\nASSISTANT:",
        turn_no_input="USER: {instruction}\nASSISTANT:",
    ),
    PromptStyle.CHATML.value: StyleFormats(
        system="<|im_start|>system\n{system}<|im_end|>\n",
        turn="<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        turn_no_input="<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    ),
    PromptStyle.PHI.value: StyleFormats(
        system="<|system|>\n{system}<|end|>\n",
        turn="<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        turn_no_input="<|user|>\n{instruction}<|end|>\n<|assistant|>",
    ),
}


class Prompter:
    """Base class of prompters."""

    def build_prompt(self, *args, **kwargs) -> Generator:
        raise NotImplementedError(f"{type(self).__name__} does not define build_prompt")


class AlpacaPrompter(Prompter):
    """Instruction with optional input, after a fixed preamble.

    Args:
        prompt_style: `instruct` (also when None), `chat`, `chatml` or `phi`.
    """

    system_prompt: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
    )
    system_no_input_prompt: str = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    system_format: str = "{system}"
    turn_format: str
    turn_no_input_format: str
    prompt_style: str | None = None

    def __init__(self, prompt_style: str | PromptStyle | None = PromptStyle.INSTRUCT.value):
        if isinstance(prompt_style, PromptStyle):
            prompt_style = prompt_style.value
        self.prompt_style = prompt_style if prompt_style else PromptStyle.INSTRUCT.value
        self.match_prompt_style()

    def match_prompt_style(self) -> None:
        """Set the formats that belong to `self.prompt_style`."""
        if self.prompt_style not in STYLE_FORMATS:
            raise ConfigError(
                f"The prompt style `{self.prompt_style}` is not known. Write one of: {', '.join(sorted(STYLE_FORMATS))}."
            )
        formats = STYLE_FORMATS[self.prompt_style]
        self.system_format = formats.system
        self.turn_format = formats.turn
        self.turn_no_input_format = formats.turn_no_input

    def _build_result(self, instruction: str, input_text: str | None, output: str | None) -> str:
        system = self.system_prompt if input_text else self.system_no_input_prompt
        text = self.system_format.format(system=system) if system else ""
        if input_text:
            text += self.turn_format.format(instruction=instruction, input=input_text)
        else:
            text += self.turn_no_input_format.format(instruction=instruction)
        return f"{text}{output}" if output else text

    def build_prompt(
        self,
        instruction: str,
        input: str | None = None,
        output: str | None = None,
    ) -> Generator[str, None, None]:
        """Yield the prompt, followed by `output` when it is given."""
        yield self._build_result(instruction, input, output)

    def __repr__(self) -> str:
        return f"{type(self).__name__}\n" + self._build_result("{instruction}", "{input}", "{output}")


class UnpromptedPrompter(AlpacaPrompter):
    """Alpaca without a preamble."""

    system_prompt = ""
    system_no_input_prompt = ""


class JeopardyPrompter(AlpacaPrompter):
    """Jeopardy clues: the question is the instruction, the category the input."""


class NomicGPT4AllPrompter(AlpacaPrompter):
    """Nomic GPT4All rows."""


class GPTeacherPrompter(AlpacaPrompter):
    """GPTeacher rows."""


class _UserAssistantPrompter(AlpacaPrompter):
    """The system text as it stands, then USER and ASSISTANT, whatever the style."""

    def match_prompt_style(self) -> None:
        self.system_format = "{system}"
        self.turn_format = "USER: {instruction}\n{input}\nASSISTANT:"
        self.turn_no_input_format = "USER: {instruction}\nASSISTANT:"


class MultipleChoiceExplainPrompter(_UserAssistantPrompter):
    """A multiple-choice question, answered with reasons."""

    system_prompt = "Choose the answer that best answers the question. Explain your reasoning.\n"
    system_no_input_prompt = system_prompt


class MultipleChoiceConcisePrompter(_UserAssistantPrompter):
    """A multiple-choice question, answered concisely."""

    system_prompt = "Choose the answer that best answers the question. Be concise in your response.\n\n"
    system_no_input_prompt = system_prompt


class SummarizeTLDRPrompter(AlpacaPrompter):
    """An article to be summarized."""

    system_prompt = ""
    system_no_input_prompt = ""

    def match_prompt_style(self) -> None:
        self.turn_format = "USER: Summarize the following article as a TL;DR.\n{instruction}\n{input}\nASSISTANT:"
        self.turn_no_input_format = "USER: Summarize the following article as a TL;DR.\n{instruction}\nASSISTANT:"


_REFLECT_TASK = (
    " You, the Assistant, should generate a response as if it were an abstract for an academic or technical paper on "
    "the query along with a methodology. Then generate an Agent Reflection where you create a long form response as if "
    "from subject matter expert, be verbose, diligent, and creative in your application of knowledge, apply it through "
    "the lens of the response generated by the assistant. Look for flawed reasoning, faulty logic, or other mistakes in "
    "the method. Finally, generate a final response and method for the user with the Assistant abstract and Reflection "
    "analysis as augmentations to the generation"
)


class ReflectAlpacaPrompter(AlpacaPrompter):
    """A thought, a reflection on it and a corrected answer."""

    system_prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context."
        + _REFLECT_TASK
    )
    system_no_input_prompt = "Below is an instruction that describes a task." + _REFLECT_TASK
    agent_label: str = (
        "### Thought:\n{output}\n\n### Agent Reflection:\n{reflection}\n\n### Final Response:\n{corrected}"
    )

    def match_prompt_style(self) -> None:
        super().match_prompt_style()
        if self.prompt_style == PromptStyle.CHAT.value:
            self.agent_label = "\nTHOUGHT: {output}\nASSISTANT REFLECTION: {reflection}\nASSISTANT: {corrected}"

    def build_prompt(
        self,
        instruction: str,
        input: str | None = None,
        output: str | None = None,
        reflection: str | None = None,
        corrected: str | None = None,
    ) -> Generator[str, None, None]:
        """Yield the prompt, followed by thought, reflection and corrected answer when all three are given."""
        label = ""
        if output and reflection and corrected:
            label = self.agent_label.format(output=output, reflection=reflection, corrected=corrected)
        yield self._build_result(instruction, input, label)


class UnsupportedPrompter(Prompter):
    """For datasets that need no prompter."""

    def __init__(self) -> None:
        pass

    def __repr__(self) -> str:
        return "Pre-tokenized or custom dataset types are unsupported for logging"
