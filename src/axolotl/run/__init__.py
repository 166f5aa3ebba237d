"""What surrounds a training run: signals that end it early, what it says of itself, and what it says when it fails.

`axolotl.train` tells the run in order and calls these.
"""
