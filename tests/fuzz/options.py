"""The options of each command, with values by what may be made of them."""

from dataclasses import replace

from tests.fuzz.draw import (
    HUGE,
    NOT_INTEGERS,
    NOT_NUMBERS,
    NOT_PLAIN_NAMES,
    NOT_SIZES,
    ODD_COUNTS,
    ODD_NUMBERS,
    ODD_STRINGS,
    Option,
)

NOT_COUNTS = (*NOT_INTEGERS, "0", "-1")
SEED = Option("--seed", ("0", "1", "77"), ("-1", str(2**31), str(2**63), HUGE), NOT_INTEGERS, often=0.2)
DEVICE = Option("--device", ("cpu",), ("cpu:1", "meta"), ("", "x", "cuda", "cuda:7", "cpu:x"), often=0.9)
NAME = Option("--name", ("default",), ("other", "é", ".hidden", "-x", "a" * 300), NOT_PLAIN_NAMES, often=0.2)
MAX_PATCH_BYTES = Option("--max-patch-bytes", ("16", "512"), ("1", "2", str(2**31)), NOT_COUNTS)
THRESHOLD = Option("--threshold", ("1.0", "0.5"), ODD_NUMBERS, NOT_NUMBERS, often=0.15)
NO_PROGRESS = Option("--no-progress", often=0.8)

PREPARE = [
    Option("--validation-fraction", ("0.1", "0", "0.5"), ("1e-300", "0.9999999"), (*NOT_NUMBERS, "1", "-0.1", "2")),
    SEED,
    Option("--max-bytes", ("1KB", "300", "1.5KiB"), ("0", "1", "999999999TB"), NOT_SIZES),
    Option("--record-batch-bytes", ("1KiB", "16KiB", "1"), ("0", "999999TB"), NOT_SIZES),
    Option("--shard-bytes", ("2KiB", "1GiB"), ("0", "1", "999999TB"), NOT_SIZES),
    Option("--text-column", ("text",), ODD_STRINGS),
    Option("--on-error", ("skip", "skip", "stop"), (), ("x", ""), often=0.8),
    Option("--max-record-bytes", ("100", "1MiB"), ("0", "1", "2GB", "999999TB"), NOT_SIZES),
    Option("--memory", ("2GiB",), ("1", "0", "999999TB"), NOT_SIZES, often=0.1),
    Option("--overwrite"),
    NO_PROGRESS,
]
INSPECT = [
    Option("--samples", ("0", "5"), ODD_COUNTS, ("nan", "x", "", "1.5")),
    Option("--no-verify"),
    NO_PROGRESS,
]
SCORE = [
    NAME,
    Option("--quantize", ("float16", "uint8"), (), ("x", "")),
    Option("--dtype", ("float32", "bfloat16"), (), ("float16", "")),
    DEVICE,
    Option("--lanes", ("1", "3"), (HUGE,), NOT_COUNTS),
    Option("--chunk-bytes", ("16", "100"), ("1", HUGE), NOT_COUNTS),
    Option("--verify"),
    NO_PROGRESS,
]
CALIBRATE = [
    Option(
        "--target-patch-bytes", ("2", "4.5", "3"), ("1.0001", "1e300", "600"), (*NOT_NUMBERS, "1", "0", "-2"), often=1
    ),
    Option("--rule", ("global", "monotonic", "add", "topk"), (), ("space", "")),
    Option("--threshold-add", ("0", "0.1"), ODD_NUMBERS, NOT_NUMBERS, often=0.15),
    Option("--name", ("default",), ("other", "é"), NOT_PLAIN_NAMES, often=0.2),
    Option("--split", ("train", "validation"), (), ("test", "")),
    MAX_PATCH_BYTES,
    Option("--segment-patches", ("16", "64", "2"), ("3", "512"), (*NOT_COUNTS, "1"), often=0.6),
    Option("--flavor", ("debug", "1B"), (), ("x", "")),
    Option("--sample-bytes", ("1KB", "64MB"), ("0", "1"), NOT_SIZES),
]
VIEW = [
    Option("--doc", ("0", "3"), ODD_COUNTS, NOT_INTEGERS),
    Option("--split", ("train", "validation"), (), ("test", "")),
    Option("--name", ("default",), ("other",), NOT_PLAIN_NAMES, often=0.2),
    THRESHOLD,
    MAX_PATCH_BYTES,
    Option("--max-bytes", ("10", "4000"), ("20000",), (*NOT_COUNTS, "20001")),
]
ANY_MODEL = [THRESHOLD, DEVICE, Option("--dtype", ("float32", "bfloat16"), (), ("x", ""), often=0.2)]
EVALUATE = [
    *ANY_MODEL,
    Option("--split", ("train", "validation"), (), ("test",), often=0.1),
    Option("--text-column", ("text",), ODD_STRINGS),
    Option("--max-documents", ("1", "2"), (str(2**63),), NOT_COUNTS, often=0.8),
    Option("--context-bytes", ("64", "200"), ("1", "2", "3"), NOT_COUNTS, often=0.7),
    Option("--stride-bytes", ("16", "32"), ("1000", str(2**63)), NOT_COUNTS),
    Option("--noise", ("random_case", "drop"), (), ("x", "")),
    SEED,
]
GENERATE = [
    *ANY_MODEL,
    Option("--batch-size", ("1", "2"), (str(2**63),), NOT_COUNTS),
    Option("--context-bytes", ("1", "20"), (str(2**63),), NOT_COUNTS),
    Option("--max-bytes", ("1", "8", "20"), (HUGE,), NOT_COUNTS, often=1),
    Option("--temperature", ("0", "0.8"), ("1e-320", "1e300"), (*NOT_NUMBERS, "-1")),
    Option("--top-k", ("1", "5"), ("256", "257", str(2**31), str(2**63)), NOT_COUNTS),
    Option("--top-p", ("0.5", "1"), ("1e-320",), (*NOT_NUMBERS, "0", "-1", "1.5")),
    SEED,
    Option("--show-patches"),
]
TO_HF = [
    Option("--dtype", ("fp32", "bf16", "fp16"), (), ("x", "")),
    Option("--max-shard-size", ("30KB", "5GB"), ("0", "1", "999999TB"), NOT_SIZES),
    Option("--threshold", ("1.0", "0.5"), ODD_NUMBERS, NOT_NUMBERS, often=0.1),
    Option("--force"),
    Option("--overwrite"),
]
PORT = Option("--port", ("0",), (), (HUGE, *NOT_INTEGERS, "-1", "65536", str(2**31)), often=1)

