"""Little-endian bit streams: code i of a row occupies bits [i*b, (i+1)*b), bit 0 = lowest bit of byte 0."""

from __future__ import annotations

import math

import torch

from ..spec import packed_bytes


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes (..., K) uint8, values below 2^bits, into (..., ceil(K*bits/8)) uint8; spare bits are 0."""
    count = codes.shape[-1]
    if bits == 8:
        return codes.contiguous().clone()
    per_period, period_bytes = _period(bits)
    periods = math.ceil(count / per_period)
    padded = torch.nn.functional.pad(codes, (0, periods * per_period - count))
    lanes = padded.reshape(*codes.shape[:-1], periods, per_period).to(torch.int16)
    packed = torch.zeros(*lanes.shape[:-1], period_bytes, dtype=torch.int16, device=codes.device)
    for lane in range(per_period):
        byte, shift = divmod(lane * bits, 8)
        spread = lanes[..., lane] << shift
        packed[..., byte] |= spread & 0xFF
        if shift + bits > 8:
            packed[..., byte + 1] |= spread >> 8
    flat = packed.to(torch.uint8).reshape(*codes.shape[:-1], periods * period_bytes)
    return flat[..., : packed_bytes(count, bits)].contiguous()


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Undo pack_bits: (..., ceil(count*bits/8)) uint8 to codes (..., count) uint8."""
    if bits == 8:
        return packed[..., :count]
    per_period, period_bytes = _period(bits)
    periods = math.ceil(count / per_period)
    padded = torch.nn.functional.pad(packed, (0, periods * period_bytes - packed.shape[-1]))
    words = padded.reshape(*packed.shape[:-1], periods, period_bytes)
    codes = torch.empty(*words.shape[:-1], per_period, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for lane in range(per_period):
        byte, shift = divmod(lane * bits, 8)
        value = words[..., byte] >> shift
        if shift + bits > 8:
            value = value | (words[..., byte + 1] << (8 - shift))
        codes[..., lane] = value & mask
    return codes.reshape(*packed.shape[:-1], periods * per_period)[..., :count]


def _period(bits: int) -> tuple[int, int]:
    """Return (codes, bytes) after which a code starts on a byte border again."""
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8
