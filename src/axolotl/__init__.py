"""axolotl: LLM post-training from one YAML file.

What comes in: a YAML config. What goes out: a trained model or adapter with everything needed to use it again.
Nothing is imported here, so that `axolotl --help` answers at once.
"""

__version__ = "0.1.0"
