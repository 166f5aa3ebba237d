"""Datasets: what to train and evaluate on, packing, streaming."""

from __future__ import annotations

import os

from axolotl.exceptions import ConfigError, NotBuiltError
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.utils import handle_legacy_message_fields_logic
from axolotl.utils.schemas.validation.common import datasets_of, fill

LOG = get_logger(__name__)

EMPTY_TEST_DATASET = "axolotl-ai-co/empty-test-ds"
DATASET_LISTS = ("datasets", "test_datasets")

# Most uses of a row per epoch.
MOST_TIMES = 1000

# Keys of a dataset that say how `type: chat_template` reads and learns conversations.
CONVERSATION_KEYS = (
    "chat_template",
    "chat_template_jinja",
    "field_messages",
    "field_system",
    "field_tools",
    "field_thinking",
    "template_thinking_key",
    "message_property_mappings",
    "message_field_training",
    "message_field_training_detail",
    "roles",
    "roles_to_train",
    "train_on_eos",
    "train_on_eot",
    "split_thinking",
    "drop_system_message",
)

# A choice made for more entries than this names the first and the last.
MANY_POSITIONS = 5


def a_config_names_its_data(cfg: DictDefault) -> None:
    """One of `datasets` and `pretraining_dataset` is written."""
    if not cfg.datasets and not cfg.pretraining_dataset:
        raise ConfigError(
            "either datasets or pretraining_dataset is required: nothing says what to train on. Write\n"
            "datasets:\n  - path: my_data.jsonl\n    type: chat_template"
        )


def sharegpt_is_chat_template_now(cfg: DictDefault) -> None:
    """`type: sharegpt` and its variants are gone."""
    for dataset in datasets_of(cfg):
        if isinstance(dataset.type, str) and dataset.type.startswith("sharegpt"):
            raise ConfigError(
                f"`type: {dataset.type}` of dataset `{dataset.path}`: `type: sharegpt.*` is deprecated. Please use `type: chat_template` "
                "instead, with `field_messages: conversations` and `message_property_mappings: {role: from, content: value}`."
            )


def a_seed_is_always_set(cfg: DictDefault) -> None:
    """Two runs of one config give the same numbers: the seed is 42 unless written."""
    if cfg.seed is None:
        fill(cfg, "seed", 42, "no `seed` is set")


def older_message_fields_are_property_mappings(cfg: DictDefault) -> None:
    """`message_field_role: from` of a dataset is `message_property_mappings: {role: from}`; both may not disagree."""
    for key in DATASET_LISTS:
        entries = cfg[key]
        if isinstance(entries, list):
            cfg[key] = [_with_mappings(entry) if isinstance(entry, dict) else entry for entry in entries]


def _with_mappings(dataset: DictDefault) -> dict:
    try:
        return handle_legacy_message_fields_logic(dataset.to_dict())
    except ConfigError:
        raise
    except ValueError as err:
        raise ConfigError(f"dataset `{dataset.path}`: {err}") from err


def jinja_needs_a_template_text(cfg: DictDefault) -> None:
    """`chat_template: jinja` needs `chat_template_jinja`; the text alone implies `jinja`. The same for each dataset."""
    for place, section in (("", cfg), *((f" of dataset `{dataset.path}`", dataset) for dataset in datasets_of(cfg))):
        if section.chat_template == "jinja" and not section.chat_template_jinja:
            raise ConfigError(
                f"`chat_template: jinja`{place}: chat_template_jinja is required when chat_template is set to jinja. Write the "
                "template, or the path of a file with it, as `chat_template_jinja`."
            )
        if section.chat_template_jinja and not section.chat_template:
            section["chat_template"] = "jinja"
            note_choice(cfg, f"chat_template{place}", "jinja", "`chat_template_jinja` is set")


def a_chat_dataset_renders_with_the_tokenizers_template(cfg: DictDefault) -> None:
    """A dataset of type chat_template without a template of its own takes the top-level one, or the tokenizer's."""
    if cfg.chat_template:
        return
    for key in DATASET_LISTS:
        positions = []
        for position, dataset in enumerate(datasets_of(cfg, key)):
            if dataset.type == "chat_template" and not dataset.chat_template:
                dataset["chat_template"] = "tokenizer_default"
                positions.append(str(position))
        if positions:
            where = (
                ", ".join(positions) if len(positions) <= MANY_POSITIONS else f"{positions[0]}, ..., {positions[-1]}"
            )
            note_choice(cfg, f"{key}[{where}].chat_template", "tokenizer_default", "no `chat_template` is set")


def split_chooses_the_part_of_a_dataset(cfg: DictDefault) -> None:
    """`train_on_split` is ignored; the key is `split`."""
    for dataset in datasets_of(cfg):
        if dataset.train_on_split:
            LOG.warning(
                "`train_on_split: %s` of dataset `%s` is ignored. Write `split: %s`.",
                dataset.train_on_split,
                dataset.path,
                dataset.train_on_split,
            )


