"""Which implementation runs, and why not another."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jax_attn.kernels import blockwise, cudnn, dense, native, program, splash, tokamax
from jax_attn.kernels.call import Call, Score, checked
from jax_attn.kernels.processor import backend
from jax_attn.mask_types import Mask
from jax_attn.observe import Mean

_MODULES = {
    "dense": dense,
    "blockwise": blockwise,
    "native": native,
    "cudnn": cudnn,
    "splash": splash,
    "tokamax": tokamax,
}
IMPLEMENTATIONS = tuple(_MODULES)

_strict = jax.make_user_context(default_value=False)


def strict():
    """Return a context in which nothing of this library takes O(T·S) memory for its scores.

    Inside, `implementation=None` never picks "dense"; "dense" by name and `dense_weights` raise.
    The context is part of the key of JAX's caches: what was compiled outside is traced again.

    Returns: a context manager.
    Raises: (inside) ValueError naming the implementation.
    Example:
      >>> import jax.numpy as jnp
      >>> from jax_attn import dot_product_attention
      >>> x_BTNH = jnp.ones((1, 5, 2, 3))
      >>> with strict():
      ...     dot_product_attention(x_BTNH, x_BTNH, x_BTNH, implementation="dense")
      Traceback (most recent call last):
      ...
      ValueError: implementation='dense' takes O(T·S) memory (T=5, S=5), which strict() forbids
    """
    return _strict(True)


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns.

    Fields: `chosen`, the name of what would run, None if nothing would; `why`, a sentence on the
    choice; `others`, for each other implementation the reason it would not run.

    Example:
      >>> print(Explanation("blockwise", "named", {"cudnn": "needs a GPU"}))
      blockwise: named
        not cudnn: needs a GPU
    """

    chosen: str | None
    why: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.chosen or 'nothing'}: {self.why}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.others.items()])


def explain(
    q_BTNH: Any,
    k_BSKH: Any,
    v_BSKE: Any,
    *,
    mask: Mask | jax.Array | None = None,
    bias_BNTS: Any = None,
    score: Score | None = None,
    scale: Any = None,
    softcap: float | None = None,
    sinks_N: Any = None,
    q_offset: Any = 0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    observe: tuple[str | Mean, ...] | None = None,
    implementation: str | None = None,
) -> Explanation:
    """Say which implementation a call would run, and for each other one why not.

    Args: as in `dot_product_attention`; arrays may be `jax.ShapeDtypeStruct`s.
    Returns: an Explanation; print it.
    Raises: ValueError as `dot_product_attention` does for arguments that do not fit each other, or
      an unknown name. A named implementation that cannot run is explained, not raised.
    Example:
      >>> x_BTNH = jax.ShapeDtypeStruct((1, 8192, 12, 64), "float32")
      >>> bias_BNTS = jax.ShapeDtypeStruct((1, 12, 8192, 8192), "float32")
      >>> explain(x_BTNH, x_BTNH, x_BTNH, bias_BNTS=bias_BNTS).chosen
      'blockwise'
    """
    call = checked(
        q_BTNH,
        k_BSKH,
        v_BSKE,
        mask,
        bias_BNTS,
        score,
        scale,
        softcap,
        sinks_N,
        q_offset,
        dropout_rate,
        dropout_key,
        observe,
    )
    _check_name(implementation)
    reasons = {name: _refusal(name, call) for name in IMPLEMENTATIONS}
    if implementation is not None:
        named = "another implementation was named"
        others = {n: why or named for n, why in reasons.items() if n != implementation}
        reason = reasons[implementation]
        if reason is not None:
            return Explanation(None, f"{implementation} was named, but {reason}", others)
        return Explanation(implementation, "named", others)
    chosen, why = _pick(call)
    others = {n: r or _PASSED_OVER[n] for n, r in reasons.items() if n != chosen}
    return Explanation(chosen, why, others)


def forbid_quadratic(name: str, call: Call) -> None:
    """Raise inside strict()."""
    if _strict.value:
        raise ValueError(f"{name} {_quadratic(call)}")


def _quadratic(call: Call) -> str:
    return f"takes O(T·S) memory (T={call.sizes.T}, S={call.sizes.S}), which strict() forbids"


def run(call: Call, implementation: str | None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run a call by the named implementation, or the one that is picked; return the output and
    what was to be observed."""
    _check_name(implementation)
    if implementation is None:
        implementation = _pick(call)[0]
    reason = _refusal(implementation, call)
    if reason is not None:
        raise ValueError(f"implementation={implementation!r} {reason}")
    # An array, lest every step of a decoding loop be a program of its own.
    call = replace(call, q_offset=jnp.asarray(call.q_offset))
    return program.run(_attend, (implementation,), call)


def _attend(implementation: str, call: Call) -> tuple[jax.Array, dict[str, jax.Array]]:
    return _MODULES[implementation].attend(call)


# Up to so many pairs (T·S) scores are written out: on jax 0.12 that is faster than blocks, on
# 0.10.2 about as fast (experiments.bench_attention --sizes=64,128,256 --peers=dense,blockwise).
_DENSE_UP_TO = {"cpu": 256 * 256}
# And up to so many queries, as in decoding: their scores take no more memory than the keys.
_FEW_QUERIES = {"cpu": 16}
_PASSED_OVER = {
    "dense": "would run, but takes O(T·S) memory",
    "blockwise": "would run, but what was picked is faster",
    "cudnn": "would run, but has no jvp, and no measurement here says that it is faster",
    "splash": "would run, but has no jvp, and no measurement here says that it is faster",
    "tokamax": "would run, but has no jvp, and no measurement here says that it is faster",
}


def _pick(call: Call) -> tuple[str, str]:
    if native.refuses(call) is None:
        return "native", "the fused kernel for this CPU takes every option of the call"
    z = call.sizes
    pairs, limit = z.T * z.S, _DENSE_UP_TO.get(backend(), 0)
    if pairs <= limit and not _strict.value:
        return "dense", f"T·S = {pairs} <= {limit}: writing the scores out is faster"
    few = _FEW_QUERIES.get(backend(), 0)
    if few >= z.T and not _strict.value:
        return "dense", f"T = {z.T} <= {few} rows of scores are O(S) memory, and faster"
    return "blockwise", "takes every option at O(S) memory"


def _refusal(name: str, call: Call) -> str | None:
    if name == "dense" and _strict.value:
        return _quadratic(call)
    return _MODULES[name].refuses(call)


def _check_name(implementation: Any) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}, "
            f"got {implementation!r}"
        )
