"""Our sections of a run's TOML; torchtitan merges them into its own (`job.custom_config_module`).

Where torchtitan has a key, that key is used: `training.dataset_path` is the directory of byte shards,
`training.seq_len` the bytes of a row, `training.local_batch_size` the rows of a micro-batch, `debug.seed` the seed of
the weights.
"""

# No `from __future__ import annotations` here: torchtitan's merge reads the annotations as types.
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Data:
    """How byte shards become rows."""

    streams: int = 3840
    """
    Streams of the run: row n comes from stream n mod streams. Kept in the checkpoint, never changed within a run.
    Data-parallel ranks must divide it, and the data must hold at least as many record batches.
    """
    segment_bytes: int = 2048
    """Byte slots of one segment of a row; must divide training.seq_len and hold patching.max_patch_bytes."""
    segment_patches: int = 512
    """Patch slots of one segment of a row."""
    mixture: dict[str, float] = field(default_factory=dict)
    """
    Several directories of byte shards and their weights, shares of bytes, instead of training.dataset_path.
    Held-out data is their `validation` splits, one after the other.
    """
    seed: int = 0
    """Another seed, another order of the data."""
    on_damage: Literal["stop", "quarantine"] = "stop"
    """
    What a record batch does that fails its checksum, or whose entropies do: 'stop' ends the run and names it,
    'quarantine' passes over it, names it in the log and in <dump_folder>/quarantined.jsonl, and counts it in metrics
    and checkpoint. What is missing or cut short when a run starts is refused either way, and validation always stops.
    """
    verify_bytes_at_start: int = 256 * 1024 * 1024
    """
    Data up to this size is checked byte by byte before training; of larger data, and of object stores, only the
    structure, and each record batch when it is read.
    """
    cache_dir: str | None = None
    """
    Where what comes from an object store is kept, for all ranks and workers of a machine: a folder on its own disk, not
    on a network file system. Default: blt_titan-<user id> in the folder for temporary files (TMPDIR, or /tmp).
    """
    cache_bytes: int = 8 * 1024**3
    """The most that the cache takes; what was used longest ago makes room."""
    fetch_ahead: int = 16
    """
    Record batches of an object store that each worker fetches before they are due, with what it holds of them in
    memory; 0 fetches each when it is needed.
    """
    fetch_timeout_s: float | None = None
    """
    Seconds that a request to an object store is made again and again, with growing pauses, before the run ends. What
    cannot pass, such as denied access, ends it at once, and so under on_damage = 'quarantine'. Below what other ranks
    wait: heartbeat.limit_seconds. Default: 300, but no more than two thirds of that limit where ranks wait (60 with
    comm.train_timeout_seconds = 100).
    """
    wait_seconds: int | None = None
    """
    How long a loader worker may show no sign of life (no batch, no time on a processor, nothing read) before it is
    named and all workers of its rank begin anew, without a row lost or repeated; also if one is killed. If it happens
    again soon the run ends. One that waits for an object store does show it, see fetch_timeout_s. Default: 300, with
    several ranks 4 tenths of comm.train_timeout_seconds.
    """


@dataclass
class Patching:
    """Where patches begin."""

    rule: str = "space"
    """
    'space': at spaces and punctuation; 'static': every `stride` bytes; 'byte': everywhere. By the entropy of the next
    byte, 'global': where it is above `threshold`; 'monotonic': where it rises by more; 'add': where it is above
    `threshold` and rises by more than `threshold_add`. Or a rule of your own, which the module
    `experimental.custom_import` registers (`patching/registry.py`).
    """
    stride: int | None = None
    """Bytes of a patch under rule = 'static'."""
    threshold: float | None = None
    """Nats, of the rules by entropy; `blt-titan calibrate` chooses it."""
    threshold_add: float | None = None
    """Nats, of rule = 'add'."""
    source: Literal["sidecar", "online"] = "sidecar"
    """
    Where entropies come from. 'sidecar': from files that `blt-titan score` made; 'online': from the model
    of `entropy_checkpoint`, which scores the text on the training device just before it is packed.
    """
    sidecar: str = "default"
    """Name of the sidecar, in <training.dataset_path>/entropies."""
    entropy_checkpoint: str | None = None
    """The entropy model of source = 'online': a checkpoint, or the folder of a run."""
    max_patch_bytes: int = 512
    """Longer patches are split; at most data.segment_bytes."""
    allow_change: bool = False
    """Let a run that resumes cut its text otherwise than before."""


