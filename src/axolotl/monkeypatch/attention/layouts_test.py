"""Documents and padding as positions and masks tell them."""

from __future__ import annotations

import pytest
import torch

from axolotl.monkeypatch.attention.layouts import (
    cu_seq_lens,
    find_layout,
    key_of,
    read_batch,
    read_layout,
    told_layouts,
)


def test_starts_and_borders() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    layout = read_layout(positions, None)
    assert layout.is_packed and not layout.is_padded
    starts = layout.starts
    assert starts.tolist() == [[True, False, False, True, False], [True, True, False, False, False]]
    borders, longest = cu_seq_lens(starts)
    assert borders.tolist() == [0, 3, 5, 6, 10]
    assert borders.dtype == torch.int32
    assert longest == 4


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        ([[0, 1, 2, 3]], None, None),
        ([[0, 1, 5, 6]], None, None),
        (None, [[1, 1, 1, 1]], None),
        (None, [[1, 1, 0, 0]], [[True, False, True, False]]),
        (None, [[0, 0, 1, 1]], [[True, False, True, False]]),
        (None, [[1, 0, 1, 1]], None),
        (None, [[0, 0, 0, 0]], None),
        ([[0, 1, 0, 1]], [[1, 1, 1, 0]], [[True, False, True, True]]),
    ],
)
def test_starts_of_padded_rows(positions, mask, expected) -> None:
    layout = read_layout(*(None if value is None else torch.tensor(value) for value in (positions, mask)))
    assert (None if layout.starts is None else layout.starts.tolist()) == expected
    assert layout.is_padded == (mask is not None and 0 in mask[0])


def test_holes_in_packed_documents_are_seen() -> None:
    assert read_layout(torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[1, 0, 1, 1, 1]])).is_torn


def test_a_batch_is_read_with_its_borders() -> None:
    ids, mask = torch.ones(2, 4, dtype=torch.int64), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    layout = read_batch({"input_ids": ids, "attention_mask": mask})
    borders, longest = layout.borders
    assert (borders.tolist(), longest) == ([0, 3, 4, 8], 4)
    positions = torch.arange(4)[None]  # of all rows
    assert torch.equal(
        read_batch({"input_ids": ids, "position_ids": positions, "attention_mask": mask}).starts, layout.starts
    )


@pytest.mark.parametrize(
    "batch",
    [
        {},
        {"attention_mask": torch.ones(2, 1, 4, 4)},
        {"position_ids": torch.ones(3, 2, 4, dtype=torch.int64), "attention_mask": torch.ones(2, 4)},
        {"position_ids": torch.ones(2, 4, dtype=torch.int64), "cu_seq_lens_q": torch.tensor([0, 8])},
    ],
    ids=["no mask", "mask of pairs", "positions in space", "borders"],
)
def test_batches_that_are_not_read(batch) -> None:
    assert read_batch({"input_ids": torch.ones(2, 4, dtype=torch.int64), **batch}) is None


def test_a_layout_is_told_for_its_tensors_as_they_were() -> None:
    mask, other = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 1, 0]])
    layout = read_layout(None, mask)
    with told_layouts({key_of(None, mask): layout}):
        assert find_layout(None, mask) is layout
        assert find_layout(None, other) is None and find_layout(mask, mask) is None
        mask[0, 1] = 0
        assert find_layout(None, mask) is None
    assert find_layout(None, mask) is None
