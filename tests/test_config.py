import math

import pytest

from scalora import ScaLoraConfig


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"interval": 0}, "interval"),
        ({"interval": 1.5}, "interval"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"smoothness": 0.0}, "smoothness"),
        ({"target_norm": math.nan}, "target_norm"),
        ({"target_norm": "1"}, "target_norm"),
        ({"smoothness": 1.0, "target_norm": 1.0}, "not both"),
        ({"mode": "row"}, "mode"),
        ({"merge": "sparse"}, "merge"),
        ({"remainder_rank": 0}, "remainder_rank"),
    ],
)
def test_a_wrong_value_is_named(settings, named):
    with pytest.raises(ValueError, match=named):
        ScaLoraConfig(**settings)


def test_a_config_survives_a_round_trip_and_an_unknown_key_does_not():
    config = ScaLoraConfig(interval=7, smoothness=3.0, mode="scalar")
    assert ScaLoraConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="'intervall'"):
        ScaLoraConfig.from_dict({"intervall": 7})
