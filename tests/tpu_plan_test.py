"""Tests of tpu.plan: what is read from a schedule, times, findings, and wrong arguments."""

import json
import pathlib
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_attn as ja
from tpu import _plan_report, flops, plan, schedule
from tpu.estimate import Transfer, estimate, links, transfer
from tpu.hlo import parse, size
from tpu.lint import donation, lint, padding, wide_products
from tpu.topology import find
from tpu.traffic import Collective

V5E = find("v5e-16").generation
PROGRAM = """
%cut (p0: bf16[24,8,128], p1: s32[]) -> bf16[8,128] {
  %p0 = bf16[24,8,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %slice = bf16[8,128]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,8,128}
}

%once (q: bf16[8,128]) -> bf16[8,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  ROOT %made = bf16[8,128]{1,0} fusion(%q), kind=kLoop, calls=%nothing, backend_config={"estimated_cycles":"40"}
}

%twice (r: bf16[8,128]) -> bf16[8,128] {
  %r = bf16[8,128]{1,0} parameter(0)
  ROOT %other = bf16[8,128]{1,0} fusion(%r), kind=kLoop, calls=%nothing, backend_config={"estimated_cycles":"90"}
}

%nothing (s: bf16[8,128]) -> bf16[8,128] {
  ROOT %s = bf16[8,128]{1,0} parameter(0)
}

%until (t: (s32[], bf16[8,128])) -> pred[] {
  %t = (s32[], bf16[8,128]) parameter(0)
  %limit = s32[]{:T(128)} constant(24)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (t: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %t = (s32[], bf16[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[8,128]{1,0} get-tuple-element(%t), index=1
  %start = (bf16[8,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%x), channel_id=3, replica_groups=[2,8]<=[16], dimensions={0}, metadata={op_name="step/gather"}
  %row = bf16[8,128]{1,0} fusion(%stack, %i), kind=kLoop, calls=%cut, backend_config={"estimated_cycles":"1000"}
  %done = bf16[64,128]{1,0} all-gather-done(%start), channel_id=3
  %sum = bf16[8,128]{1,0} all-reduce(%row), channel_id=4, replica_groups={{0,1},{2,3}}, to_apply=%add
  %near = bf16[8,128]{1,0:S(1)} fusion(%sum), kind=kLoop, calls=%nothing, backend_config={"estimated_cycles":"10"}
  ROOT %out = (s32[], bf16[8,128]) tuple(%i, %near)
}

ENTRY %main (a: bf16[8,128], stack: bf16[24,8,128], which: s32[]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %stack = bf16[24,8,128]{2,1,0} parameter(1)
  %which = s32[] parameter(2)
  %before = (s32[], /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%which, %a)
  %loop = (s32[], bf16[8,128]) while(%before), condition=%until, body=%body
  %x = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
  ROOT %end = bf16[8,128]{1,0} conditional(%which, %x, %x), branch_computations={%once, %twice}
}
"""  # noqa: E501


def test_a_schedule_is_summed_as_often_as_it_runs() -> None:
    cost = schedule.cost(parse(PROGRAM), V5E)
    assert cost.cycles == 24 * 1010 + 40
    assert cost.most_cycles == 24 * 1010 + 90
    assert cost.unknown_loops == 0
    gather, reduce = sorted(cost.collectives, key=lambda one: one.kind)
    assert (gather.kind, gather.shapes, gather.times) == ("all-gather", ("bf16[64,128]",), 24)
    assert gather.group == tuple(range(8))
    assert gather.covered_cycles == 1000
    assert gather.source == "step/gather"
    assert (reduce.kind, reduce.shapes, reduce.group) == ("all-reduce", ("bf16[8,128]",), (0, 1))
    assert reduce.covered_cycles == 0


def test_a_loop_without_a_constant_is_told_and_runs_as_often_as_is_said() -> None:
    text = PROGRAM.replace("constant(24)", "get-tuple-element(%t), index=0")
    cost = schedule.cost(parse(text), V5E, unknown_trips=2.5)
    assert cost.cycles == 2.5 * 1010 + 40
    assert cost.unknown_loops == 1
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing")


def test_of_a_stack_only_the_slice_counts() -> None:
    module = parse(PROGRAM)
    row = next(x for x in module.computations["body"] if x.name == "row")
    shapes = {"stack": "bf16[24,8,128]{2,1,0}", "i": "s32[]"}
    assert schedule._traffic(module, row, shapes) == 2048 + 2048 + 4
    assert size("(f32[3,5]{1,0}, pred[7], s4[8])") == 60 + 7 + 4
    assert size("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", hbm_only=True) == 0


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}, x", (0, 4)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", (0, 2, 4, 6)),
        ("replica_groups=mesh['data'=2,'model'=4] {'model'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['data'=2,'model'=4] {'data'}", (0, 4)),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("no groups", ()),
    ],
)
def test_every_way_to_write_a_group_is_read(text: str, group: tuple[Any, ...]) -> None:
    from tpu.traffic import _group

    assert _group(text) == group


