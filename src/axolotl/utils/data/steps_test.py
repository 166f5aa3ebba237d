"""The number of steps is that of the batches that the ranks really get."""

from __future__ import annotations

import math

import pytest
from datasets import Dataset

from axolotl.exceptions import ConfigError
from axolotl.utils.data.steps import build_multipack_sampler, calculate_total_num_steps, num_steps_of_run
from axolotl.utils.dict import DictDefault
from axolotl.utils.samplers.epoch import EvenBatches

LENGTHS = [3, 9, 4, 7, 2, 8, 5, 5, 6, 1, 10, 3, 3, 3, 9, 4, 2]
ROWS = Dataset.from_dict({"input_ids": [[1] * n for n in LENGTHS], "length": LENGTHS})


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size, accumulation", [(1, 4), (2, 2), (4, 1), (3, 5)])
@pytest.mark.parametrize("keys", [{}, {"sample_packing": True}, {"sample_packing": True, "flash_attention": True}])
def test_a_step_takes_the_same_number_of_rows_or_bins(world_size, micro_batch_size, accumulation, keys):
    cfg = DictDefault(
        sequence_len=12, micro_batch_size=micro_batch_size, gradient_accumulation_steps=accumulation, num_epochs=2,
        world_size=world_size, seed=1, **keys,
    )  # fmt: skip
    items = build_multipack_sampler(ROWS, cfg).plan.num_bins if cfg.sample_packing else len(LENGTHS)
    per_step = micro_batch_size * accumulation * world_size
    assert calculate_total_num_steps(cfg, ROWS, update=False) == 2 * math.ceil(items / per_step)
    total = calculate_total_num_steps(cfg, ROWS, update=False)
    for steps in (1, 1000):
        limited = DictDefault({**cfg, "max_steps": steps})
        assert calculate_total_num_steps(limited, ROWS, update=False) == min(steps, total)
        assert num_steps_of_run(limited, total) == steps
    if cfg.sample_packing:
        even = EvenBatches(build_multipack_sampler(ROWS, cfg), world_size)
        assert len(list(even)) == len(even)
        assert len(even) % world_size == 0


def test_a_run_whose_batches_are_all_dropped_is_refused():
    cfg = DictDefault(micro_batch_size=64, dataloader_drop_last=True)
    with pytest.raises(ConfigError, match=r"drops all 17 rows.*micro_batch_size: 64"):
        calculate_total_num_steps(cfg, ROWS, update=False)


def test_dropped_batches_are_not_counted():
    cfg = DictDefault(micro_batch_size=4, dataloader_drop_last=True, world_size=3, num_epochs=1)
    assert calculate_total_num_steps(cfg, ROWS, update=False) == 1  # four whole batches, of which three make a round
