"""The attention layer: scores derived from the input mix its values, and an output is handed on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn.context import attend, key_positions, length_of, positions, require, write
from jax_attn.dot_product import dot_product_attention
from jax_attn.intervene import Edit, apply, edits_of
from jax_attn.kernels.call import Score, check_mask, check_sizes
from jax_attn.mask_types import Mask
from jax_attn.masks import prefix
from jax_attn.norm import rms_norm
from jax_attn.observe import Mean
from jax_attn.params import Leaves, Params, check_leaves, draw, fan_in, ones, zeros
from jax_attn.rope import Rope, rotate
from jax_attn.shapes import Sizes, dims, floating


def attention_leaves(
    D: int, N: int, E: int, *, bias: bool = False, qk_norm: bool = False, sinks: bool = False
) -> Leaves:
    """Declare the leaves of an attention layer; arguments as in `init_attention`."""
    leaves: dict[str, Any] = {
        "wq_DNH": fan_in(D),
        "wk_DKH": fan_in(D),
        "wv_DKE": fan_in(D),
        "wo_NED": fan_in(N, E),
    }
    if bias:
        leaves |= {"bq_NH": zeros, "bk_KH": zeros, "bv_KE": zeros, "bo_D": zeros}
    if qk_norm:
        leaves |= {"q_scale_H": ones, "k_scale_H": ones}
    if sinks:
        leaves |= {"sinks_N": zeros}
    return leaves


def attention_sizes(
    D: int, N: int, K: int | None = None, H: int | None = None, E: int | None = None
) -> dict[str, int]:
    """Fill in the sizes that were left out: K = N, H = D / N, E = H."""
    if H is None and (not isinstance(N, int | np.integer) or N < 1 or D % N):
        raise ValueError(f"N={N} must divide D={D}, or give the head width H")
    K, H = N if K is None else K, D // N if H is None else H
    if not isinstance(K, int | np.integer) or K < 1 or N % K:
        raise ValueError(f"N={N} (query heads) must be a multiple of K={K} (key/value heads)")
    return {"D": D, "N": N, "K": K, "H": H, "E": H if E is None else E}


def init_attention(
    key: jax.Array,
    D: int,
    N: int,
    *,
    K: int | None = None,
    H: int | None = None,
    E: int | None = None,
    bias: bool = False,
    qk_norm: bool = False,
    sinks: bool = False,
    dtype: Any = jnp.float32,
) -> Params:
    """Draw the weights of an attention layer: Wq, Wk, Wv and Wo, variance 1 / fan-in.

    Args:
      key: a jax.random key.
      D: model width.
      N: query heads.
      K: key/value heads, a divisor of N; default N.
      H: head width of queries and keys; default D / N.
      E: head width of values; default H.
      bias: add leaves bq_NH, bk_KH, bv_KE, bo_D, zero.
      qk_norm: add leaves q_scale_H, k_scale_H, one: RMS-norm of queries and keys.
      sinks: add leaf sinks_N, zero: a learned sink a head.
      dtype: of the leaves.
    Returns: {"wq_DNH", "wk_DKH", "wv_DKE", "wo_NED"} and the optional leaves; 4·D² numbers with
      the defaults.
    Raises: ValueError naming the letters whose sizes do not fit.
    Example:
      >>> params = init_attention(jax.random.key(0), D=768, N=12)
      >>> params["wq_DNH"].shape
      (768, 12, 64)
    """
    sizes = attention_sizes(D, N, K, H, E)
    leaves = attention_leaves(D, N, sizes["E"], bias=bias, qk_norm=qk_norm, sinks=sinks)
    return draw(key, leaves, sizes, dtype)


REQUIRED = ("wq_DNH", "wk_DKH", "wv_DKE", "wo_NED")
KEPT = ("q_BTNH", "k_BSKH", "v_BSKE", "o_BTNE")
OPTIONAL = ("bq_NH", "bk_KH", "bv_KE", "bo_D", "q_scale_H", "k_scale_H", "sinks_N")


def project_qkv(
    params: Params,
    x_BTD: jax.Array,
    kv_BSD: jax.Array | None = None,
    *,
    rope: Rope | None = None,
    position_BT: jax.Array | None = None,
    kv_position_BS: jax.Array | None = None,
    q_offset: Any = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Make queries, keys and values: q = x Wq + bq, QK-norm if its leaves are there, then RoPE.

    Args: as in `attention`; and
      kv_position_BS: positions of kv_BSD for RoPE, B may be 1; default s.
    Returns: q_BTNH, k_BSKH, v_BSKE, ready for `dot_product_attention`.
    Raises: ValueError naming the argument or leaf, the axis letter and both sizes.
    Example:
      >>> params = init_attention(jax.random.key(0), D=6, N=2)
      >>> [x.shape for x in project_qkv(params, jnp.ones((1, 5, 6)))]
      [(1, 5, 2, 3), (1, 5, 2, 3), (1, 5, 2, 3)]
    """
    check_leaves("attention", params, REQUIRED, OPTIONAL)
    sizes = dims(x_BTD=x_BTD, **params)
    floating(x_BTD=x_BTD, kv_BSD=kv_BSD, **params)
    dims(x_BTD=x_BTD, kv_BSD=kv_BSD)
    if position_BT is not None and rope is None:
        raise ValueError("position_BT is read by rope alone, and rope is None")
    if position_BT is not None and kv_BSD is not None and kv_position_BS is None:
        raise ValueError("position_BT with kv_BSD: the keys' positions would be unknown")
    source_BSD = x_BTD if kv_BSD is None else kv_BSD
    q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, params["wq_DNH"])
    k_BSKH = jnp.einsum("BSD,DKH->BSKH", source_BSD, params["wk_DKH"])
    v_BSKE = jnp.einsum("BSD,DKE->BSKE", source_BSD, params["wv_DKE"])
    q_BTNH, k_BSKH, v_BSKE = (
        x if name not in params else x + params[name][None, None]
        for x, name in ((q_BTNH, "bq_NH"), (k_BSKH, "bk_KH"), (v_BSKE, "bv_KE"))
    )
    if "q_scale_H" in params:
        q_BTNH = rms_norm(q_BTNH, params["q_scale_H"])
    if "k_scale_H" in params:
        k_BSKH = rms_norm(k_BSKH, params["k_scale_H"])
    if rope is not None:
        q_position_BT = position_BT
        if q_position_BT is None:
            q_position_BT = jnp.arange(sizes.T)[None] + q_offset
        k_position_BS = q_position_BT if kv_BSD is None else kv_position_BS
        if k_position_BS is None:
            k_position_BS = jnp.arange(source_BSD.shape[1])[None]
        q_BTNH = rotate(q_BTNH, rope, q_position_BT)
        k_BSKH = rotate(k_BSKH, rope, k_position_BS)
    return q_BTNH, k_BSKH, v_BSKE


