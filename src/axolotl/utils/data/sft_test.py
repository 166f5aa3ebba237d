from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from axolotl.exceptions import DatasetError
from axolotl.utils.data import sft
from axolotl.utils.data.sft import prepare, prepare_datasets
from axolotl.utils.data.steps import calculate_total_num_steps
from axolotl.utils.dict import DictDefault


def byte_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate(letters)}}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def token_rows(count=40, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = rng.integers(3, 200, int(rng.integers(4, 30))).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "attention_mask": [1] * len(ids)})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path):
    def make(rows=None, **keys):
        path = write(tmp_path / "data.jsonl", token_rows() if rows is None else rows)
        entries = [{"path": str(path), **({} if rows is None or "input_ids" in rows[0] else {"type": "alpaca"})}]
        return DictDefault(
            **{
                "datasets": entries,
                "sequence_len": 64,
                "micro_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "num_epochs": 1,
                "seed": 42,
                "dataset_prepared_path": str(tmp_path / "prepared"),
                **keys,
            }
        )

    return make


def all_ids(dataset):
    return [row["input_ids"] for row in dataset]


def test_alpaca_rows_become_tokens(config, tokenizer):
    rows = [{"instruction": f"q{n}", "input": "", "output": f"a{n}"} for n in range(5)]
    train, evaluation, steps, _ = prepare_datasets(config(rows, sequence_len=400), tokenizer)
    assert evaluation is None
    assert steps == 2
    assert set(train.column_names) >= {"input_ids", "labels", "attention_mask", "length"}
    for row in train:
        assert row["length"] == len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
        answer = tokenizer.decode([token for token in row["labels"] if token != -100])
        assert answer.startswith("a")
        assert answer.endswith("</s>")


def test_rows_of_tokens_pass_through(config, tokenizer):
    rows = token_rows()
    train = prepare_datasets(config(rows, shuffle_merged_datasets=False), tokenizer)[0]
    assert all_ids(train) == [row["input_ids"] for row in rows]
    assert [row["labels"] for row in train] == [row["labels"] for row in rows]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"input_ids": [1, 2], "labels": [1], "attention_mask": [1, 1]}, "row 1: `labels` has 1 entries"),
        ({"input_ids": None, "labels": [1], "attention_mask": [1]}, "row 1: field `input_ids` is missing"),
        ({"input_ids": "ab", "labels": [1], "attention_mask": [1]}, "field `input_ids` must hold lists of integers"),
        (
            {"input_ids": [1, -1], "labels": [1, 2], "attention_mask": [1, 1]},
            "row 1: `input_ids` has a negative number",
        ),
        (
            {"input_ids": [1, 2], "labels": [-100, -1], "attention_mask": [1, 1]},
            "row 1: `labels` has a negative number",
        ),
    ],
)
def test_rows_of_tokens_that_are_none(config, tokenizer, row, message):
    with pytest.raises(DatasetError, match=message):
        prepare_datasets(config([*token_rows(1), row]), tokenizer)


def test_tokens_that_the_tokenizer_does_not_know(config, tokenizer, caplog):
    row = {"input_ids": [1, 10**6], "labels": [-100, 10**6], "attention_mask": [1, 1]}
    assert len(prepare(config([*token_rows(2), row, row]), tokenizer).train) == 4
    assert "row 2: `input_ids` has the token 1000000, and the tokenizer has 259 tokens" in caplog.text


def test_length_policy_is_counted(config, tokenizer):
    rows = token_rows()
    lengths = np.array([len(row["input_ids"]) for row in rows])
    dropped = prepare(config(rows, sequence_len=20, min_sample_len=6), tokenizer)
    assert sorted(dropped.train["length"]) == sorted(lengths[(lengths <= 20) & (lengths >= 6)].tolist())
    assert dropped.report["datasets"][0]["dropped"] == {
        "longer than `sequence_len: 20`": int((lengths > 20).sum()),
        "shorter than 6 tokens": int((lengths < 6).sum()),
    }
    cut = prepare(config(rows, sequence_len=20, excess_length_strategy="truncate"), tokenizer)
    assert sorted(cut.train["length"]) == sorted(np.minimum(lengths, 20).tolist())
    assert cut.report["datasets"][0]["truncated"] == int((lengths > 20).sum())
    assert all(len(row["labels"]) == len(row["attention_mask"]) == row["length"] for row in cut.train)
    with pytest.raises(DatasetError, match=rf"the first is row {int(np.argmax(lengths > 20))} with"):
        prepare(config(rows, sequence_len=20, excess_length_strategy="raise"), tokenizer)


