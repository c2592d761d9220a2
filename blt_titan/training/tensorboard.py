"""TensorBoard's files of a run: one folder, curves in groups, and a page that shows the groups as charts.

The decision that is not obvious: a run that resumes writes another file into the same folder, which begins by saying
from which step on it writes (`purge_step`). TensorBoard then forgets what earlier files say of those steps, which will
be made again. A run that begins anew in an old folder says so of step 1 and hides the old curves in the same way.
"""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

GROUPS = {
    "loss": ("loss_nats", "bits_per_byte", "heldout_loss_nats", "heldout_bits_per_byte", "lr", "grad_norm"),
    "throughput": (
        *("bytes_per_second", "bytes_per_second_per_device", "patches_per_second", "mfu", "bytes_seen"),
        "training_flops",
    ),
    "patches": ("mean_patch_bytes", "padded_byte_share", "padded_patch_share"),
    "store": ("fetched_bytes", "fetch_retries", "cache_evictions"),
}
OTHER, DATA_SETS = "health", "share/"
"""The group of all other figures, and the prefix of those of a mixture's data sets, which are a group already."""
CHARTS = {
    "loss": {
        "bits per byte": ["loss/bits_per_byte", "loss/heldout_bits_per_byte"],
        "gradient norm": ["loss/grad_norm"],
        "learning rate": ["loss/lr"],
    },
    "throughput": {
        "bytes per second": ["throughput/bytes_per_second$"],
        "patches per second": ["throughput/patches_per_second"],
        "MFU": ["throughput/mfu"],
    },
    "patches": {
        "bytes of a patch": ["patches/mean_patch_bytes"],
        "padding": ["patches/padded_byte_share", "patches/padded_patch_share"],
        "data sets": ["share/.*"],
    },
    "store": {
        "bytes fetched": ["store/fetched_bytes"],
        "retries and evictions": ["store/fetch_retries", "store/cache_evictions"],
    },
    "health": {
        "waiting": ["health/data_wait_share", "health/slowest_data_wait_share", "health/saving_share"],
        "beside the usual": ["health/throughput_ratio", "health/grad_norm_ratio", "health/slowest_rank_ratio"],
        "slowest rank": ["health/slowest_rank$", "health/slowest_data_rank"],
        "memory": ["health/memory_gib", "health/memory_ratio"],
    },
}
"""Tabs of the page "Custom scalars": charts, and the curves of each, as regular expressions."""


def tag_of(name: str) -> str:
    """Return a figure's name in TensorBoard, which groups by what stands before a slash.

    >>> tag_of("grad_norm"), tag_of("saving_share"), tag_of("share/web")
    ('loss/grad_norm', 'health/saving_share', 'share/web')
    """
    if name.startswith(DATA_SETS):
        return name
    return f"{next((group for group, names in GROUPS.items() if name in names), OTHER)}/{name}"


class Curves:
    """Writes figures to TensorBoard's files; the first call opens one.

    Args:
        folder: of this run's files.
    """

    def __init__(self, folder: str | Path):
        self._folder = str(folder)
        self._first_step = 1
        self._writer: SummaryWriter | None = None

    def resume_at(self, step: int) -> None:
        """Go on after `step`: a new file takes back what the ones before it say of later steps.

        Raises:
            OSError: what is waiting cannot be written.
        """
        self._first_step = step + 1
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the figures of a step.

        Raises:
            OSError: they cannot be written; the next call tries again, in a new file.
        """
        try:
            if self._writer is None:
                self._writer = SummaryWriter(self._folder, purge_step=self._first_step, max_queue=1000)
                charts = {tab: {name: ["Multiline", tags] for name, tags in of.items()} for tab, of in CHARTS.items()}
                self._writer.add_custom_scalars(charts)
            for name, value in metrics.items():
                self._writer.add_scalar(tag_of(name), value, step)
        except OSError:
            self._writer, self._first_step = None, step
            raise

    def close(self) -> None:
        """Write what is waiting, and close the file.

        Raises:
            OSError: it cannot be written.
        """
        if self._writer is not None:
            self._writer.close()
