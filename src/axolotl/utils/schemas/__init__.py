"""The words of the config: one module per subject, and `AxolotlInputConfig` in `config`, which inherits from all of them.

In: the mapping read from YAML. Out: typed values, or every problem of the file in the user's words. Nothing here imports
torch, touches the network or looks at the machine.

To add a key: add a field with a one-line description to the model of its subject, run `scripts/config_reference.py`.
"""
