"""The relation that both cross-attentions have in common, on the CPU: pairs of a byte and a slot of its patch.

A byte with a patch makes k pairs in each head. Encoder and decoder need three things of them, and differ only in which
side asks: a number per pair from the vectors of both, and sums over the pairs of a byte or of a slot. All three read
vectors where they lie, by row number, as bags of an embedding do: no [B, S, k, d] tensor is made.

    k = 2, one head, bytes a b | c in patches 0 and 1 with slots 0 1 | 2 3:  pairs a0 a1 b0 b1 c2 c3

Letters: B rows, S byte slots, P patch slots, N slots of a patch (k), H heads, K head size, d = H * K.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

_SUM = 0
"""The mode of a bag in torch's operators."""


@dataclass(frozen=True)
class Pairs:
    """Which byte meets which slot. Vectors are taken and given in the dtype that sums are made in."""

    is_real_BS11: torch.Tensor
    """Whether the byte has a patch: bool. The pairs of a byte without one count 0."""
    byte_row_BSHN: torch.Tensor
    """Row of the pair's byte among the vectors [B * S * H, K]."""
    slot_row_BSHN: torch.Tensor
    """Row of the pair's slot among the vectors [B * P * N * H, K]; some row where the byte has no patch."""

    @classmethod
    def of_bytes(cls, patch_BS: torch.Tensor, is_real_BS: torch.Tensor, P: int, N: int, H: int) -> "Pairs":
        """Number the pairs of bytes whose patches are known; `patch_BS` is at least 0 everywhere."""
        B, S = patch_BS.shape
        # int32 bags are several times as fast.
        dtype = torch.int32 if B * max(S, P * N) * H * N < 2**31 else torch.int64
        byte_row = torch.arange(B * S * H, dtype=dtype).view(B, S, H, 1).expand(B, S, H, N).contiguous()
        first_slot_BS = (patch_BS + torch.arange(B, dtype=dtype)[:, None] * P).to(dtype) * (N * H)
        slot_row = first_slot_BS[..., None, None] + torch.arange(N * H, dtype=dtype).view(N, H).T.contiguous()
        return cls(is_real_BS[..., None, None], byte_row, slot_row)

    def dots(self, byte_BSHK: torch.Tensor, slot_BPNHK: torch.Tensor) -> torch.Tensor:
        """Multiply the vectors of both sides: a dot product for each pair, [B, S, H, N]."""
        K = byte_BSHK.shape[-1]
        byte_row, slot_row = self.byte_row_BSHN.flatten(), self.slot_row_BSHN.flatten()
        # A bag's gradient for its weights is this dot product; the offsets are not read where each pair names its bag.
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            byte_BSHK.reshape(-1, K), slot_BPNHK.reshape(-1, K), slot_row, byte_row[:1], byte_row, _SUM
        )
        return dots.view(self.slot_row_BSHN.shape)

    def sum_to_bytes(self, weight_BSHN: torch.Tensor, slot_BPNHK: torch.Tensor) -> torch.Tensor:
        """Sum the slots' vectors over the pairs of each byte, weighted: [B, S, H, K]."""
        B, S, H, N = self.slot_row_BSHN.shape
        K = slot_BPNHK.shape[-1]
        begin = torch.arange(0, B * S * H * N, N, dtype=self.slot_row_BSHN.dtype)
        rows, slots = self.slot_row_BSHN.flatten(), slot_BPNHK.reshape(-1, K)
        return F.embedding_bag(rows, slots, begin, mode="sum", per_sample_weights=weight_BSHN.reshape(-1)).view(
            B, S, H, K
        )

    def sum_to_slots(self, weight_BSHN: torch.Tensor, byte_BSHK: torch.Tensor, first_BP1: torch.Tensor) -> torch.Tensor:
        """Sum the bytes' vectors over the pairs of each slot, weighted, by 0 without a patch: [B, P, N, H, K]."""
        B, S, H, N = self.slot_row_BSHN.shape
        P, K = first_BP1.shape[1] - 1, byte_BSHK.shape[-1]
        # Slot by slot, the bytes of all rows one after another: then a patch is a run there too. What lies between the
        # last run of a row and the first of the next is added to the former; it has weight 0.
        dtype = self.slot_row_BSHN.dtype
        begin_BP = torch.arange(B, dtype=dtype)[:, None] * S + first_BP1[:, :-1]
        begin_NHBP = torch.arange(N * H, dtype=dtype).view(N, H, 1, 1) * (B * S) + begin_BP
        begin = begin_NHBP.flatten()
        begin[:1] = 0
        rows_NHBS, weight_NHBS = (x.permute(3, 2, 0, 1).flatten() for x in (self.byte_row_BSHN, weight_BSHN))
        bags = F.embedding_bag(rows_NHBS, byte_BSHK.reshape(-1, K), begin, mode="sum", per_sample_weights=weight_NHBS)
        return bags.view(N, H, B, P, K).permute(2, 3, 0, 1, 4).contiguous()
