"""The check of a run's settings before any device work: by themselves, then with what they refer to.

    python -m blt_titan.config.check --job.config_file train_configs/debug.toml

says what is wrong, a line for each fault, with exit code 2, or nothing. The world size is NGPU times NNODES.
`blt-titan train` checks the same before it starts ranks, and `blt-titan config --check` whenever it is asked.
"""

import os
import sys

from blt_titan.checkpoint.read import CheckpointError
from blt_titan.config.read import RunConfigError, load_run_config
from blt_titan.config.refer import refer
from blt_titan.config.rules.ranks import data_parallel
from blt_titan.config.rules.sound import sound
from blt_titan.config.rules.target import Target
from blt_titan.config.run_config import RunConfig
from blt_titan.custom_import import CustomImportError, import_custom
from blt_titan.data.store.errors import DataError
from blt_titan.patching.rule import PatchRule
from blt_titan.patching.trial import trial_faults
from blt_titan.training.run_folder import RunFolderError, try_folder

__all__ = ["RunConfigError", "check_run", "load_run_config"]


def check_run(
    config: RunConfig,
    *,
    world_size: int,
    verify_data: bool,
    look_at_disk: bool = True,
    target: Target | None = None,
) -> None:
    """Check that the settings fit each other, the number of ranks, and what they refer to.

    Args:
        config: as `load_run_config` returns it.
        world_size: ranks of the whole job.
        verify_data: also read small data in full (`data.verify_bytes_at_start`); once per node is enough.
        look_at_disk: also look at data and checkpoints; likewise.
        target: what the run shall compute on; None for this machine.

    Raises:
        RunConfigError: a sentence for each fault, naming the keys, their values and what is allowed.
        DataError: naming the file.
        CheckpointError: likewise.
    """
    # First: it may register what other settings name.
    if (module := config.experimental.custom_import) != "":
        try:
            import_custom(module)
        except CustomImportError as error:
            raise RunConfigError(f"experimental.custom_import = {error}") from error
    faults = sound(config, world_size, target) or [
        f"patching.{fault}" for fault in trial_faults(PatchRule.of(config.patching))
    ]
    if faults:
        raise RunConfigError(*faults)
    dp = data_parallel(config.parallelism, world_size)
    assert dp is not None  # else the settings are not sound
    if look_at_disk:
        refer(config, dp=dp.ranks, verify_data=verify_data)


def main() -> None:
    """Check a run's settings and say what is wrong."""
    try:
        # Not WORLD_SIZE: some clusters set it to something else before torchrun does.
        world_size = _count_of("NGPU") * _count_of("NNODES")
        config = load_run_config(sys.argv[1:])
        check_run(config, world_size=world_size, verify_data=True)
        # On the node of rank 0, before ranks start: whether the folder can be had.
        if os.environ.get("NODE_RANK", "0") == "0":
            try_folder(config.job.dump_folder)
    except (RunConfigError, RunFolderError, DataError, CheckpointError) as error:
        for sentence in getattr(error, "sentences", [str(error)]):
            print(f"error: {' '.join(sentence.splitlines())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _count_of(variable: str) -> int:
    value = os.environ.get(variable, "1")
    if not (value.isascii() and value.isdigit() and 1 <= int(value[:10]) <= 10**6):
        raise RunConfigError(f"{variable} = {value!r}: must be a whole number from 1 to 1000000")
    return int(value)


if __name__ == "__main__":
    main()
