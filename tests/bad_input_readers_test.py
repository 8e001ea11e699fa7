"""Wrong arguments of what reads weights again; see tests/bad_input_test.py."""

import numpy as np

import jax_attn as a
from jax_attn.attribution import head_norms, rollout, value_weighted_rows
from jax_attn.readers import attention_block, attention_rows, received_mass, top_links
from tests.bad_input_cases import Entry, K, Q, V, assert_named, call, i, tables, x

LAYERS_Q, WO = x(2, 2, 5, 3, 7), x(3, 13, 6)

BAD: list[Entry] = [
    # readers
    (call(attention_rows, Q, K[..., :5], rows=0), r"k_BSKH has H=5 but q_BTNH has H=7"),
    (call(attention_rows, Q.tolist(), K, rows=0), r"q_BTNH must be an array .* got list"),
    (call(attention_rows, Q, K, rows=5), r"rows must be from 0 to T=5 - 1, got 5"),
    (call(attention_rows, Q, K, rows=[0, -1]), r"rows must be from 0 to T=5 - 1, got -1"),
    (call(attention_rows, Q, K, rows=1.0), r"rows must be integers, got float64"),
    (call(attention_rows, Q, K, rows=i(1, 2)), r"rows must be an int or .* rank 1, .*\(1, 2\)"),
    (call(attention_rows, Q, K, rows=0, heads=(0, 3)), r"heads must be from 0 to N=3 - 1, got 3"),
    (call(attention_rows, Q, K, rows=0, heads=True), r"heads must be integers, got bool"),
    (call(attention_rows, Q, K, rows=0, mask=a.lengths(kv_B=i(3))), r"kv_B has B=3.*B=2"),
    (call(attention_block, Q, K, queries=(0, 6), keys=(0, 1)), r"queries must be two ints.*T=5"),
    (call(attention_block, Q, K, queries=(0, 1), keys=(4, 2)), r"keys must be two ints .*S=11, "),
    (call(attention_block, Q, K, queries=3, keys=(4, 5)), r"queries must be two ints .* got 3"),
    (call(attention_block, Q, K[:1], queries=(0, 1), keys=(0, 1)), r"k_BSKH has B=1 but q_BTNH"),
    (call(top_links, Q, K, k=12), r"k must be an int from 1 to S=11 keys, got 12"),
    (call(top_links, Q, K, k=0), r"k must be an int from 1 to S=11 keys, got 0"),
    (call(top_links, Q, K, k=2.0), r"k must be an int from 1 to S=11 keys, got 2.0"),
    (call(top_links, Q, K[:, :, :2]), r"q_BTNH has N=3, no multiple of K=2 of k_BSKH"),
    (call(received_mass, Q, K, queries_BTN=x(2, 4, 3)), r"queries_BTN has T=4.* T=5"),
    (call(received_mass, Q, K, queries_BTN=i(2, 5, 3)), r"queries_BTN must be floating point"),
    (call(received_mass, Q, K, sinks_N=x(2)), r"sinks_N has N=2 but q_BTNH has N=3"),
    # attribution
    (call(rollout, LAYERS_Q, LAYERS_Q[:, :, :4], rows=0), r"k_LBSKH has S=4 but q_LBTNH has T=5"),
    (call(rollout, LAYERS_Q, LAYERS_Q[:1], rows=0), r"k_LBSKH has L=1 but q_LBTNH has L=2"),
    (call(rollout, Q, K, rows=0), r"q_LBTNH needs rank 5"),
    (call(rollout, LAYERS_Q, LAYERS_Q, rows=7), r"rows must be from 0 to T=5 - 1, got 7"),
    (
        call(rollout, LAYERS_Q, LAYERS_Q, rows=0, residual=1.5),
        r"residual must be .* 0 to 1, got 1.5",
    ),
    (call(rollout, LAYERS_Q, LAYERS_Q, rows=0, residual=True), r"residual must be .*, got True"),
    (
        call(rollout, LAYERS_Q, LAYERS_Q, rows=0, residual=np.float32(2)),
        r"residual must be .* 0 to 1, got .*2.0",
    ),
    (call(rollout, LAYERS_Q, LAYERS_Q, rows=0, residual=x(2)), r"residual must be a number"),
    (call(rollout, LAYERS_Q, LAYERS_Q, rows=0, sinks_LN=x(1, 3)), r"sinks_LN has L=1 but q_LBTNH"),
    (call(head_norms, V, x(4, 13, 6)), r"wo_NED has N=4, no multiple of K=3 of x_BTKE"),
    (call(head_norms, V, x(3, 12, 6)), r"wo_NED has E=12 but x_BTKE has E=13"),
    (call(head_norms, i(2, 11, 3, 13), WO), r"x_BTKE must be floating point"),
    (call(value_weighted_rows, Q, K, V, x(4, 13, 6), rows=0), r"wo_NED has N=4 but q_BTNH has N=3"),
    (call(value_weighted_rows, Q, K, V[:, :4], WO, rows=0), r"v_BSKE has S=4 but k_BSKH"),
    (call(value_weighted_rows, Q, K, V, WO, rows=5), r"rows must be from 0 to T=5 - 1"),
]


@tables(*BAD)
def test_wrong_argument_is_named(entry: Entry) -> None:
    assert_named(entry)
