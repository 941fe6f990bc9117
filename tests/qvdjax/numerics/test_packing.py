"""Packed codes against a slow reference that handles one bit at a time with Python integers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvdjax.numerics.packing import pack_bits, packed_width, unpack_bits


def reference_words(row: list[int], bits: int) -> list[int]:
    """One row as signed 32-bit words, by arithmetic on one big integer."""
    stream = sum((code + (1 << (bits - 1))) << (i * bits) for i, code in enumerate(row))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@st.composite
def matrices(draw):
    bits = draw(st.integers(2, 8))
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    seed = draw(st.integers(0, 2**32 - 1))
    half = 1 << (bits - 1)
    return bits, np.random.default_rng(seed).integers(-half, half, (rows, width)).astype(np.int8)


@settings(deadline=None)
@given(matrices())
def test_packing_equals_the_reference_and_unpacks_to_the_same_codes(case):
    bits, codes = case
    packed = pack_bits(codes, bits)
    assert packed.dtype == np.int32
    assert packed.tolist() == [reference_words(row.tolist(), bits) for row in codes]
    np.testing.assert_array_equal(unpack_bits(packed, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_and_leading_axes_survive(bits):
    half = 1 << (bits - 1)
    codes = np.resize(np.arange(-half, half, dtype=np.int8), (2, 3, 2 * half + 1))
    packed = pack_bits(codes, bits)
    assert packed.shape == (2, 3, packed_width(2 * half + 1, bits))
    unpacked = unpack_bits(packed, bits, codes.shape[-1])
    assert unpacked.dtype == np.int8
    np.testing.assert_array_equal(unpacked, codes)


def test_slices_of_rows_join_without_a_seam(monkeypatch):
    codes = np.random.default_rng(0).integers(-4, 4, (37, 11)).astype(np.int8)
    whole = pack_bits(codes, 3)
    monkeypatch.setattr("qvdjax.numerics.packing._CODES_AT_A_TIME", 25)
    np.testing.assert_array_equal(pack_bits(codes, 3), whole)
    np.testing.assert_array_equal(unpack_bits(whole, 3, 11), codes)


def test_four_bits_are_low_nibble_first():
    # Codes -8, -7 are stored as 0, 1: the first byte holds the first code in its low half.
    assert pack_bits(np.array([[-8, -7, -6, -5]], np.int8), 4).view(np.uint8).tolist() == [[0x10, 0x32, 0, 0]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        pack_bits(np.array([[8]], np.int8), 4)
    with pytest.raises(ValueError, match="bits must be"):
        pack_bits(np.array([[0]], np.int8), 9)
    with pytest.raises(ValueError, match="words a row"):
        unpack_bits(np.zeros((1, 2), np.int32), 4, 8)
