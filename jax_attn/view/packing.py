"""A map in few bytes: 8 or 16 bits for each weight, relative to its row's largest."""

import zlib

import numpy as np

# A weight w of a row whose largest is m is stored as c = levels · (w / m)^(1/3), rounded. The cubic
# root gives small weights the finer steps that their size needs.
POWER = 3


def error(bits: int) -> float:
    """How far a weight that is read back may be off, as a share of its row's largest.

        half a step at the top, 1 - (1 - 0.5 / levels)^3, and what float32 rounds

    Args:
      bits: 8 or 16.
    Returns: the bound.
    Example:
      >>> [f"{error(bits):.4%}" for bits in (8, 16)]
      ['0.5872%', '0.0024%']
    """
    return 1 - (1 - 0.5 / (2**bits - 1)) ** POWER + 1e-6


def pack_map(weights_TS: np.ndarray, bits: int) -> bytes:
    """Compress a map.

    Before compression, little-endian: each row's largest weight in float32, then an unsigned
    integer for each weight, row by row. Only a weight that is exactly 0 in float32 becomes 0.

    Args:
      weights_TS: a checked map.
      bits: of the integers, 8 or 16.
    Returns: a raw DEFLATE stream.
    Example:
      >>> packed = pack_map(np.array([[1.0, 0.0], [0.25, 0.75]], np.float32), 8)
      >>> unpack_map(packed, 2, 2, 8).round(3).tolist()
      [[1.0, 0.0], [0.251, 0.75]]
    """
    weights_TS = weights_TS.astype(np.float32)
    largest_T = weights_TS.max(-1)
    share_TS = weights_TS / np.where(largest_T == 0, 1, largest_T)[:, None]
    codes_TS = np.rint((2**bits - 1) * np.cbrt(share_TS))
    codes_TS = np.where(weights_TS > 0, np.maximum(codes_TS, 1), 0).astype(f"<u{bits // 8}")
    return deflate(largest_T.astype("<f4").tobytes() + codes_TS.tobytes())


def unpack_map(packed: bytes, T: int, S: int, bits: int) -> np.ndarray:
    """Read a packed map back, as the page does.

    Args:
      packed: what `pack_map` returned.
      T, S: the map's size.
      bits: as it was packed.
    Returns: [T, S], each weight off by at most `error(bits)` of its row's largest; 0 is exact.
    Example:
      >>> unpack_map(pack_map(np.zeros((1, 3)), 16), 1, 3, 16).tolist()
      [[0.0, 0.0, 0.0]]
    """
    raw = zlib.decompress(packed, wbits=-zlib.MAX_WBITS)
    largest_T = np.frombuffer(raw, "<f4", T)
    codes_TS = np.frombuffer(raw, f"<u{bits // 8}", T * S, offset=4 * T).reshape(T, S)
    return largest_T[:, None] * (codes_TS / (2**bits - 1)) ** POWER


def deflate(raw: bytes) -> bytes:
    """Compress bytes as browsers read them back: raw DEFLATE, without a header.

    Args:
      raw: what to compress.
    Returns: the stream.
    Example:
      >>> zlib.decompress(deflate(b"aaa"), wbits=-zlib.MAX_WBITS)
      b'aaa'
    """
    squeeze = zlib.compressobj(level=6, wbits=-zlib.MAX_WBITS)
    return squeeze.compress(raw) + squeeze.flush()
