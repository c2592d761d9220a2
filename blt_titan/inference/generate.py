"""Sample bytes one at a time by recomputing the whole row: simple, exact and slow, for short texts.

The patching rule decides at each byte whether the next one begins a patch, from the bytes so far, exactly as in
training; so the sampled text is what the trained model would say.
"""

import numpy as np
import torch

from blt_titan.byte_vocab import BOS_ID, BYTE_OFFSET, EOS_ID, bytes_to_ids
from blt_titan.data.packing import MarkPatchStarts
from blt_titan.model.blt import BLT
from blt_titan.patching import starts_to_lengths


@torch.no_grad()
def complete(
    model: BLT,
    prompt: bytes,
    *,
    mark_starts: MarkPatchStarts,
    max_bytes: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> bytes:
    """Continue `prompt` until EOS or `max_bytes`.

    Args:
        model: in evaluation mode, on any device.
        prompt: beginning of a document; may be empty.
        mark_starts: the rule the model was trained with, bool [N + 1] from ids [N]: it also says whether the next
            position starts a patch (`include_next`).
        max_bytes: bytes to sample at most.
        temperature: divides the logits; 0 takes the likeliest byte.
        seed: of the sampling.

    Returns:
        The bytes sampled, without the prompt.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = [BOS_ID, *bytes_to_ids(prompt).tolist()]
    n_prompt = len(ids)
    while len(ids) < n_prompt + max_bytes:
        lengths = starts_to_lengths(mark_starts(np.array(ids, dtype=np.int16)))
        logits = model.logits(torch.tensor([ids], device=device), torch.from_numpy(lengths).to(device)[None])[
            0, -1
        ].cpu()
        logits[:BYTE_OFFSET][torch.arange(BYTE_OFFSET) != EOS_ID] = -torch.inf
        if temperature == 0:
            next_id = int(logits.argmax())
        else:
            next_id = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if next_id == EOS_ID:
            break
        ids.append(next_id)
    return bytes(i - BYTE_OFFSET for i in ids[n_prompt:])