def a_key_of_a_dataset_is_for_its_type(cfg: DictDefault) -> None:
    """Types of single prompts and texts read none of the keys of conversations. What types with a path read is theirs to know."""
    if cfg.rl or cfg.reward_model or cfg.process_reward_model:
        return
    for dataset in datasets_of(cfg):
        kind = dataset.type if isinstance(dataset.type, str) else "user_defined" if dataset.type else ""
        if not kind or "." in kind:
            continue
        reads_text = kind in ("completion", "pretrain")
        unread = [*(() if kind == "chat_template" else CONVERSATION_KEYS), *(() if reads_text else ("field",))]
        found = [f"`{key}`" for key in unread if dataset[key] not in (None, False)]
        if found:
            hint = " Write `field` for the column of the text." if reads_text else ""
            LOG.warning("`type: %s` of dataset `%s` does not read %s.%s", kind, dataset.path, ", ".join(found), hint)


def pushing_a_dataset_needs_a_login(cfg: DictDefault) -> None:
    """Only a logged-in user may push to the hub."""
    if cfg.push_dataset_to_hub and cfg.hf_use_auth_token is not True:
        raise ConfigError(
            f"Require cfg.hf_use_auth_token to be True for push_dataset_to_hub: `push_dataset_to_hub: {cfg.push_dataset_to_hub}` needs a "
            "login. Write `hf_use_auth_token: true`."
        )


def one_thing_makes_the_evaluation_set(cfg: DictDefault) -> None:
    """Either `test_datasets` or `val_set_size`, not both."""
    if cfg.test_datasets and cfg.val_set_size:
        raise ConfigError(
            f"non-zero val_set_size should not be used with test_datasets configuration: `val_set_size: {cfg.val_set_size}` would set "
            "aside rows that nobody evaluates on. Write `val_set_size: 0`, or remove `test_datasets`."
        )


def a_benchmark_alone_evaluates_on_an_empty_set(cfg: DictDefault) -> None:
    """`do_bench_eval` needs an evaluation to hang on; without evaluation data that is one on an empty dataset."""
    if cfg.do_bench_eval and not cfg.test_datasets and not cfg.val_set_size:
        LOG.warning(
            "`do_bench_eval: true` needs some evaluation dataset; an empty one is used for the benchmark alone."
        )
        test_datasets = [{"path": EMPTY_TEST_DATASET, "ds_type": "json", "type": "completion", "split": "train"}]
        fill(cfg, "test_datasets", test_datasets, "`do_bench_eval: true` has no evaluation data")


def a_packed_run_evaluates_packed(cfg: DictDefault) -> None:
    """Evaluation is packed like training unless said otherwise; the prediction table needs rows that are not packed."""
    if not cfg.sample_packing:
        return
    if cfg.eval_table_size and cfg.eval_sample_packing is not False:
        raise ConfigError(
            f"eval_table_size and eval_sample_packing are not supported together with sample_packing: `eval_table_size: {cfg.eval_table_size}` "
            "shows single rows. Please set 'eval_sample_packing' to false."
        )
    if cfg.eval_sample_packing is None and not cfg.eval_table_size:
        fill(cfg, "eval_sample_packing", True, "`sample_packing: true`")
    if cfg.eval_sample_packing is False and cfg.remove_unused_columns is None:
        fill(cfg, "remove_unused_columns", False, "packed rows carry columns that unpacked evaluation would drop")


def rows_that_are_not_prepared_keep_their_columns(cfg: DictDefault) -> None:
    """Without preparation, the columns that the strategy reads must reach it."""
    if cfg.skip_prepare_dataset and cfg.remove_unused_columns is None:
        fill(cfg, "remove_unused_columns", False, "`skip_prepare_dataset: true` reads the columns while training")


def deduplication_reads_all_rows(cfg: DictDefault) -> None:
    """Duplicates cannot be seen in a stream, nor in data that is not prepared."""
    if not cfg.dataset_exact_deduplication:
        return
    if cfg.skip_prepare_dataset:
        raise ConfigError(
            "`dataset_exact_deduplication: true` cannot be combined with `skip_prepare_dataset: true`: rows are compared while they are "
            "prepared. Remove one of them."
        )
    if cfg.streaming or cfg.pretraining_dataset:
        raise NotBuiltError(
            "`dataset_exact_deduplication: true` is not implemented for streaming datasets: a stream is not known as a whole. Remove it, or "
            "read the data in advance (`datasets:` with `streaming: false`)."
        )


def pretraining_data_should_say_that_it_streams(cfg: DictDefault) -> None:
    """`pretraining_dataset` streams; saying so keeps the config readable."""
    if cfg.pretraining_dataset and not cfg.streaming:
        LOG.warning("`pretraining_dataset` is streamed. Write `streaming: true` too; it will not always be implied.")