def test_rows_without_a_trained_token(config, tokenizer):
    silent = {"input_ids": [5, 6, 7], "labels": [5, -100, -100], "attention_mask": [1, 1, 1]}
    prepared = prepare(config([*token_rows(3), silent]), tokenizer)
    assert len(prepared.train) == 3
    assert prepared.report["datasets"][0]["dropped"] == {"without a trained token": 1}
    with pytest.raises(
        DatasetError, match=r"no row is left(.|\n)*data\.jsonl(.|\n)*1 without a trained token(.|\n)*Check|check"
    ):
        prepare(config([silent]), tokenizer)


def test_missing_field_and_type_are_named(config, tokenizer):
    rows = [{"instruction": "a", "output": "b"}, {"output": "b"}]
    with pytest.raises(DatasetError, match=r"[Rr]ow 1.*instruction"):
        prepare(config(rows, sequence_len=400), tokenizer)
    untyped = config(rows)
    del untyped.datasets[0]["type"]
    with pytest.raises(DatasetError, match=r"no `type`.*instruction, output"):
        prepare(untyped, tokenizer)


def test_validation_split(config, tokenizer):
    cfg = config(val_set_size=0.2)
    train, evaluation, _, _ = prepare_datasets(cfg, tokenizer)
    assert (len(train), len(evaluation)) == (32, 8)
    assert not set(map(tuple, all_ids(train))) & set(map(tuple, all_ids(evaluation)))
    again = prepare_datasets(DictDefault({**cfg, "dataset_prepared_path": cfg.dataset_prepared_path + "2"}), tokenizer)
    assert all_ids(again[0]) == all_ids(train)
    assert all_ids(again[1]) == all_ids(evaluation)
    assert len(prepare_datasets(config(val_set_size=7), tokenizer)[1]) == 7
    with pytest.raises(DatasetError, match="val_set_size: 40"):
        prepare_datasets(config(val_set_size=40), tokenizer)


def test_a_split_of_ordered_rows_holds_out_the_last_and_says_so(config, tokenizer, caplog):
    rows = token_rows()
    train, evaluation, _, _ = prepare_datasets(config(rows, curriculum_sampling=True, val_set_size=10), tokenizer)
    assert all_ids(train) + all_ids(evaluation) == [row["input_ids"] for row in rows]
    assert len(evaluation) == 10
    assert "holds out the last 10" in caplog.text


@pytest.mark.parametrize("sizes", [(40,), (17, 25, 8)])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_rows_are_shuffled_as_datasets_does_before_any_is_dropped(config, tokenizer, tmp_path, sizes, together, apart):
    """The order, the duplicate that stays and the split are those of `datasets` itself over all rows."""
    sources = [token_rows(size, seed=size) for size in sizes]
    sources[-1] += sources[0][:4] * 2
    entries = [{"path": str(write(tmp_path / f"{n}.jsonl", rows))} for n, rows in enumerate(sources)]
    longest = int(np.median([len(row["input_ids"]) for row in sources[0]]))
    cfg = config(
        datasets=entries,
        sequence_len=longest,
        seed=7,
        val_set_size=0.2,
        dataset_exact_deduplication=True,
        shuffle_merged_datasets=together,
        shuffle_before_merging_datasets=apart,
    )
    loaded = [Dataset.from_list(rows) for rows in sources]
    if apart and (len(loaded) > 1 or not together):
        loaded = [dataset.shuffle(seed=7) for dataset in loaded]
    merged = concatenate_datasets(loaded)
    merged = merged.shuffle(seed=7) if together else merged
    kept = list(dict.fromkeys(tuple(ids) for ids in merged["input_ids"] if len(ids) <= longest))
    assert 10 < len(kept) < len(merged)
    split = Dataset.from_dict({"input_ids": kept}).train_test_split(test_size=0.2, shuffle=False)
    train, evaluation, _, _ = prepare_datasets(cfg, tokenizer)
    assert all_ids(train) == all_ids(split["train"])
    assert all_ids(evaluation) == all_ids(split["test"])


