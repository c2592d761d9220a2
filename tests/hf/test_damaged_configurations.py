"""A damaged config.json, index or params.json is one sentence that names the field, before anything is built."""

import json
import random
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blt_titan import BLT, Patcher
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.hf.config import HFConfigError

BAD: list[Any] = [
    2.5,
    "512",
    True,
    False,
    -1,
    0,
    10**30,
    -(10**30),
    1e300,
    None,
    [],
    [1],
    [2.5, "x"],
    {},
    {"a": 1},
    "",
    "x" * 5000,
    "../../x",
    2**31,
    [0] * 1000,
]
TEXTS = [
    b"",
    b"[1, 2]",
    b"5",
    b"{",
    b'{"model_type": "blt"',
    b"\xff\xfe{}",
    b'{"model_type": "bl\xfft"}',
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a": ' * 100_000,
    b'{"model_type": "blt", "model_type": "llama"}',
    b"1" * 5000,
    bytes(300),
]


def mutations(config: dict[str, Any], rng: random.Random, count: int) -> list[bytes]:
    """Change one to three places of a configuration each, our own key's more often."""
    made = []
    for _ in range(count):
        changed = json.loads(json.dumps(config))
        for _ in range(rng.randint(1, 3)):
            section = changed
            while True:
                key = rng.choice(sorted(section))
                if isinstance(section[key], dict) and section[key] and rng.random() < 0.85:
                    section = section[key]
                    continue
                break
            if rng.random() < 0.2:
                del section[key]
                if not section:
                    break
            else:
                section[key] = rng.choice([*BAD, float("nan"), float("inf")])
        made.append(json.dumps(changed).encode())
    return made


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_damaged_configurations_are_one_sentence(sound, tmp_path, layout):
    """A seeded fuzz: each loads, or says in one sentence of configuration or weights what is wrong."""
    rng = random.Random(0)
    directory = tmp_path / "model"
    shutil.copytree(sound / layout, directory)
    files = ["config.json"] if layout == "hf" else ["config.json", "entropy_model/params.json"]
    refused = 0
    for file in files:
        config = json.loads((sound / layout / file).read_text())
        for content in [*TEXTS, *mutations(config, rng, 300 // (2 * len(files)))]:
            (directory / file).write_bytes(content)
            for load in (BLT, Patcher):
                try:
                    load.from_pretrained(directory)
                except (HFConfigError, CheckpointError) as error:
                    said = str(error)
                except FileNotFoundError as error:
                    # Without a type it may be the entropy model's folder of the original.
                    said = str(error)
                except ValueError as error:
                    said = str(error)
                    assert said.startswith(str(directory)), (content[:200], said)
                else:
                    continue
                refused += 1
                assert "\n" not in said, said
                assert len(said) < 1500, said
        shutil.copyfile(sound / layout / file, directory / file)
    assert refused > 100


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda c: c["encoder_config"].update(num_hidden_layers=2.0),
            "encoder_config.num_hidden_layers = 2.0, must be",
        ),
        (lambda c: c["global_config"].update(num_hidden_layers=10**30), "global_config.num_hidden_layers = 1000"),
        (lambda c: c["global_config"].update(num_hidden_layers=True), "global_config.num_hidden_layers = True, must"),
        (lambda c: c.update(local_attention_window_len="512"), "local_attention_window_len = '512', must be a whole"),
        (lambda c: c.update(local_attention_window_len=-1), "local_attention_window_len = -1, must be a whole"),
        (lambda c: c.update(patching_threshold=float("nan")), "holds NaN, which is no number of JSON"),
        (lambda c: c.update(patching_threshold=float("inf")), "holds Infinity, which is no number of JSON"),
        (lambda c: c.update(patching_threshold=True), "patching_threshold = True, must be a number"),
        (lambda c: c.update(encoder_hash_byte_group_size=[3, -1]), "encoder_hash_byte_group_size = "),
        (lambda c: c.update(encoder_hash_byte_group_size=[4, 3]), "must be ascending lengths"),
        (lambda c: c.update(encoder_config=[1]), r"encoder_config = \[1\], must be an object"),
        (lambda c: c["encoder_config"].pop("hidden_size"), "encoder_config.hidden_size is missing"),
        (lambda c: c["encoder_config"].update(rope_parameters=5), "rope_parameters = 5, must be an object"),
        (lambda c: c.update(blt_titan=[1]), r"blt_titan = \[1\], must be an object"),
        (lambda c: c["blt_titan"].update(patchnig={}), "blt_titan.patchnig is not known"),
        (lambda c: c["blt_titan"].update(entropies=5), "blt_titan.entropies = 5, must be a text"),
        (lambda c: c["blt_titan"]["patching"].update(rule="x"), "blt_titan.patching.rule = 'x', must be one of"),
        (lambda c: c["blt_titan"]["patching"].update(storage="int4"), "storage = 'int4', must be one of"),
        (lambda c: c["blt_titan"]["patching"].update(max_patch_bytes=0), "max_patch_bytes = 0, must be"),
        (lambda c: c["blt_titan"]["patching"].update(rule="static"), "stride = None: .static. needs a stride"),
    ],
)
def test_a_field_that_is_wrong_is_named(sound, tmp_path, change, sentence):
    shutil.copytree(sound / "hf", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    change(config)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(HFConfigError, match=sentence):
        BLT.from_pretrained(tmp_path / "model")


def test_what_the_files_do_not_hold_takes_no_memory(sound, tmp_path):
    shutil.copytree(sound / "hf", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for changes in ({"encoder_hash_byte_group_vocab": 2**32}, {"encoder_hash_byte_group_size": list(range(1, 65))}):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match="the configuration makes it"):
            BLT.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/m.safetensors", "..", 5, None, "x.pth"])
def test_an_index_names_files_beside_it(sound, tmp_path, file):
    shutil.copytree(sound / "hf", tmp_path / "model")
    shutil.copyfile(sound / "hf" / "model.safetensors", tmp_path / "model.safetensors")
    names = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, file)})
    )
    with pytest.raises(ValueError, match=r"must be a \.safetensors file beside it"):
        BLT.from_pretrained(tmp_path / "model")


def test_integers_are_no_weights(sound, tmp_path):
    shutil.copytree(sound / "hf", tmp_path / "model")
    tensors = {name: tensor.to(torch.int8) for name, tensor in load_file(sound / "hf" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="is I8, must be F32"):
        BLT.from_pretrained(tmp_path / "model")
