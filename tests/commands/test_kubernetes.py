"""The example for Kubernetes says of blt-titan what holds: its options, its settings, its exit codes."""

from pathlib import Path

import pytest
import yaml

from blt_titan.commands import train
from blt_titan.commands.run_settings import run_arguments
from blt_titan.config.check import load_run_config
from blt_titan.training.exit_codes import CAME_OUT_WRONG, LEFT, REFUSED

FILE = Path(__file__).parents[2] / "scripts/kubernetes/train.yaml"
NEVER_AGAIN = [REFUSED, CAME_OUT_WRONG]


@pytest.fixture(scope="module")
def job_set() -> dict:
    return yaml.safe_load(FILE.read_text())


@pytest.fixture(scope="module")
def job(job_set) -> dict:
    (replicated,) = job_set["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    return replicated["template"]["spec"]


@pytest.fixture(scope="module")
def container(job) -> dict:
    (container,) = job["template"]["spec"]["containers"]
    return container


def test_a_job_that_failed_for_good_is_not_started_again(job_set):
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job_set["spec"]["failurePolicy"] == {"maxRestarts": 0}


def test_how_a_launcher_ends_decides_what_becomes_of_its_pod(job, container):
    wrong, left, evicted = job["podFailurePolicy"]["rules"]
    name = {"containerName": container["name"], "operator": "In"}
    assert wrong == {"action": "FailJob", "onExitCodes": name | {"values": NEVER_AGAIN}}
    assert left == {"action": "Ignore", "onExitCodes": name | {"values": [LEFT]}}
    assert evicted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    # Kubernetes takes such a policy with this alone.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["completionMode"] == "Indexed"


def test_the_launchers_find_each_other(job_set, job, container):
    environment = {variable["name"]: variable for variable in container["env"]}
    program, verb, *arguments = container["command"]
    assert (program, verb) == ("blt-titan", "train")
    index = environment["JOB_COMPLETION_INDEX"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    values = {"$(JOB_COMPLETION_INDEX)": "7", "$(MASTER_ADDR)": environment["MASTER_ADDR"]["value"]}
    for mark, value in values.items():
        arguments = [argument.replace(mark, value) for argument in arguments]
    args = train.parse_args(arguments)
    assert (args.nnodes, args.node_rank) == (job["completions"], 7)
    assert job["parallelism"] == job["completions"]
    assert args.nproc == container["resources"]["limits"]["nvidia.com/gpu"]
    assert args.master_port == container["ports"][0]["containerPort"]
    name, network = job_set["metadata"]["name"], job_set["spec"]["network"]
    assert network["enableDNSHostnames"]
    assert network["publishNotReadyAddresses"]
    (replicated,) = job_set["spec"]["replicatedJobs"]
    assert args.master_addr == f"{name}-{replicated['name']}-0-0.{network['subdomain']}"
    # The settings are settings, and their folders are mounted.
    config = load_run_config(run_arguments(args.config, args.overrides))
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert config.training.dataset_path == "/work/data/8b"
    assert str(Path(config.training.dataset_path).parent) in mounts
    assert str(Path(config.job.dump_folder).parent) in mounts
    assert not mounts[str(Path(config.job.dump_folder).parent)].get("readOnly")


def test_volumes_and_the_time_to_save(job, container):
    pod = job["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    (shared,) = (name for name, path in mounts.items() if path == "/dev/shm")
    assert volumes[shared]["emptyDir"]["medium"] == "Memory"
    # Kubernetes gives 30 s, in which a large checkpoint is not saved.
    assert pod["terminationGracePeriodSeconds"] >= 120
