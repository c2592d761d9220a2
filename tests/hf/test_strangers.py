"""Model directories and checkpoints of strangers: nothing in them runs, whatever command reads them."""

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_saver import save

from blt_titan import EntropyModel
from blt_titan.checkpoint.description import MODEL_KEY
from blt_titan.checkpoint.load import describe_model
from blt_titan.commands import evaluate, generate
from blt_titan.commands import export as convert_to_hf
from blt_titan.commands import import_ as convert_from_hf
from blt_titan.commands import score as score_entropies
from blt_titan.commands import view as view_patches
from blt_titan.config.check import check_run, load_run_config
from blt_titan.training import exports as in_training
from tests.helpers.attacks import Attack
from tests.helpers.verbs import VERB_OF

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROOT = Path(__file__).parents[2]


def in_metadata(folder: Path, attack: Attack) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    metadata.planner_data = attack
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_an_entry(folder: Path, attack: Attack) -> None:
    shutil.rmtree(folder)
    save({MODEL_KEY: attack, "weight": torch.ones(2)}, checkpoint_id=str(folder), no_dist=True)


def in_weights(folder: Path, attack: Attack) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save({"model": attack}, folder / "consolidated.pth")


def run_online(checkpoint: Path, sound: Path) -> int:
    settings = ["--patching.rule=global", "--patching.threshold=1.0", "--patching.source=online"]
    settings += [f"--training.dataset_path={sound / 'data'}", "--data.streams=1", "--validation.no-enable"]
    arguments = ["--job.config_file=train_configs/debug.toml", f"--patching.entropy_checkpoint={checkpoint}"]
    check_run(load_run_config([*arguments, *settings]), world_size=1, verify_data=False)
    return 0


def harness(arguments: list[str]) -> int:
    pytest.importorskip("lm_eval", reason="install the extra `harness`")
    from blt_titan.commands import harness as evaluate_harness

    with pytest.MonkeyPatch.context() as patch:
        # Reading the harness's own tasks takes longer than all else.
        patch.setattr("lm_eval.tasks.TaskManager", lambda include_path: SimpleNamespace(all_tasks=["arc_easy"]))
        return evaluate_harness.main([*arguments, "--tasks", "arc_easy"])


def export_beside(checkpoint: Path, sound: Path) -> int:
    settings: dict[str, Any] = {"checkpoint": str(checkpoint), "out": str(checkpoint.parent / "hf-step")}
    settings["description"] = describe_model(sound / "blt").to_json()
    settings |= {"entropy_checkpoint": None, "dtype": "float32", "force": True, "custom_import": ""}
    return in_training.main([json.dumps(settings)])


OF_A_BLT: dict[str, Callable[[Path, Path], int]] = {
    "generate": lambda path, _: generate.main(["--model", str(path), "--prompt", "x", "--max-bytes", "1"]),
    "evaluate": lambda path, sound: evaluate.main(["--model", str(path), "--data", str(sound / "text.txt")]),
    "evaluate_harness": lambda path, _: harness(["--model", str(path)]),
    "convert_to_hf": lambda path, _: convert_to_hf.main(["--checkpoint", str(path), "--out", f"{path}-out", "--force"]),
    "export.hf_every": export_beside,
}
OF_AN_ENTROPY_MODEL: dict[str, Callable[[Path, Path], int]] = {
    "generate": lambda path, sound: generate.main(
        ["--model", str(sound / "blt"), "--entropy-checkpoint", str(path), "--prompt", "x"]
    ),
    "convert_to_hf": lambda path, sound: convert_to_hf.main(
        ["--checkpoint", str(sound / "blt"), "--entropy-checkpoint", str(path), "--out", f"{path}-out"]
    ),
    "score_entropies": lambda path, sound: score_entropies.main(
        ["--data", str(sound / "data"), "--checkpoint", str(path), "--name", "stranger"]
    ),
    "view_patches": lambda path, _: view_patches.main(
        ["--text", "x", "--checkpoint", str(path), "--out", f"{path}.html"]
    ),
    "patching.entropy_checkpoint": run_online,
}
COMMANDS = [("blt", name, command) for name, command in OF_A_BLT.items()]
COMMANDS += [("entropy", name, command) for name, command in OF_AN_ENTROPY_MODEL.items()]


