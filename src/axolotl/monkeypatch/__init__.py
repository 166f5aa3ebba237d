"""Changes to other people's code, all listed in `ledger.py`, and the old names of changes that are gone (`axolotl._moved`).

In: a config. Out: transformers and models that do what the config says. One more change is one more row of the ledger.
"""
