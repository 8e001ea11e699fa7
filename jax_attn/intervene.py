"""Edits of chosen heads, for ablation and activation patching: values that attention applies.

    heads_LN = intervene.heads(L, N, [(1, 0)])
    logits_BTV, aux = language_model(params, tokens_BT, intervene=intervene.zero(heads_LN))

A stack takes heads [L,N], one attention layer heads [N]. Each edit replaces what attention
computed; where several choose the same head, the last holds.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_attn.mask_types import Mask
from jax_attn.masks import prefix
from jax_attn.shapes import Sizes, fits, floating

__all__ = [
    "Edit",
    "first_token",
    "given_output",
    "given_pattern",
    "heads",
    "knock_out",
    "mean",
    "path_effect",
    "uniform",
    "zero",
]

# (uniform=, mask=) -> outputs [B,T,N,E]: the same attention once more, with logits 0 or under one
# more mask.
Again = Callable[..., jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Edit:
    """What the functions below return: a pytree, so that it passes through `jit` and `vmap`.

    Fields: `heads`, bool [N], or [L,N] for a stack; `value`, what is put in, with the same leading
    L, or None; `mask`, that of `knock_out`, the same in every layer; `kind`, the function's name.

    Example:
      >>> zero(jnp.ones(3, bool)).kind
      'zero'
    """

    heads: Any
    value: Any
    mask: Any
    kind: str = field(metadata={"static": True})


def heads(L: int, N: int, chosen: Iterable[tuple[int, int]]) -> jax.Array:
    """Write chosen heads out as bool [L,N].

    Args:
      L, N: layers and heads of the model.
      chosen: pairs (layer, head).
    Returns: bool [L,N], for the functions below.
    Raises: ValueError naming L or N, what is no pair or out of range, or that there is none.
    Example:
      >>> heads(2, 3, [(1, 0)]).tolist()
      [[False, False, False], [True, False, False]]
    """
    _check_sizes("heads", L, N)
    made, chosen = np.zeros((L, N), bool), list(chosen)
    if not chosen:
        raise ValueError("heads: chosen is empty, the edit would match nothing")
    for pair in chosen:
        if np.shape(pair) != (2,) or np.asarray(pair).dtype.kind not in "iu":
            raise ValueError(f"heads: chosen must be pairs (layer, head) of ints, got {pair!r}")
        layer, head = (int(index) for index in pair)
        if not (0 <= layer < L and 0 <= head < N):
            raise ValueError(
                f"heads: (layer, head) = {layer, head} is out of range, the model has L={L}, N={N}"
            )
        made[layer, head] = True
    return jnp.asarray(made)


def zero(heads: jax.Array) -> Edit:
    """Put 0 in place of the chosen heads' outputs.

    Args:
      heads: bool [N], or [L,N] for a stack; see `heads`. A bool array under `jit` may choose none.
    Returns: an edit for `attention(intervene=...)`, `block`, `stack` or `language_model`.
    Raises: ValueError if heads is no bool array of rank 1 or 2, or chooses none.
    Example:
      >>> import jax_attn as a
      >>> params = a.init_attention(jax.random.key(0), D=6, N=3)
      >>> y_BTD = a.attention(params, jnp.ones((1, 2, 6)), intervene=zero(jnp.ones(3, bool)))
      >>> float(abs(y_BTD).max())
      0.0
    """
    return _edit("zero", heads)


def mean(heads: jax.Array, mean_NE: jax.Array | None = None) -> Edit:
    """Put a mean output in place of the chosen heads' outputs, at every position.

    Args:
      heads: as in `zero`.
      mean_NE: the mean, from a data set say, [N,E] or [L,N,E]; None takes the mean over the batch
        and positions of the run itself, and gradients reach all of them.
    Returns: as in `zero`.
    Raises: as in `zero`; ValueError if mean_NE has another rank or dtype.
    Example:
      >>> mean(heads(2, 3, [(1, 0)]), jnp.zeros((2, 3, 5))).kind
      'mean'
    """
    return _edit("mean", heads, "mean_NE", mean_NE, (2,))


def uniform(heads: jax.Array) -> Edit:
    """Let the chosen heads attend alike to every key that their mask allows.

    Bias, score, sinks and dropout are left out; rows without keys give 0.

    Args, Returns, Raises: as in `zero`.
    Example:
      >>> uniform(heads(2, 3, [(1, 0)])).kind
      'uniform'
    """
    return _edit("uniform", heads)


def first_token(heads: jax.Array) -> Edit:
    """Let the chosen heads attend to key 0 alone; rows that may not see it give 0.

    Args, Returns, Raises: as in `zero`.
    Example:
      >>> first_token(heads(2, 3, [(1, 0)])).kind
      'first_token'
    """
    return _edit("first_token", heads)


def given_output(heads: jax.Array, o_BTNE: jax.Array) -> Edit:
    """Patch the chosen heads' outputs, with those of another run.

    Args:
      heads: as in `zero`.
      o_BTNE: outputs of all heads, [B,T,N,E] or [L,B,T,N,E]: `attention(keep=("o_BTNE",))`.
    Returns: as in `zero`.
    Raises: as in `zero`; ValueError if o_BTNE has another rank or dtype.
    Example:
      >>> given_output(jnp.ones(3, bool), jnp.ones((1, 5, 3, 2))).kind
      'given_output'
    """
    return _edit("given_output", heads, "o_BTNE", o_BTNE, (4,))


def given_pattern(heads: jax.Array, p: jax.Array) -> Edit:
    """Let the chosen heads attend by a supplied pattern; it is used as it is.

    No mask, sink or dropout applies to it, and rows need not sum to 1. A key of weight 0 is not
    looked at, whatever its value holds. O(B·N·T·S) memory.

    Args:
      heads: as in `zero`.
      p: weights [T,S] for all, or [B,N,T,S], whose axes may be 1; with a leading L for a stack.
    Returns: as in `zero`.
    Raises: as in `zero`; ValueError if p has another rank or dtype.
    Example:
      >>> given_pattern(jnp.ones(3, bool), jnp.eye(5)).kind
      'given_pattern'
    """
    return _edit("given_pattern", heads, "p", p, (2, 4))


def knock_out(heads: jax.Array, mask: Mask) -> Edit:
    """Forbid the chosen heads every pair that a mask forbids, beside their own mask.

    Pairs that their own mask forbids already are forbidden still: `causal()` takes nothing from a
    causal model, and no error says so, since masks may be traced.

    Args:
      heads: as in `zero`.
      mask: from `jax_attn.masks`, True = still allowed; the same in every layer.
    Returns: as in `zero`.
    Raises: as in `zero`; ValueError if mask is none.
    Example:
      >>> from jax_attn import window
      >>> knock_out(heads(2, 3, [(1, 0)]), window(8)).kind
      'knock_out'
    """
    if not isinstance(mask, Mask):
        raise ValueError(
            f"knock_out: mask must be from jax_attn.masks, got {type(mask).__name__}; wrap a bool "
            f"array in dense()"
        )
    return replace(_edit("knock_out", heads), mask=mask)


def path_effect(
    metric: Callable[[Edit], jax.Array],
    edit: Callable[[jax.Array], Edit],
    *,
    L: int,
    N: int,
) -> jax.Array:
    """Measure what editing each head by itself changes: metric(edit of one) - metric(edit of none).

    Args:
      metric: function of an edit -> scalar, e.g. lambda e: loss of language_model(intervene=e).
      edit: function of bool heads [L,N] -> an edit: `zero`, or partial(given_output, o_BTNE=...).
      L, N: layers and heads of the model.
    Returns: [L,N], exactly 0 for a head that metric does not read. Heads of a layer are run
      together by vmap, N times the memory of one run; layers one after the other.
    Raises: ValueError naming L or N, or if metric returns no scalar.
    Example:
      >>> from functools import partial
      >>> from jax_attn import init_attention, init_block, init_stack, stack
      >>> layer = partial(init_block, D=6, attention=partial(init_attention, D=6, N=3))
      >>> params = init_stack(jax.random.key(0), 2, layer)
      >>> x_BTD = jax.random.normal(jax.random.key(1), (1, 5, 6))
      >>> def metric(edit):
      ...     return jnp.sum(stack(params, x_BTD, intervene=edit)[0] ** 2)
      >>> path_effect(metric, zero, L=2, N=3).shape
      (2, 3)
    """
    _check_sizes("path_effect", L, N)

    def measured(chosen_LN: jax.Array) -> jax.Array:
        value = metric(edit(chosen_LN))
        if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
            got = type(value).__name__
            if hasattr(value, "dtype"):
                got = f"{value.dtype} {value.shape}"
            raise ValueError(f"path_effect: metric must return a floating-point scalar, got {got}")
        return value

    one_LNLN = np.eye(L * N, dtype=bool).reshape(L, N, L, N)
    # The run without an edit goes through the same program at the same places of its batches: a
    # program of its own would round differently, and no effect would be exactly 0.
    none_NLN = np.zeros((1, N, L, N), bool)
    made = jax.lax.map(jax.vmap(measured), jnp.asarray(np.concatenate([one_LNLN, none_NLN])))
    return made[:L] - made[L:]


def _check_sizes(owner: str, L: Any, N: Any) -> None:
    for name, size in (("L", L), ("N", N)):
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{owner}: {name} must be an int >= 1, got {size!r}")


def _edit(
    kind: str, heads: Any, name: str = "", value: Any = None, ranks: tuple[int, ...] = ()
) -> Edit:
    if not hasattr(heads, "dtype") or heads.dtype != np.bool_ or heads.ndim not in (1, 2):
        got = f"{heads.dtype} {heads.shape}" if hasattr(heads, "dtype") else repr(heads)
        raise ValueError(f"{kind}: heads must be a bool array [N] or [L,N], got {got}")
    if not isinstance(heads, Tracer) and not np.asarray(heads).any():
        raise ValueError(f"{kind}: heads chooses none, the edit would match nothing")
    if value is None and ranks and kind != "mean":
        raise ValueError(f"{kind}: {name} must be an array, got None")
    if value is not None:
        rank = getattr(value, "ndim", type(value).__name__)
        wanted = [n + heads.ndim - 1 for n in ranks]
        if rank not in wanted:
            lead = "a leading L" if heads.ndim == 2 else "no leading L"
            raise ValueError(
                f"{kind}: {name} must have rank {' or '.join(map(str, wanted))}, {lead} as heads "
                f"{heads.shape} has, got {rank}"
            )
        floating(**{name: value})
    return Edit(heads, value, None, kind)


def edits_of(intervene: Any) -> tuple[Edit, ...]:
    """Return what was given as `intervene` as a tuple, or raise."""
    edits = (intervene,) if isinstance(intervene, Edit) else intervene
    if edits is None:
        return ()
    if not isinstance(edits, tuple | list) or not all(isinstance(e, Edit) for e in edits):
        raise ValueError(
            f"intervene must be an edit from jax_attn.intervene, or a tuple of them, got "
            f"{type(intervene).__name__}"
        )
    return tuple(edits)


def check_layers(edits: tuple[Edit, ...], L: int) -> None:
    """Raise unless every edit's arrays lead with the stack's L."""
    for edit in edits:
        if edit.heads.ndim != 2:
            raise ValueError(
                f"intervene: {edit.kind} has heads {edit.heads.shape}, but a stack of L={L} needs "
                f"[L,N]; see intervene.heads"
            )
        for name, array in (("heads", edit.heads), ("a value", edit.value)):
            if array is not None and array.shape[0] != L:
                raise ValueError(
                    f"intervene: {edit.kind} has {name} with L={array.shape[0]} but the stack has "
                    f"L={L}"
                )


def apply(
    edits: tuple[Edit, ...], o_BTNE: jax.Array, sizes: Sizes, again: Again, v_BSKE: jax.Array
) -> jax.Array:
    """Return the heads' outputs with the edits made, one after the other.

    Args:
      o_BTNE: what attention computed.
      again: function (uniform=, mask=) -> [B,T,N,E], the same attention with logits 0, or under
        one more mask.
      v_BSKE: values, for a pattern.
    """
    edited_BTNE = o_BTNE
    for edit in edits:
        if edit.heads.ndim != 1:
            raise ValueError(
                f"intervene: {edit.kind} has heads {edit.heads.shape}, but one attention layer "
                f"needs [N]; a stack takes [L,N]"
            )
        _fits(edit, "heads", edit.heads, "N", sizes)
        new_BTNE = _replacement(edit, o_BTNE, sizes, again, v_BSKE).astype(o_BTNE.dtype)
        edited_BTNE = jnp.where(edit.heads[None, None, :, None], new_BTNE, edited_BTNE)
    return edited_BTNE


def _replacement(
    edit: Edit, o_BTNE: jax.Array, sizes: Sizes, again: Again, v_BSKE: jax.Array
) -> jax.Array:
    match edit.kind:
        case "zero":
            return jnp.zeros_like(o_BTNE)
        case "mean" if edit.value is None:
            wide = jnp.promote_types(o_BTNE.dtype, jnp.float32)
            return jnp.broadcast_to(jnp.mean(o_BTNE, (0, 1), wide, keepdims=True), o_BTNE.shape)
        case "mean":
            _fits(edit, "mean_NE", edit.value, "NE", sizes)
            return jnp.broadcast_to(edit.value[None, None], o_BTNE.shape)
        case "uniform":
            return again(uniform=True, mask=None)
        case "first_token":
            return again(uniform=True, mask=prefix(1))
        case "knock_out":
            return again(uniform=False, mask=edit.mask)
        case "given_output":
            _fits(edit, "o_BTNE", edit.value, "BTNE", sizes)
            return edit.value
        case "given_pattern":
            p_BNTS = edit.value if edit.value.ndim == 4 else edit.value[None, None]
            fits(sizes, p_BNTS=p_BNTS)
            return _mixed(p_BNTS, v_BSKE, sizes)
    raise ValueError(f"intervene: {edit.kind!r} is no kind of edit")


def _mixed(p_BNTS: jax.Array, v_BSKE: jax.Array, sizes: Sizes) -> jax.Array:
    """Mix values by weights; a value that is not finite makes the rows that weigh it NaN, and
    those alone."""
    wide = jnp.promote_types(jnp.promote_types(p_BNTS.dtype, v_BSKE.dtype), jnp.float32)
    p_BKGTS = jnp.broadcast_to(p_BNTS, sizes["BNTS"]).reshape(sizes["BKGTS"]).astype(wide)
    finite_BSKE = jnp.isfinite(v_BSKE)
    v_BSKE = jnp.where(finite_BSKE, v_BSKE, 0).astype(wide)
    o_BTKGE = jnp.einsum("BKGTS,BSKE->BTKGE", p_BKGTS, v_BSKE)
    bad_BSK = (~finite_BSKE.all(axis=-1)).astype(wide)
    read_BKGTS = (p_BKGTS != 0).astype(wide)
    bad_BTKG = jnp.einsum("BKGTS,BSK->BTKG", read_BKGTS, bad_BSK)
    return jnp.where(bad_BTKG[..., None] > 0, jnp.nan, o_BTKGE).reshape(sizes["BTNE"])


def _fits(edit: Edit, name: str, array: jax.Array, letters: str, sizes: Sizes) -> None:
    for letter, size, known in zip(letters, array.shape, sizes[letters], strict=True):
        if size != known:
            raise ValueError(
                f"intervene: {edit.kind} has {name} with {letter}={size} but attention has "
                f"{letter}={known}"
            )
