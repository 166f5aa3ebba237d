"""Optimizers beyond those of transformers, and the param groups of a run."""
