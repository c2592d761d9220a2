"""What the commands of the grammar are called on the command line."""

VERB_OF = {
    "calibrate_threshold": "calibrate",
    "convert_from_hf": "import",
    "convert_to_hf": "export",
    "evaluate": "evaluate",
    "generate": "generate",
    "inspect_data": "inspect",
    "prepare_data": "prepare",
    "score_entropies": "score",
    "serve_plots": "plots",
    "view_patches": "view",
}
"""The names that `FUZZ_COMMAND` takes, which are those of `scripts/`, and the verbs of `blt-titan`."""