# Operations.


def test_operations_of_loops_masks_and_derivatives() -> None:
    q = jax.ShapeDtypeStruct((1, 2048, 2, 64), "bfloat16")
    pair = 2 * 2 * 2048 * 2048 * 64  # 1 batch entry, 2 heads, one product

    def run(mask: Any) -> Any:
        def scalar(q: jax.Array) -> jax.Array:
            out = ja.dot_product_attention(q, q, q, mask=mask, implementation="blockwise")
            return out.astype("float32").sum()

        return scalar

    for mask, share in ((None, 1.0), (ja.causal(), 10 / 16)):  # blocks of 512: 10 of 16
        forward = flops.count(jax.make_jaxpr(run(mask))(q))
        assert forward.flops == 2 * pair * share
        assert not forward.notes
        both = flops.count(jax.make_jaxpr(jax.grad(run(mask)))(q))
        assert both.flops == 7 * pair * share
        assert not both.notes


def test_operations_that_cannot_be_known_are_told() -> None:
    def grows(x: jax.Array, n: Any) -> jax.Array:
        return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)

    square = 2 * 5**3
    found = flops.count(jax.make_jaxpr(grows)(jnp.ones((5, 5)), 3))
    assert found.flops == square
    assert "depends on data" in found.notes[0]
    known = flops.count(jax.make_jaxpr(lambda x: grows(x, jnp.int32(2) + 5))(jnp.ones((5, 5))))
    assert (known.flops, known.notes, known.iterations) == (7 * square, [], [7])

    def chooses(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x.sum() > 0, lambda: x @ x, lambda: x)

    found = flops.count(jax.make_jaxpr(chooses)(jnp.ones((5, 5))))
    assert found.flops == 0
    assert "fewer operations" in found.notes[0]

    def scanned(x: jax.Array) -> Any:
        return jax.lax.scan(lambda c, _: (c @ c, c[0]), x, None, length=11)

    found = flops.count(jax.make_jaxpr(scanned)(jnp.ones((5, 5), jnp.bfloat16)))
    assert (found.flops, found.narrow) == (11 * square, 11 * square)


# Times.


