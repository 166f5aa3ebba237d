"""What a run that is out of memory is told to change."""

from __future__ import annotations

from axolotl.plan import find_remedies
from axolotl.plan_run import build_blank_model, read_run
from axolotl.run.errors import advise
from axolotl.utils.dict import DictDefault
from axolotl.utils.forecast import forecast
from tests.tiny import make_tiny_model


def test_the_advice_is_that_of_the_plan(tmp_path):
    config = make_tiny_model(tmp_path, "llama").config
    cfg = DictDefault(base_model=str(tmp_path), sequence_len=2048, micro_batch_size=4, optimizer="adamw_torch")
    run = read_run(cfg, *build_blank_model(cfg, config))
    found = find_remedies(cfg, run, 0.9 * forecast(run).total)
    assert found
    assert advise(cfg) == f"Try, one after the other: {', or '.join(f'`{remedy.change}`' for remedy in found)}."


def test_what_is_on_already_is_not_proposed(tmp_path):
    make_tiny_model(tmp_path, "llama")
    cfg = DictDefault(
        base_model=str(tmp_path),
        sequence_len=512,
        micro_batch_size=1,
        optimizer="adamw_8bit",
        gradient_checkpointing=True,
    )
    advice = advise(cfg)
    assert "micro_batch_size" not in advice and "adamw_8bit" not in advice
    assert "`adapter: lora, gradient_checkpointing: true`" in advice


def test_without_a_forecast_the_plan_is_named(tmp_path):
    assert "axolotl plan" in advise(DictDefault(base_model=str(tmp_path / "none")))
