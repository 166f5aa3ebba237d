"""What the commands share: arguments and overrides, reading a config, launching, sweeps, fetching, loading."""

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "add_options_from_config": "axolotl.cli.utils.args",
        "add_options_from_dataclass": "axolotl.cli.utils.args",
        "filter_none_kwargs": "axolotl.cli.utils.args",
        "fetch_from_github": "axolotl.cli.utils.fetch",
        "load_model_and_tokenizer": "axolotl.cli.utils.load",
        "generate_sweep_configs": "axolotl.cli.utils.sweeps",
        "build_command": "axolotl.cli.utils.train",
        "generate_config_files": "axolotl.cli.utils.train",
        "launch_training": "axolotl.cli.utils.train",
    },
)
