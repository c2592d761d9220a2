"""What `[monitor]` may say."""

import pytest

from blt_titan.config.read import load_run_config
from blt_titan.config.rules.keys import refused_keys
from blt_titan.config.rules.sound import sound
from blt_titan.config.rules.target import Target

CONFIG = "--job.config_file=train_configs/debug.toml"


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        (
            "webhook",
            ["ftp://x", "http://", "x.com/y", "http://a b", "http://x:99999", "http://é.de"],
            "https://x.com/a?b",
        ),
        ("prometheus_textfile", ["run.txt", "out/.prom", ".prom", "run.prom/"], "out/run.prom"),
        ("prometheus_port", ["0", "65536"], "9400"),
        ("slow_rank", ["1", "0.5", "-1", "nan", "inf"], "0"),
        ("gradient_spike", ["1.0", "-2"], "3.5"),
        ("throughput_drop", ["1.1", "-0.1"], "0"),
        ("predicted_memory_gib", ["0", "-3"], "43.3"),
    ],
)
def test_a_bad_value_is_a_sentence(key, bad, good):
    for value in bad:
        [said] = refused_keys(load_run_config([CONFIG, f"--monitor.{key}={value}"])).values()
        assert said.startswith(f"monitor.{key} = ")
        assert ": must be " in said
    assert not refused_keys(load_run_config([CONFIG, f"--monitor.{key}={good}"]))


def test_a_prediction_of_memory_needs_something_that_measures():
    config = load_run_config([CONFIG, "--monitor.predicted_memory_gib=43.3"])
    [said] = sound(config, 1, Target("cpu", multiplies_float8=False))
    assert said == "monitor.predicted_memory_gib = 43.3 does not work on a CPU: nothing measures its tensors there"
