"""Residual blocks and stacks of them.

Which parts run follows from which parameters are present: a block with only "attention", only
"mlp", "mixer" and "mlp", or both. Options of a part are bound where it is passed in:

    attend = partial(attention, mask=causal(), rope=rope.plain(64))
    y_BTD, aux = block(params, x_BTD, attend=attend)
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn import dropout
from jax_attn.attention import attention
from jax_attn.context import context_of, parted, token_positions
from jax_attn.intervene import Edit, check_layers, edits_of
from jax_attn.mixing import static_mixer
from jax_attn.mlp import mlp
from jax_attn.norm import init_rms_norm, norm
from jax_attn.params import Params, check_leaves
from jax_attn.shapes import dims, floating
from jax_attn.sharding import whole_width

Part = Callable[..., Any]
Init = Callable[[jax.Array], Params]

PARTS = ("attention", "mixer", "mlp")
REMAT: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def init_block(
    key: jax.Array,
    D: int,
    *,
    attention: Init | None = None,
    mixer: Init | None = None,
    mlp: Init | None = None,
    init_norm: Callable[[int], Params] = init_rms_norm,
) -> Params:
    """Draw the parts of a pre-norm block, each from its own key.

    Args:
      key: a jax.random key. A part's key depends on it and on the part's name alone: changing
        one part's initialiser leaves the others bit-equal.
      D: model width, of the norms.
      attention, mixer, mlp: functions key -> parameters; None leaves the part out.
      init_norm: makes a norm's parameters from D.
    Returns: {"attention": ..., "attention_norm": ...} and so on for each part. For a post-norm
      block rename "attention_norm" to "attention_post_norm"; without a norm leaf, no norm.
    Raises: ValueError if every part is None.
    Example:
      >>> from functools import partial
      >>> from jax_attn import init_attention, init_mlp
      >>> params = init_block(
      ...     jax.random.key(0),
      ...     D=6,
      ...     attention=partial(init_attention, D=6, N=2),
      ...     mlp=partial(init_mlp, D=6, F=24),
      ... )
      >>> list(params)
      ['attention', 'attention_norm', 'mlp', 'mlp_norm']
    """
    params: Params = {}
    for index, (name, init) in enumerate(zip(PARTS, (attention, mixer, mlp), strict=True)):
        if init is not None:
            params[name] = init(jax.random.fold_in(key, index))
            params[f"{name}_norm"] = init_norm(D)
    if not params:
        raise ValueError("init_block: give an initialiser for attention, mixer or mlp")
    return params


def block(
    params: Params,
    x_BTD: jax.Array,
    *,
    attend: Part = attention,
    mix: Part = static_mixer,
    feed: Part = mlp,
    cache: Params | None = None,
    q_offset: Any = 0,
    intervene: Edit | tuple[Edit, ...] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Run the parts whose parameters are present, in the order attention, mixer, mlp.

        x = post_norm(x + dropout(part(norm(x))))

    The feed-forward part receives attention's output through the residual stream, never its
    scores. `norm` applies if leaf "<part>_norm" is there, `post_norm` if "<part>_post_norm" is.

    Args:
      params: from `init_block`.
      x_BTD: the residual stream.
      attend: function (params, x_BTD, q_offset=, cache=, intervene=, dropout_key=) for
        params["attention"]; it is called with those alone that there are.
      mix: function (params, x_BTD) for params["mixer"].
      feed: function (params, x_BTD) for params["mlp"], e.g. `mlp`, `gated_mlp`, `moe`.
      cache: keys and values of this block, see `jax_attn.decode`; attention's aux then holds the
        updated one.
      q_offset: position of x's first token.
      intervene: edits of heads, handed to `attend` in place of those bound to it; one that takes
        them and does nothing with them is not found out.
      dropout_rate: of each part's output before it is added.
      dropout_key: drives that dropout, and is handed to `attend` for its own.
    Returns: (x_BTD, aux); aux maps a part's name to what it reports beside its output, if
      anything: {"mlp": {"routing": ...}}, {"attention": {"cache": ..., "seen": ...}}.
    Raises: ValueError naming the argument or leaf, the axis letter and both sizes.
    Example:
      >>> from functools import partial
      >>> from jax_attn import init_mlp
      >>> params = init_block(jax.random.key(0), D=6, mlp=partial(init_mlp, D=6, F=24))
      >>> x_BTD, aux = block(params, jnp.ones((1, 2, 6)))
      >>> x_BTD.shape, aux
      ((1, 2, 6), {})
    """
    norms = [f"{part}_{when}" for part in PARTS for when in ("norm", "post_norm")]
    check_leaves("block", params, (), (*PARTS, *norms))
    if not any(part in params for part in PARTS):
        raise ValueError(f"block: params has none of the parts {', '.join(PARTS)}")
    for name in norms:
        if name in params and name.removesuffix("_norm").removesuffix("_post") not in params:
            raise ValueError(f"block: params has {name!r} but not the part it belongs to")
    dims(x_BTD=x_BTD)
    floating(x_BTD=x_BTD)
    dropout.check(dropout_rate, dropout_key)
    if cache is not None and "mixer" in params:
        raise ValueError("block: a static mixer mixes positions, not keys; it cannot use a cache")
    edits = edits_of(intervene)
    if "mixer" in params and (context_of(attend) == "zigzag" or parted()):
        raise ValueError(
            "block: a static mixer mixes by position, and tokens are split over mesh axis "
            "'context' or laid out in zigzag; leave context out, or use context='ring' under "
            "jax.set_mesh"
        )
    if edits and "attention" not in params:
        raise ValueError("block: intervene edits heads, but params has no 'attention'")

    aux: dict[str, Any] = {}
    for index, name in enumerate(PARTS):
        if name not in params:
            continue
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        h_BTD = norm(params[f"{name}_norm"], x_BTD) if f"{name}_norm" in params else x_BTD
        if name == "attention":
            made = _attend(attend, params[name], h_BTD, cache, q_offset, edits, key)
        else:
            made = (mix if name == "mixer" else feed)(params[name], h_BTD)
        y_BTD, said = made if isinstance(made, tuple) else (made, {})
        if said:
            aux[name] = said
        if dropout_rate > 0.0 and key is not None:
            kept = _kept(jax.random.fold_in(key, 1), dropout_rate, y_BTD, attend)
            y_BTD = jnp.where(kept, y_BTD / (1 - dropout_rate), 0)
        x_BTD = whole_width("BTD", x_BTD + y_BTD)
        if f"{name}_post_norm" in params:
            x_BTD = norm(params[f"{name}_post_norm"], x_BTD)
    return x_BTD, aux


