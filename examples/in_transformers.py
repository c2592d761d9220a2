"""An exported model in `transformers`, offline, beside the same model here.

`make demo` trains one; then

    blt-titan export --checkpoint outputs/demo --entropy-checkpoint outputs/demo/entropy --out blt-demo
    pip install -c scripts/constraints.txt transformers
    python examples/in_transformers.py --model blt-demo --prompt "def main"

`transformers` cuts texts by one entropy threshold; of models with another rule it wants `patch_lengths`, which a
`Patcher` gives.
"""

import argparse
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from blt_titan import BLT, ByteTokenizer, generate


def main() -> None:
    """Continue a prompt on both sides, by the likeliest byte."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory that `blt-titan export` wrote")
    parser.add_argument("--prompt", default="def main")
    parser.add_argument("--max-bytes", type=int, default=40)
    args = parser.parse_args()

    theirs: Any = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    inputs = tokenizer(args.prompt, return_tensors="pt")
    assert inputs["input_ids"].equal(ByteTokenizer()(args.prompt, return_tensors="pt")["input_ids"])
    ids = theirs.generate(**inputs, max_new_tokens=args.max_bytes, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"transformers: {tokenizer.decode(ids, skip_special_tokens=True)!r}")

    ours = BLT.from_pretrained(args.model)
    print(f"blt_titan:    {generate(ours, args.prompt, max_bytes=args.max_bytes, temperature=0)!r}")


if __name__ == "__main__":
    main()
