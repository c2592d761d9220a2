"""A Slurm cluster of two nodes on this machine: its own munge, controller and ports, in a folder that goes away."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from blt_titan.data.prepare.worker_pool import die_with_parent

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
# Addresses are names that every process of a node can resolve.
NODES = ("127.0.0.1", "127.0.0.2")
# Jobs that are queued again wait for as long as their old credentials hold, by default 120 s.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,builtin_interval=2
GresTypes=gpu
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs=1 Gres=gpu:1
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs=1 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """Two nodes with a processor and a pretended GPU each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        with contextlib.ExitStack() as held:
            taken = [held.enter_context(socket.socket()) for _ in range(3)]
            for one in taken:
                one.bind(("", 0))
            ports = [one.getsockname()[1] for one in taken]
        text = CONFIGURATION.format(folder=self.folder, host=socket.gethostname(), ports=ports, nodes=NODES)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        paths = {"socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed", "log-file": "munge.log"}
        places = [f"--{option}={self.folder / name}" for option, name in paths.items()]
        self._run("munged", "--foreground", "--force", f"--key-file={key}", *places)
        self._run("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.say("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2, "nodes")

    def start_node(self, node: str) -> None:
        self._run("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """End all processes of a node at once, as a machine that loses its power."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        for pid in self._processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
            self.say("scancel", "--signal=KILL", "--full", "--state=RUNNING", "--user=root")
            self.say("scancel", "--user=root")
        for node in [node for node in NODES if node in self._daemons]:
            self.kill_node(node)
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()

    def say(self, *command: str) -> str:
        """Run a command of Slurm's and return what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        words = self.say("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, holds: Callable[[], object], what: str, seconds: float = 240) -> None:
        """Wait for something; no longer than until a job has failed."""
        deadline = time.monotonic() + seconds
        while not holds():
            if "slurmctld" in self._daemons:
                assert "JobState=FAILED" not in self.say("scontrol", "show", "job", "-o"), what
            assert time.monotonic() < deadline, f"{what}: {self.logs()}"
            time.sleep(0.3)

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in self.folder.glob("slurm*.log"))

    def _run(self, program: str, *options: str, name: str = "") -> None:
        self._daemons[name or program] = subprocess.Popen(
            [program, *options],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        if program == "munged":
            self.wait((self.folder / "munge.socket").exists, program)

    def _processes(self, node: str) -> set[int]:
        """Return the tasks of a node and the processes that Slurm watches them by."""
        marks = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.folder}/slurm.conf".encode()}
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marks <= set((entry / "environ").read_bytes().split(b"\0")):
                    found.add(int(entry.name))
                    parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                    if "slurmstepd" in Path(f"/proc/{parent}/comm").read_text():
                        found.add(int(parent))
        return found


@contextlib.contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    # Sockets have short names.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)
