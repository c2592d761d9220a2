"""Train a Byte Latent Transformer in plain PyTorch on a text file, then let it write. No torchtitan, no shards.

    python examples/plain_pytorch.py --file README.md
    python examples/plain_pytorch.py --file shakespeare.txt --steps 2000 --device cuda

A model takes ids and the lengths of their patches, and returns logits. Where patches begin is decided beside it, by a
`Patcher`; here after spaces, which needs no entropy model.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from blt_titan import BLT, ByteTokenizer, Patcher, generate
from blt_titan.model.args import BLTArgs

ARGS = BLTArgs(
    local_dim=96,
    local_heads=4,
    local_window=64,
    local_ffn_hidden=256,
    decoder_layers=2,
    global_dim=192,
    global_heads=4,
    global_layers=3,
    global_ffn_hidden=512,
    cross_attn_heads=4,
    hash_rows=2003,
    # The faster FlexAttention of GPUs is compiled for each shape, and here batches differ in their number of patches.
    attention_backend="sdpa",
)


def draw_batch(text: bytes, patcher: Patcher, rows: int, n_bytes: int) -> tuple[torch.Tensor, ...]:
    """Cut random windows out of a text: inputs [B, S], patch lengths [B, P], targets [B, S]."""
    begins = torch.randint(len(text) - n_bytes + 1, (rows,)).tolist()
    windows = [text[begin : begin + n_bytes] for begin in begins]
    ids = ByteTokenizer()(windows, return_tensors="pt")["input_ids"]
    # The last byte is a target only, so it belongs to no patch; shorter rows of lengths end with zeros.
    lengths = patcher.patch_lengths([window[:-1] for window in windows])
    return ids[:, :-1], pad_sequence([torch.tensor(row) for row in lengths], batch_first=True), ids[:, 1:]


def main() -> None:
    """Train, then continue the beginning of the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="the text to learn")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    text, patcher = args.file.read_bytes(), Patcher("space", max_patch_bytes=32)
    model = BLT(ARGS)
    model.init_weights()
    model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, args.steps + 1):
        inputs, lengths, targets = (t.to(args.device) for t in draw_batch(text, patcher, rows=8, n_bytes=256))
        loss = F.cross_entropy(model.logits(inputs, lengths).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0 or step == args.steps:
            print(f"step {step}: {loss.item() / torch.log(torch.tensor(2.0)).item():.3f} bits per byte")
    prompt = text[:40].decode(errors="replace")
    print(prompt + generate(model.eval(), prompt, rule=patcher.rule, max_bytes=120, temperature=0.7))


if __name__ == "__main__":
    main()
