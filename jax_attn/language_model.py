"""A small causal language model: embedding, a stack of blocks, a tied or free head."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_attn.attention import attention
from jax_attn.block import Init, Part, init_stack, stack
from jax_attn.context import token_positions
from jax_attn.intervene import Edit
from jax_attn.masks import causal
from jax_attn.mixing import static_mixer
from jax_attn.mlp import mlp
from jax_attn.norm import init_rms_norm, norm
from jax_attn.params import Leaves, Params, check_leaves, draw, fan_in
from jax_attn.shapes import dims, floating, integer
from jax_attn.sharding import whole_width

causal_attention = partial(attention, mask=causal())
causal_mixer = partial(static_mixer, mask=causal())


def language_model_leaves(D: int, *, T: int | None = None, tied: bool = True) -> Leaves:
    """Declare the leaves outside the blocks; arguments as in `init_language_model`."""
    leaves: dict[str, Any] = {"embed_VD": fan_in(D)}
    if T is not None:
        leaves["position_TD"] = fan_in(D)
    if not tied:
        leaves["head_DV"] = fan_in(D)
    return leaves


def init_language_model(
    key: jax.Array,
    *,
    V: int,
    D: int,
    L: int,
    layer: Init,
    T: int | None = None,
    tied: bool = True,
    dtype: Any = jnp.float32,
) -> Params:
    """Draw a language model.

    Args:
      key: a jax.random key.
      V: vocabulary.
      D: model width.
      L: layers.
      layer: function key -> parameters of one block, e.g. `partial(init_block, D=D, ...)`.
      T: longest input; adds leaf position_TD, learned positions. None: none (RoPE, ALiBi).
      tied: logits are taken with the embedding; else add leaf head_DV.
      dtype: of the leaves outside the blocks.
    Returns: {"embed_VD", "layers", "norm"} and the optional leaves.
    Raises: ValueError naming a size that is no int >= 1.
    Example:
      >>> from jax_attn import init_block, init_mlp
      >>> layer = partial(init_block, D=6, mlp=partial(init_mlp, D=6, F=24))
      >>> params = init_language_model(jax.random.key(0), V=11, D=6, L=2, layer=layer)
      >>> params["embed_VD"].shape, params["layers"]["mlp"]["w_in_DF"].shape
      ((11, 6), (2, 6, 24))
    """
    sizes = {"V": V, "D": D} if T is None else {"V": V, "D": D, "T": T}
    params = draw(key, language_model_leaves(D, T=T, tied=tied), sizes, dtype)
    params["layers"] = init_stack(jax.random.fold_in(key, 0), L, layer)
    params["norm"] = init_rms_norm(D, dtype)
    return params


def language_model(
    params: Params,
    tokens_BT: jax.Array,
    *,
    attend: Part = causal_attention,
    mix: Part = causal_mixer,
    feed: Part = mlp,
    cache: Params | None = None,
    q_offset: Any = 0,
    intervene: Edit | tuple[Edit, ...] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    remat: str | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Predict the next token at every position.

        logits = norm(stack(embed[token] + position)) · head,  head = embed^T if tied

    Args:
      params: from `init_language_model`.
      tokens_BT: int token ids. An id outside [0, V) gives NaN logits, never another token's.
      attend, mix, feed: the blocks' parts, see `block`; attention and mixer are causal by default,
        keep the mask when you bind options: `partial(attention, mask=causal(), rope=...)`.
        Learned positions and dropout read `context` off a partial: tokens are split, or laid out
        in another order, as it says.
      cache, q_offset: for decoding, see `jax_attn.decode`.
      intervene, dropout_rate, dropout_key, remat: see `stack`.
    Returns: (logits_BTV, aux); logits float32 or wider, aux as in `stack`.
    Raises: ValueError naming the argument or leaf, the axis letter and both sizes.
    Example:
      >>> from jax_attn import init_block, init_mlp
      >>> layer = partial(init_block, D=6, mlp=partial(init_mlp, D=6, F=24))
      >>> params = init_language_model(jax.random.key(0), V=11, D=6, L=2, layer=layer)
      >>> logits_BTV, aux = language_model(params, jnp.array([[1, 2, 3]]))
      >>> logits_BTV.shape
      (1, 3, 11)
    """
    check_leaves(
        "language_model", params, ("embed_VD", "layers"), ("position_TD", "head_DV", "norm")
    )
    embed_VD = params["embed_VD"]
    head_DV = params.get("head_DV")
    position_TD = params.get("position_TD")
    sizes = dims(tokens_BT=tokens_BT, embed_VD=embed_VD, head_DV=head_DV)
    dims(embed_VD=embed_VD, position_TD=position_TD)
    integer(tokens_BT=tokens_BT)
    floating(embed_VD=embed_VD, position_TD=position_TD, head_DV=head_DV)
    if isinstance(q_offset, int) and position_TD is not None:
        known = position_TD.shape[0]
        if q_offset + sizes.T > known:
            raise ValueError(
                f"tokens_BT ends at T={q_offset + sizes.T} but position_TD has T={known}"
            )

    with jax.named_scope("embed"):
        embed_VD = whole_width("VD", embed_VD)  # else a lookup gathers the table over V as well
        x_BTD = _rows(embed_VD, tokens_BT)
        if position_TD is not None:
            at_T = q_offset + token_positions("position_TD", attend, sizes.T)
            x_BTD = x_BTD + _rows(position_TD, at_T)[None]
        x_BTD = whole_width("BTD", x_BTD)
    x_BTD, aux = stack(
        params["layers"],
        x_BTD,
        attend=attend,
        mix=mix,
        feed=feed,
        cache=cache,
        q_offset=q_offset,
        intervene=intervene,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        remat=remat,
    )
    with jax.named_scope("head"):
        if "norm" in params:
            x_BTD = norm(params["norm"], x_BTD)
        head_DV = embed_VD.T if head_DV is None else head_DV
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, head_DV, preferred_element_type=wide)
    return logits_BTV, aux


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Look rows up; an index outside gives NaN, where jnp would clamp or count from behind."""
    index = index.astype(jnp.promote_types(index.dtype, jnp.int32))  # int8 could not hold V
    index = jnp.where(index < 0, table.shape[0], index)
    return jnp.asarray(table).at[index].get(mode="fill", fill_value=jnp.nan)
