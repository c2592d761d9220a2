"""To and from Hugging Face: our model <-> a `transformers` BltForCausalLM directory, fp32 on the CPU."""

from blt_titan.interop.hf_files import load_hf, load_hf_entropy_model, save_hf

__all__ = ["load_hf", "load_hf_entropy_model", "save_hf"]
