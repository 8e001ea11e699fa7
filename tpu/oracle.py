"""Attention as a layer, forward and gradient, in float64 NumPy: written out, nothing shared."""

from collections.abc import Mapping

import numpy as np

Array = np.ndarray


def attend(
    params: Mapping[str, Array], x_BTD: Array, dy_BTD: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Attend causally, and take the gradient of sum(y · dy) by hand.

        y = concat_n(softmax(q_n k_g^T / sqrt(H)) v_g) Wo,  g = n // (N / K)

    Args:
      params: {"wq_DNH", "wk_DKH", "wv_DKE", "wo_NED"}; N a multiple of K.
      x_BTD: tokens.
      dy_BTD: the cotangent of y.
    Returns: {"y"}, and gradients with the names of `params` and "x", all float64.
    Example:
      >>> ones = {"wq_DNH": np.ones((3, 2, 5)), "wk_DKH": np.ones((3, 1, 5))}
      >>> ones |= {"wv_DKE": np.ones((3, 1, 7)), "wo_NED": np.ones((2, 7, 3))}
      >>> out, grad = attend(ones, np.ones((1, 4, 3)), np.ones((1, 4, 3)))
      >>> out["y"][0, 0].tolist(), grad["x"].shape  # 3 sums of 14 values, each 3
      ([42.0, 42.0, 42.0], (1, 4, 3))
    """
    wq, wk, wv, wo = (
        np.asarray(params[name], np.float64) for name in ("wq_DNH", "wk_DKH", "wv_DKE", "wo_NED")
    )
    x, dy = np.asarray(x_BTD, np.float64), np.asarray(dy_BTD, np.float64)
    (_, N, H), K, T = wq.shape, wk.shape[1], x.shape[1]
    # Each query head with its own copy of keys and values; their gradients are summed again below.
    group = np.arange(N) // (N // K)
    q = np.einsum("BTD,DNH->BNTH", x, wq)
    k = np.einsum("BTD,DNH->BNTH", x, wk[:, group])
    v = np.einsum("BTD,DNE->BNTE", x, wv[:, group])
    s = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(2, 3) / np.sqrt(H), -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = p @ v
    y = np.einsum("BNTE,NED->BTD", o, wo)

    do = np.einsum("BTD,NED->BNTE", dy, wo)
    dp = do @ v.swapaxes(2, 3)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(H)
    dq, dk, dv = ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ do
    dx = np.einsum("BNTH,DNH->BTD", dq, wq) + np.einsum("BNTH,DNH->BTD", dk, wk[:, group])
    dx += np.einsum("BNTE,DNE->BTD", dv, wv[:, group])

    def grouped(each: Array) -> Array:
        return each.reshape(each.shape[0], K, N // K, each.shape[2]).sum(2)

    return {"y": y}, {
        "x": dx,
        "wq_DNH": np.einsum("BTD,BNTH->DNH", x, dq),
        "wk_DKH": grouped(np.einsum("BTD,BNTH->DNH", x, dk)),
        "wv_DKE": grouped(np.einsum("BTD,BNTE->DNE", x, dv)),
        "wo_NED": np.einsum("BNTE,BTD->NED", o, dy),
    }
