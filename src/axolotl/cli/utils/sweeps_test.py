from __future__ import annotations

import pytest

from axolotl.cli.utils.sweeps import generate_sweep_configs, swept_keys
from axolotl.exceptions import ConfigError


def test_every_combination_once():
    configs = generate_sweep_configs({"seed": 1, "lr": 0.5}, {"lr": [0.1, 0.01], "wd": [0, 1, 2]})
    assert len(configs) == 6
    assert {(config["lr"], config["wd"]) for config in configs} == {(lr, wd) for lr in (0.1, 0.01) for wd in (0, 1, 2)}
    assert all(config["seed"] == 1 for config in configs)


def test_pairs_vary_together():
    sweep = {
        "lr": [0.1, 0.01],
        "_": [{"load_in_8bit": True, "adapter": "lora"}, {"load_in_4bit": True, "adapter": "qlora"}],
    }
    configs = generate_sweep_configs({"base_model": "m"}, sweep)
    assert len(configs) == 4
    assert {"base_model": "m", "lr": 0.1, "load_in_8bit": True, "adapter": "lora"} in configs
    assert {"base_model": "m", "lr": 0.01, "load_in_4bit": True, "adapter": "qlora"} in configs
    assert swept_keys(sweep) == {"lr", "load_in_8bit", "load_in_4bit", "adapter"}


def test_the_order_is_shuffled_the_same_way_every_time():
    sweep = {"seed": list(range(20))}
    orders = [[config["seed"] for config in generate_sweep_configs({}, sweep)] for _ in range(2)]
    assert orders[0] == orders[1]
    assert orders[0] != sorted(orders[0])


def test_runs_share_nothing():
    base = {"datasets": [{"path": "a"}]}
    first, second = generate_sweep_configs(base, {"trl.beta": [1, 2]})
    first["datasets"][0]["path"] = "changed"
    assert second["datasets"] == base["datasets"] == [{"path": "a"}]
    assert {first["trl"]["beta"], second["trl"]["beta"]} == {1, 2}


@pytest.mark.parametrize("sweep", [{}, [1], {"lr": 0.1}, {"lr": []}, {"_": [1]}])
def test_what_is_no_sweep(sweep):
    with pytest.raises(ConfigError, match=r"[Ss]weep"):
        generate_sweep_configs({}, sweep)
