"""What messages are made of."""

from __future__ import annotations

from axolotl.exceptions import did_you_mean, first_line


def test_near_words_are_named_and_far_ones_are_not():
    known = {"cosine": 1, "constant": 2, "linear": 3}
    assert did_you_mean("cosin", known) == " Did you mean `cosine`?"
    assert did_you_mean("con", ["constant", "cone"], n=2, cutoff=0.5) == " Did you mean `cone` or `constant`?"
    assert did_you_mean("warmup", known) == did_you_mean("cosine", []) == ""


def test_an_error_that_says_nothing_is_named():
    assert first_line(ValueError("\n  a file is missing \n and more")) == "a file is missing"
    assert first_line(EOFError()) == "EOFError"
