"""Wrong arguments of what observes, edits and controls; see tests/bad_input_test.py."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_attn as a
from jax_attn import control, intervene
from tests.bad_input_cases import (
    ATTENTION,
    BLOCK,
    HEADS,
    LAYERS,
    MODEL,
    Entry,
    K,
    Q,
    V,
    X,
    assert_named,
    call,
    i,
    tables,
    tree,
    without,
    x,
)

dot = a.dot_product_attention
attend = a.attention
STACK: dict = {"attention": HEADS}
WRONG: Any = None


def b(*shape: int) -> Any:
    return np.ones(shape, bool)


def edited(edit: intervene.Edit) -> Any:
    return call(attend, ATTENTION, X, intervene=edit)


BAD: list[Entry] = [
    # observing
    (call(dot, Q, K, V, observe="entropy"), r"got 'entropy': write \('entropy',\)"),
    (call(dot, Q, K, V, observe=("entropie",)), r"unknown .* 'entropie', the nearest is 'entropy'"),
    (call(dot, Q, K, V, observe=("lse", "lse")), r"observe: 'lse' stands there twice"),
    (call(dot, Q, K, V, observe=("window_mass",)), r"needs its width, pass window_mass\(w\)"),
    (call(dot, Q, K, V, observe=(len,)), r"is no statistic; wrap a function as mean_of"),
    (call(dot, Q, K, V, observe=(a.mean_of(x(2, 10, 3)),)), r"g_BSN has S=10 .* call has S=11"),
    (
        call(dot, Q, K, V, observe=(a.mean_of(lambda b, n, t, s: x(3), name="f"),)),
        r"'f' must return .* broadcast to \[B,N,T,S\], \(2, 3, 5, 11\), got float32 \(3,\)",
    ),
    (call(dot, Q, K, V, observe=(a.mean_of(x(2, 11, 3), name="lse"),)), r"'lse' is a statistic"),
    (call(a.mean_of, x(2, 3)), r"g must be a function .* or a real array \[B,S,N\], got \(2, 3\)"),
    (call(a.mean_of, lambda b, n, t, s: s), r"give the lambda a name"),
    (call(a.mean_of, len, name=""), r"name must be a string that is not empty"),
    (call(a.window_mass, -1), r"w must be an int >= 0, got -1"),
    (call(a.head_summary, {"lse": x(3)}), r"'lse' must be \[\.\.\., B, T, N\], got \(3,\)"),
    (call(a.head_summary, {"lse": X}, edges={"a": x(2)}), r"edges: 'a' is not among lse"),
    (call(a.head_summary, {"lse": X}, edges={"lse": x(1)}), r"edges: 'lse' must be \[bins \+ 1\]"),
    (call(attend, ATTENTION, X, observe="lse"), r"observe must be a tuple of statistics"),
    (
        call(a.head_summary, {"lse": X}, edges={"lse": np.array([2.0, 1.0])}),
        r"edges: 'lse' must rise, got \[2. 1.\]",
    ),
    (
        call(dot, Q, K, V, observe=(a.window_mass(1), a.window_mass(2))),
        r"'window_mass' stands there twice; .* another name=",
    ),
    (call(attend, ATTENTION, X, reduce=a.head_summary), r"reduce is applied to .*observe is None"),
    (call(attend, ATTENTION, X, observe=("lse",), reduce="mean"), r"reduce must be a function"),
    (call(attend, ATTENTION, X, keep="o_BTNE"), r"keep must be a tuple of q_BTNH, .*got 'o_BTNE'"),
    (call(attend, ATTENTION, X, keep=("p_BNTS",)), r"keep must be a tuple of .* got \('p_BNTS',\)"),
    (call(attend, ATTENTION, X, keep=([],)), r"keep must be a tuple of .* got \(\[\],\)"),
    # edits where they are made
    (call(intervene.heads, 0, 3, [(0, 0)]), r"heads: L must be an int >= 1, got 0"),
    (call(intervene.heads, 2, 3.0, [(0, 0)]), r"heads: N must be an int >= 1, got 3.0"),
    (call(intervene.heads, 2, 3, []), r"chosen is empty, the edit would match nothing"),
    (call(intervene.heads, 2, 3, [(2, 0)]), r"= \(2, 0\) is out of range, the model has L=2, N=3"),
    (call(intervene.heads, 2, 3, [(0, -1)]), r"\(0, -1\) is out of range"),
    (call(intervene.heads, 2, 3, [(0, 3)]), r"\(0, 3\) is out of range"),
    (call(intervene.heads, 2, 3, [1]), r"chosen must be pairs \(layer, head\) of ints, got 1"),
    (call(intervene.heads, 2, 3, [(0, 0.5)]), r"chosen must be pairs .* got \(0, 0.5\)"),
    (call(intervene.zero, [True]), r"zero: heads must be a bool array \[N\] or .* got \[True\]"),
    (call(intervene.zero, x(3)), r"heads must be a bool array .* got float32 \(3,\)"),
    (call(intervene.zero, b(1, 2, 3)), r"heads must be a bool array .* got bool \(1, 2, 3\)"),
    (call(intervene.zero, ~b(2, 3)), r"zero: heads chooses none, the edit would match nothing"),
    (call(intervene.uniform, ~b(3)), r"uniform: heads chooses none"),
    (call(intervene.first_token, ~b(3)), r"first_token: heads chooses none"),
    (call(intervene.mean, b(3), x(2, 3, 4)), r"mean_NE must have rank 2, no leading L .* got 3"),
    (call(intervene.mean, b(2, 3), x(3, 4)), r"mean_NE must have rank 3, a leading L .* got 2"),
    (call(intervene.mean, b(3), i(3, 4)), r"mean_NE must be floating point, got int32"),
    (call(intervene.given_output, b(3), WRONG), r"given_output: o_BTNE must be an array, got None"),
    (call(intervene.given_output, b(3), [1.0]), r"o_BTNE must have rank 4, .* got list"),
    (call(intervene.given_output, b(2, 3), x(2, 5, 3, 4)), r"o_BTNE must have rank 5, a leading L"),
    (call(intervene.given_pattern, b(3), x(3, 5, 5)), r"p must have rank 2 or 4, .* got 3"),
    (call(intervene.given_pattern, b(2, 3), x(5, 5)), r"p must have rank 3 or 5, .* got 2"),
    (call(intervene.given_pattern, b(3), i(5, 5)), r"p must be floating point, got int32"),
    (call(intervene.knock_out, b(3), b(5, 5)), r"mask must be from .* ndarray; wrap .* in dense"),
    (call(intervene.knock_out, ~b(3), a.causal()), r"knock_out: heads chooses none"),
    # edits where they are used
    (call(attend, ATTENTION, X, intervene="zero"), r"intervene must be an edit .* got str"),
    (
        call(attend, ATTENTION, X, intervene=(3,)),
        r"intervene must be an edit .* a tuple of them",
    ),
    (edited(intervene.zero(b(2, 3))), r"heads \(2, 3\), but one attention layer needs \[N\]"),
    (edited(intervene.zero(b(5))), r"zero has heads with N=5 but attention has N=3"),
    (edited(intervene.mean(b(3), x(3, 5))), r"mean has mean_NE with E=5 but attention has E=4"),
    (edited(intervene.mean(b(3), x(1, 4))), r"mean has mean_NE with N=1 but attention has N=3"),
    (edited(intervene.given_output(b(3), x(2, 4, 3, 4))), r"o_BTNE with T=4 but attention has T=5"),
    (edited(intervene.given_output(b(3), x(1, 5, 3, 4))), r"o_BTNE with B=1 but attention has B=2"),
    (edited(intervene.given_pattern(b(3), x(5, 6))), r"p_BNTS has S=6, .* equals S=5"),
    (edited(intervene.given_pattern(b(3), x(2, 2, 5, 5))), r"p_BNTS has N=2, .* equals N=3"),
    (edited(intervene.knock_out(b(3), a.lengths(kv_B=i(3)))), r"kv_B has B=3.*B=2"),
    (edited(intervene.Edit(b(3), None, None, "halve")), r"'halve' is no kind of edit"),
    (call(a.block, BLOCK, X, intervene=intervene.zero(b(3))), r"params has no 'attention'"),
    (call(a.block, BLOCK, X, intervene=b(3)), r"intervene must be an edit .* got ndarray"),
    (call(a.stack, STACK, X, intervene=intervene.zero(b(3))), r"heads \(3,\), but a stack of L=2"),
    (call(a.stack, STACK, X, intervene=intervene.zero(b(4, 3))), r"heads with L=4 but .* has L=2"),
    (call(a.stack, STACK, X, intervene=intervene.zero(b(2, 5))), r"N=5 but attention has N=3"),
    (
        call(a.stack, STACK, X, intervene=intervene.mean(b(2, 3), x(4, 3, 4))),
        r"mean has a value with L=4 but the stack has L=2",
    ),
    (call(a.stack, LAYERS, X, intervene=intervene.zero(b(2, 3))), r"params has no 'attention'"),
    (
        call(a.language_model, MODEL, i(2, 5), intervene=intervene.zero(b(3, 3))),
        r"heads with L=3 but the stack has L=2",
    ),
    (
        call(intervene.path_effect, lambda edit: jnp.ones(3), intervene.zero, L=2, N=3),
        r"metric must return a floating-point scalar, got float32 \(3,\)",
    ),
    (
        call(intervene.path_effect, lambda edit: (edit, 0.0), intervene.zero, L=2, N=3),
        r"metric must return a floating-point scalar, got tuple",
    ),
    (
        call(intervene.path_effect, lambda edit: jnp.bool_(True), intervene.zero, L=2, N=3),
        r"metric must return a floating-point scalar, got bool",
    ),
    (call(intervene.path_effect, len, intervene.zero, L=0, N=3), r"L must be an int >= 1, got 0"),
    (call(intervene.path_effect, len, intervene.zero, L=2, N=True), r"N must be an int >= 1"),
    # controls
    (call(control.qk_clip, ATTENTION, x(3), tau=0.0), r"qk_clip: tau must be > 0, got 0.0"),
    (call(control.qk_clip, ATTENTION, x(3), tau=float("nan")), r"tau must be > 0, got nan"),
    (call(control.qk_clip, ATTENTION, x(3), tau="9"), r"tau must be > 0, got '9'"),
    (call(control.qk_clip, ATTENTION, x(5), tau=9.0), r"\(5,\) but wq_DNH asks for \[N\], N=3"),
    (call(control.qk_clip, ATTENTION, x(2, 3), tau=9.0), r"shape \(2, 3\) but .* \[N\], N=3"),
    (call(control.qk_clip, ATTENTION, [9.0], tau=9.0), r"max_logit_N has shape list but"),
    (call(control.qk_clip, ATTENTION, i(3), tau=9.0), r"max_logit_N must be floating point"),
    (call(control.qk_clip, HEADS, x(3), tau=9.0), r"asks for \[L,N\] = \(2, 3\); .* head_summary"),
    (call(control.qk_clip, STACK, x(2, 3), tau=9.0), r"qk_clip: unknown leaf 'attention'"),
    (call(control.qk_clip, without(ATTENTION, "wk_DKH"), x(3), tau=9.0), r"'wk_DKH' is missing"),
    (
        call(control.qk_clip, ATTENTION | tree(k_scale_H=(2,)), x(3), tau=9.0),
        r"k_scale_H undoes what the clip does",
    ),
    (
        call(control.qk_clip, ATTENTION, x(3), tau=jnp.float32(-1)),
        r"tau must be > 0, got Arr",
    ),
    (call(control.qk_clip, ATTENTION, x(3), tau=jnp.ones(4)), r"tau must be > 0, got Array\(\[1"),
    (call(control.entropy_floor, x(3), floor=jnp.ones(3)), r"floor must be >= 0, got Array"),
    (call(control.z_loss, i(3)), r"z_loss: lse must be a floating array, got int32"),
    (call(control.z_loss, [1.0]), r"z_loss: lse must be a floating array, got list"),
    (call(control.entropy_floor, x(3), floor=-1.0), r"floor must be >= 0, got -1.0"),
    (call(control.entropy_floor, x(3), floor=True), r"floor must be >= 0, got True"),
    (call(control.entropy_floor, 1.0, floor=1.0), r"entropy must be a floating array, got float"),
    (
        call(control.entropy_floor, X, floor=1.0, where=x(6)),
        r"where must be a bool array, got float",
    ),
    (
        call(control.entropy_floor, X, floor=1.0, where=[True]),
        r"where must be a bool array, got li",
    ),
    (
        call(control.entropy_floor, X, floor=1.0, where=b(5, 1, 6)),
        r"where has shape \(5, 1, 6\), which does not broadcast to \(2, 5, 6\) of entropy",
    ),
    (call(control.entropy_floor, x(3), floor=1.0, where=b(1, 3)), r"where has shape \(1, 3\)"),
]


@tables(*BAD)
def test_wrong_argument_is_named(entry: Entry) -> None:
    assert_named(entry)