def _kept(key: jax.Array, rate: float, y_BTD: jax.Array, attend: Part) -> jax.Array:
    """Decide what dropout keeps: by batch entry, position and channel, not by device."""
    B, T, D = y_BTD.shape
    position_T = token_positions("block: dropout_rate", attend, T)
    b, t, d = jnp.arange(B)[:, None, None], position_T[None, :, None], jnp.arange(D)[None, None]
    return dropout.keep(key, rate, b, 0, t, d)


def _attend(
    attend: Part,
    params: Params,
    h_BTD: jax.Array,
    cache: Any,
    q_offset: Any,
    edits: tuple[Edit, ...],
    key: Any,
) -> Any:
    """Call `attend` with no more than there is to say, so that it may be any (params, x) -> y."""
    said: dict[str, Any] = {}
    if cache is not None:
        said["cache"] = cache
    if cache is not None or not (isinstance(q_offset, int | np.integer) and q_offset == 0):
        said["q_offset"] = q_offset
    if edits:
        said["intervene"] = edits
    if key is not None and cache is None:
        said["dropout_key"] = key
    return attend(params, h_BTD, **said)


def init_stack(key: jax.Array, L: int, init: Init) -> Params:
    """Draw L blocks at once; every leaf gains a leading axis L.

    Args:
      key: a jax.random key, split into L.
      L: layers.
      init: function key -> parameters of one block.
    Returns: the block's tree; leaves keep their names and carry a leading L.
    Raises: ValueError if L is no int >= 1.
    Example:
      >>> from functools import partial
      >>> from jax_attn import init_mlp
      >>> init = partial(init_block, D=6, mlp=partial(init_mlp, D=6, F=24))
      >>> init_stack(jax.random.key(0), 5, init)["mlp"]["w_in_DF"].shape
      (5, 6, 24)
    """
    if not isinstance(L, int | np.integer) or isinstance(L, bool) or L < 1:
        raise ValueError(f"L (layers) must be an int >= 1, got {L!r}")
    return jax.vmap(init)(jax.random.split(key, L))


