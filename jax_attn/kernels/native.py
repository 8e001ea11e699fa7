"""A fused kernel in C++ for CPUs, called through XLA's foreign function interface.

Optional: `python -m jax_attn.compile` compiles it on the machine that is to run it. Values and
first derivatives in reverse mode are the kernel's; other derivatives are taken through the
blockwise folds.
"""

import ctypes
import hashlib
import os
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn.kernels import blockwise, derivative, fused, observations, spread
from jax_attn.kernels.call import Call
from jax_attn.kernels.hoist import vary, vary_together, varying_axes
from jax_attn.kernels.processor import backend, processor
from jax_attn.mask_types import And, Chunks, Lengths, Mask, Prefix, Segments, Window

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC")
_SMALL_INTEGERS = {"int8", "int16", "int32", "uint8", "uint16"}


def refuses(call: Call) -> str | None:
    """Say why the call cannot run here."""
    if backend() != "cpu":
        return f"needs a CPU, and JAX runs on {backend()}"
    dtypes = {str(x.dtype) for x in (call.q_BTNH, call.k_BSKH, call.v_BSKE)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"takes float32 or bfloat16, one for all, got {', '.join(sorted(dtypes))}"
    reason = fused.refuses_options(call, takes=("softcap", "sinks_N", "observe"))
    if reason is not None:
        return reason
    if spread.splits(call):
        return "runs on one device, and jax.set_mesh has set several"
    masks = _conjuncts(call.mask)
    known = Window | Prefix | Chunks | Lengths | Segments
    if not all(isinstance(mask, known) for mask in masks):
        return "knows masks whose rows are intervals of keys, and segments, joined by &"
    segments = [mask for mask in masks if isinstance(mask, Segments)]
    if len(segments) > 1:
        return "takes one segments mask, got several"
    for mask in segments:
        if not {str(ids.dtype) for ids in (mask.q_ids_BT, mask.kv_ids_BS)} <= _SMALL_INTEGERS:
            return "takes segment ids of at most 32 bits"
    return _load()


def attend(call: Call) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run the call on the kernel; what it does not sum up itself, a pass in blocks observes."""
    z = call.sizes
    if 0 in z["BTSNE"]:
        return jnp.zeros(z["BTNE"], call.v_BSKE.dtype), blockwise.observe(call)
    point = _Point(call.q_BTNH, call.k_BSKH, call.v_BSKE, call.sinks_N)
    numbers = _Numbers(float(call.scale), float(call.softcap or 0.0))
    point, data = vary_together((point, _data(call)))
    value = _fold(numbers, point, data)
    out_BTNE = value.out_BTNE.astype(call.v_BSKE.dtype)
    if observations.columns(call) or call.means:
        return out_BTNE, blockwise.observe(call)
    if call.statistics:
        return out_BTNE, blockwise.finish(call, value.lse_BNT, {})
    return out_BTNE, {}


class _Point(NamedTuple):
    q_BTNH: Any
    k_BSKH: Any
    v_BSKE: Any
    sinks_N: Any


class _Value(NamedTuple):
    out_BTNE: Any  # float32: the backward pass takes Σ dO·out, which rounding would unbalance
    lse_BNT: Any


class _Data(NamedTuple):
    first_BT: Any
    end_BT: Any
    q_ids_BT: Any
    kv_ids_BS: Any
    mask: Any
    q_offset: Any


class _Numbers(NamedTuple):
    scale: float
    softcap: float


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fold(numbers: _Numbers, point: _Point, data: _Data) -> _Value:
    def kernel(point, data):
        q_BTNH, _, v_BSKE, _ = point
        B, T, N, _ = q_BTNH.shape
        made = (
            jax.ShapeDtypeStruct((B, T, N, v_BSKE.shape[3]), jnp.float32),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        )
        return _Value(*_call("jax_attn_forward", made, _operands(point, data), numbers, data))

    # A program may be lowered for another platform than the one it is written on.
    blocks = partial(_in_blocks, numbers)
    return jax.lax.platform_dependent(point, data, cpu=kernel, default=blocks)


def _call(name: str, made: tuple, operands: tuple, numbers: _Numbers, data: _Data) -> list:
    kernel = jax.ffi.ffi_call(name, made, vmap_method="sequential")
    results = kernel(
        *operands,
        scale=np.float32(numbers.scale),
        softcap=np.float32(numbers.softcap),
        has_ids=np.int32(data.q_ids_BT is not None),
    )
    # A foreign call does not say of its results that they vary from shard to shard.
    return [vary(x, varying_axes(operands)) for x in results]


@_fold.defjvp
def _fold_jvp(numbers, primals, tangents):
    point, data = primals
    value = _fold(numbers, point, data)
    rules = derivative.Rules(partial(_push, numbers), partial(_pull, numbers))
    return value, derivative.push(rules, point, value, data, tangents[0])


def _pull(numbers, point: _Point, value: _Value, data: _Data, d: _Value, reversible) -> _Point:
    zeros = jax.tree.map(jnp.zeros_like, value)
    d = _Value(*(zero if x is None else x for x, zero in zip(d, zeros, strict=True)))

    def in_blocks(point, value, data, d):
        return jax.vjp(lambda point: _in_blocks(numbers, point, data), point)[1](d)[0]

    def kernel(point, value, data, d):
        operands = _operands(point, data)
        like = (*point[:3], operands[-1])
        made = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like)
        operands = (*operands, *value, *d)
        dq, dk, dv, d_sinks_N = _call("jax_attn_backward", made, operands, numbers, data)
        if point.sinks_N is None:
            return _Point(dq, dk, dv, None)
        return _Point(dq, dk, dv, d_sinks_N.astype(point.sinks_N.dtype))

    if reversible:
        return in_blocks(point, value, data, d)
    return jax.lax.platform_dependent(point, value, data, d, cpu=kernel, default=in_blocks)


def _push(numbers, point: _Point, value: _Value, data: _Data, d: _Point, reversible) -> _Value:
    return jax.jvp(lambda point: _in_blocks(numbers, point, data), (point,), (d,))[1]


def _in_blocks(numbers: _Numbers, point: _Point, data: _Data) -> _Value:
    """Compute the same value by the folds that JAX can differentiate again."""
    call = Call(
        point.q_BTNH,
        point.k_BSKH,
        point.v_BSKE,
        mask=data.mask,
        bias_BNTS=None,
        score=None,
        scale=numbers.scale,
        softcap=numbers.softcap or None,
        sinks_N=point.sinks_N,
        q_offset=data.q_offset,
        dropout_key=None,
        dropout_rate=0.0,
    )
    out_BTNE, lse_BNT, _ = blockwise.attend_with_lse(call)
    return _Value(out_BTNE, lse_BNT)


def _operands(point: _Point, data: _Data) -> tuple[Any, ...]:
    q, k, v, sinks_N = point
    if sinks_N is None:
        sinks_N = jnp.full(q.shape[2], -jnp.inf, jnp.float32)
    nothing = jnp.zeros((1, 1), jnp.int32)
    ids = (nothing, nothing) if data.q_ids_BT is None else (data.q_ids_BT, data.kv_ids_BS)
    return (q, k, v, data.first_BT, data.end_BT, *ids, sinks_N.astype(jnp.float32))


def _data(call: Call) -> _Data:
    z = call.sizes
    t = jnp.arange(z.T)[None]
    first, end = jnp.int32(0), jnp.int32(z.S)
    q_ids = kv_ids = None
    for mask in _conjuncts(call.mask):
        if isinstance(mask, Segments):
            q_ids = jnp.broadcast_to(mask.q_ids_BT, z["BT"]).astype(jnp.int32)
            kv_ids = jnp.broadcast_to(mask.kv_ids_BS, z["BS"]).astype(jnp.int32)
            continue
        low, high = _interval(mask, t, t + call.q_offset, z.S)
        first, end = jnp.maximum(first, low), jnp.minimum(end, high)
    first_BT, end_BT = (jnp.broadcast_to(x, z["BT"]).astype(jnp.int32) for x in (first, end))
    return _Data(first_BT, end_BT, q_ids, kv_ids, call.mask, call.q_offset)


def _interval(mask: Mask, t: jax.Array, p: jax.Array, S: int) -> tuple[Any, Any]:
    """Return the first key and the end of the keys that the queries t at positions p may see."""
    if isinstance(mask, Window):
        low = 0 if mask.left is None else p - mask.left
        return low, S if mask.right is None else p + mask.right + 1
    if isinstance(mask, Chunks):
        low = p // mask.n * mask.n
        return low, low + mask.n
    if isinstance(mask, Prefix):
        n_B = jnp.asarray(mask.n_B)
        return 0, n_B[:, None] if n_B.ndim else n_B
    assert isinstance(mask, Lengths)
    high = S if mask.kv_B is None else jnp.asarray(mask.kv_B)[:, None]
    if mask.q_B is not None:
        high = jnp.where(t < jnp.asarray(mask.q_B)[:, None], high, 0)
    return 0, high


def _conjuncts(mask: Mask | None) -> list[Mask]:
    if isinstance(mask, And):
        return _conjuncts(mask.left) + _conjuncts(mask.right)
    return [] if mask is None else [mask]


@cache
def library() -> Path:
    """Return where the compiled library is, or is to be."""
    key = hashlib.sha256(repr((FLAGS, jax.__version__, processor())).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "jax_attn" / f"cpu-{key.hexdigest()[:16]}.so"


@cache
def _load_from(path: Path) -> str | None:
    try:
        loaded = ctypes.cdll.LoadLibrary(str(path))
    except OSError as error:
        return f"could not be loaded: {error}"
    for name in ("jax_attn_forward", "jax_attn_backward"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return None


def _load() -> str | None:
    """Load the library once; say why not."""
    path = library()
    if not path.exists():
        return "is not compiled here: run python -m jax_attn.compile"
    return _load_from(path)