def test_order_of_several_datasets(config, tokenizer, tmp_path):
    one, two = token_rows(10, seed=1), token_rows(10, seed=2)
    entries = [{"path": str(write(tmp_path / f"{n}.jsonl", rows))} for n, rows in enumerate((one, two))]
    ids = [row["input_ids"] for row in one + two]

    def order(**keys):
        return [ids.index(row) for row in all_ids(prepare_datasets(config(datasets=entries, **keys), tokenizer)[0])]

    assert order(shuffle_merged_datasets=False) == list(range(20))
    assert order() != list(range(20))
    assert sorted(order()) == list(range(20))
    assert order(seed=1) != order()
    before = order(shuffle_before_merging_datasets=True, shuffle_merged_datasets=False)
    assert before[:10] != list(range(10))
    assert sorted(before[:10]) == list(range(10))


def test_duplicates_and_test_datasets(config, tokenizer, tmp_path):
    rows = token_rows(10)
    held_out = write(tmp_path / "test.jsonl", [*rows[:2], *token_rows(3, seed=5)])
    cfg = config(rows + rows[:4], dataset_exact_deduplication=True, test_datasets=[{"path": str(held_out)}])
    prepared = prepare(cfg, tokenizer)
    assert len(prepared.train) == 10
    assert prepared.report["duplicates"] == 4
    assert len(prepared.evaluation) == 3


def keys_on_disk(cfg):
    return sorted(
        name for name in os.listdir(cfg.dataset_prepared_path) if os.path.isdir(f"{cfg.dataset_prepared_path}/{name}")
    )


def test_the_cache_key_holds_what_rows_depend_on(config, tokenizer):
    base = config()
    prepare_datasets(base, tokenizer)
    assert len(keys_on_disk(base)) == 1
    prepare_datasets(DictDefault({**base, "learning_rate": 1, "val_set_size": 0.1, "micro_batch_size": 1}), tokenizer)
    assert len(keys_on_disk(base)) == 1
    for number, key in enumerate(
        [
            {"excess_length_strategy": "truncate"},
            {"seed": 1},
            {"min_sample_len": 5},
            {"shuffle_merged_datasets": False},
        ],
        2,
    ):
        prepare_datasets(DictDefault({**base, **key}), tokenizer)
        assert len(keys_on_disk(base)) == number
    tokenizer.add_tokens(["<new>"])
    prepare_datasets(base, tokenizer)
    assert len(keys_on_disk(base)) == 6
    path = base.datasets[0].path
    stamp = os.stat(path)
    file = Path(path)
    file.write_text(file.read_text().replace("[", "[ ", 1)[:-1])  # as long as before
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    prepare_datasets(base, tokenizer)
    assert len(keys_on_disk(base)) == 7


def test_a_damaged_cache_is_built_again(config, tokenizer, caplog):
    cfg = config()
    expected = all_ids(prepare_datasets(cfg, tokenizer)[0])
    folder = f"{cfg.dataset_prepared_path}/{keys_on_disk(cfg)[0]}"
    data = f"{folder}/data-00000-of-00001.arrow"

    def truncate():
        os.truncate(data, 100)

    def flip():
        with open(data, "r+b") as file:
            file.seek(2000)
            file.write(b"\xff\x00\xff")

    for damage in (truncate, flip, lambda: os.remove(data), lambda: os.remove(f"{folder}/axolotl_dataset.json")):
        damage()
        caplog.clear()
        assert all_ids(prepare_datasets(cfg, tokenizer)[0]) == expected
        assert "is damaged" in caplog.text
        caplog.clear()
        prepare_datasets(cfg, tokenizer)
        assert "is damaged" not in caplog.text


