"""The model card of an exported model: what it is, how it is used, and what `transformers` does otherwise."""

from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.patching.rounding import decision_edge
from blt_titan.patching.rule import PatchRule

OLDEST_TRANSFORMERS = "5.23.0"
"""The first release that has the local window; `make test-oldest` tests it."""
NEWEST_TRANSFORMERS = "5.24.0"
"""The newest that was tested; scripts/constraints.txt installs it."""


def model_card(
    args: BLTArgs,
    entropy_args: EntropyModelArgs | None,
    rule: PatchRule | None,
    *,
    parameters: int,
    dtype: str,
    origin: str,
    alone: str | None,
    cut_share: float | None = None,
) -> str:
    """Return the README.md of a model directory.

    Args:
        args: of the BLT.
        entropy_args: of its entropy model, or None.
        rule: where patches begin.
        parameters: of all tensors.
        dtype: of the weights.
        origin: where the weights come from, for a reader.
        alone: why `transformers` cannot cut texts by itself, or None if it can.
        cut_share: of the training text's patches, that begin only because the one before was full; None if unknown.
    """
    hashes = args.hash_functions * len(args.hash_ngrams) * args.hash_rows * args.local_dim
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [blt, byte-level, tokenizer-free]",
        "---",
        "",
        "# Byte Latent Transformer",
        "",
        "A byte-level language model ([arXiv 2412.09871](https://arxiv.org/abs/2412.09871)) trained with blt_titan.",
        "",
        f"- weights: {parameters:,} parameters in {dtype}, {hashes:,} of them hash tables that are only looked up; "
        f"from {origin}",
        f"- encoder {args.encoder_layers} x {args.local_dim}, global transformer {args.global_layers} x "
        f"{args.global_dim}, decoder {args.decoder_layers} x {args.local_dim}; local window {args.local_window} bytes",
    ]
    if entropy_args is not None:
        lines.append(
            f"- entropy model {entropy_args.n_layers} x {entropy_args.dim}, window {entropy_args.window} bytes, inside "
            "as the patcher"
        )
    if rule is not None:
        settings = ", ".join(f"{key} {value}" for key, value in rule.as_settings().items() if value is not None)
        lines.append(f"- patches: {settings}")
    lines += ["", "## Use", "", "```python", *_use(alone)]
    lines += [
        "```",
        "",
        "With blt_titan, cached and many times as fast: "
        f'`blt-titan generate --model THIS_DIRECTORY{_needs(alone, rule)} --prompt "The quick brown"`.',
        "",
        "## What to know",
        "",
        f"- transformers {OLDEST_TRANSFORMERS} or later. Older releases attend over the whole text where the model "
        f"was trained with a window of {args.local_window} bytes: from there on they compute something else. "
        f"Tested with {OLDEST_TRANSFORMERS}, the oldest that can express the model, and {NEWEST_TRANSFORMERS}.",
        "- `use_cache` must stay false: with a cache, transformers' BLT fails or is silently wrong.",
        "- One document per row, padded on the right; there is no document mask, so nothing may follow `</s>`.",
    ]
    lines += _differences(alone, rule, cut_share)
    return "\n".join(lines) + "\n"


def _use(alone: str | None) -> list[str]:
    """Return lines of Python that use the model."""
    if alone is None:
        return [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")',
            'inputs = tokenizer("The quick brown", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))",
        ]
    return [
        "# This model cannot cut texts by itself: lengths of patches, [1, ...] with sum S + 1, must be given.",
        "model(input_ids, patch_lengths=patch_lengths, use_cache=False)",
    ]


def _differences(alone: str | None, rule: PatchRule | None, cut_share: float | None) -> list[str]:
    """Return lines that say where `transformers` cuts texts otherwise than training did."""
    lines = []
    if alone is not None:
        lines.append(f"- transformers cannot cut texts as this model was trained: {alone}.")
    elif rule is not None:
        low, high = decision_edge(float(rule.threshold or 0), rule.storage)
        lines.append(
            f"- Entropies were rounded to {rule.storage} in training, and transformers does not round. "
            + (
                f"The threshold lies amid two of its values, where that moves no boundary but those within 1e-4 nats "
                f"of {low}."
                if low == high
                else f"Where an entropy lies from {low} to {high} nats the two cut otherwise."
            )
        )
        lines.append(
            "- The patcher's weights are in float32, whatever the others are. Loaded in a smaller dtype, as "
            "transformers does by default, it cuts some texts elsewhere."
        )
        if rule.max_patch_bytes is not None:
            share = (
                f"That concerned {cut_share:.3%} of the training text's patches."
                if cut_share is not None
                else "How many that concerned is not known here; `blt-titan calibrate` prints it."
            )
            lines.append(
                f"- In training patches longer than {rule.max_patch_bytes} bytes were split; transformers leaves them "
                f"whole. {share}"
            )
    return lines


def _needs(alone: str | None, rule: PatchRule | None) -> str:
    """Return the options without which blt_titan cannot cut texts for a model that cannot by itself."""
    if alone is None or (rule is not None and not rule.by_entropy):
        return ""
    return " --entropy-checkpoint ENTROPY_MODEL" + (" --threshold NATS" if rule is None else "")