def places(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    import itertools

    return [(*at, 0, 0) for at in itertools.product(*map(range, shape))]


def test_links_follow_the_torus() -> None:
    square, ring = find("v5e-16"), find("v5e-256")
    rows, many = places((4, 4)), places((16, 16))
    assert links(range(4), rows, square) == 1  # a line
    assert links(range(16), rows, square) == 2  # both dimensions
    assert links((0, 2), rows, square) == 0.5  # two groups share the line
    assert links(range(16), many, ring) == 2  # a closed ring


def test_a_transfer_takes_its_bytes_over_its_links() -> None:
    slice_, rows = find("v5e-16"), places((4, 4))
    axes = {"data": 4, "model": 4}

    def took(kind: str, group: Any, covered: float = 0.0) -> Transfer:
        return transfer(
            Collective(kind, ("s8[45000000]",), 3, group, covered, "x"), rows, axes, slice_
        )

    gather = took("all-gather", (0, 1, 2, 3))
    assert gather.axes == "model"
    assert gather.seconds == pytest.approx(3 * 0.75e-3)
    assert gather.exposed == gather.seconds
    assert took("all-reduce", (0, 4, 8, 12)).seconds == pytest.approx(3 * 1.5e-3)
    assert took("all-reduce", (0, 4, 8, 12)).axes == "data"
    assert took("collective-permute", ((0, 1), (1, 0))).seconds == pytest.approx(3e-3)
    hidden = took("all-gather", (0, 1, 2, 3), covered=0.5e-3 * 1.5e9)
    assert hidden.exposed == pytest.approx(3 * 0.25e-3)


def test_a_step_lies_between_its_bounds() -> None:
    slice_ = find("v5e-16")
    facts = {"cycles": 1.5e9, "most_cycles": 1.8e9, "hbm_bytes": 819e9 / 2, "tokens": 1000,
             "unpriced_kernels": 0}  # fmt: skip
    moved = transfer(
        Collective("all-gather", ("s8[45000000000]",), 1, tuple(range(4)), 0.0, ""),
        places((4, 4)), {"fsdp": 16}, slice_,
    )  # fmt: skip
    found = estimate({**facts, "model_flops": 0.7 * 16 * 197e12}, [moved], slice_, 1.2)
    assert (found.compute, found.memory) == (1.0, 0.5)
    assert found.step == pytest.approx(1.75)
    assert (found.least, found.most) == pytest.approx((1.0, 1.2 + 0.5 + 0.75))
    assert found.mfu == pytest.approx(0.4)
    assert found.tokens_per_s == pytest.approx(1000 / 1.75)
    dollars = 16 * 1.2 / 3600 * 1.75 / 1000 * 1e9
    assert found.dollars_per_billion_tokens == pytest.approx(dollars)


# Findings.

STATE = {"path": "w_DF", "role": "state", "shape": [512, 2048], "itemsize": 4, "axes": ["fsdp"]}


def test_padding_donation_and_wide_products_are_found() -> None:
    assert not padding([STATE])
    (said,) = padding([{**STATE, "shape": [4096, 24, 40]}])
    assert "4096×24×40" in said
    facts = {"returned_bytes": 1e9, "aliased_bytes": 1e9, "flops": 100.0, "narrow_flops": 99.0}
    assert not donation(facts)
    assert not wide_products(facts)
    assert "1,000 MB" in donation({**facts, "aliased_bytes": 0})[0]
    assert wide_products({**facts, "narrow_flops": 40.0})[0].startswith("60% of the products'")
    everything = {**facts, "arguments": [STATE], "mesh": {"fsdp": 4}, "host_transfers": ["outfeed"]}
    assert lint(everything, []) == ["a transfer to the host in the step: outfeed"]


# The command.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --experiment=experiments.character_lm or --step=module:function"),
        (["--step=mine"], "--step looks like module:function, got 'mine'"),
        (["--step=a:b", "--target=v5e-3"], "target 'v5e-3': v5e is let with 1, 4, 8"),
        (["--step=a:b", "--target=2*v5e-4"], "--target=2*v5e-4: one slice at a time"),
        (["--step=a:b", "--mesh=data=3"], "--mesh=data=3 is 3 devices, v5e-16 has 16"),
        (["--step=a:b", "--mesh=rows=16"], "--mesh looks like data=4,model=4"),
        (["--step=a:b", "--search", "--axes=x"], "--axes: no axis 'x'"),
        (["--step=a:b", "--search", "--mesh=data=16"], "--mesh names one mesh"),
        (["--step=a:b", "--preset=x", "--preset=y"], "--preset is given twice"),
        (["--step=a:b", "--batch=-1"], "--batch must be at least 0"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], said: str, capsys: Any) -> None:
    assert plan.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_prices_are_read_or_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text('{"v5e": 1.2}')
    assert plan.read_prices(str(path)) == {"v5e": 1.2}
    for text in ("", "[1]", '{"v5e": "dear"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="must be JSON such as"):
            plan.read_prices(str(path))


def made(fits: bool = True) -> plan.Plan:
    facts: dict[str, Any] = {
        "fits": fits, "used": 9 * 2**30 if fits else 20 * 2**30, "limit": 15.75 * 2**30,
        "cycles": 1.5e9, "most_cycles": 1.8e9, "hbm_bytes": 4e11, "model_flops": 1e15,
        "tokens": 1000, "collectives": [], "places": [], "arguments": [], "mesh": {"fsdp": 16},
        "host_transfers": [], "returned_bytes": 1, "aliased_bytes": 1, "flops": 1.0,
        "narrow_flops": 1.0, "unpriced_kernels": 0,
        "largest": [{"bytes": 2**30, "shape": "f32[8]", "source": "here"}],
    }  # fmt: skip
    return plan.conclude(facts, find("v5e-16"), {"fsdp": 16}, {})


def test_the_table_says_what_fits_and_what_does_not(capsys: Any, tmp_path: pathlib.Path) -> None:
    refused = plan.Plan(find("v5e-16"), {"model": 16}, {"refused": "wq_DNH has N=12"})
    _plan_report.show([refused, made(False), made()], 3.0)
    said = capsys.readouterr().out
    assert "does not fit: 20.00 GiB wanted on a device of 15.75" in said
    assert "large: 1.00 GiB f32[8] here" in said
    assert "no plan: wq_DNH has N=12" in said
    _plan_report.draw(tmp_path / "a" / "plan.png", [refused, made(False), made()])
    assert (tmp_path / "a" / "plan.png").stat().st_size > 10_000
    _plan_report.write_json(tmp_path / "plan.json", [refused, made(False), made()])
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert [row.get("fits") for row in rows] == [True, False, None]
    assert rows[0]["estimate"]["compute"] == 1.0


def test_the_example_of_a_step_of_ones_own_is_one() -> None:
    """As it stands in the help: it is traced for a mesh of the CPU's devices."""
    text = (plan.__doc__ or "").split("  # mine.py\n")[1].split("\n--mesh is")[0]
    lines = textwrap.dedent(text).strip().splitlines()
    assert len(lines) <= 20
    mine: dict[str, Any] = {}
    exec(compile("\n".join(lines), "mine.py", "exec"), mine)
    step, arguments, tokens = mine["plan_step"](ja.make_mesh(fsdp=8), batch=16)
    assert tokens == 16 * 2048
    assert step.trace(*arguments).jaxpr.jaxpr.outvars
