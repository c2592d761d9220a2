"""The options of each command, with values by what may be made of them."""

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
