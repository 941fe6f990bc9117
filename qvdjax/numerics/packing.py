"""Dense bit streams: how codes of fewer than eight bits lie on disk. Plain NumPy, on the host."""

import math

import numpy as np

_CODES_AT_A_TIME = 1 << 20  # a slice of rows holding about this many codes bounds the temporary arrays


def packed_width(width: int, bits: int) -> int:
    """Number of 32-bit words that hold `width` codes of `bits` bits."""
    return math.ceil(width * bits / 32)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack signed codes into 32-bit words, row by row.

    Row by row along the last axis: code q is stored as the unsigned number q + 2**(bits-1), lowest bit
    first, with nothing between two codes; the last word is filled up with zero bits. This is byte for byte
    the `weight_packed` of compressed-tensors (`compressors/pack_quantized`, `pack_to_int32`).

    Args:
        codes: int8 [..., out, in], each in [-2**(bits-1), 2**(bits-1) - 1].
        bits: 1 to 8.

    Returns:
        int32 [..., out, ceil(in * bits / 32)].

    Raises:
        ValueError: A code does not fit, or `bits` is out of range.
    """
    _check_bits(bits)
    codes = np.asarray(codes, np.int8)
    half, width = 1 << (bits - 1), codes.shape[-1]
    if codes.size and (codes.min() < -half or codes.max() >= half):
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit {bits} bits")
    rows = codes.reshape(-1, width)  # [..., out, in] -> [rows, in]
    words = np.zeros((len(rows), packed_width(width, bits)), "<i4")
    octets = words.view(np.uint8)
    step = max(1, _CODES_AT_A_TIME // max(width, 1))
    for start in range(0, len(rows), step):
        # Adding half modulo 256 and taking the low bits equals q + 2**(bits-1).
        unsigned = rows[start : start + step].view(np.uint8) + np.uint8(half)
        stream = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little")  # [rows, in, bits]
        stream = stream.reshape(len(unsigned), width * bits)  # [rows, in, bits] -> [rows, (in bits)]
        packed = np.packbits(stream, axis=-1, bitorder="little")  # [rows, octets]
        octets[start : start + step, : packed.shape[1]] = packed
    return words.reshape(*codes.shape[:-1], words.shape[-1])  # [rows, words] -> [..., out, words]


def unpack_bits(packed: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Inverse of `pack_bits`.

    Args:
        packed: int32 [..., out, ceil(width * bits / 32)].
        bits: 1 to 8.
        width: Codes a row.

    Returns:
        int8 [..., out, width].

    Raises:
        ValueError: The number of words is not what `width` codes of `bits` bits need, or `bits` is out of
            range.
    """
    _check_bits(bits)
    packed = np.ascontiguousarray(packed, "<i4")
    words = packed_width(width, bits)
    if packed.shape[-1] != words:
        raise ValueError(f"{width} codes of {bits} bits take {words} words a row, not {packed.shape[-1]}")
    octets = packed.reshape(-1, words).view(np.uint8)  # [..., out, words] -> [rows, octets]
    codes = np.empty((len(octets), width), np.int8)
    half = np.uint8(1 << (bits - 1))
    step = max(1, _CODES_AT_A_TIME // max(width, 1))
    for start in range(0, len(octets), step):
        stream = np.unpackbits(octets[start : start + step], axis=-1, count=width * bits, bitorder="little")
        unsigned = np.zeros((len(stream), width), np.uint8)
        for bit in range(bits):
            unsigned |= stream[:, bit::bits] << np.uint8(bit)
        codes[start : start + step] = (unsigned - half).view(np.int8)
    return codes.reshape(*packed.shape[:-1], width)  # [rows, in] -> [..., out, in]


def _check_bits(bits: int):
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {bits}")