def attention(
    params: Params,
    x_BTD: jax.Array,
    *,
    kv_BSD: jax.Array | None = None,
    mask: Mask | jax.Array | None = None,
    rope: Rope | None = None,
    position_BT: jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    score: Score | None = None,
    scale: Any = None,
    softcap: float | None = None,
    q_offset: Any = 0,
    cache: Params | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    observe: tuple[str | Mean, ...] | None = None,
    reduce: Callable[[dict[str, jax.Array]], Any] | None = None,
    keep: tuple[str, ...] = (),
    intervene: Edit | tuple[Edit, ...] | None = None,
    implementation: str | None = None,
    context: str | None = None,
) -> Any:
    """Mix tokens by scores derived from them, and hand on the result: an output, not weights.

        y = concat_n(softmax(scale · x Wq_n (z Wk_n)^T) z Wv_n) Wo,  z = x, or kv in cross-attention

    What else it does follows from the leaves in `params`: biases, QK-norm, sinks. The scores are
    no parameter; they are made anew from every input.

    Args:
      params: from `init_attention`.
      x_BTD: tokens that ask.
      kv_BSD: tokens that are asked, for cross-attention; default x.
      rope: turns queries and keys by their positions; see `jax_attn.rope`.
      position_BT: positions for RoPE, B may be 1; default q_offset + t. Masks do not read it.
      cache: {"k_BSKH", "v_BSKE"}: x's keys and values are written at q_offset, and queries attend
        to the q_offset + T first entries. See `jax_attn.decode`. If they do not fit, y is NaN
        where q_offset is traced, and an error is raised where it is an int.
      q_offset: position of x's first token; other than 0 only with a cache or kv_BSD.
      mask, bias_BNTS, score, scale, softcap, dropout_rate, dropout_key, observe, implementation:
        as in `dot_product_attention`.
      reduce: function of what is observed, applied on the spot, e.g. `head_summary`.
      keep: which of "q_BTNH", "k_BSKH", "v_BSKE" (as the scores see them, after RoPE) and "o_BTNE"
        (the heads' outputs, edits made) to return as well.
      context: "ring", "zigzag", "all_to_all" or "split_kv", for tokens that are split over the mesh
        axis "context": inside `jax.shard_map` x is a device's part, under `jax.set_mesh` the whole.
        RoPE turns by positions in the sequence. See `context_attention`; it runs in blocks, so no
        implementation can be named, and it takes no edits. A cache, split by S, goes with
        "split_kv", where x is whole on every device.
      intervene: edits of chosen heads from `jax_attn.intervene`; of two edits of a head the last
        holds. What is observed is the attention that was computed, without them.
    Returns: y_BTD; with a cache, `observe` or `keep` (y_BTD, aux), aux holding of "cache", "seen"
      and "kept" what was asked for.
    Raises: ValueError naming the argument or leaf, the axis letter and both sizes.
    Example:
      >>> params = init_attention(jax.random.key(0), D=768, N=12)
      >>> attention(params, jnp.ones((1, 3, 768))).shape
      (1, 3, 768)
    """
    static = isinstance(q_offset, int | np.integer)
    if cache is None and kv_BSD is None and not (static and q_offset == 0):
        raise ValueError(
            "q_offset moves the queries but not x's own keys, so a causal mask would show the "
            "future; it needs a cache or kv_BSD"
        )
    if reduce is not None and observe is None:
        raise ValueError("reduce is applied to what is observed, and observe is None")
    if reduce is not None and not callable(reduce):
        raise ValueError(f"reduce must be a function of what is observed, got {reduce!r}")
    if not isinstance(keep, tuple | list) or not all(name in KEPT for name in keep):
        raise ValueError(f"keep must be a tuple of {', '.join(KEPT)}, got {keep!r}")
    edits = edits_of(intervene)
    kv_position_BS = None
    if context is not None:
        if cache is not None and context != "split_kv":
            raise ValueError(
                f"context={context!r} does not go with cache: a cache whose S is split over "
                f"devices is read by context='split_kv'"
            )
        for name, given in (
            ("intervene", bool(edits)),
            ("implementation", implementation is not None),
        ):
            if given:
                raise ValueError(f"context={context!r} does not go with {name}; leave one out")
        require(context)
        if rope is not None and position_BT is None:
            position_BT = positions(context, x_BTD.shape[1])[None] + q_offset
            if kv_BSD is not None:
                kv_position_BS = key_positions(context, kv_BSD.shape[1])[None]
    with jax.named_scope("attention"):
        q_BTNH, k_BSKH, v_BSKE = project_qkv(
            params,
            x_BTD,
            kv_BSD,
            rope=rope,
            position_BT=position_BT,
            kv_position_BS=kv_position_BS,
            q_offset=q_offset,
        )
        if cache is not None:
            if kv_BSD is not None:
                raise ValueError("cache with kv_BSD: a cache holds the tokens' own keys and values")
            check_leaves("cache", cache, ("k_BSKH", "v_BSKE"))
            room = cache["k_BSKH"].shape[1] if context is None else length_of(cache)
            cache = {
                name: _write(cache, name, new, q_offset, room, context)
                for name, new in (("k_BSKH", k_BSKH), ("v_BSKE", v_BSKE))
            }
            k_BSKH, v_BSKE = cache["k_BSKH"], cache["v_BSKE"]
            written = prefix(q_offset + x_BTD.shape[1])
            here = check_sizes(q_BTNH, k_BSKH, v_BSKE, None, None)
            given = check_mask(mask, Sizes(**{c: here.size(c) for c in "BTNKGHE"}, S=room))
            mask = written if given is None else written & given
        plain = {"q_offset": q_offset, "implementation": implementation}
        scored = plain | {
            "bias_BNTS": bias_BNTS,
            "score": score,
            "scale": scale,
            "softcap": softcap,
            "sinks_N": params.get("sinks_N"),
            "dropout_rate": dropout_rate,
            "dropout_key": dropout_key,
        }
        asked = () if observe is None else observe
        if context is None:
            o_BTNE, seen = dot_product_attention(
                q_BTNH, k_BSKH, v_BSKE, mask=mask, observe=asked, **scored
            )
        else:
            del scored["implementation"]
            o_BTNE, seen = attend(
                q_BTNH, k_BSKH, v_BSKE, context=context, mask=mask, observe=asked, **scored
            )
        if edits:
            sizes = check_sizes(q_BTNH, k_BSKH, v_BSKE, bias_BNTS, None)
            own = check_mask(mask, sizes)

            def again(uniform: bool, mask: Mask | None) -> jax.Array:
                both = own if mask is None else mask if own is None else own & mask
                if uniform:
                    nothing = (jnp.zeros_like(q_BTNH), jnp.zeros_like(k_BSKH))
                    return dot_product_attention(*nothing, v_BSKE, mask=both, **plain)
                return dot_product_attention(q_BTNH, k_BSKH, v_BSKE, mask=both, **scored)

            o_BTNE = apply(edits, o_BTNE, sizes, again, v_BSKE)
        y_BTD = jnp.einsum("BTNE,NED->BTD", o_BTNE, params["wo_NED"])
        if "bo_D" in params:
            y_BTD = y_BTD + params["bo_D"][None, None]
        if cache is not None:
            # The write would be moved back to fit, over entries that are needed.
            outside = (q_offset < 0) | (q_offset + x_BTD.shape[1] > room)
            y_BTD = jnp.where(outside, jnp.nan, y_BTD)
    aux: dict[str, Any] = {}
    if cache is not None:
        aux["cache"] = cache
    if observe is not None:
        aux["seen"] = seen if reduce is None else reduce(seen)
    if keep:
        made = {"q_BTNH": q_BTNH, "k_BSKH": k_BSKH, "v_BSKE": v_BSKE, "o_BTNE": o_BTNE}
        aux["kept"] = {name: made[name] for name in keep}
    return (y_BTD, aux) if aux else y_BTD


def _write(
    cache: Params, name: str, new: jax.Array, q_offset: Any, room: int, context: str | None
) -> jax.Array:
    old = cache[name]
    if old.ndim != 4 or old.shape[:1] + old.shape[2:] != new.shape[:1] + new.shape[2:]:
        raise ValueError(f"cache {name} has shape {old.shape}, new entries have {new.shape}")
    if isinstance(q_offset, int | np.integer):
        if q_offset < 0:
            raise ValueError(f"q_offset must be >= 0 with a cache, got {q_offset}")
        if q_offset + new.shape[1] > room:
            raise ValueError(
                f"cache {name} has S={room}, too short for q_offset={q_offset} + "
                f"T={new.shape[1]} tokens"
            )
    if context is not None:
        return write(name, old, new, q_offset)
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), q_offset, axis=1)
