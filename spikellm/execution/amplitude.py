"""A token's amplitude on its way to the Linears that read its spikes (`snn.amplitude=token`): m, its largest |x|.

A norm's spikes reach their readers through transformers' forwards, which may pass some of the tokens alone (`logits_to_keep`), and m has to
arrive with the spikes that it belongs to. It travels behind them, as the bits of its floating-point number: wires that carry 0 or 1, 32
or 64 a token, so that what leaves a norm is spikes alone.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

NUMBERS = {32: (torch.int32, torch.float32), 64: (torch.int64, torch.float64)}  # of so many bits, which spell the numbers


def attached(spikes: Int8[Tensor, "*wires W"], amplitude: Float[Tensor, "*#wires 1"] | None) -> Int8[Tensor, "*wires W_and_bits"]:
    """The spikes with m behind them; alone where there is none."""
    if amplitude is None:
        return spikes
    width = 8 * amplitude.itemsize
    bits = amplitude.contiguous().view(NUMBERS[width][0]) >> torch.arange(width, device=spikes.device) & 1
    return torch.cat([spikes, bits.to(torch.int8).expand(*spikes.shape[:-1], width)], -1)


def detached(train: Int8[Tensor, " S *rows W_and_bits"], width: int) -> tuple[Int8[Tensor, " S *rows W"], Float[Tensor, "*rows 1"] | None]:
    """The inverse of `attached`, of a train; width: bits of a number, 0 where there is none."""
    if not width:
        return train, None
    integer, number = NUMBERS[width]
    bits = train[0, ..., -width:].long() << torch.arange(width, device=train.device)
    return train[..., :-width], bits.sum(-1, keepdim=True).to(integer).view(number)
