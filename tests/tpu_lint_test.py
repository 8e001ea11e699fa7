"""Tests of what tpu.plan says of traffic: planted activations, and steps as they should be."""

import pytest

from tpu import schedule
from tpu.estimate import Transfer, transfer
from tpu.hlo import parse
from tpu.lint import unexplained
from tpu.topology import find

V5E = find("v5e-4")
STATE = [
    {"path": f"['w{i}']", "role": "state", "shape": [1024, 4096], "itemsize": 2, "axes": ["fsdp"]}
    for i in range(2)
]  # bfloat16 [4096, 4096] over 4 devices
INPUT = {"path": "argument 1", "role": "input", "shape": [256, 4096], "itemsize": 2,
         "axes": ["fsdp"]}  # fmt: skip
SUM = "jit(step)/transpose(jvp())/dot_general"
GROUP = "replica_groups=mesh['axis_0'=4] {'axis_0'}"


def found(kind: str, shape: str, source: str, axes: str = "fsdp") -> list[str]:
    """What is said of one transfer of a step whose state are two matrices."""
    one = Transfer(kind, axes, (shape,), 24, 1.0, 1.0, source)
    return unexplained([*STATE, INPUT], [one], {"fsdp": 4, "model": 2})


def test_parameters_may_travel() -> None:
    assert not found("all-gather", "bf16[4096,4096]", "p['w0']")
    assert not found("all-gather", "bf16[4096,4096]", "jit(step)/while/body/dynamic_slice")
    assert not found("all-reduce", "bf16[4096,4096]", SUM)
    assert not found("reduce-scatter", "f32[4096,4096]", SUM)
    assert not found("collective-permute", "bf16[1,1024,4096]", "jit(step)/jvp()/dot_general")
    assert not found("all-reduce", "f32[]", SUM)
    assert not found("all-gather", "bf16[1000,4096]", "jit(step)/jvp()/dot_general", "model")


def test_a_line_says_what_travels_and_where_to_look() -> None:
    (said,) = found("all-gather", "bf16[8000,4096]", "jit(step)/while/body/mlp/sort")
    assert said == (
        "all-gather of 65.5 MB over fsdp, 24 × a step, is no parameter and no gradient: an "
        "activation travels; look at the sharding around jit(step)/mlp/sort"
    )


@pytest.mark.parametrize("batch", [512, 1024, 2048, 4096, 8192])
def test_activations_are_found_where_they_have_the_size_of_parameters(batch: int) -> None:
    shape = f"bf16[{batch},4096]"
    assert found("all-gather", shape, "x")
    assert found("all-gather", shape, SUM)
    assert found("all-reduce", shape, "jit(step)/jvp()/dot_general")


@pytest.mark.parametrize(("rows", "shifted"), [(4160, 48), (4480, 288)])
def test_padding_of_gradients_is_no_activation(rows: int, shifted: int) -> None:
    assert not found("all-reduce", f"bf16[{rows},4096]", SUM)
    assert not found("all-reduce", f"bf16[{rows},4096]", "")
    assert not found("collective-permute", f"bf16[{shifted},4096]", "")
    assert found("all-reduce", "bf16[5000,4096]", SUM)
    assert found("collective-permute", "bf16[288,4096]", "jit(step)/jvp()/roll")


PROGRAM = f"""
%add (a: bf16[], b: bf16[]) -> bf16[] {{
  ROOT %a = bf16[] parameter(0)
}}

%fused (q: bf16[4160,4096]) -> bf16[1040,4096] {{
  %q = bf16[4160,4096]{{1,0}} parameter(0)
  ROOT %all = bf16[4160,4096]{{1,0}} all-reduce(%q), channel_id=3, {GROUP}, to_apply=%add
}}

%elsewhere (r: bf16[256,4096]) -> bf16[1024,4096] {{
  %r = bf16[256,4096]{{1,0}} parameter(0)
  ROOT %got = bf16[1024,4096]{{1,0}} all-gather(%r), channel_id=7, {GROUP}, dimensions={{0}}
}}, execution_thread="sparsecore"

ENTRY %main (w: bf16[1024,4096], g: bf16[4160,4096]) -> bf16[1040,4096] {{
  %w = bf16[1024,4096]{{1,0}} parameter(0)
  %g = bf16[4160,4096]{{1,0}} parameter(1)
  %whole = bf16[4096,4096]{{1,0}} all-gather(%w), channel_id=1, {GROUP}, dimensions={{0}}, metadata={{op_name="p[\\'w0\\']"}}
  %begun = ((), (), (s32[1])) call-start(), to_apply=%elsewhere, metadata={{op_name="jit(step)/transpose(jvp())/select_n"}}
  %work = bf16[1024,4096]{{1,0}} fusion(%w), kind=kLoop, calls=%add, backend_config={{"estimated_cycles":"700"}}
  %ended = bf16[1024,4096]{{1,0}} call-done(%begun)
  ROOT %sum = bf16[1040,4096]{{1,0}} fusion(%g), kind=kCustom, calls=%fused, metadata={{op_name="{SUM}"}}
}}
"""  # noqa: E501


def test_sources_and_calls_to_another_core_are_read() -> None:
    made = schedule.cost(parse(PROGRAM), V5E.generation).collectives
    assert [(one.kind, one.shapes, one.source, one.covered_cycles) for one in made] == [
        ("all-gather", ("bf16[4096,4096]",), "p['w0']", 0.0),
        ("all-gather", ("bf16[1024,4096]",), "jit(step)/transpose(jvp())/select_n", 700.0),
        ("all-reduce", ("bf16[4160,4096]",), SUM, 0.0),
    ]
    places = [(x, y, 0, 0) for x in range(2) for y in range(2)]
    moved = [transfer(one, places, {"fsdp": 4}, V5E) for one in made]
    (said,) = unexplained([*STATE, INPUT], moved, {"fsdp": 4})
    assert said.startswith("all-gather of 8.4 MB over fsdp, 1 × a step, is no parameter")
    assert said.endswith("select_n (or the compiler preferred it to a larger parameter)")