def slow_prepare(cfg, builds, seconds):
    original = sft.build_rows

    def slow(*args):
        with open(builds, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return original(*args)

    sft.build_rows = slow
    prepare_datasets(DictDefault(cfg), byte_tokenizer())


def test_one_process_prepares_and_a_killed_one_blocks_nobody(config, tmp_path, tokenizer):
    cfg, builds = config(), tmp_path / "builds"
    context = multiprocessing.get_context("fork")
    first = context.Process(target=slow_prepare, args=(cfg.to_dict(), builds, 60))
    first.start()
    while not builds.exists() or not builds.read_text().endswith("\n"):
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    ranks = [context.Process(target=slow_prepare, args=(cfg.to_dict(), builds, 0.5)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert len(builds.read_text().split()) == 2
    assert len(prepare_datasets(cfg, tokenizer)[0]) == 40
    assert not [name for name in os.listdir(cfg.dataset_prepared_path) if "building" in name]


@pytest.mark.parametrize("world, drop_last, epochs", [(1, False, 1), (3, False, 2), (4, True, 1.5)])
@pytest.mark.parametrize("packing", [True, False])
def test_steps_are_counted_as_the_trainer_does(config, tokenizer, packing, world, drop_last, epochs):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    from axolotl.utils.data.steps import build_multipack_sampler

    cfg = config(sample_packing=packing, world_size=world, dataloader_drop_last=drop_last, num_epochs=epochs)
    train = prepare_datasets(cfg, tokenizer)[0]
    if packing:
        batches = build_multipack_sampler(train, cfg)
    else:
        batches = BatchSampler(SequentialSampler(train), 2, drop_last)
    per_rank = {len(list(BatchSamplerShard(batches, world, rank) if world > 1 else batches)) for rank in range(world)}
    assert len(per_rank) == 1
    expected = math.ceil(epochs * max(1, math.ceil(per_rank.pop() / 2)))
    assert calculate_total_num_steps(cfg, train) == expected
    assert calculate_total_num_steps(DictDefault({**cfg, "max_steps": 1}), train) == 1
    assert cfg.total_num_tokens == sum(train["length"])


def test_pose_positions(config, tokenizer):
    cfg = config(use_pose=True, pose_max_context_len=500, pose_num_chunks=3)
    positions = prepare_datasets(cfg, tokenizer)[0]["position_ids"]
    assert max(map(max, positions)) > 64
    for row in positions:
        steps = np.diff(row)
        assert row[0] == 0 and row[-1] < 500
        assert (steps >= 1).all() and (steps > 1).sum() <= 2


def test_save_to_disk_sources_are_left_as_they_are(tmp_path, config, tokenizer):
    Dataset.from_list([{"instruction": "a", "output": "b"}] * 3).save_to_disk(tmp_path / "saved")
    before = sorted(os.listdir(tmp_path / "saved"))
    cfg = config(datasets=[{"path": str(tmp_path / "saved"), "type": "alpaca"}], sequence_len=400)
    assert len(prepare_datasets(cfg, tokenizer)[0]) == 3
    assert sorted(os.listdir(tmp_path / "saved")) == before


def test_raw_rows(config, tokenizer):
    rows = [{"instruction": f"q{n}", "output": "a"} for n in range(8)]
    train, evaluation, steps, _ = prepare_datasets(
        config(rows, skip_prepare_dataset=True, val_set_size=0.25), tokenizer
    )
    assert (len(train), len(evaluation), steps) == (6, 2, 2)
    assert train.column_names == ["instruction", "output"]


@pytest.mark.parametrize("keys", [{}, {"shuffle_merged_datasets": False, "shuffle_before_merging_datasets": True}])
def test_raw_rows_are_ordered_as_prepared_ones(config, tokenizer, keys):
    raw, prepared = (
        prepare_datasets(config(token_rows(), skip_prepare_dataset=skips, **keys), tokenizer)[0]
        for skips in (True, False)
    )
    assert all_ids(raw) == all_ids(prepared) != [row["input_ids"] for row in token_rows()]


def test_synthetic_rows(config, tokenizer):
    entry = {
        "path": "synthetic",
        "type": "_synthetic",
        "length": 9,
        "sequence_length": 12,
        "min_input_id": 5,
        "max_input_id": 8,
    }
    train = prepare_datasets(config(datasets=[entry]), tokenizer)[0]
    assert np.shape(train["input_ids"][:]) == (9, 12)
    assert set(np.ravel(train["input_ids"][:])) == {5, 6, 7}
    assert train["labels"][:] == train["input_ids"][:]
    with pytest.raises(DatasetError, match=r"`min_input_id: 8` .* must be below 8"):
        prepare_datasets(config(datasets=[{**entry, "min_input_id": 8}]), tokenizer)


def test_a_prepared_dataset_in_a_read_only_place(config, tokenizer, monkeypatch):
    cfg = config()
    expected = all_ids(prepare_datasets(cfg, tokenizer)[0])
    monkeypatch.setattr(sft, "hold_lock", None)
    assert all_ids(prepare_datasets(cfg, tokenizer)[0]) == expected


def test_weight_is_how_often_rows_are_used_and_held_out_rows_stay_out(tmp_path, tokenizer):
    entries = []
    for name, weight in (("a", 2.5), ("b", 0.5), ("c", None)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {row}"}) + "\n" for row in range(20)))
        entries.append({"path": str(path), "type": "completion", **({"weight": weight} if weight else {})})
    cfg = DictDefault(
        datasets=entries,
        sequence_len=64,
        dataset_prepared_path=str(tmp_path / "prepared"),
        micro_batch_size=1,
        num_epochs=1,
        seed=1,
        dataset_exact_deduplication=True,
    )
    counts = []
    for held_out in (0, 15):
        prepared = prepare(DictDefault({**cfg, "val_set_size": held_out}), tokenizer)
        texts = [tokenizer.decode(ids) for ids in prepared.train["input_ids"]]
        counts.append({name: sum(f"{name} " in text for text in texts) for name in "abc"})
        assert prepared.total_num_steps == len(texts)
        assert "dataset_weight" not in prepared.train.column_names
        if prepared.evaluation is not None:
            evaluated = {tokenizer.decode(ids) for ids in prepared.evaluation["input_ids"]}
            assert len(evaluated) == 15
            assert not evaluated & set(texts)
            assert "dataset_weight" not in prepared.evaluation.column_names
    assert counts[0] == {"a": 50, "b": 10, "c": 20}


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_a_strategy_leaves_out_are_counted(config, tokenizer, tmp_path, monkeypatch, streaming):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "filtering_of_sft_test").mkdir()
    (tmp_path / "filtering_of_sft_test/short.py").write_text(
        "from axolotl.prompt_strategies.completion import load as load_completion\n"
        "def load(tokenizer, cfg, ds_cfg=None):\n"
        "    strategy = load_completion(tokenizer, cfg, ds_cfg)\n"
        "    strategy.filter_rows = lambda row: len(row['text']) < 5\n"
        "    return strategy\n"
    )
    path = write(tmp_path / "t.jsonl", [{"text": "a" * n} for n in range(1, 11)])
    cfg = config(
        datasets=[{"path": str(path), "type": "filtering_of_sft_test.short"}], streaming=streaming, max_steps=1
    )
    if streaming:
        _, position = next(prepare(cfg, tokenizer).train.read())
        (dropped,) = position["dropped_now"].values()
    else:
        (entry,) = prepare(cfg, tokenizer).report["datasets"]
        dropped = entry["dropped"]
        assert entry["rows_made"] - sum(dropped.values()) == entry["rows_kept"] == 4
    assert dropped == {"left out by `filter_rows` of the strategy": 6}


def test_more_pieces_than_rows(config, tokenizer):
    rows = [{"instruction": f"q{n}", "input": "", "output": f"a{n}"} for n in range(3)]
    cfg = config(rows, sequence_len=400)
    cfg.datasets[0]["preprocess_shards"] = 5
    assert len(prepare(cfg, tokenizer).train) == 3
    cfg.datasets[0] = DictDefault({**cfg.datasets[0], "preprocess_shards": None, "shards": 5, "shards_idx": 4})
    with pytest.raises(DatasetError, match=r"`shards: 5`.*more than its 3 rows"):
        prepare(cfg, tokenizer)


def test_a_weighted_dataset_of_which_nothing_is_left(config, tokenizer, tmp_path):
    good = write(tmp_path / "good.jsonl", [{"text": "some words"}] * 4)
    short = write(tmp_path / "short.jsonl", [{"text": ""}] * 4)
    entries = [{"path": str(path), "type": "completion", "weight": 2} for path in (good, short)]
    assert len(prepare(config(datasets=entries, min_sample_len=5), tokenizer).train) == 8


def test_a_part_of_all_rows(config, tokenizer):
    rows = token_rows(10)
    parts = [
        all_ids(prepare(config(rows, dataset_shard_num=3, dataset_shard_idx=index), tokenizer).train)
        for index in range(3)
    ]
    assert sorted(ids for part in parts for ids in part) == sorted(row["input_ids"] for row in rows)
    assert [len(part) for part in parts] == [4, 3, 3]
    assert len(prepare(config(rows, dataset_shard_num=3), tokenizer).train) == 10
    with pytest.raises(DatasetError, match="`dataset_shard_idx: 3` must be from 0 to 2"):
        prepare(config(rows, dataset_shard_num=3, dataset_shard_idx=3), tokenizer)
    with pytest.raises(DatasetError, match="`dataset_shard_num: 30` is more than the 10 rows"):
        prepare(config(rows, dataset_shard_num=30, dataset_shard_idx=3), tokenizer)


@pytest.mark.parametrize("files", [1, 4, 25])
def test_number_of_files(config, tokenizer, files):
    cfg = config(token_rows(10), num_dataset_shards_to_save=files, shuffle_merged_datasets=False)
    rows = token_rows(10)
    assert all_ids(prepare(cfg, tokenizer).train) == [row["input_ids"] for row in rows]
    assert len(list(Path(cfg.dataset_prepared_path).glob("*/*.arrow"))) == min(files, 10)