JSON = Option("--json")
DRY_RUN = Option("--dry-run", often=0.3)
NO_VERIFY = Option("--no-verify", often=0.2)
NOT_STEPS = (*NOT_INTEGERS, "-1", str(2**63), HUGE)
STEP = Option("--step", ("2", "4", "6"), ("0", "8", "10", str(2**61)), NOT_STEPS, often=0.3)
CHECKPOINT = {
    "list": [JSON],
    "verify": [STEP, JSON, NO_PROGRESS],
    "prune": [
        Option("--keep", ("1", "2", "3"), ("1000000",), (*NOT_COUNTS, HUGE), often=0.7),
        Option("--abandoned"),
        Option("--half-written"),
        DRY_RUN,
        NO_VERIFY,
        NO_PROGRESS,
    ],
    "rollback": [replace(STEP, often=0.95), DRY_RUN, NO_VERIFY, NO_PROGRESS],
}
SLURM = [
    Option("--nodes", ("1", "2"), ("100000",), (*NOT_COUNTS, "100001", HUGE), often=0.97),
    Option("--gpus-per-node", ("1", "8"), ("64",), (*NOT_COUNTS, "65", HUGE)),
    Option("--leave-before", ("60",), ("1", "1000000"), (*NOT_COUNTS, HUGE)),
    Option("--max-restarts", ("0", "3"), ("1000000",), (*NOT_INTEGERS, "-1", HUGE)),
    Option(
        "--array",
        ("0-3", "1,4,7%2", "0-8:2"),
        ("9-1", "0", "0-3%0"),
        ("", "x", "-1", "0-3;rm", "1..3", "0-3\n", "\u0663"),
    ),
    Option(
        "--sbatch",
        ("partition=gpu", "time=24:00:00", "--account=a b"),
        ("nodes=7", "output=/dev/null", "x=\x1b[31m"),
        ("", "gpu", "=x", "partition=", "a\nb=c", "a=b\nc", "UPPER=x"),
    ),
]
WORLD_SIZE = Option("--world-size", ("1", "2"), ("3", "4"), (*NOT_COUNTS, "1000001", HUGE), often=0.97)
GPU = Option("--gpu", ("h100", "h200"), (), ("x", "", "H100"))
ASSUMED = [
    GPU,
    Option("--mfu", ("0.4", "1"), ("1e-320", "1e-300"), (*NOT_NUMBERS, "0", "-1", "1.1")),
    Option("--store", ("2",), ("1e-320", "1e-300", "1e6"), (*NOT_NUMBERS, "0", "-1")),
    Option("--failures", ("0", "1e-4"), ("1e3", "1e-320", "1e-300"), (*NOT_NUMBERS, "-1", "1e4")),
    Option("--restart", ("0", "300"), ("1e6", "1e-320"), (*NOT_NUMBERS, "-1", "1e7")),
]
PLAN = [
    WORLD_SIZE,
    *ASSUMED,
    Option("--network", ("ib400",), (), ("x", ""), often=0.2),
    Option("--price", ("2.5", "0"), ("1e-320", "1e6"), (*NOT_NUMBERS, "-1", "1e7")),
    Option("--tries", ("1",), (), (*NOT_COUNTS, "1001", HUGE), often=0.1),
    JSON,
]
CHECK_CUDA = [
    WORLD_SIZE,
    GPU,
    Option("--rank", ("0",), ("1", "1000000"), (*NOT_INTEGERS, "-1", "1000001", HUGE)),
    replace(JSON, name="--memory-only", often=1),
    JSON,
]
SIMULATE = [
    WORLD_SIZE,
    *ASSUMED,
    Option("--steps", ("2", "3", "6"), ("7",), (*NOT_COUNTS, "1", HUGE), often=0.95),
    Option("--resume-on", ("1", "2"), ("3", "7"), (*NOT_COUNTS, HUGE)),
    Option("--resume-at", ("1", "2"), ("5", str(10**9)), (*NOT_COUNTS, HUGE)),
    Option("--text", ("1MB", "2MB"), ("1.5MB",), (*NOT_SIZES, "0", "1KB", "999999TB"), often=1),
    Option("--record-batch-bytes", ("4096", "16KiB"), ("16MiB",), (*NOT_SIZES, "0", "1", "1GiB"), often=0.9),
    Option("--step-seconds", ("2.1",), ("1e-320", "1e-300", "1e6"), (*NOT_NUMBERS, "0", "-1", "1e7")),
    Option("--straggle", ("0", "0.01"), ("100", "1e-320"), (*NOT_NUMBERS, "-1", "101")),
    Option("--intervals", ("1", "100"), (str(10**9),), (*NOT_COUNTS, HUGE)),
    Option("--histories", ("2",), (), (*NOT_COUNTS, "1", "1001"), often=1),
    SEED,
    JSON,
]
