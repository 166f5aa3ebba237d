"""Data: from the sources that a config names to prepared rows of tokens.

In: `cfg.datasets` and a tokenizer. Out: `(train, eval, total_num_steps, prompters)`. In the order of work: `shared` finds
and opens a source (`files`, `json_lines`, `remote`), `tokenize` turns its rows into tokens, `rows` and `dedup` decide which rows
stay, `sft` puts datasets together, `cache` and `lock` keep the result on disk under the key of `fingerprint`, `hub_copy` on the
hub, `steps` counts, `report` tells. `streaming` reads the same sources while a run trains.
A new kind of file is a row in `files`, a new object store one in `remote`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "prepare_datasets": "axolotl.utils.data.sft",
        "load_dataset_with_config": "axolotl.utils.data.shared",
        "calculate_total_num_steps": "axolotl.utils.data.steps",
    },
)
