from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.exceptions import CheckpointError, DatasetError
from axolotl.utils.data.stream import BlockPlan, TokenStream
from axolotl.utils.data.stream_loader import StreamLoader
from axolotl.utils.data.stream_mix import StreamMix
from axolotl.utils.data.stream_rows import RowPolicy, as_token_rows, join_texts
from axolotl.utils.data.stream_sources import StreamSource, open_iterable
from axolotl.utils.data.streaming import encode_streaming, prepare_streaming_dataset, wrap_streaming_dataset
from axolotl.utils.dict import DictDefault
from axolotl.utils.samplers.geometry import PackingGeometry
from tests.tiny import make_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def token_rows(first: int, num_rows: int) -> list[dict]:
    """Rows of tokens that all carry the number of their row."""
    return [
        {"input_ids": [first + row] * (2 + row % 5), "labels": [first + row] * (2 + row % 5)} for row in range(num_rows)
    ]


def make_source(first: int, num_rows: int, num_shards: int = 1, **options) -> StreamSource:
    rows = Dataset.from_list(token_rows(first, num_rows)).to_iterable_dataset(num_shards=num_shards)
    return StreamSource(rows, f"d{first}", **options)


def make_stream(sizes=(10,), weights=None, num_shards=1, **plan) -> TokenStream:
    sources = [make_source(1000 * (i + 1), size, num_shards, seed=1) for i, size in enumerate(sizes)]
    plan = BlockPlan(**{"num_rows": 4, "seed": 7, "batch_rows": 3, **plan})
    return TokenStream(StreamMix(sources, weights), [None] * len(sizes), RowPolicy(sequence_len=100), plan)


def numbers(batch) -> list[int]:
    """The rows of a batch, packed or not."""
    flat = [row for part in batch for row in (part if isinstance(part, list) else [part])]
    return [int(row["input_ids"][0]) for row in flat]


def first_rows(stream, count, reader=0, num_readers=1) -> list[int]:
    found: list[int] = []
    for batch, _ in stream.read(reader, num_readers):
        found += numbers(batch)
        if len(found) >= count:
            break
    return found


@given(
    sizes=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    num_readers=st.integers(1, 5),
    num_rows=st.integers(1, 9),
    shuffle=st.booleans(),
    packed=st.booleans(),
    num_shards=st.integers(1, 2),
)
@settings(max_examples=25, deadline=None)
def test_readers_share_every_row_once_per_pass(sizes, num_readers, num_rows, shuffle, packed, num_shards):
    """Over as many passes as there are readers, each reader sees each row once; together, once per pass."""
    plan = {"num_rows": num_rows, "shuffle": shuffle, "packing": PackingGeometry(2, 8) if packed else None}
    shards = min(num_shards, *sizes)
    expected = [1000 * (i + 1) + row for i, size in enumerate(sizes) for row in range(size)]
    seen: Counter = Counter()
    for reader in range(num_readers):
        stream = make_stream(sizes, num_shards=shards, **plan)
        for batch, position in stream.read(reader, num_readers):
            if min(source["pass"] for source in position["mix"]["sources"]) >= num_readers:
                break
            # A block never reaches over the end of a pass, and its position is that before it.
            seen.update(numbers(batch))
    assert seen == Counter(dict.fromkeys(expected, num_readers))


@given(data=st.data(), packed=st.booleans(), weighted=st.booleans(), joined=st.booleans())
@settings(max_examples=30, deadline=None)
def test_goes_on_at_the_next_batch_from_anywhere(data, packed, weighted, joined):
    options = {
        "sizes": data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3)),
        "num_rows": data.draw(st.integers(1, 90)),
        "packing": PackingGeometry(data.draw(st.integers(1, 2)), 16) if packed else None,
        "join_to": 20 if joined and not packed else None,
    }
    weights = [data.draw(st.sampled_from([0.3, 1, 2.5])) for _ in options["sizes"]] if weighted else None
    whole = list(itertools.islice(make_stream(weights=weights, **options).read(1, 3), 40))
    stop = data.draw(st.integers(0, 37))
    position = json.loads(json.dumps(whole[stop][1]))
    rest = itertools.islice(make_stream(weights=weights, **options).read(1, 3, position), 39 - stop)
    assert [numbers(batch) for batch, _ in rest] == [numbers(batch) for batch, _ in whole[stop + 1 :]]