@dataclass
class DataLoader:
    """Defaults that differ from torchtitan's."""

    pin_memory: bool = True
    """Batches are page-locked on their way to a GPU, so that no copy is waited for: only true there."""


@dataclass
class Training:
    """Defaults that differ from torchtitan's."""

    dataloader: DataLoader = field(default_factory=DataLoader)
    """How rows reach the device."""


@dataclass
class Model:
    """Defaults that differ from torchtitan's."""

    name: Literal["blt", "blt_entropy"] = "blt"
    """The Byte Latent Transformer, or the byte-level entropy model that decides its patches."""
    flavor: str = "debug"
    """Size: debug, 20M, 100M, 400M, 1B, 2B, 4B, 8B for blt; debug, 100M for blt_entropy."""
    attention_backend: Literal["auto", "sdpa", "flex", "varlen"] = "auto"
    """
    How self-attention is computed, not what: 'auto' takes 'flex' on a GPU and 'sdpa' on a CPU. 'flex' is FlexAttention
    by block masks, 'varlen' torch's FlashAttention over runs of documents; both need a GPU.
    """
    varlen_documents: int = 16
    """Documents of a row that 'varlen' has room for; a row of more ends the run. Room that is not used costs time."""
    hf_assets_path: str = "."
    """Unused: bytes need no tokenizer. (torchtitan warns when its own default does not exist.)"""


@dataclass
class Checkpoint:
    """Defaults that differ from torchtitan's."""

    last_save_model_only: bool = False
    """True leaves only weights in the last checkpoint, so that a finished run cannot be continued."""
    load_step: int = -1
    """
    Go back to this step of the run, and set later ones aside; -1 goes on from the newest. Done once: a command that is
    started again with it goes on from the newest. To go back again, start once without it.
    """


@dataclass
class Validation:
    """Defaults that differ from torchtitan's. Held-out data is the `validation` split of training.dataset_path."""

    local_batch_size: int = -1
    """Rows of a validation batch; -1 takes training.local_batch_size, and so does a run with a pipeline."""
    seq_len: int = -1
    """Bytes of a validation row; -1 takes training.seq_len."""
    steps: int = -1
    """
    Rows of the split that a validation pass scores, the first ones, the same in every layout; -1 scores the whole
    split.
    """
    freq: int = 500
    """Steps between validation passes; the last step is always validated."""


@dataclass
class HashEmbeddingSettings:
    """How the hash tables are split over ranks."""

    sharding: Literal["columns", "fsdp"] = "columns"
    """
    'columns': each rank holds some columns of all rows, and sums travel; dp_shard x cp x tp must divide the local
    width.
    'fsdp': FSDP shards the rows and gathers the whole tables in every step.
    """


@dataclass
class EntropyModelSettings:
    """The byte-level model `blt_entropy`."""

    reset_at_newline: bool = False
    """A byte sees nothing from before its line. Kept in the checkpoint; scoring and generation follow."""


@dataclass
class LocalBlocks:
    """The local encoder and decoder; `[activation_checkpoint]` is about the global transformer alone."""

    activation_checkpoint: Literal["none", "full"] = "none"
    """'full': compute each local block and each cross-attention again in backward."""


@dataclass
class Export:
    """Hugging Face directories beside checkpoints."""

    hf_every: int = 0
    """
    Every so many checkpoints, write <dump_folder>/hf/step-N, which transformers loads; 0: never. A process of its own
    reads the checkpoint from disk, and the run does not wait for it, but at its end.
    """
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of the weights there."""
    entropy_checkpoint: str | None = None
    """The entropy model to put inside as the patcher; default: patching.entropy_checkpoint."""
    force: bool = False
    """Also export a model that transformers cannot cut texts for; it then needs explicit patch_lengths."""


@dataclass
class Monitor:
    """What a run looks at by itself at each logged line, and whom it tells. A warning never stops it."""

    slow_rank: float = 1.3
    """
    Warn of a rank whose forward takes so many times as long as that of the ranks that do the same, others not waited
    for; 0: never.
    """
    data_wait: float = 0.2
    """Warn where a rank waits for its rows for more than this share of the time; 0: never."""
    throughput_drop: float = 0.7
    """Warn where bytes per second stay below this share of their running median; 0: never."""
    gradient_spike: float = 5.0
    """Warn of a gradient norm of so many times the running median; 0: never."""
    saving: float = 0.1
    """Warn where saving has taken more than this share of the time since the start; 0: never."""
    predicted_memory_gib: float | None = None
    """GiB of tensors at a GPU's peak, as `blt-titan plan` predicts them; warn where they are over by 10 %."""
    repeat_s: int = 600
    """Seconds before the same warning is said again."""
    webhook: str | None = None
    """URL that is sent each warning and the end of the run, as JSON by POST."""
    prometheus_textfile: str | None = None
    """File that holds the newest figures for the textfile collector of Prometheus' node exporter, as in run.prom."""
    prometheus_port: int | None = None
    """Port of rank 0's host where Prometheus can ask for the newest figures."""


