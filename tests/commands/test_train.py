"""`blt-titan train`: what it takes, that settings are checked before ranks start, and how it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from blt_titan.commands import launch, train
from blt_titan.commands import ranks as ranks_of_node
from blt_titan.commands.ranks import Ranks
from blt_titan.commands.run_settings import SHIPPED, config_file, shipped_configs, split_overrides

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launched(monkeypatch) -> list:
    """What would have been started: a list of (ranks, arguments)."""
    calls = []
    monkeypatch.setattr(train, "launch", lambda name, ranks, arguments, **more: calls.append((ranks, arguments)) or 7)
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("words", "options", "overrides"),
    [
        (["debug"], ["debug"], []),
        (["--training.steps=5", "debug"], ["debug"], ["--training.steps=5"]),
        (["debug", "--a.b", "5", "--nproc", "2"], ["debug", "--nproc", "2"], ["--a.b", "5"]),
        (["debug", "--a.b", "--nproc=2"], ["debug", "--nproc=2"], ["--a.b"]),
        (["a.b.toml", "--a.b", "-1", "--c.d"], ["a.b.toml"], ["--a.b", "-1", "--c.d"]),
        (["debug", "--master-addr=10.0.0.1"], ["debug", "--master-addr=10.0.0.1"], []),
        (["debug", "--master-addr", "10.0.0.1", "--a.b=x y"], ["debug", "--master-addr", "10.0.0.1"], ["--a.b=x y"]),
    ],
)
def test_overrides_are_the_words_with_a_dot(words, options, overrides):
    assert split_overrides(words) == (options, overrides)


def test_a_configuration_is_a_file_or_a_shipped_name(tmp_path, monkeypatch):
    assert shipped_configs() == sorted(path.stem for path in (ROOT / "train_configs").glob("*.toml"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "debug").mkdir()
    (tmp_path / "mine.toml").touch()
    assert config_file("debug") == config_file("debug.toml") == SHIPPED / "debug.toml"
    assert config_file("mine.toml") == Path("mine.toml")
    (tmp_path / "blt_1b").touch()
    assert config_file("blt_1b") == Path("blt_1b"), "a file goes first"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: CONFIG"),
        (["debgu"], "CONFIG 'debgu': no such file, and not a shipped configuration (blt_1b, blt_8b, blt_8b_1024,"),
        (["debgu"], "; did you mean debug?"),
        (["."], "CONFIG '.': is a directory, not a file"),
        (["debug", "--nproc", "0"], "--nproc '0': must be a whole number from 1 to 1,000,000, or gpu, cpu or auto"),
        (["debug", "--nproc", "two"], "--nproc 'two': must be a whole number"),
        (["debug", "--nnodes", "1:2"], "--nnodes 1:2: must be a whole number from 1 to"),
        (["debug", "--node-rank", "1"], "--node-rank 1: must be below --nnodes 1"),
        (["debug", "--master-port", "65536"], "--master-port 65536: must be a whole number from 1 to 65,535"),
        (["debug", "--log-rank", "0,a"], "--log-rank '0,a': must be numbers of ranks separated by commas"),
        (["debug", "--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["debug", "--training.seq_length=4"], "unknown key training.seq_length; did you mean training.seq_len?"),
        (["debug", "--training.dataset_path=/nowhere"], "training.dataset_path = '/nowhere': no such directory"),
        (["debug", "--job.config_file=x.toml"], "--job.config_file is given 2 times"),
    ],
)
def test_what_is_wrong_is_one_sentence_before_ranks_start(words, said, launched, capsys):
    assert train.main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("blt-titan train: error: ")
    assert (captured.out, captured.err.count("\n"), launched) == ("", 1, [])


def test_ranks_are_started_with_the_settings_and_their_exit_code_is_passed_on(launched, small_run, tmp_path):
    settings = [*small_run, f"--job.dump_folder={tmp_path / 'out'}"]
    assert train.main(["debug", *settings, "--nproc=2", "--log-rank", "0,1"]) == 7
    [(ranks, arguments)] = launched
    assert ranks == Ranks(nproc=2, log_rank="0,1")
    assert arguments == [f"--job.config_file={SHIPPED / 'debug.toml'}", *settings]
    assert train.main(["debug", *settings, "--nproc=3", "--nnodes=2"]) == 2, "6 ranks do not divide 4 rows"
    assert len(launched) == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_data_of_a_shipped_debug_configuration_is_made(launched, small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(train.prepare, "main", lambda arguments: made.append(arguments) or 1)
    assert train.main(["debug"]) == 1, "what preparing ends with"
    assert len(made) == 1
    assert "data/stdlib is missing" in capsys.readouterr().err
    assert train.main(["debug", "--training.dataset_path=data/other"]) == 2
    (tmp_path / "debug.toml").write_text((SHIPPED / "debug.toml").read_text())
    assert train.main(["debug.toml"]) == 2, "a configuration of one's own"
    assert (len(made), launched) == (1, [])


def test_ranks_of_others_start_no_ranks(launched, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    ran = []
    monkeypatch.setattr(train, "_be_a_rank", lambda arguments: ran.append(arguments) or 0)
    assert train.main(["debug", "--training.steps=5"]) == 0
    assert ran == [[f"--job.config_file={SHIPPED / 'debug.toml'}", "--training.steps=5"]]
    assert train.main(["debug", "--nproc=2"]) == 2
    assert "--nproc within torchrun, which has started the ranks: leave it out" in capsys.readouterr().err


def test_torchrun_knows_the_options():
    for ranks, words in (
        (Ranks(2), {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "nnodes": "1", "nproc_per_node": "2"}),
        (Ranks(8, 2, 1, "host0"), {"node_rank": 1, "master_addr": "host0", "master_port": 29500, "nnodes": "2"}),
        (Ranks(1, master_port=29501), {"node_rank": 0, "master_addr": "localhost", "master_port": 29501}),
    ):
        found = vars(get_args_parser().parse_args([*ranks.torchrun_options(), "-m", "x", "--a.b=c"]))
        assert found | words == found
        assert (found["training_script"], found["training_script_args"]) == ("x", ["--a.b=c"])


STAND_IN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
if os.environ["RANK"] == "1":
    {ending}
print("began", flush=True)
time.sleep({seconds})
"""
LAUNCH = """
import sys
from blt_titan.commands import launch, ranks
from blt_titan.commands.ending import command
ranks.RANK_MODULE = "stand_in"
@command("x")
def main(arguments=None):
    return launch.launch("x", ranks.Ranks(2), [])
sys.exit(main())
"""


