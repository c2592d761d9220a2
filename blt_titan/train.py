"""Entry point of a rank: `torchrun ... -m blt_titan.train --job.config_file FILE [--section.key=value ...]`.

`blt-titan train` starts it; use that.
"""

import os
import sys
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

from blt_titan.checkpoint.read import CheckpointError
from blt_titan.config.check import RunConfigError, check_run, load_run_config
from blt_titan.config.resume import RunStateError
from blt_titan.data.prepare.worker_pool import die_with_parent
from blt_titan.data.rows.workers import WorkerLostError
from blt_titan.data.store.errors import DataError, UnreachableError
from blt_titan.monitor.record import RunRecord
from blt_titan.patching.registry import RuleError
from blt_titan.titan import init_logger, logger
from blt_titan.training.error_causes import StorageLostError, lost_storage
from blt_titan.training.exit_codes import CAME_OUT_WRONG, LEFT, REFUSED
from blt_titan.training.exports import ExportFailedError
from blt_titan.training.failures import LossSpikeError, NonFiniteLossError
from blt_titan.training.hang_watch import HangWatch, HungError, PeerLostError, begin_hang_watch
from blt_titan.training.preemption import PreemptedError, Preemption
from blt_titan.training.row_ranks import RowsDifferError
from blt_titan.training.run_folder import RunFolderError
from blt_titan.training.trainer import BLTTrainer

WRONG_WORK = (NonFiniteLossError, LossSpikeError, RowsDifferError, ExportFailedError)
"""What ends a run that was asked for rightly, and would end it again; `commands/ranks.py` says their sentences."""

LOST_WORK = (HungError, PeerLostError, StorageLostError, WorkerLostError, UnreachableError)
"""What ends a run because a rank, a worker or its store is lost: exit code 1, as of a fault of the program."""
_SAID = (
    *(RunConfigError, RunFolderError, DataError, CheckpointError, RunStateError, RuleError),
    *WRONG_WORK,
    *LOST_WORK,
)


@record
def main() -> None:
    """Train as the settings say. One sentence for what a user can mend: exit code 2, or 3 where the work went wrong."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Nobody watches ranks whose launcher was killed, and other nodes would wait for them.
        die_with_parent()
    init_logger()
    preemption = Preemption()
    with preemption.heard():
        _train(preemption)


def _train(preemption: Preemption) -> None:
    trainer: BLTTrainer | None = None
    record = RunRecord()
    watch: HangWatch | None = None
    try:
        if missing := [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]:
            raise RunConfigError(f"{', '.join(missing)} not set: start it with blt-titan train, or under torchrun")
        config = load_run_config(sys.argv[1:])
        is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        check_run(
            config,
            world_size=int(os.environ["WORLD_SIZE"]),
            verify_data=is_first_of_node,
            look_at_disk=is_first_of_node,
        )
        trainer = BLTTrainer(config, record)
        trainer.preemption = preemption
        if config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
            logger.info("Wrote the seed checkpoint")
            record.end("done", 0, "wrote the seed checkpoint")
        else:
            watch = begin_hang_watch(trainer.heartbeat, config, record)
            trainer.train()
    except PreemptedError as error:
        if os.environ["RANK"] == "0":
            logger.info(str(error))
            record.end("preempted", LEFT, str(error))
        get_error_handler().record_exception(error)
        assert trainer is not None
        trainer.close()  # curves are written to their end
        # All ranks have saved before one is gone, whose end has the others ended.
        dist.barrier()
        sys.stdout.flush()
        os._exit(LEFT)
    except Exception as error:
        found = (watch and watch.lost_peer(error)) or (record.has_trained and lost_storage(error)) or error
        if not isinstance(found, _SAID):
            record.end("failed", 1, f"{type(found).__name__}: {str(found)[:1000]}")
            raise
        _say_and_leave(found, record)
    except BaseException as error:  # a fault of the program, or of another rank's
        record.end("failed", 1, f"{type(error).__name__}: {str(error)[:1000]}")
        raise
    finally:
        if trainer is not None:
            trainer.close()
    # All ranks leave together: a process that exits while another still talks to it can abort.
    dist.barrier()
    if watch is not None:
        watch.end()
    dist.destroy_process_group()
    sys.stdout.flush()


def _say_and_leave(error: Exception, record: RunRecord) -> NoReturn:
    """End this rank with the sentences of an error."""
    said = error.sentences if isinstance(error, RunConfigError) else [str(error).strip().splitlines()[-1]]
    for sentence in said:
        logger.error(" ".join(sentence.splitlines()))
    # torchrun prints it as the cause also where this rank's own output is filtered out, its last line alone.
    get_error_handler().record_exception(RunConfigError("; ".join(said)) if len(said) > 1 else error)
    code = CAME_OUT_WRONG if isinstance(error, WRONG_WORK) else 1 if isinstance(error, LOST_WORK) else REFUSED
    record.end("failed" if code != REFUSED or record.has_trained else "refused", code, "; ".join(said))
    sys.stdout.flush()
    # Other ranks may wait for this one in a collective; torchrun ends them.
    os._exit(code)


if __name__ == "__main__":
    main()
