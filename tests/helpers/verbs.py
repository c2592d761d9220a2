"""The commands that tests walk: the verbs of `blt-titan`, and the check of a GPU."""

import importlib
from types import ModuleType

from blt_titan.commands.cli import VERBS

SETTINGS = ("train", "config")
"""Verbs whose arguments are mostly a run's settings; `tests/config` walks those."""
COMMANDS = sorted([*(verb for verb in VERBS if verb not in SETTINGS), "gpu_check"])

VERB_OF = {
    "prepare_data": "prepare",
    "inspect_data": "inspect",
    "score_entropies": "score",
    "calibrate_threshold": "calibrate",
    "view_patches": "view",
    "convert_to_hf": "export",
    "convert_from_hf": "import",
    "generate": "generate",
    "evaluate": "evaluate",
    "evaluate_harness": "harness",
    "serve_plots": "plots",
    "demo": "demo",
}
"""The verbs by the names of `scripts/`, which `FUZZ_COMMAND` takes too."""


def verb_of(case: str) -> str:
    """The verb of a case of the fuzz, which is named as in `scripts/`, or as its verb."""
    return VERB_OF.get(case, case.replace("_", "-"))


def module_of(command: str) -> ModuleType:
    """The module that runs a command."""
    return importlib.import_module(
        f"blt_titan.commands.{VERBS[command][0]}" if command in VERBS else "scripts.gpu_check"
    )


def program_of(command: str) -> str:
    """What the messages of a command begin with."""
    return f"blt-titan {command}" if command in VERBS else command