def test_weights_are_kept_at_every_moment():
    stream = make_stream((7, 50), weights=[1, 3], shuffle=False, num_rows=50)
    counts = Counter(number // 1000 for number in first_rows(stream, 400)[:400])
    assert counts == {1: 100, 2: 300}


def test_without_weights_a_short_dataset_waits_for_the_others():
    stream = make_stream((2, 6), shuffle=False, num_rows=50)
    expected = [1000, 2000, 1001, 2001, 2002, 2003, 2004, 2005]
    assert first_rows(stream, 16) == expected * 2


def test_shuffled_by_seed_and_pass():
    rows = [first_rows(make_stream((40,), num_rows=20, seed=seed), 80) for seed in (7, 7, 8)]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0][:40] != rows[0][40:]
    assert sorted(rows[0][:20]) == list(range(1000, 1020))


def test_files_are_read_in_another_order_in_every_pass(tmp_path):
    names = []
    for file in range(6):
        names.append(f"part{file}.jsonl")
        (tmp_path / names[-1]).write_text("".join(json.dumps({"n": 10 * file + row}) + "\n" for row in range(3)))
    entry = DictDefault(path=str(tmp_path), data_files=names)
    source = StreamSource(open_iterable(entry), "d", seed=5)
    passes = []
    for _ in range(3):
        rows = list(iter(source.next, None))
        passes.append([row["n"] for _, row in rows])
        assert sorted(passes[-1]) == [10 * file + row for file in range(6) for row in range(3)]
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize(
    "entry, expected",
    [
        ({"split": "train[2:5]"}, [2, 3, 4]),
        ({"split": "train[:4]", "skip": 1}, [1, 2, 3]),
        ({"skip": 7}, [7, 8, 9]),
        ({"shards": 3, "shards_idx": 1}, [1, 4, 7]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_that_an_entry_leaves_out(tmp_path, kind, entry, expected):
    from axolotl.utils.data.stream_sources import open_sources

    rows = Dataset.from_list([{"n": row} for row in range(10)])
    path = tmp_path / f"rows.{kind}"
    rows.to_json(path) if kind == "jsonl" else rows.to_parquet(path)
    ((_, source),) = open_sources([DictDefault(path=str(path), **entry)], seed=None)
    for _ in range(2):
        assert [row["n"] for _, row in iter(source.next, None)] == expected


def test_a_share_of_a_stream_is_not_known(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DatasetError, match="cannot be streamed"):
        open_iterable(DictDefault(path=str(tmp_path / "d.jsonl"), split="train[:10%]"))


def test_rows_keep_their_shape_in_a_stream(tmp_path):
    rows = [{"content": "text"}, {"content": [{"type": "text", "text": "part"}]}, {"other": 1, "content": None}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = StreamSource(open_iterable(DictDefault(path=str(tmp_path / "d.jsonl"))), "d")
    assert [row["content"] for _, row in iter(source.next, None)] == [row["content"] for row in rows]


def config(**keys) -> DictDefault:
    return DictDefault(
        {"sequence_len": 32, "micro_batch_size": 2, "seed": 3, "max_steps": 5, "streaming": True, **keys}
    )


def write_texts(tmp_path, texts, column="text"):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("type_", ["pretrain", "completion"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("column", ["text", "body"])
def test_no_text_is_lost(tmp_path, tokenizer, type_, packing, column):
    texts = [" ".join(f"w{row}x{word}" for word in range(length)) for row, length in enumerate((1, 60, 3, 200))]
    path = write_texts(tmp_path, texts, column)
    entry = {"path": path, "type": type_, "text_column": column}
    stream = prepare_streaming_dataset(
        config(pretraining_dataset=[entry], sample_packing=packing, shuffle_merged_datasets=False), tokenizer
    )
    found = set()
    for batch, position in stream.read():
        if position["mix"]["sources"][0]["pass"]:
            break
        for part in batch:
            for row in part if packing else [part]:
                found.update(row["input_ids"].tolist())
                assert len(row["input_ids"]) <= 32
                assert (row["labels"] == row["input_ids"]).all()
                assert row["input_ids"][-1] == tokenizer.eos_token_id or type_ == "completion"
    wanted = {token for text in texts for token in tokenizer(text)["input_ids"]} | {tokenizer.eos_token_id}
    assert found == wanted


def test_long_texts_are_whole(tokenizer):
    """Windows overlap; without the overlap they are the text."""
    from axolotl.prompt_strategies.pretrain import load

    text = " ".join(map(str, range(300)))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = load(tokenizer, DictDefault(sequence_len=40)).tokenize_prompt({"text": text})["input_ids"]
    overlap = 19
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in rows)
    whole = rows[0][1:-1] + [token for row in rows[1:] for token in row[1 + overlap : -1]]
    assert whole == ids
    assert all(len(row) == 40 for row in rows[:-1])


def test_dropped_rows_are_counted_and_nothing_left_is_an_error():
    stream = make_stream((6,))
    stream.policy = RowPolicy(sequence_len=3)
    _, position = next(stream.read())
    assert position["dropped_now"] == {"d1000": {"longer than 3 tokens": 2}}
    stream.policy = RowPolicy(sequence_len=1)
    with pytest.raises(DatasetError, match="no row of the stream is left"):
        next(stream.read())
    stream.policy = RowPolicy(sequence_len=3, strategy="raise")
    with pytest.raises(DatasetError, match="excess_length_strategy"):
        next(stream.read())


@pytest.mark.parametrize("strategy, length", [("truncate", 3), ("drop", None)])
def test_length_policy(strategy, length):
    rows = as_token_rows({"input_ids": [[1, 2, 3, 4]], "labels": [[-100, -100, 3, 4]]}, "d")
    kept = RowPolicy(sequence_len=3, strategy=strategy).apply(rows, "d", {})
    assert [len(row["labels"]) for row in kept] == ([length] if length else [])


def test_rows_of_prepared_data_are_the_rows_of_a_stream(tmp_path, tokenizer):
    """The same tokens and labels whether a dataset is read in advance or streamed."""
    from axolotl.utils.data.sft import prepare

    rows = [{"instruction": f"do {i}", "input": "", "output": "word " * (i % 9)} for i in range(30)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"sequence_len": 200, "datasets": [{"path": str(path), "type": "alpaca"}]}
    base = config(**keys, dataset_prepared_path=str(tmp_path / "prepared"), num_epochs=1)
    prepared = prepare(DictDefault({**base, "streaming": None}), tokenizer).train
    stream = prepare(base, tokenizer).train
    streamed = []
    for batch, position in stream.read():
        if position["mix"]["sources"][0]["pass"]:
            break
        streamed += [(row["input_ids"].tolist(), row["labels"].tolist()) for row in batch]
    assert sorted(streamed) == sorted(zip(prepared["input_ids"], prepared["labels"], strict=True))


def test_a_broken_row_is_named(tmp_path, tokenizer):
    path = write_texts(tmp_path, ["fine", "fine", 7])
    stream = prepare_streaming_dataset(config(pretraining_dataset=[{"path": path, "type": "pretrain"}]), tokenizer)
    with pytest.raises(DatasetError, match=r"Row 2 .*`text` is int"):
        next(stream.read())


def test_wrap_streaming_dataset_packs(tokenizer):
    rows = Dataset.from_list([{"text": "word " * (3 + i % 7)} for i in range(50)])
    cfg = config(pretraining_dataset=[{"type": "pretrain"}], sample_packing=True, attn_implementation="sdpa")
    batches = list(itertools.islice(wrap_streaming_dataset(rows.to_iterable_dataset(), tokenizer, cfg), 5))
    tokens = [sum(len(row["input_ids"]) for row in bin_) for batch in batches for bin_ in batch]
    assert len(tokens) == 10
    assert max(tokens) <= 32
    assert sum(tokens) > 250


def test_encode_streaming(tokenizer):
    texts = ["one two", "three", "four five six " * 9]
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    plain = [tokenizer(text)["input_ids"] for text in texts]
    got = encode_streaming({"text": texts}, tokenizer, 40)
    assert {len(row) for row in got["input_ids"]} == {40}
    first = plain[0] + [eos, pad] + plain[1] + [eos, pad]
    assert got["input_ids"][0][: len(first)] == first
    assert first[0] == bos
    whole = [token for row in got["input_ids"] for token in row if token not in (bos, eos, pad)]
    assert whole == [token for row in plain for token in row if token != bos]
    for ids, labels, mask in zip(got["input_ids"], got["labels"], got["attention_mask"], strict=True):
        assert [token for token, on in zip(ids, mask, strict=True) if not on] == [pad] * mask.count(0)
        assert all(label == -100 for label, on in zip(labels, mask, strict=True) if not on)
    apart = encode_streaming({"text": texts[:2]}, tokenizer, 40, concatenate=False)
    assert apart["input_ids"] == [ids + [eos] for ids in plain[:2]]


def test_joined_texts_fit_and_lose_nothing():
    rows = as_token_rows({"input_ids": [[1] * n for n in (8, 3, 3, 1)], "labels": [[1] * n for n in (8, 3, 3, 1)]}, "d")
    joined = join_texts(rows, 8, pad_token_id=0)
    assert [row["input_ids"].tolist() for row in joined] == [[1] * 8, [1, 1, 1, 0, 1, 1, 1, 0], [1, 0]]
    assert joined[1]["labels"].tolist() == [-100, 1, 1, -100, -100, 1, 1, -100]


def collate(batch) -> dict:
    return {"numbers": numbers(batch)}


def taken(loader, count) -> list[list[int]]:
    return [batch["numbers"] for batch in itertools.islice(iter(loader), count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_resumes_at_the_next_batch(tmp_path, num_workers):
    def make():
        return StreamLoader(make_stream((50, 30)), collate, rank=1, world_size=2, num_workers=num_workers)

    whole = taken(make(), 25)
    loader = make()
    assert taken(loader, 11) == whole[:11]
    loader.save(tmp_path)
    other = StreamLoader(make_stream((50, 30)), collate, rank=0, world_size=2, num_workers=num_workers)
    taken(other, 3)
    other.save(tmp_path)
    again = make()
    again.load(tmp_path)
    assert taken(again, 14) == whole[11:]


def test_ranks_and_workers_get_every_row_once():
    seen: Counter = Counter()
    for rank in range(3):
        # 12 readers and 24 rows: two rows per reader in a pass, which is a block, which is a batch.
        loader = StreamLoader(make_stream((24,)), collate, rank=rank, world_size=3, num_workers=4)
        for batch in taken(loader, 4):
            seen.update(batch)
    assert seen == Counter(range(1000, 1024))


def test_other_number_of_ranks_goes_on_without_a_gap(tmp_path, caplog):
    for rank in range(2):
        loader = StreamLoader(make_stream((100,), shuffle=False), collate, rank=rank, world_size=2)
        taken(loader, 9)
        loader.save(tmp_path)
    loader = StreamLoader(make_stream((100,), shuffle=False), collate)
    loader.load(tmp_path)
    after = taken(loader, 40)
    seen = {1000 + row for row in range(2 * 4 * 4)} | {row for batch in after for row in batch}
    assert after[0][0] <= 1000 + 2 * 27
    assert seen == set(range(1000, 1100))


def test_another_layout_goes_on_without_a_gap(tmp_path):
    loader = StreamLoader(make_stream((40,), shuffle=False, num_rows=12), collate)
    before = taken(loader, 6)
    assert before[-1] == [1015, 1016, 1017]
    loader.save(tmp_path)
    other = StreamLoader(make_stream((40,), shuffle=False, num_rows=12, batch_rows=5), collate)
    other.load(tmp_path)
    assert taken(other, 2) == [[1012, 1013, 1014, 1015, 1016], [1017, 1018, 1019, 1020, 1021]]


def test_position_of_other_datasets_is_refused(tmp_path):
    loader = StreamLoader(make_stream((5, 5)), collate)
    taken(loader, 1)
    loader.save(tmp_path)
    with pytest.raises(CheckpointError, match="Resume with the same datasets"):
        StreamLoader(make_stream((5,)), collate).load(tmp_path)


def test_empty_dataset_is_said(tmp_path):
    rows = open_iterable(DictDefault(path=write_texts(tmp_path, ["only one"]), skip=5))
    with pytest.raises(DatasetError, match="holds no rows"):
        StreamSource(rows, "d").next()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_is_the_error(num_workers):
    stream = make_stream((6,))
    stream.policy = RowPolicy(sequence_len=2, strategy="raise")
    with pytest.raises(DatasetError) as error:
        taken(StreamLoader(stream, collate, num_workers=num_workers), 3)
    assert str(error.value).startswith("dataset d1000: a row has")


@pytest.mark.parametrize("weights", [None, [1.0]])
def test_a_stream_without_rows_ends(weights):
    stream = make_stream((6,), weights=weights)
    stream.policy = RowPolicy(sequence_len=1)
    with pytest.raises(DatasetError, match="no row of the stream is left"):
        next(stream.read(1, 2))


@pytest.mark.parametrize("content, problem", [("{}\n{}\n", "no fields"), ('{"a": 1}\n{"a"\n', "line 2")])
def test_rows_that_cannot_be_read_are_named(tmp_path, content, problem):
    (tmp_path / "d.jsonl").write_text(content)
    source = StreamSource(open_iterable(DictDefault(path=str(tmp_path / "d.jsonl"))), "d")
    with pytest.raises(DatasetError, match=problem):
        list(iter(source.next, None))


def test_pose_positions_do_not_depend_on_the_reader():
    policy = RowPolicy(sequence_len=9, pose={"max_context_len": 64, "chunks": 2}, seed=1)
    rows = as_token_rows({"input_ids": [[1, 2, 3, 4]], "labels": [[1, 2, 3, 4]]}, "d")
    (a,), (b,) = policy.apply(rows, "d", {}), policy.apply(rows, "d", {})
    assert np.array_equal(a["position_ids"], b["position_ids"])
    assert (np.diff(a["position_ids"]) > 0).all()


@given(
    sizes=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    parts=st.integers(1, 3),
    num_readers=st.integers(1, 3),
    num_rows=st.integers(1, 9),
)
@settings(max_examples=20, deadline=None)
def test_shards_and_readers_share_every_row_once(sizes, parts, num_readers, num_rows):
    """`dataset_shard_num` cuts the rows first, then the readers of a shard share them: no row twice, none left out."""
    expected = {1000 * (i + 1) + row for i, size in enumerate(sizes) for row in range(size)}
    seen: Counter = Counter()
    for part, reader in itertools.product(range(parts), range(num_readers)):
        stream = make_stream(sizes, num_rows=num_rows)
        stream.shard = (parts, part)
        if sum(sizes) < parts:
            continue
        try:
            for batch, position in stream.read(reader, num_readers):
                if min(source["pass"] for source in position["mix"]["sources"]) >= 1:
                    break
                seen.update(numbers(batch))
        except DatasetError as error:
            assert "no row of the stream is left" in str(error)  # fewer rows than shards and readers
    assert seen == Counter(dict.fromkeys(expected, 1)) or sum(sizes) < parts


@given(
    sizes=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    worlds=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    taken_batches=st.integers(0, 12),
    num_rows=st.integers(1, 9),
    packed=st.booleans(),
    weighted=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_another_number_of_ranks_leaves_no_row_out(
    tmp_path_factory, sizes, worlds, taken_batches, num_rows, packed, weighted
):
    """What was trained before the change and what comes after it is every row, once per pass at least."""
    folder = tmp_path_factory.mktemp("checkpoint")
    before, after = worlds
    weights = [1.0] * len(sizes) if weighted else None
    plan = {"num_rows": num_rows, "packing": PackingGeometry(1, 8) if packed else None, "weights": weights}
    seen: Counter = Counter()

    def loader(rank: int, world_size: int) -> StreamLoader:
        return StreamLoader(make_stream(sizes, **plan), collate, rank=rank, world_size=world_size)

    for rank in range(before):
        one = loader(rank, before)
        if taken_batches:
            seen.update(number for batch in taken(one, taken_batches) for number in batch)
        one.save(folder)
    for rank in range(after):
        one = loader(rank, after)
        one.load(folder)
        start = one.positions[0]
        last_pass = min(source["pass"] for source in start["mix"]["sources"]) if start else 0
        for batch in iter(one):
            now = one.positions[0]
            if min(source["pass"] for source in now["mix"]["sources"]) > last_pass:
                break
            seen.update(batch["numbers"])
    states = [json.loads(file.read_text())["positions"][0] for file in folder.glob("*.json")]
    passes = min(min(source["pass"] for source in state["mix"]["sources"]) if state else 0 for state in states)
    for index, size in enumerate(sizes):
        for row in range(size):
            assert seen[1000 * (index + 1) + row] >= passes + 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": [2**31, 1], "labels": [1, 1]}, "`input_ids` must hold"),
        ({"input_ids": [1, 2], "labels": None}, "`labels` is missing"),
        ({"input_ids": [1, [2]], "labels": [1, 2]}, "`input_ids` must hold"),
        ({"input_ids": [1, 2], "labels": [1, True, "x"]}, "`labels` must hold"),
        ({"input_ids": [1, 2], "labels": [1]}, "different lengths"),
    ],
)
def test_rows_of_tokens_that_are_none(tmp_path, tokenizer, row, words):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"input_ids": [1, 2], "labels": [1, 2]}) + "\n" + json.dumps(row) + "\n")
    stream = prepare_streaming_dataset(config(datasets=[{"path": str(path)}]), tokenizer)
    with pytest.raises(DatasetError, match=rf"row 1.*{words}"):
        next(stream.read())