def start_stand_in(folder: Path, ending: str = "pass", seconds: int = 60) -> subprocess.Popen:
    """Start two ranks of a stand-in for the training, of which the second ends as is said."""
    (folder / "stand_in.py").write_text(STAND_IN.format(ending=ending, seconds=seconds))
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH],
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore it, and what they start does too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("get_error_handler().record_exception(ValueError('a: b')); os._exit(2)", 2, r"x: error: rank 1: a: b\n\Z"),
        (
            "get_error_handler().record_exception(type('NonFiniteLossError', (RuntimeError,), {})('rank 1: step 2')); "
            "os._exit(3)",
            3,
            r"x: error: rank 1: step 2\n\Z",
        ),
        ("sys.exit(5)", 5, "exitcode  : 5"),
        # Only what says that it came out wrong has.
        ("sys.exit(3)", 1, "exitcode  : 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "Signal 9 .SIGKILL. received"),
        ("pass", 0, r"\A\Z"),
    ],
)
def test_the_ranks_exit_code_is_passed_on(ending, code, said, tmp_path):
    process = start_stand_in(tmp_path, ending, seconds=60 if code else 0)
    out, err = process.communicate(timeout=120)
    err = "".join(line for line in err.splitlines(keepends=True) if "OMP_NUM_THREADS" not in line)
    assert process.returncode == code, out + err
    assert re.search(said, err), err
    assert "Traceback" not in out + err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 75, "x: told to leave by SIGINT before training had begun; nothing was lost\n"),
        (signal.SIGTERM, 75, "x: told to leave by SIGTERM before training had begun; nothing was lost\n"),
        (signal.SIGHUP, 129, "x: ended by SIGHUP\n"),
    ],
)
def test_a_signal_ends_the_ranks_in_one_line(number, code, said, tmp_path):
    process = start_stand_in(tmp_path)
    assert process.stdout is not None
    assert "began" in process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, said)
    assert "Traceback" not in out


@pytest.mark.slow
@pytest.mark.parametrize("others_started_it", [False, True])
def test_ctrl_c_in_training_saves_and_is_one_line(others_started_it, small_run, tmp_path):
    of_a_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29587"}
    command = [
        *(sys.executable, "-m", "blt_titan", "train", "debug", *small_run, f"--job.dump_folder={tmp_path}"),
        *("--training.steps=100000", "--lr_scheduler.total_steps=100000", "--training.dataloader.num_workers=1"),
    ]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONWARNINGS": "ignore"} | (of_a_rank if others_started_it else {}),
            stdout=log,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    deadline = time.monotonic() + 300
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    log = (tmp_path / "log").read_text()
    sentence = re.search(
        r"told to leave by SIGINT: step (\d+) is saved, in [\d.]+ s; the same command goes on", err + log
    )
    assert sentence, err + log
    assert (tmp_path / "checkpoint" / f"step-{sentence[1]}" / ".metadata").exists()
    if not others_started_it:
        assert err == f"blt-titan train: {sentence[0]}\n"
    assert "Traceback" not in err + log
    recorded = (tmp_path / "config.toml").read_text()
    assert re.search(r"^#   blt-titan train \S*debug\.toml --training\.dataset_path=", recorded, re.MULTILINE)
    assert f"#   blt-titan train {tmp_path}/config.toml\n" in recorded


def test_help_of_run_train_sh_names_its_variables_and_runs_nothing():
    done = subprocess.run(
        ["./run_train.sh", "--training.steps=5", "--help"],
        env=os.environ | {"PYTHON": "/nowhere/python"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for variable in re.findall(r"\$\{(\w+):", (ROOT / "run_train.sh").read_text()):
        assert variable in done.stdout
    assert "set -" not in done.stdout


def test_what_failed_is_known_by_name_to_the_launcher():
    from blt_titan.train import LOST_WORK, WRONG_WORK

    assert tuple(kind.__name__ for kind in WRONG_WORK) == ranks_of_node.WRONG_WORK
    assert tuple(kind.__name__ for kind in LOST_WORK) == ranks_of_node.LOST_WORK


@pytest.mark.parametrize(
    ("set_by_the_user", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
def test_the_gpu_allocator_may_grow_segments_unless_the_user_says_how(set_by_the_user, expected, monkeypatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in names} | set_by_the_user)
    monkeypatch.setattr(ranks_of_node.torchrun, "run", lambda _options: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert launch.launch("x", Ranks(1), []) == 0
    assert {name: os.environ[name] for name in names if name in os.environ} == expected
