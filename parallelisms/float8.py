"""Float8 on exactly the linears of the global transformer.

torchtitan's converter excludes modules by parts of their names; what a later module is called would decide its
precision. Ours, under torchtitan's name for it, includes by name.
"""

import dataclasses
import re

import torch.nn as nn

from blt_titan.titan import Float8LinearConverter, JobConfig, Model, ParallelDims, replace_converter

CONVERTER = "quantize.linear.float8"

_GLOBAL_LINEAR = re.compile(r"^layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])$")


class GlobalFloat8Converter(Float8LinearConverter):
    """torchtitan's converter with an include list, and with `emulate` for recipes too."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        super().__init__(job_config, parallel_dims)
        self.filter_fn = lambda module, name: isinstance(module, nn.Linear) and bool(_GLOBAL_LINEAR.match(name))
        settings = job_config.quantize.linear.float8
        self.config = dataclasses.replace(self.config, emulate=settings.emulate)
        if parallel_dims.cp_enabled and settings.enable_fsdp_float8_all_gather:
            # torchtitan asks for dp_shard > 1, but cp ranks shard the global weights too.
            self.config = dataclasses.replace(self.config, enable_fsdp_float8_all_gather=True)
            self.precompute_scale = settings.precompute_float8_dynamic_scale_for_fsdp


replace_converter(CONVERTER, GlobalFloat8Converter)


def uses_float8(model: Model) -> bool:
    """Tell whether a run with these settings of its model converts the global linears to float8."""
    return CONVERTER in model.converters