def a_stream_has_no_known_end(cfg: DictDefault) -> None:
    """The length of a stream is unknown: it needs `max_steps`, and no share of it can be set aside."""
    if not (cfg.streaming or cfg.pretraining_dataset):
        return
    problems = []
    if not cfg.max_steps:
        problems.append(
            "max_steps must be set when using iterable pretraining_dataset (or `streaming: true`), Trainer can't infer length and schedule "
            "optimizer/learning rate without it! Write `max_steps: 1000`, say."
        )
    if cfg.val_set_size:
        problems.append(
            f"`val_set_size: {cfg.val_set_size}` cannot be used with a stream, whose rows are not known in advance. Write `val_set_size: 0` "
            "and `test_datasets:`."
        )
    if cfg.rl or cfg.reward_model or cfg.process_reward_model:
        problems.append(
            "Only supervised fine-tuning and pretraining read a stream. Remove `streaming` and `pretraining_dataset`."
        )
    if problems:
        raise ConfigError(problems)
    if cfg.group_by_length:
        LOG.warning("`group_by_length: true` has no effect on a stream, whose lengths are not known in advance.")
    # Each rank reads its own part of the stream; accelerate must neither split one batch nor send the first rank's to all.
    accelerator_config = cfg.accelerator_config or DictDefault()
    for option in ("split_batches", "dispatch_batches"):
        if accelerator_config[option] is None:
            accelerator_config[option] = False
            note_choice(cfg, f"accelerator_config.{option}", False, "the data is streamed")
    cfg["accelerator_config"] = accelerator_config


def a_weight_belongs_to_rows_that_are_trained(cfg: DictDefault) -> None:
    """`weight` says how much a dataset is trained on: evaluation has no use for it, and rows that are not prepared cannot be counted."""
    for dataset in datasets_of(cfg, "test_datasets"):
        if dataset.weight is not None:
            raise ConfigError(
                f"`weight: {dataset.weight}` of the test dataset `{dataset.path}`: every row is evaluated once. Remove it."
            )
    weighted = [dataset for dataset in datasets_of(cfg, "datasets") if dataset.weight is not None]
    many = [dataset for dataset in weighted if dataset.weight > MOST_TIMES and not cfg.streaming]
    if many:
        raise ConfigError(
            f"`weight: {many[0].weight:g}` of dataset `{many[0].path}` would use each of its rows {many[0].weight:,g} times per epoch; at "
            f"most {MOST_TIMES:,} is taken. A weight is no share: 2 uses every row twice, 0.5 every other row."
        )
    if weighted and cfg.skip_prepare_dataset and not cfg.streaming:
        raise ConfigError(
            f"`weight: {weighted[0].weight}` of dataset `{weighted[0].path}` needs rows that are prepared. Remove it, or "
            "`skip_prepare_dataset: true`."
        )


def preparation_uses_the_cpus_there_are(cfg: DictDefault) -> None:
    """`dataset_num_proc` comes from AXOLOTL_DATASET_NUM_PROC, RUNPOD_CPU_COUNT or the number of CPUs this process may use."""
    if cfg.dataset_num_proc is not None:
        return
    for variable in ("AXOLOTL_DATASET_NUM_PROC", "AXOLOTL_DATASET_PROCESSES", "RUNPOD_CPU_COUNT"):
        value = os.environ.get(variable)
        if value:
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(f"the environment variable {variable}={value} must be a whole number above 0.")
            fill(cfg, "dataset_num_proc", int(value), f"the environment variable {variable}")
            return
    fill(cfg, "dataset_num_proc", _num_cpus(), "the number of CPUs")


def _num_cpus() -> int:
    # Containers and batch systems give a process fewer CPUs than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def batches_are_loaded_by_as_many_processes_as_pay_off(cfg: DictDefault) -> None:
    """With GPUs, one loader per GPU and pinned memory; without, the main process loads: a worker would take a core from training."""
    keys = ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor")
    num_gpus = (cfg.capabilities or DictDefault()).n_gpu
    if num_gpus is None or any(cfg[key] is not None for key in keys):
        return
    if num_gpus == 0:
        fill(cfg, "dataloader_num_workers", 0, "no GPU: a worker would take a core from training")
        fill(cfg, "dataloader_pin_memory", False, "no GPU")
        return
    fill(cfg, "dataloader_num_workers", num_gpus, "the number of GPUs")
    fill(cfg, "dataloader_pin_memory", True, "batches go to a GPU")
    fill(cfg, "dataloader_prefetch_factor", 256, "batches of token ids are small")


CHECKS = (
    a_config_names_its_data,
    sharegpt_is_chat_template_now,
    a_seed_is_always_set,
    older_message_fields_are_property_mappings,
    jinja_needs_a_template_text,
    a_chat_dataset_renders_with_the_tokenizers_template,
    split_chooses_the_part_of_a_dataset,
    a_key_of_a_dataset_is_for_its_type,
    pushing_a_dataset_needs_a_login,
    one_thing_makes_the_evaluation_set,
    a_benchmark_alone_evaluates_on_an_empty_set,
    a_packed_run_evaluates_packed,
    rows_that_are_not_prepared_keep_their_columns,
    deduplication_reads_all_rows,
    pretraining_data_should_say_that_it_streams,
    a_stream_has_no_known_end,
    a_weight_belongs_to_rows_that_are_trained,
    preparation_uses_the_cpus_there_are,
    batches_are_loaded_by_as_many_processes_as_pay_off,
)
