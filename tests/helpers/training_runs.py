"""Whole training runs inside a test process: what `blt_titan.train` does, without the shell around it."""

import json
from pathlib import Path

import torch

from blt_titan.config.check import check_run, load_run_config
from blt_titan.training.trainer import BLTTrainer

CONFIG_FILE = Path(__file__).parents[2] / "train_configs" / "debug.toml"


def train(out: str, *overrides: str) -> dict[str, torch.Tensor]:
    """Run to `training.steps` and return all parameters, whole, by name."""
    trainer = make_trainer(out, *overrides)
    trainer.train()
    parameters = gather_parameters(trainer)
    trainer.close()
    return parameters


def make_trainer(out: str, *overrides: str) -> BLTTrainer:
    config = load_run_config([f"--job.config_file={CONFIG_FILE}", f"--job.dump_folder={out}", *overrides])
    check_run(config, world_size=torch.distributed.get_world_size(), verify_data=False)
    return BLTTrainer(config)


def gather_parameters(trainer: BLTTrainer) -> dict[str, torch.Tensor]:
    return {name: whole(p).detach().clone() for part in trainer.model_parts for name, p in part.named_parameters()}


def plain_name(name: str) -> str:
    """Return a parameter's name without what activation checkpointing and compile put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def metrics(out: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out: str | Path) -> dict[int, float]:
    """Loss by step; fails on a step that stands twice."""
    lines = [line for line in metrics(out) if "loss_nats" in line]
    by_step = {line["step"]: line["loss_nats"] for line in lines}
    assert len(by_step) == len(lines), "a step stands twice in metrics.jsonl"
    return by_step
