"""Dataset types: each module here turns one kind of row into tokens and labels.

In: the `type:` of a dataset, a tokenizer, the config. Out: a strategy with `tokenize_prompt(row)`. One more type is one
more module with `load(tokenizer, cfg, ds_cfg=None)`; users keep theirs in their own packages and name them by path.
"""

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {"load": "axolotl.prompt_strategies.resolve"})
