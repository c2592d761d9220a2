r"""The byte-level language model whose next-byte entropy decides where patches begin (paper, section 2.3).

A plain transformer over bytes with a sliding window: the released one attends over 512 bytes, and with full
attention its entropies give the wrong patch sizes.

With `reset_at_newline` a byte sees nothing from before its line: entropies drift down in text that repeats, and the
paper's best model forgets at each newline. A newline belongs to the line that it begins:

    bytes          a  b  \n  c  d  \n  \n  e        position i sees j iff no newline lies in j + 1 .. i
    context        0  0   1  1  1   2   3  3

Letters: B rows, S byte slots, V vocabulary, W window.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn

from blt_titan.batch import PADDING, PatchLayout
from blt_titan.byte_vocab import NEWLINE_ID, VOCAB_SIZE
from blt_titan.model.args import EntropyModelArgs
from blt_titan.model.attention import AttentionMask, window_mask
from blt_titan.model.eager import RMSNorm
from blt_titan.model.initialization import initialize
from blt_titan.model.layers import NORM_EPS, Attend, Rotation, block_stack, rotary_angles, run_blocks
from blt_titan.model.placement import Placement


class EntropyModel(nn.Module):
    """Byte embedding, windowed blocks, norm, untied output."""

    def __init__(self, args: EntropyModelArgs):
        super().__init__()
        args.validate()
        self.args = args
        self.tok_embeddings = nn.Embedding(VOCAB_SIZE, args.dim)
        self.layers = block_stack(args.n_layers, args.dim, args.n_heads, args.ffn_hidden)
        self.norm = RMSNorm(args.dim, eps=NORM_EPS)
        self.output = nn.Linear(args.dim, VOCAB_SIZE, bias=False)
        self.placement = Placement()

    def forward(self, ids_BS: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        """Score the next byte at every slot.

        Args:
            ids_BS: ids, integer [B, S].
            layout: of the rows. This model knows no patches and reads positions and documents of the bytes only; it
                takes them in this form because both models train from one loader.

        Returns:
            Logits, fp32 [B, S, V].
        """
        context_BS = self.contexts(ids_BS, layout.byte_doc_BS)
        return self.run(ids_BS, *self.rotation_and_mask(layout.byte_pos_BS, context_BS))

    def run(
        self,
        ids_BS: torch.Tensor,
        rotation: Rotation,
        mask: AttentionMask,
        attends: Sequence[Attend] | None = None,
    ) -> torch.Tensor:
        """Score the next byte at every slot, whatever else its attention sees.

        Args:
            ids_BS: ids, integer [B, S].
            rotation: of their positions.
            mask: what each byte may see.
            attends: attention of each layer, where it takes keys and values from elsewhere too.

        Returns:
            Logits, fp32 [B, S, V].
        """
        attends = attends or [self.placement.attend_bytes] * len(self.layers)
        h_BSD = run_blocks(self.layers, self.tok_embeddings(ids_BS), rotation, mask, attends)
        return self.output(self.norm(h_BSD)).float()

    def rotation_and_mask(
        self, pos_BS: torch.Tensor, context_BS: torch.Tensor, before_context_BW: torch.Tensor | None = None
    ) -> tuple[Rotation, AttentionMask]:
        """Prepare `run` for bytes at these positions.

        Args:
            pos_BS: integer [B, S].
            context_BS: what `contexts` gives, integer [B, S].
            before_context_BW: of up to W bytes before the first slot, if their keys precede the slots' own.
        """
        args = self.args
        rotation = rotary_angles(pos_BS, head_dim=args.dim // args.n_heads, theta=args.rope_theta)
        mask = window_mask(
            context_BS,
            window=args.window,
            backend=args.attention_backend,
            before_doc_BW=before_context_BW,
            documents=args.varlen_documents,
        )
        return rotation, mask

    def contexts(self, ids_BS: torch.Tensor, byte_doc_BS: torch.Tensor) -> torch.Tensor:
        """Number what a byte may see: its document, or with `reset_at_newline` its line; integer [B, S], PADDING kept.

        Numbers grow along the row. A byte sees only bytes of its own number.
        """
        if not self.args.reset_at_newline:
            return byte_doc_BS
        lines_BS = (ids_BS == NEWLINE_ID).cumsum(1, dtype=byte_doc_BS.dtype)
        return torch.where(byte_doc_BS == PADDING, byte_doc_BS, byte_doc_BS + lines_BS)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw every parameter from the run's seed and its name. There are no buffers, hence no buffer device."""
        initialize(
            self,
            seed=self.args.init_seed,
            depth_scaling=self.args.init_depth_scaling,
            stack_depths={"layers": self.args.n_layers},
            write=self.placement.write_parameter,
        )
