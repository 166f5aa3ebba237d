"""From a config as written to a config that is ready to run.

In: the `DictDefault` read from YAML and flags. `validate_config` checks it (all problems at once) and fills what only
depends on other keys; `normalize_config` and `normalize_cfg_datasets` fill what depends on the machine, the launcher and the
model. Below this room the config is read only. To add a derived key: a function in the module of its subject, called by
`normalize_config`, with a `note_choice` where a choice was made for the user.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "validate_config": "axolotl.utils.config.validate",
        "prepare_plugins": "axolotl.utils.config.validate",
        "normalize_config": "axolotl.utils.config.normalize",
        "normalize_cfg_datasets": "axolotl.utils.config.normalize",
    },
)
