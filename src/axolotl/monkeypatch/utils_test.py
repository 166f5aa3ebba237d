from __future__ import annotations

import torch

from axolotl.monkeypatch.utils import (
    get_cu_seqlens,
    get_cu_seqlens_from_pos_ids,
    get_max_seqlen_in_batch,
    mask_2d_to_4d,
)


def test_borders_from_masks():
    mask = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    borders, longest = get_cu_seqlens(mask)
    assert borders.tolist() == [[0, 3, 5, 6, 8], [0, 8, 8, 8, 8]]
    assert borders.dtype == torch.int32
    assert longest.tolist() == [3, 8]
    assert get_max_seqlen_in_batch(mask).tolist() == [3, 2, 1, 8]


def test_borders_from_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])
    assert get_cu_seqlens_from_pos_ids(positions)[0].tolist() == [[0, 3, 5, 8]]
    assert get_cu_seqlens_from_pos_ids(torch.tensor([0, 1, 0, 1, 2]))[0].tolist() == [[0, 2, 5]]


def test_documents_do_not_see_each_other():
    seen = mask_2d_to_4d(torch.tensor([[1, 1, 2, 2, 0]]), torch.float32)
    assert seen.shape == (1, 1, 5, 5)
    assert seen[0, 0].tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    assert mask_2d_to_4d(torch.tensor([[1, 1, 1]]), torch.float32, tgt_len=1).tolist() == [[[[1, 1, 1]]]]
