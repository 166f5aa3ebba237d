"""Datasets: where rows come from and how they become tokens.

An entry of `datasets` is one of five models; `dataset_model` says which, from the entry's `type` and the method (`rl`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ValidationInfo, model_validator

from axolotl.utils.schemas.enums import ChatTemplate
from axolotl.utils.schemas.fields import IGNORE_CASE, Float, Int, Text, Words, key
from axolotl.utils.schemas.utils import handle_legacy_message_fields_logic


class UserDefinedPrompterType(Words):
    """A prompt format of one's own, for instruction tuning."""

    system_prompt: str | None = key("System prompt of every row.")
    system_format: str | None = key("How the system prompt is written; `{system}` stands for it.")
    field_system: str | None = key("Column of the system prompt.")
    field_instruction: str | None = key("Column of the instruction.")
    field_input: str | None = key("Column of the further input.")
    field_output: str | None = key("Column of the answer.")
    format: str | None = key("How a prompt is written; `{instruction}` and `{input}` stand for the columns.")
    no_input_format: str | None = key("How a prompt without further input is written.")


class UserDefinedDPOType(Words):
    """A prompt format of one's own, for preference pairs."""

    field_system: str | None = key("Column of the system prompt.")
    field_prompt: str | None = key("Column of the prompt.")
    field_chosen: str | None = key("Column of the better answer.")
    field_rejected: str | None = key("Column of the worse answer.")
    prompt_format: str | None = key("How the prompt is written; `{prompt}` and `{system}` stand for the columns.")
    chosen_format: str | None = key("How the better answer is written; `{chosen}` stands for the column.")
    rejected_format: str | None = key("How the worse answer is written; `{rejected}` stands for the column.")


class UserDefinedKTOType(Words):
    """A prompt format of one's own, for answers judged one by one."""

    field_system: str | None = key("Column of the system prompt.")
    field_prompt: str | None = key("Column of the prompt.")
    field_completion: str | None = key("Column of the answer.")
    field_label: str | bool | None = key("Column that says whether the answer is good.")
    prompt_format: str | None = key("How the prompt is written; `{prompt}` and `{system}` stand for the columns.")
    completion_format: str | None = key("How the answer is written; `{completion}` stands for the column.")


class DatasetSource(Words):
    """Where rows come from."""

    path: Text | None = key(
        "Local file or folder, name on the Hugging Face hub, or an s3://, gs://, az://, oci:// or https:// URL."
    )
    name: Text | list[Text] | None = key("Configuration of the dataset on the hub; a list loads each of them.")
    split: Text | None = key("Split to load, such as `train` or `train[:10%]`.")
    data_files: Text | list[Text] | dict[str, Text | list[Text]] | None = key(
        "Files to load from the folder or repository; a mapping gives those of each split."
    )
    ds_type: Annotated[str | None, IGNORE_CASE] = key("Format of the files: json, csv, parquet, arrow or text.")
    revision: str | None = key("Branch, tag or commit of the dataset on the hub. Put numbers in quotes.")
    trust_remote_code: bool | None = key("Run Python code that comes with the dataset.", False)
    shards: Int | None = key("Split the dataset into this many parts and use one.", ge=1)
    shards_idx: Int | None = key("Which of the `shards` to use, from 0.", ge=0)
    preprocess_shards: Int | None = key(
        "Process the dataset in this many parts, one after the other, to save memory.", ge=1
    )


class ConversationFields(Words):
    """How a row is read as a conversation."""

    chat_template: ChatTemplate | str | None = key(
        "Chat template: a name, `tokenizer_default`, `tokenizer_default:<name>` for one of several that the tokenizer has, "
        "`tokenizer_default_fallback_<name>` or `jinja`."
    )
    chat_template_jinja: str | None = key("Jinja text of the chat template, or the path of a file with it.")
    field_messages: str | None = key("Column of the messages. Default: `messages`.")
    field_system: str | None = key("Column of the system prompt. Default: `system`.")
    field_tools: str | None = key("Column of the tools, a list of JSON schemas. Default: `tools`.")
    field_thinking: str | None = key("Property of a message that holds its reasoning. Default: `reasoning_content`.")
    template_thinking_key: str | None = key("Name that the chat template gives to the reasoning.")
    message_property_mappings: dict[str, str] | None = key(
        "Property of a message in the template: its name in the data. Default: `{role: role, content: content}`."
    )
    roles: dict[str, str | list[str]] | None = key("Role in the template: its names in the data.")

    @model_validator(mode="before")
    @classmethod
    def handle_legacy_message_fields(cls, data: Any) -> Any:
        """Move `message_field_role` and its like into `message_property_mappings`."""
        return handle_legacy_message_fields_logic(data) if isinstance(data, dict) else data


class Weighted(Words):
    """How much a dataset is trained on."""

    weight: Float | None = key(
        "How many times each row is used per epoch (0.5: half of the rows, 2: every row twice). When streaming: share of the "
        "rows, relative to the other datasets.",
        gt=0,
    )