def stack(
    params: Params,
    x_BTD: jax.Array,
    *,
    attend: Part = attention,
    mix: Part = static_mixer,
    feed: Part = mlp,
    cache: Params | None = None,
    q_offset: Any = 0,
    intervene: Edit | tuple[Edit, ...] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    remat: str | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Run L blocks one after the other by `lax.scan`: compile time does not grow with L.

    Args:
      params: from `init_stack`, leaves with a leading L.
      cache: caches of all blocks, leaves with a leading L.
      intervene: edits of heads of any layer, their heads [L,N] and values with a leading L.
      dropout_key: split into one key a layer.
      remat: what the backward pass computes again: None, nothing; "full", everything but the
        blocks' inputs; "dots", everything but matrix products with parameters.
      x_BTD, attend, mix, feed, q_offset, dropout_rate: as in `block`.
    Returns: (x_BTD, aux), aux as in `block` with a leading L.
    Raises: ValueError naming the argument; leaves whose L differ are named with both sizes; if a
      block returns another dtype than it got.
    Example:
      >>> from functools import partial
      >>> from jax_attn import init_mlp
      >>> init = partial(init_block, D=6, mlp=partial(init_mlp, D=6, F=24))
      >>> x_BTD, aux = stack(init_stack(jax.random.key(0), 5, init), jnp.ones((1, 2, 6)))
      >>> x_BTD.shape
      (1, 2, 6)
    """
    if remat is not None and remat not in REMAT:
        raise ValueError(f"remat must be None or one of {', '.join(REMAT)}, got {remat!r}")
    L, edits = _layers(params), edits_of(intervene)
    check_layers(edits, L)
    keys = None if dropout_key is None else jax.random.split(dropout_key, L)

    def layer(x_BTD: jax.Array, per_layer: Any) -> Any:
        block_params, block_cache, key, arrays = per_layer
        mine = tuple(replace(e, heads=a[0], value=a[1]) for e, a in zip(edits, arrays, strict=True))
        y_BTD, aux = block(
            block_params,
            x_BTD,
            attend=attend,
            mix=mix,
            feed=feed,
            cache=block_cache,
            q_offset=q_offset,
            intervene=mine,
            dropout_rate=dropout_rate,
            dropout_key=key,
        )
        if y_BTD.dtype != x_BTD.dtype:
            raise ValueError(
                f"stack: x_BTD is {x_BTD.dtype} but a block returns {y_BTD.dtype}; cast x_BTD or "
                f"the parameters"
            )
        return y_BTD, aux

    if remat is not None:
        layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)
    arrays = [(edit.heads, edit.value) for edit in edits]
    return jax.lax.scan(layer, x_BTD, (params, cache, keys, arrays))


def _layers(params: Params) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("stack: params is empty")
    (first_path, first), *rest = leaves
    for path, leaf in rest:
        if not leaf.ndim or leaf.shape[0] != first.shape[0]:
            raise ValueError(
                f"stack: {jax.tree_util.keystr(path)} has L={leaf.shape[:1]} but "
                f"{jax.tree_util.keystr(first_path)} has L={first.shape[0]}"
            )
    return first.shape[0]
