"""The contestants of `bench_attention`: the same numbers, each by its own best call."""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np

from jax_attn import Mask, causal, dot_product_attention, segments, window
from jax_attn.dispatch import IMPLEMENTATIONS, explain

OURS = tuple(sorted(IMPLEMENTATIONS, key=lambda name: name != "native"))
PEERS = (*OURS, "jax.nn", "jax.nn.cudnn", "flax.linen", "flax.nnx", "torch")
MASKS = ("causal", "window", "segments")
DTYPES = ("float32", "bfloat16")
WHATS = ("forward", "forward+backward")
DOCUMENTS = 4


class Case(NamedTuple):
    """One attention call, T = S; `window` counts the keys a query sees, its own included."""

    mask: str
    dtype: str
    what: str
    S: int
    B: int
    N: int
    H: int
    window: int


class Prepared(NamedTuple):
    """A call that is ready to be timed.

    Fields: `run` computes and waits for the result; `values` turns the result into NumPy arrays
    [B,T,N,H]: the output, then the gradients of q, k, v; `compile_s`, None where nothing is
    compiled; `temporary`, the bytes it is known to need beside its inputs; `mask_bytes`, what the
    mask takes that had to be written out for it; `kernel`, what the peer says it runs.
    """

    run: Callable[[], Any]
    values: Callable[[Any], list[np.ndarray]]
    compile_s: float | None
    temporary: int
    mask_bytes: int
    kernel: str = ""


def cores() -> int:
    """Count the CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def torch() -> Any:
    """Import PyTorch, set to use every core; None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    module = importlib.import_module("torch")
    module.set_num_threads(cores())
    return module


def on_gpu() -> bool:
    """Say whether JAX runs on a GPU."""
    return jax.default_backend() == "gpu"


def refusal(peer: str, case: Case) -> str | None:
    """Say why a contestant cannot run the case on this machine."""
    if peer in IMPLEMENTATIONS:
        said = _explain(case, peer)
        return None if said.chosen else said.why.removeprefix(f"{peer} was named, but ")
    if peer == "jax.nn.cudnn" and not on_gpu():
        return f"needs a GPU, and JAX runs on {jax.default_backend()}"
    if peer == "torch":
        if torch() is None:
            return "is not installed; pip install 'jax-attn[bench]' adds it"
        if on_gpu() and not torch().cuda.is_available():
            return "has no GPU here, and JAX runs on one"
    return None


def picked(case: Case) -> str | None:
    """Name the implementation that this library runs where none is named."""
    return _explain(case, None).chosen


def _explain(case: Case, implementation: str | None) -> Any:
    x_BTNH = jax.ShapeDtypeStruct((case.B, case.S, case.N, case.H), case.dtype)
    ids_BT = jnp.zeros((1, case.S), jnp.int32)
    mask = our_mask(case, ids_BT)
    return explain(x_BTNH, x_BTNH, x_BTNH, mask=mask, implementation=implementation)


