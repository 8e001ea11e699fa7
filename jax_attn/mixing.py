"""Static token mixers: counterparts of attention whose mixing matrix is the same for every input.

Attention derives its matrix from the input. Here it is learned (random synthesizer,
arXiv:2005.00743), fixed, or uniform over the past; or an MLP over positions (arXiv:2105.01601).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn import softmax
from jax_attn.mask_types import Mask
from jax_attn.mlp import activate
from jax_attn.params import Leaves, Params, check_leaves, draw, fan_in, normal
from jax_attn.shapes import dims, floating


def static_mixer_leaves(D: int, N: int, E: int, *, learned: bool = True) -> Leaves:
    """Declare the leaves of a static mixer; arguments as in `init_static_mixer`."""
    leaves = {"wv_DNE": fan_in(D), "wo_NED": fan_in(N, E)}
    return leaves | {"logits_NTS": normal(1.0)} if learned else leaves


def static_mixer_sizes(D: int, N: int, T: int | None, E: int | None) -> dict[str, int]:
    """Fill in the sizes that were left out: E = D / N, S = T."""
    if E is None and (not isinstance(N, int | np.integer) or N < 1 or D % N):
        raise ValueError(f"N={N} must divide D={D}, or give the head width E")
    sizes = {"D": D, "N": N, "E": D // N if E is None else E}
    return sizes if T is None else sizes | {"T": T, "S": T}


def init_static_mixer(
    key: jax.Array,
    D: int,
    N: int,
    *,
    T: int | None = None,
    E: int | None = None,
    dtype: Any = jnp.float32,
) -> Params:
    """Draw the weights of a static mixer: Wv, Wo and, with T, a learned mixing matrix a head.

    Args:
      key: a jax.random key.
      D: model width.
      N: heads.
      T: the longest input; adds leaf logits_NTS. None: the mixer is uniform, or takes a fixed
        matrix as an option.
      E: head width of values; default D / N.
      dtype: of the leaves.
    Returns: {"wv_DNE", "wo_NED"} and, with T, "logits_NTS".
    Raises: ValueError naming the letters whose sizes do not fit.
    Example:
      >>> init_static_mixer(jax.random.key(0), D=6, N=2, T=5)["logits_NTS"].shape
      (2, 5, 5)
    """
    sizes = static_mixer_sizes(D, N, T, E)
    return draw(key, static_mixer_leaves(D, N, sizes["E"], learned=T is not None), sizes, dtype)


def static_weights(
    params: Params, T: int, *, mask: Mask | None = None, logits_NTS: jax.Array | None = None
) -> jax.Array:
    """Write out the mixing matrix: softmax of the logits over what the mask allows.

    Args:
      params: from `init_static_mixer`.
      T: length of the input; the first T rows and columns of longer logits are used.
      mask: which pairs mix; must not depend on the batch.
      logits_NTS: a fixed matrix, if `params` has no learned one; without either, weights are
        uniform.
    Returns: weights [N,T,S], S = T, float32 or wider; rows sum to 1, or to 0 if all is masked.
    Raises: ValueError naming both sizes if T is longer than the logits.
    Example:
      >>> from jax_attn import causal
      >>> params = init_static_mixer(jax.random.key(0), D=4, N=1)
      >>> static_weights(params, 2, mask=causal()).tolist()
      [[[1.0, 0.0], [0.5, 0.5]]]
    """
    check_leaves("static_mixer", params, ("wv_DNE", "wo_NED"), ("logits_NTS",))
    if not isinstance(T, int | np.integer) or T < 0:
        raise ValueError(f"T must be an int >= 0, got {T!r}")
    if "logits_NTS" in params and logits_NTS is not None:
        raise ValueError("logits_NTS is both a leaf of params and an option; give one")
    logits_NTS = params.get("logits_NTS", logits_NTS)
    sizes = dims(**params, **({} if "logits_NTS" in params else {"logits_NTS": logits_NTS}))
    floating(logits_NTS=logits_NTS)
    if logits_NTS is None:
        logits_NTS = jnp.zeros((sizes.N, T, T))
    elif min(logits_NTS.shape[1:]) < T:
        raise ValueError(
            f"x_BTD has T={T} but logits_NTS has T={logits_NTS.shape[1]}, S={logits_NTS.shape[2]}"
        )
    s_NTS = logits_NTS[:, :T, :T].astype(jnp.promote_types(logits_NTS.dtype, jnp.float32))
    if mask is not None:
        if not isinstance(mask, Mask):
            raise ValueError(f"mask must come from jax_attn.masks, got {type(mask).__name__}")
        s_NTS = jnp.where(mask.materialize(T, T, N=sizes.N)[0], s_NTS, -jnp.inf)
    return softmax.finish(softmax.summarize(s_NTS, lambda e_NTS: e_NTS)).value


def static_mixer(
    params: Params,
    x_BTD: jax.Array,
    *,
    mask: Mask | None = None,
    logits_NTS: jax.Array | None = None,
) -> jax.Array:
    """Mix tokens by one matrix a head that does not depend on them.

        y = concat_n(softmax(logits_n) x Wv_n) Wo

    Args:
      params: from `init_static_mixer`; leaf logits_NTS makes the matrix learned.
      x_BTD: tokens.
      mask: which pairs mix, e.g. `causal()`; must not depend on the batch.
      logits_NTS: a fixed matrix, if `params` has no learned one; without either, mixing is
        uniform over what the mask allows.
    Returns: [B,T,D].
    Raises: ValueError naming the argument or leaf, the axis letter and both sizes.
    Example:
      >>> params = init_static_mixer(jax.random.key(0), D=6, N=2, T=5)
      >>> static_mixer(params, jnp.ones((1, 4, 6))).shape
      (1, 4, 6)
    """
    check_leaves("static_mixer", params, ("wv_DNE", "wo_NED"), ("logits_NTS",))
    dims(x_BTD=x_BTD, **{k: v for k, v in params.items() if k != "logits_NTS"})
    floating(x_BTD=x_BTD, **params)
    with jax.named_scope("static_mixer"):
        weights_NTS = static_weights(params, x_BTD.shape[1], mask=mask, logits_NTS=logits_NTS)
        x_BSD, bad_BS = _finite(x_BTD)
        v_BSNE = jnp.einsum("BSD,DNE->BSNE", x_BSD, params["wv_DNE"])
        weights_NTS = weights_NTS.astype(v_BSNE.dtype)
        o_BTNE = jnp.einsum("NTS,BSNE->BTNE", weights_NTS, v_BSNE)
        y_BTD = jnp.einsum("BTNE,NED->BTD", o_BTNE, params["wo_NED"])
        reads_TS = (weights_NTS > 0).any(axis=0)
        return y_BTD + _poison(reads_TS, bad_BS, y_BTD.dtype)


def init_token_mlp(key: jax.Array, T: int, F: int, *, dtype: Any = jnp.float32) -> Params:
    """Draw the weights of an MLP over positions, shared by all channels.

    Args:
      key: a jax.random key.
      T: length of the input.
      F: hidden width; a multiple of T if the mixer is to be causal.
      dtype: of the leaves.
    Returns: {"w_in_SF", "w_out_FT"}, S = T.
    Raises: ValueError naming a size that is no int >= 1.
    Example:
      >>> init_token_mlp(jax.random.key(0), T=5, F=10)["w_in_SF"].shape
      (5, 10)
    """
    leaves = {"w_in_SF": fan_in(T), "w_out_FT": fan_in(F)}
    return draw(key, leaves, {"S": T, "T": T, "F": F}, dtype)


def token_mlp(
    params: Params, x_BTD: jax.Array, *, causal: bool = False, activation: str = "gelu"
) -> jax.Array:
    """Mix tokens by an MLP over positions, the same for every channel (arXiv:2105.01601).

        y_t = Σ_f W_out[f, t] · activation(Σ_s W_in[s, f] · x_s)

    Causal: hidden unit f belongs to position f·T // F, reads positions up to its own and is read
    by its own and later ones; other entries of both matrices are treated as zero.

    Args:
      params: from `init_token_mlp`.
      x_BTD: tokens; T as in the leaves, or less if causal.
      causal: forbid reading later positions; F must be a multiple of T.
      activation: see `activate`.
    Returns: [B,T,D].
    Raises: ValueError naming the argument or leaf, the axis letter and both sizes.
    Example:
      >>> params = init_token_mlp(jax.random.key(0), T=5, F=10)
      >>> token_mlp(params, jnp.ones((1, 5, 3)), causal=True).shape
      (1, 5, 3)
    """
    check_leaves("token_mlp", params, ("w_in_SF", "w_out_FT"))
    floating(x_BTD=x_BTD, **params)
    sizes = dims(**params)
    length = dims(x_BTD=x_BTD).size("T")
    if sizes.S != sizes.T or length > sizes.T or (length < sizes.T and not causal):
        raise ValueError(f"x_BTD has T={length} but w_in_SF has S={sizes.S}, w_out_FT T={sizes.T}")
    w_in_SF, w_out_FT = params["w_in_SF"], params["w_out_FT"]
    if causal:
        if sizes.F % sizes.T:
            raise ValueError(f"w_in_SF has F={sizes.F}, no multiple of T={sizes.T}: not causal")
        owner = jnp.arange(sizes.F) * sizes.T // sizes.F
        position = jnp.arange(sizes.T)
        w_in_SF = jnp.where(position[:, None] <= owner[None], w_in_SF, 0)[:length]
        w_out_FT = jnp.where(owner[:, None] <= position[None], w_out_FT, 0)[:, :length]
    with jax.named_scope("token_mlp"):
        x_BSD, bad_BS = _finite(x_BTD)
        h_BFD = activate(activation, jnp.einsum("BSD,SF->BFD", x_BSD, w_in_SF))
        y_BTD = jnp.einsum("BFD,FT->BTD", h_BFD, w_out_FT)
        reads_TS = jnp.tri(length, dtype=bool) if causal else jnp.ones((length, length), bool)
        return y_BTD + _poison(reads_TS, bad_BS, y_BTD.dtype)


def _finite(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Replace what is not finite, since 0 · NaN is NaN, and say which tokens had it."""
    finite_BTD = jnp.isfinite(x_BTD)
    return jnp.where(finite_BTD, x_BTD, jnp.zeros_like(x_BTD)), ~finite_BTD.all(axis=-1)


def _poison(reads_TS: jax.Array, bad_BS: jax.Array, dtype: Any) -> jax.Array:
    """Give NaN back to the queries that do read a token that is not finite."""
    hit_BT = (reads_TS[None] & bad_BS[:, None]).any(axis=-1)
    return jnp.where(hit_BT, jnp.nan, 0.0)[:, :, None].astype(dtype)
