"""One damaged file or run takes nothing else off the page, and the page says what could not be read."""

import json
import os
import shutil

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.flavors import BLT_FLAVORS, ENTROPY_FLAVORS

pytest.importorskip("starlette", reason="install the dev extra to serve plots")
from starlette.testclient import TestClient

from blt_titan.plots.app import make_app
from blt_titan.plots.figures import RunsFolder

LINES = (
    '{"step": 1, "bits_per_byte": 3, "training_flops": 1e12, "mean_patch_bytes": PATCH}\n'
    '{"step": 1, "heldout_bits_per_byte": 2}\n'
)


def add_run(folder, *, patch="4.5", more=b""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_bytes(LINES.replace("PATCH", patch).encode() + more)
    return folder


@pytest.fixture
def outputs(tmp_path):
    add_run(tmp_path / "outputs" / "good")
    return tmp_path / "outputs"


def page_of(outputs) -> dict:
    """What the page was sent, as strict JSON, with figures by their names."""
    answer = TestClient(make_app(outputs), base_url="http://127.0.0.1").get("/")
    assert answer.status_code == 200
    sent = answer.text.split("const page = ")[1].split(";\n")[0]

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    page = json.loads(sent, parse_constant=refuse)
    return page | {"figures": {figure["name"]: figure for figure in page["figures"]}}


def check_that_the_good_run_is_shown(page):
    [run] = [run for run in page["figures"]["curves"]["data"] if run["run"] == "good"]
    assert run == {"run": "good", "training": [[1, 3]], "heldout": [[1, 2]], "skipped_lines": 0}
    assert "good" in [point["run"] for point in page["figures"]["scaling"]["data"]["points"]]


def test_bad_lines_are_counted_per_file(outputs):
    bad = b'{"step": 2, "bits_per_byte": "3"}\n{"step": 3, "bits_per_byte": NaN}\n[1]\n{"step": 4, "bits'
    add_run(outputs / "bad", more=bad)
    page = page_of(outputs)
    check_that_the_good_run_is_shown(page)
    [note] = page["notes"]
    assert note.startswith("bad/metrics.jsonl: 4 of 6 lines passed over; the first, line 3: \"bits_per_byte\" is '3'")
    assert [run["skipped_lines"] for run in page["figures"]["curves"]["data"]] == [4, 0]


@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "patch_lengths.json"])
def test_what_is_no_file_is_not_opened(outputs, kind, name):
    bad = outputs / "bad"
    bad.mkdir()
    if kind == "directory":
        (bad / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(bad / name)
    else:
        (bad / name).symlink_to("/dev/zero")
    page = page_of(outputs)
    check_that_the_good_run_is_shown(page)
    assert page["notes"] == [f"bad/{name}: cannot be read: not a regular file"]


@pytest.mark.parametrize(
    "content",
    [
        b"not JSON",
        b"[1]",
        b'{"counts": 3}',
        b'{"counts": [1, "2"]}',
        b'{"counts": [1, NaN]}',
        b'{"counts": [1], "mean": 1e999}',
        b'{"counts": [1], "threshold": ' + b"1" * 400 + b"}",
        b'{"counts": [1], "rule": [1]}',
        b"[" * 100_000,
        b'{"counts": ["' + b"x" * 2_000_000 + b'"]}',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_histogram_is_named(outputs, content):
    (outputs / "good" / "patch_lengths.json").write_bytes(content)
    page = page_of(outputs)
    check_that_the_good_run_is_shown(page)
    [note] = page["notes"]
    assert note.startswith("good/patch_lengths.json: cannot be read: ")
    assert len(note) < 200
    assert "good/patch_lengths.json" not in page["figures"]


def test_names_that_are_not_utf_8(outputs):
    run = os.fsdecode(os.fsencode(outputs) + b"/na\xffme")
    os.mkdir(run)
    with open(run + "/metrics.jsonl", "w") as file:
        file.write(LINES.replace("PATCH", "4"))
    for name, content in (("a.html", "found"), ("a.png", "found"), ("patch_lengths.json", '{"counts": [1]}')):
        with open(f"{run}/{name}", "w") as file:
            file.write(content)
    client = TestClient(make_app(outputs), base_url="http://127.0.0.1")
    page = page_of(outputs)
    check_that_the_good_run_is_shown(page)
    assert page["runs"] == ["good", r"na\xffme"]
    listed = client.get("/api/visualizations").json()
    assert {figure["name"] for figure in listed} == page["figures"].keys()
    for name in (r"na\xffme/a.html", r"na\xffme/a.png"):
        assert client.get(page["figures"][name]["url"]).text == "found"
    for url in (page["figures"][r"na\xffme/patch_lengths.json"]["url"], "/data/curves", "/data/scaling"):
        assert r"na\\xffme" in client.get(url).text
    assert client.get("/data/na%FFme/metrics.jsonl").text.startswith('{"step": 1')
    assert client.get("/data/na%FEme/metrics.jsonl").json()["error"].startswith(r"na\xfeme/metrics.jsonl: there is no")
    assert client.get("/data/%ED%A0%80.json").status_code == 404


def test_a_run_that_vanishes_while_it_is_read(outputs, monkeypatch):
    add_run(outputs / "leaving")
    read = RunsFolder._read

    def vanish(self, path, known, notes):
        if path.parent.name == "leaving":
            shutil.rmtree(path.parent)
        return read(self, path, known, notes)

    monkeypatch.setattr(RunsFolder, "_read", vanish)
    page = page_of(outputs)
    check_that_the_good_run_is_shown(page)
    assert page["runs"] == ["good"]
    assert page["notes"] == []


def test_the_folder_of_all_runs_is_gone(outputs):
    client = TestClient(make_app(outputs), base_url="http://127.0.0.1")
    shutil.rmtree(outputs)
    assert ".: cannot be read: No such file or directory" in client.get("/").text


def save_checkpoint(run, model):
    with torch.device("meta"):
        state = model().state_dict()
    path = run / "checkpoint" / "step-2"
    save({key: torch.zeros(1) for key in state}, checkpoint_id=str(path), no_dist=True)


def entropy_model():
    return EntropyModel(ENTROPY_FLAVORS["debug"])


def blt():
    return BLT(BLT_FLAVORS["debug"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("said_by", ["settings", "checkpoint", "metrics"])
def test_entropy_models_do_not_stand_among_blts(outputs, said_by):
    """Settings say more than checkpoints, and these more than metrics."""
    run = add_run(outputs / "entropy", patch="1.0" if said_by == "metrics" else "4.5")
    other = add_run(outputs / "baseline", patch="4.5" if said_by == "metrics" else "1.0")
    if said_by != "metrics":
        save_checkpoint(run, entropy_model if said_by == "checkpoint" else blt)
        save_checkpoint(other, blt if said_by == "checkpoint" else entropy_model)
    if said_by == "settings":
        (run / "config.toml").write_text('[model]\nname = "blt_entropy"\n')
        (other / "config.toml").write_text('[model]\nname = "blt"\n')
    page = page_of(outputs)
    assert page["runs"] == ["baseline", "entropy", "good"]
    scaling = page["figures"]["scaling"]["data"]
    assert [point["run"] for point in scaling["points"]] == ["baseline", "good"]
    assert scaling["others"] == ["entropy (blt_entropy)"]
    assert scaling["unsure"] == []
    assert page["notes"] == []


def test_a_run_that_does_not_say_what_it_is(outputs):
    (outputs / "good" / "metrics.jsonl").write_text(LINES.replace(', "mean_patch_bytes": PATCH', ""))
    assert page_of(outputs)["figures"]["scaling"]["data"]["unsure"] == ["good"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[model\n", "cannot be read: "),
        (b'[model]\nname = "\xff"\n', "cannot be read: "),
        (b"[model]\n", "has no model.name"),
        (b"model = 3\n", "has no model.name"),
        (b"[model]\nname = 3\n", "model.name is not a name"),
        (None, "cannot be read: not a regular file"),
    ],
)
def test_damaged_settings_are_named_and_the_rest_has_its_say(outputs, content, reason):
    settings = add_run(outputs / "entropy", patch="1.0") / "config.toml"
    if content is None:
        os.mkfifo(settings)
    else:
        settings.write_bytes(content)
    page = page_of(outputs)
    [note] = page["notes"]
    assert note.startswith(f"entropy/config.toml: {reason}")
    assert [point["run"] for point in page["figures"]["scaling"]["data"]["points"]] == ["good"]