@pytest.mark.parametrize("put", [in_metadata, in_an_entry])
@pytest.mark.parametrize(("of", "name", "command"), COMMANDS, ids=[f"{of}-{name}" for of, name, _ in COMMANDS])
def test_a_checkpoint_runs_nothing(sound, tmp_path, capsys, of, name, command, put):
    shutil.copytree(sound / of, tmp_path / "step-1")
    put(tmp_path / "step-1", Attack(tmp_path / "ran"))
    (tmp_path / "ran").unlink(missing_ok=True)
    if "." in name:
        # Not commands: the run and its exports turn it into a message of theirs.
        with pytest.raises(ValueError, match=r"step-1.*io\.open"):
            command(tmp_path / "step-1", sound)
    else:
        assert command(tmp_path / "step-1", sound) == 2
        said = capsys.readouterr().err
        assert "io.open" in said
        assert said.startswith(f"blt-titan {VERB_OF[name]}: error: {tmp_path / 'step-1'}")
        assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["generate", "evaluate", "convert_to_hf", "convert_from_hf", "score_entropies"])
def test_a_directory_with_a_configuration_is_no_checkpoint(sound, tmp_path, capsys, name):
    """Its `.metadata` is not even read."""
    directory = tmp_path / "model"
    shutil.copytree(sound / "hf", directory)
    (directory / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    (directory / "step-9").mkdir()
    (directory / "step-9" / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    commands = OF_A_BLT | {
        "convert_from_hf": lambda path, _: convert_from_hf.main(["--model", str(path), "--out", f"{path}-out"]),
        "score_entropies": OF_AN_ENTROPY_MODEL["score_entropies"],
    }
    refused = name in ("convert_to_hf", "score_entropies")
    assert commands[name](directory, sound) == (2 if refused else 0)
    if refused:
        assert "is a model directory (it has a config.json)" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", [".", "entropy_model"])
def test_weights_run_nothing(sound, tmp_path, capsys, part):
    directory = tmp_path / "model"
    shutil.copytree(sound / "original", directory)
    in_weights(directory / part, Attack(tmp_path / "ran"))
    arguments = ["--model", str(directory)]
    outs = ["--out", str(tmp_path / "b"), "--entropy-out", str(tmp_path / "e")]
    for command in (
        lambda: convert_from_hf.main([*arguments, *outs]),
        lambda: generate.main([*arguments, "--prompt", "x"]),
        lambda: evaluate.main([*arguments, "--data", str(sound / "text.txt")]),
        lambda: harness(arguments),
    ):
        assert command() == 2
        said = capsys.readouterr().err
        assert "consolidated.pth: cannot be read (it names io.open, which is not loaded)" in said
        assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "b").exists()


def test_a_number_does_not_stand_for_a_large_tensor(sound, tmp_path):
    shutil.copytree(sound / "original", tmp_path / "model")
    path = tmp_path / "model" / "entropy_model" / "consolidated.pth"
    for content, sentence in (
        ({"layers.0.feed_forward.w1.weight": torch.zeros(1, 1).expand(2**19, 2**17)}, "more than the file"),
        ({"a": 5}, "a is no tensor"),
        ([1], "holds list"),
        ({"a": torch.ones(2, dtype=torch.int8)}, "a is no tensor of floating-point numbers"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a is no tensor|cannot be read"),  # by torch itself since 2.15
        ({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, "a is no tensor|cannot be read"),
        ({"a": torch.ones(2, 2, device="meta")}, "a is no tensor|cannot be read"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=sentence):
            EntropyModel.from_pretrained(tmp_path / "model")


def test_nothing_in_the_sources_unpickles_at_will():
    """Every torch.load has weights_only=True, and the one unpickler is the restricted one."""
    found = 0
    for path in (
        p for folder in ("blt_titan", "parallelisms", "scripts", "benchmarks") for p in ROOT.glob(f"{folder}/**/*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                found += 1
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                only = given.get("weights_only")
                assert isinstance(only, ast.Constant), where
                assert only.value is True, where
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                of_own_processes = path == ROOT / "blt_titan/data/rows/workers.py" and name == "pickle.loads"
                assert of_own_processes or name not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), where
                assert not (name.endswith("np.load") and "allow_pickle=True" in ast.unparse(node)), where
                # torch's own reader, and its planner where none is named.
                assert not name.endswith(("FileSystemReader", "DefaultLoadPlanner")), where
                if name in ("load", "dcp.load"):
                    assert {"storage_reader", "planner"} <= {keyword.arg for keyword in node.keywords}, where
    assert found >= 3
