"""NF4 with double quantization as the QLoRA paper states it (arXiv 2305.14314, sections 2-3, appendix E): slow, in
plain torch and scipy, one block at a time, sharing no code with bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.stats import norm

BLOCK, SECOND_BLOCK = 64, 256


def nf4_code() -> torch.Tensor:
    """The 16 values of NF4, ascending, shape (16,): quantiles of N(0, 1), 8 of them on the negative side and 9 on
    the positive, which share an exact zero, scaled to [-1, 1]."""
    # The outermost quantile: half-way between those of 2^4 and 2^4 - 1 values, so that neither tail is infinite.
    offset = 1 - (1 / 32 + 1 / 30) / 2
    negative = [-norm.ppf(0.5 + (offset - 0.5) * i / 7) for i in range(7, 0, -1)]
    positive = [norm.ppf(0.5 + (offset - 0.5) * i / 8) for i in range(1, 9)]
    values = torch.tensor([*negative, 0.0, *positive], dtype=torch.float64)
    return (values / values.abs().max()).float()


def dynamic_code() -> torch.Tensor:
    """The 256 values of the signed 8-bit dynamic data type, ascending, shape (256,) (Dettmers, arXiv 2110.02861): a
    sign bit, e zeros, a bit set to one, and the other bits as a linear fraction between 0.1 and 1, times 10^-e."""
    values = [0.0, 1.0]
    for zeros in range(7):
        n = 2 ** (6 - zeros)
        edges = [0.1 + 0.9 * i / n for i in range(n + 1)]
        for low, high in pairwise(edges):
            middle = (low + high) / 2 * 10.0**-zeros
            values += [middle, -middle]
    return torch.tensor(sorted(values), dtype=torch.float64).float()


@dataclass
class Quantized:
    """codes (n,) of the weights; codes2 (blocks,), absmax2 (blocks of blocks,) and the mean of the first constants."""

    codes: torch.Tensor
    codes2: torch.Tensor
    absmax2: torch.Tensor
    mean: torch.Tensor


def nearest(values: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    return (values[:, None] - code[None]).abs().argmin(dim=1)


def quantize(weight: torch.Tensor) -> Quantized:
    """`weight` of any shape, in row-major order."""
    code, code2 = nf4_code(), dynamic_code()
    blocks = weight.float().flatten().split(BLOCK)
    constants = torch.stack([block.abs().max() for block in blocks])
    codes = torch.cat([nearest(block / c, code) for block, c in zip(blocks, constants, strict=True)])
    mean = constants.mean()
    centered = (constants - mean).split(SECOND_BLOCK)
    absmax2 = torch.stack([block.abs().max() for block in centered])
    codes2 = torch.cat([nearest(block / c, code2) for block, c in zip(centered, absmax2, strict=True)])
    return Quantized(codes, codes2, absmax2, mean)


def dequantize(q: Quantized, shape: torch.Size, code=None, code2=None) -> torch.Tensor:
    """The weights, float32, in `shape`; by other code books if given."""
    code = nf4_code() if code is None else code
    code2 = dynamic_code() if code2 is None else code2
    constants = torch.cat(
        [code2[codes] * c + q.mean for codes, c in zip(q.codes2.split(SECOND_BLOCK), q.absmax2, strict=True)]
    )
    blocks = [code[codes] * c for codes, c in zip(q.codes.split(BLOCK), constants, strict=True)]
    return torch.cat(blocks).reshape(shape)
