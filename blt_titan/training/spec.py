"""The registration of our models in torchtitan: `blt` and `blt_entropy`, each as one `TrainSpec`.

Importing this module registers both. Everything a run needs beside the trainer is named here.
"""

from typing import Any

from blt_titan.loss import ByteCrossEntropy
from blt_titan.model.blt import BLT
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.model.flavors import BLT_FLAVORS, ENTROPY_FLAVORS
from blt_titan.titan import JobConfig, TrainSpec, build_lr_schedulers, build_optimizers, register_train_spec
from blt_titan.training.loader import build_dataloader
from blt_titan.training.metrics import BLTMetrics
from blt_titan.training.validator import build_validator
from parallelisms.parallelize import parallelize
from parallelisms.pipeline import pipeline


def _build_loss(job_config: JobConfig, **context: Any) -> ByteCrossEntropy:
    settings = job_config.compile
    return ByteCrossEntropy(settings.backend if settings.enable and "loss" in settings.components else None)


def _spec(model_cls: Any, flavors: Any, pipelining_fn: Any = None) -> TrainSpec:
    return TrainSpec(
        model_cls=model_cls,
        model_args=flavors,
        parallelize_fn=parallelize,
        pipelining_fn=pipelining_fn,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,  # pyright: ignore[reportArgumentType]
        build_tokenizer_fn=None,
        build_loss_fn=_build_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=BLTMetrics,
    )


TRAIN_SPECS = {"blt": _spec(BLT, BLT_FLAVORS, pipeline), "blt_entropy": _spec(EntropyModel, ENTROPY_FLAVORS)}

for _name, _train_spec in TRAIN_SPECS.items():
    register_train_spec(_name, _train_spec)