class SFTDataset(ConversationFields, Weighted, DatasetSource):
    """Rows with a prompt and an answer, a conversation, or plain text."""

    type: str | UserDefinedPrompterType | None = key(
        "How a row becomes tokens: `alpaca`, `chat_template`, `completion`, `input_output`, ..., a module path, or a mapping."
    )
    input_transform: str | None = key("Function that changes a row first, for `type: messages.chat`.")
    conversation: str | None = key("Style of the conversation for old prompt types.")
    input_format: str | None = key("Format of the input for old prompt types.")
    field: str | None = key("Column of the text, for `type: completion`. Default: `text`.")
    field_human: str | None = key("Column of the human's turn, for old prompt types.")
    field_model: str | None = key("Column of the model's turn, for old prompt types.")
    message_field_training: str | None = key("Property of a message that says whether it is trained on.")
    message_field_training_detail: str | None = key(
        "Property of a message that lists which of its characters are trained on."
    )
    split_thinking: bool | None = key("Split reasoning in tags such as `<think>` from the assistant's content.")
    logprobs_field: str | None = key("Column of the teacher's log probabilities, for distillation.")
    temperature: Float | None = key("Temperature of the teacher's log probabilities.", gt=0)
    roles_to_train: list[str] | None = key("Roles whose turns are trained on. Default: assistant.")
    train_on_eos: Annotated[Literal["all", "turn", "last", "none"] | None, IGNORE_CASE] = key(
        "End-of-sequence tokens to train on: all, those after trained turns (default), the last, or none."
    )
    train_on_eot: Annotated[Literal["all", "turn", "last", "none"] | None, IGNORE_CASE] = key(
        "End-of-turn tokens to train on. Default: as `train_on_eos`."
    )
    drop_system_message: bool | None = key("Leave the system turn out.")
    train_on_split: str | None = key("Has no effect; use `split`.")


class PretrainingDataset(Weighted, DatasetSource):
    """Plain text, streamed."""

    split: Text | None = key("Split to load.", "train")
    text_column: str | None = key("Column of the text.", "text")
    field: str | None = key("The same as `text_column`.")
    type: str | None = key("How a row becomes tokens: `pretrain` or `completion`.", "pretrain")
    skip: Int | None = key("Rows to skip at the start.", ge=0)


class DPODataset(ConversationFields, DatasetSource):
    """Preference pairs."""

    type: UserDefinedDPOType | str | None = key(
        "How a row becomes a prompt and two answers, such as `chatml.intel`, or a mapping."
    )
    field_chosen: str | None = key("Column of the better answer. Default: `chosen`.")
    field_rejected: str | None = key("Column of the worse answer. Default: `rejected`.")


class KTODataset(ConversationFields, DatasetSource):
    """Answers judged one by one."""

    type: UserDefinedKTOType | str | None = key("How a row becomes a prompt, an answer and a label, or a mapping.")


class StepwiseSupervisedDataset(DatasetSource):
    """Answers judged step by step."""

    type: str | None = key("`stepwise_supervised`.")
    step_separator: str | None = key("Text between steps. Default: a line break.")
    max_completion_length: Int | None = key("Longest answer, in tokens.", ge=1)
    train_on_last_step_only: bool | None = key("Train on the last step only.")


class SyntheticDataset(Words):
    """Random tokens, to measure speed."""

    path: str = key("`synthetic`.", "synthetic")
    type: Literal["_synthetic"] = key("`_synthetic`.", "_synthetic")
    length: Int = key("Number of rows.", 1000, ge=1)
    sequence_length: Int | None = key("Tokens per row. Default: `sequence_len`.", ge=1)
    min_input_id: Int = key("Lowest token id.", 100, ge=0)
    max_input_id: Int | None = key("Token ids are below this. Default: the size of the vocabulary.", ge=1)
    seed: Int | None = key("Seed of the rows. Default: `seed`.")


DatasetEntry = SFTDataset | DPODataset | KTODataset | StepwiseSupervisedDataset | SyntheticDataset

MODEL_OF_TYPE: dict[str, type[BaseModel]] = {
    "_synthetic": SyntheticDataset,
    "stepwise_supervised": StepwiseSupervisedDataset,
}
MODEL_OF_RL: dict[str, type[BaseModel]] = {
    "dpo": DPODataset,
    "ipo": DPODataset,
    "simpo": DPODataset,
    "kto": KTODataset,
}


def dataset_model(entry: dict[str, Any], rl: Any) -> type[BaseModel]:
    """The model that an entry of `datasets` is read with."""
    type_ = entry.get("type")
    if isinstance(type_, str) and type_ in MODEL_OF_TYPE:
        return MODEL_OF_TYPE[type_]
    return MODEL_OF_RL.get(str(rl).lower(), SFTDataset)


def pretraining_model(entry: dict[str, Any], rl: Any = None) -> type[BaseModel]:
    """The model that an entry of `pretraining_dataset` is read with."""
    return PretrainingDataset if entry.get("type") in (None, "pretrain", "completion") else SFTDataset


def _read_dataset(entry: Any, info: ValidationInfo) -> Any:
    if not isinstance(entry, dict):
        return entry
    return dataset_model(entry, info.data.get("rl")).model_validate(entry)


def _read_pretraining(entry: Any) -> Any:
    return pretraining_model(entry).model_validate(entry) if isinstance(entry, dict) else entry


# These read `rl` from the model they stand in, so `rl` must be declared before them.
AnyDataset = Annotated[DatasetEntry, BeforeValidator(_read_dataset)]
AnyPretrainingDataset = Annotated[PretrainingDataset | SFTDataset, BeforeValidator(_read_pretraining)]