@dataclass
class Failure:
    """What a run does when a step went wrong, the same on all its ranks."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """
    What is done about a step whose loss or gradient norm is NaN or infinite. 'stop' ends the run before it saves
    anything. 'skip' leaves weights and optimizer as they were, bit for bit, and the rows of the step out of bytes_seen;
    the learning rate goes on by steps. Such a step is named in the log and in <dump_folder>/skipped.jsonl, with its
    rows, and counted in metrics and checkpoint. The host does not wait for the device to know, except once in each step
    where optimizer.implementation is not 'fused' or training.enable_cpu_offload is true.
    """
    max_skipped: int = 10
    """The run stops when more of the last `skip_window` steps than these were skipped."""
    skip_window: int = 1000
    """Steps that `max_skipped` is about; above it."""
    on_spike: Literal["off", "warn", "rollback"] = "off"
    """
    What is done about a spike of the loss. 'warn' says so in the log, once for each spike, and counts them in metrics.
    'rollback' goes back to the newest checkpoint that is at least `rollback_steps` older than the spike, and on with
    the rows after it: those between are not read again. They are named in <dump_folder>/skipped.jsonl; the steps are
    made again, and what was saved or logged of them is set aside.
    """
    spike_sigmas: float = 6.0
    """
    A step's loss x is a spike above b = mean + spike_sigmas * sqrt(variance) of the steps before it. Then, with n the
    steps so far, a = 1 / min(n, spike_window) and d = min(x, b) - mean: mean grows by a * d, and variance becomes
    (1 - a) * (variance + a * d**2). So one spike hardly changes what the next is judged by, and a loss that stays
    higher is taken as usual in the end. A spike ends with the first step below b. Skipped steps do not count.
    """
    spike_window: int = 200
    """Steps over which mean and variance of the loss reach; the first so many of a run are not judged."""
    rollback_steps: int = 100
    """
    Steps before a spike that a checkpoint must be old to be gone back to. Where there is none, the run says so and goes
    on.
    """
    max_rollbacks: int = 5
    """The run stops at the spike after so many rollbacks, counted from its beginning."""


@dataclass
class Parallelism:
    """Defaults that differ from torchtitan's."""

    context_parallel_load_balancer: str | None = None
    """Slices of a row are contiguous: only None."""
    pipeline_parallel_expert_parallel_overlap: bool = False
    """There are no experts: only false."""


@dataclass
class Compile:
    """Defaults that differ from torchtitan's."""

    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model", "loss"])
    """"model": each transformer block, each cross-attention and the hashes of n-grams, one by one; "loss": the loss."""


@dataclass
class Heartbeat:
    """What becomes of a run in which a rank does not get on."""

    limit_seconds: int | None = None
    """
    How long nothing may move in a rank (no phase of a step, no collective) before it looks at all others, says where
    each stands, and ends the run in the name of the one that they wait for. Default: what comm.train_timeout_seconds
    leaves after a tenth of it, 10 s at least; until the first step is made, and while a checkpoint is saved or loaded
    or held-out text scored, of comm.init_timeout_seconds. Where no rank is behind, or there is only one, the default
    warns; a number ends such runs too.
    """


@dataclass
class JobConfig:
    """What is merged into torchtitan's JobConfig."""

    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    data: Data = field(default_factory=Data)
    patching: Patching = field(default_factory=Patching)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    hash_embedding: HashEmbeddingSettings = field(default_factory=HashEmbeddingSettings)
    entropy_model: EntropyModelSettings = field(default_factory=EntropyModelSettings)
    local_blocks: LocalBlocks = field(default_factory=LocalBlocks)
    export: Export = field(default_factory=Export)
    monitor: Monitor = field(default_factory=Monitor)
    failure: Failure = field(default_factory=Failure)
    parallelism: Parallelism = field(default_factory=Parallelism)
    compile: Compile = field(default_factory=Compile)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