def document_ids(S: int) -> np.ndarray:
    """Pack documents of equal length, [1,S]; the lengths differ by 1 if they have to."""
    return (np.arange(S, dtype=np.int64) * DOCUMENTS // S).astype(np.int32)[None]


def our_mask(case: Case, ids_BT: Any = None) -> Mask:
    """Build the mask from this library's parts."""
    if case.mask == "window":
        return causal() & window(case.window - 1, 0)
    return causal() & segments(ids_BT) if case.mask == "segments" else causal()


def allowed(case: Case) -> np.ndarray:
    """Write the mask out, bool [1,1,T,S], for peers that take it in no other way."""
    t, s = np.arange(case.S)[:, None], np.arange(case.S)[None, :]
    mask = s <= t
    if case.mask == "window":
        mask &= s > t - case.window
    if case.mask == "segments":
        ids = document_ids(case.S)[0]
        mask &= ids[:, None] == ids[None, :]
    return mask[None, None]


def pairs(case: Case) -> int:
    """Count the pairs of a query and a key that the mask allows, for one head of one sequence."""
    lengths = [case.S]
    if case.mask == "segments":
        lengths = np.bincount(document_ids(case.S)[0], minlength=DOCUMENTS).tolist()
    total = sum(n * (n + 1) // 2 for n in lengths)
    if case.mask == "window":
        beyond = max(case.S - case.window, 0)
        total -= beyond * (beyond + 1) // 2
    return total


def flops(case: Case) -> float:
    """Count the multiplications and additions: 4 per pair and feature, 3.5 times with gradients."""
    forward = 4 * case.B * case.N * pairs(case) * case.H
    return forward * (3.5 if case.what == "forward+backward" else 1.0)


def prepare(peer: str, case: Case) -> Prepared:
    """Make a contestant's inputs and compile it; raises what the contestant raises."""
    return _prepare_torch(case) if peer == "torch" else _prepare_jax(peer, case)


def _numbers(B: int, S: int, N: int, H: int) -> list[np.ndarray]:
    """Draw q, k, v and the cotangent."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((B, S, N, H), dtype=np.float32) for _ in range(4)]


@lru_cache(maxsize=1)
def _arrays(B: int, S: int, N: int, H: int, dtype: str) -> list[jax.Array]:
    return [jnp.asarray(x).astype(dtype) for x in _numbers(B, S, N, H)]


@lru_cache(maxsize=1)
def _written_mask(mask: str, S: int, window: int) -> jax.Array:
    return jnp.asarray(allowed(Case(mask, "float32", "forward", S, 1, 1, 1, window)))


def _prepare_jax(peer: str, case: Case) -> Prepared:
    backward = case.what == "forward+backward"
    inputs = _arrays(case.B, case.S, case.N, case.H, case.dtype)[: 4 if backward else 3]
    attend, written = _jax_call(peer, case)
    extra: list[jax.Array] = []
    if written:
        extra = [_written_mask(case.mask, case.S, case.window)]
    elif peer in IMPLEMENTATIONS and case.mask == "segments":
        extra = [jnp.asarray(document_ids(case.S))]

    def forward(q_BTNH, k_BSNH, v_BSNH, *extra):
        return (attend(q_BTNH, k_BSNH, v_BSNH, *extra),)

    def both(q_BTNH, k_BSNH, v_BSNH, d_BTNH, *extra):
        # The output is returned too: unused, the compiler would drop the work it takes.
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *extra), q_BTNH, k_BSNH, v_BSNH)
        return out, *pull(d_BTNH)

    began = time.perf_counter()
    compiled = jax.jit(both if backward else forward).lower(*inputs, *extra).compile()
    compile_s = time.perf_counter() - began
    analysis = compiled.memory_analysis()
    return Prepared(
        run=lambda: jax.block_until_ready(compiled(*inputs, *extra)),
        values=lambda result: [np.asarray(x.astype(jnp.float32)) for x in result],
        compile_s=compile_s,
        temporary=int(getattr(analysis, "temp_size_in_bytes", 0) or 0),
        mask_bytes=extra[0].nbytes if written else 0,
    )


def _jax_call(peer: str, case: Case) -> tuple[Callable[..., Any], bool]:
    """Return a function of (q, k, v, mask if it needs one), and whether it needs one."""
    if peer in IMPLEMENTATIONS:
        return (
            lambda q, k, v, *ids: dot_product_attention(
                q, k, v, mask=our_mask(case, *ids), implementation=peer
            )
        ), False
    if peer == "flax.linen":
        return (lambda q, k, v, m: flax.linen.dot_product_attention(q, k, v, mask=m)), True
    if peer == "flax.nnx":
        if case.mask == "causal":
            return (lambda q, k, v: flax.nnx.dot_product_attention(q, k, v, is_causal=True)), False
        return (lambda q, k, v, m: flax.nnx.dot_product_attention(q, k, v, mask=m)), True
    if peer not in ("jax.nn", "jax.nn.cudnn"):
        raise ValueError(f"unknown contestant {peer!r}")
    name = "cudnn" if peer == "jax.nn.cudnn" else "xla" if on_gpu() else None
    call = jax.nn.dot_product_attention
    if case.mask == "segments":
        return (lambda q, k, v, m: call(q, k, v, mask=m, implementation=name)), True
    size = (case.window - 1, 0) if case.mask == "window" else None
    return (
        lambda q, k, v: call(q, k, v, is_causal=True, local_window_size=size, implementation=name)
    ), False


def _prepare_torch(case: Case) -> Prepared:
    th = torch()
    device = "cuda" if on_gpu() else "cpu"
    backward = case.what == "forward+backward"
    q, k, v, d = (
        th.from_numpy(x).to(device, getattr(th, case.dtype)).transpose(1, 2).contiguous()
        for x in _numbers(case.B, case.S, case.N, case.H)
    )
    mask = None if case.mask == "causal" else th.from_numpy(allowed(case)).to(device)
    call = th.nn.functional.scaled_dot_product_attention
    for x in (q, k, v):
        x.requires_grad_(backward)

    def compute() -> Any:
        out = call(q, k, v, attn_mask=mask, is_causal=mask is None)
        return (out, *th.autograd.grad(out, (q, k, v), d)) if backward else (out,)

    def run() -> Any:
        with th.set_grad_enabled(backward):
            result = compute()
        if device == "cuda":
            th.cuda.synchronize()
        return result

    with th.set_grad_enabled(backward):
        kernel = _torch_kernel(th, q, k, v, mask)
    copies = 0 if kernel != "math" else 6 if backward else 3
    return Prepared(
        run=run,
        values=lambda result: [x.detach().transpose(1, 2).float().cpu().numpy() for x in result],
        compile_s=None,
        temporary=copies * 4 * case.B * case.N * case.S**2,
        mask_bytes=0 if mask is None else mask.nbytes,
        kernel=kernel,
    )


def _torch_kernel(th: Any, q: Any, k: Any, v: Any, mask: Any) -> str:
    """Ask which of its kernels PyTorch takes for the call; "" if this version does not say."""
    choose = getattr(th, "_fused_sdp_choice", None)
    if choose is None:
        return ""
    number = int(choose(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=mask is None))
    return {0: "math", 1: "flash", 2: "memory-efficient", 3: "cudnn"}.get(number, str(number))
