"""Which datasets, and how their rows are prepared, packed and loaded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from axolotl.utils.schemas.datasets import AnyDataset, AnyPretrainingDataset
from axolotl.utils.schemas.fields import IGNORE_CASE, Float, Int, Text, Words, key


class DataConfig(Words):
    """Preparing and loading data."""

    datasets: Annotated[list[AnyDataset], Field(min_length=1)] | None = key("Datasets to train on.")
    test_datasets: Annotated[list[AnyDataset], Field(min_length=1)] | None = key(
        "Datasets to evaluate on, instead of `val_set_size`."
    )
    pretraining_dataset: Annotated[list[AnyPretrainingDataset], Field(min_length=1)] | None = key(
        "Datasets of plain text to stream."
    )

    shuffle_merged_datasets: bool | None = key("Shuffle the rows of all datasets together.", True)
    shuffle_before_merging_datasets: bool | None = key(
        "Shuffle the rows of each dataset before they are joined.", False
    )
    dataset_prepared_path: Text | None = key(
        "Folder that keeps tokenized datasets. Default: `last_run_prepared`, rebuilt by each run."
    )
    dataset_shard_num: Int | None = key("Split the joined dataset into this many parts and use one.", ge=1)
    dataset_shard_idx: Int | None = key("Which of the `dataset_shard_num` parts to use, from 0.", ge=0)
    skip_prepare_dataset: bool | None = key("Do not tokenize in advance.", False)
    num_dataset_shards_to_save: Int | None = key("Files that the prepared dataset is saved in.", ge=1)
    dataset_num_proc: Int | None = key(
        "Processes that prepare data. Default: RUNPOD_CPU_COUNT, or the number of CPUs.", ge=1
    )
    dataset_exact_deduplication: bool | None = key(
        "Drop rows that occur twice, also across training and evaluation data."
    )
    dataset_keep_in_memory: bool | None = key("Keep data in memory while preparing it.")
    dataloader_pin_memory: bool | None = key("Pin host memory for faster copies to the GPU.")
    dataloader_num_workers: Int | None = key("Processes that load batches.", ge=0, le=1024)
    dataloader_prefetch_factor: Int | None = key("Batches each of them loads ahead.", ge=1)
    dataloader_drop_last: bool | None = key("Drop the last batch when it is not full.")
    accelerator_config: dict[str, Any] | None = key("Settings of accelerate's `AcceleratorConfig`.")
    remove_unused_columns: bool | None = key("Drop columns that the model does not take.")
    push_dataset_to_hub: str | None = key("Repository on the hub to push the prepared dataset to.")
    hf_use_auth_token: bool | None = key("Log in to the hub to load datasets.")
    val_set_size: Float | None = key("Rows set aside for evaluation: a share up to 1, or a number above 1.", 0.0, ge=0)
    sequence_len: Int = key("Longest training sequence, in tokens.", 512, ge=1)
    excess_length_strategy: Annotated[Literal["drop", "truncate", "raise"] | None, IGNORE_CASE] = key(
        "What to do with longer rows: drop (default), truncate or raise an error."
    )
    eval_sequence_len: Int | None = key("Longest evaluation sequence. Default: `sequence_len`.", ge=1)
    min_sample_len: Int | None = key("Shortest row to keep, in tokens. Default: 2.", ge=0)
    sample_packing: bool | None = key("Pack several rows into one sequence; they do not see each other.")
    sample_packing_group_size: Int | None = key("Rows packed at a time.", 100_000, ge=1)
    sample_packing_bin_size: Int | None = key("Most rows in one sequence.", 200, ge=1)
    sample_packing_sequentially: bool | None = key("Pack rows in their order.")
    sample_packing_mp_start_method: Annotated[Literal["fork", "spawn", "forkserver"] | None, IGNORE_CASE] = key(
        "How packing processes start."
    )
    eval_sample_packing: bool | None = key("Pack evaluation rows. Default: as `sample_packing`.")
    pad_to_sequence_len: bool | None = key("Pad every batch to `sequence_len`. Default: true with `sample_packing`.")
    pad_to_multiple_of: Int | None = key("Pad every batch to a multiple of this.", ge=1)
    curriculum_sampling: bool | None = key("Train on rows in their order.")
    multipack_real_batches: bool | None = key("Keep packed sequences as rows of a batch instead of one long row.")
    batch_flattening: Annotated[Literal["auto"] | bool | None, IGNORE_CASE] = key(
        "Put a batch's rows in one sequence without padding, when not packing."
    )
    use_pose: bool | None = key("PoSE: train for long context with skipped positions.")
    pose_split_on_token_ids: list[Int] | None = key("PoSE: tokens to split at.")
    pose_max_context_len: Int | None = key("PoSE: longest context.", ge=1)
    pose_num_chunks: Int | None = key("PoSE: number of pieces.", ge=1)
    pretrain_multipack_attn: bool | None = key("Keep packed rows apart in streamed pretraining.", True)
    pretraining_sample_concatenation: bool | None = key("Join rows in streamed pretraining.")
    streaming: bool | None = key("Read datasets while training instead of in advance.")
    streaming_multipack_buffer_size: Int | None = key("Rows packed at a time when streaming.", 10_000, ge=1)
