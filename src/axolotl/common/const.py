"""Various shared constants"""

from __future__ import annotations

# Where `axolotl preprocess` keeps prepared rows when the config does not say.
DEFAULT_DATASET_PREPARED_PATH = "last_run_prepared"
