"""The letters of every einsum are the axes in its operands' names. A test of source, not of values.

    h_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, params["w_in_DF"])

A name's suffix is the part after its last underscore if that is all upper-case letters.
"""

import ast
import re
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

from jax_attn.shapes import ALPHABET

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("jax_attn", "experiments", "tests", "tpu")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def suffix(node: ast.expr) -> str | None:
    """The axes in the name of an expression; None where it has no such name."""
    match node:
        case (
            ast.Name(id=name)
            | ast.Attribute(attr=name)
            | ast.Subscript(slice=ast.Constant(value=str(name)))
        ):
            found = re.search(r"_([A-Z]+)$", name)
            return found[1] if found and not name.isupper() else None  # LOG2_E is a number
        case ast.Call(func=ast.Attribute(value=inner, attr="astype")) | ast.UnaryOp(operand=inner):
            return suffix(inner)
        case ast.BinOp(left=left, op=op, right=right) if not isinstance(op, ast.MatMult):
            sides = {suffix(left), suffix(right)} - {None}
            return sides.pop() if len(sides) == 1 else None
    return None


def einsum_call(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name.endswith("einsum")
    return False


def results(value: ast.expr) -> Iterator[ast.Call]:
    """The einsum calls whose axes an expression has: bare, cast, negated, or under arithmetic."""
    match value:
        case ast.Call() if einsum_call(value):
            yield value
        case ast.Call(func=ast.Attribute(value=inner, attr="astype")) | ast.UnaryOp(operand=inner):
            yield from results(inner)
        case ast.BinOp(left=left, op=op, right=right) if not isinstance(op, ast.MatMult):
            # A scalar may meet any shape; anything else must have the shape of the result.
            yield from (call for call in (*results(left), *results(right)) if output(call) != "")


def subscripts(call: ast.Call) -> str | None:
    """The letters of an einsum call, or None where they are not written out."""
    match call.args:
        case [ast.Constant(value=str(letters)), *_]:
            return letters.replace(" ", "")
    return None


def output(call: ast.Call) -> str | None:
    letters = subscripts(call)
    return letters.partition("->")[2] if letters and "->" in letters else None


def call_faults(call: ast.Call, strict: bool, alphabet: Container[str]) -> Iterator[str]:
    letters = subscripts(call)
    if letters is None:
        yield "write the letters out as a string"
        return
    if not re.fullmatch(r"[A-Za-z]*(,[A-Za-z]*)*->[A-Za-z]*", letters):
        yield f"write every letter out, with an arrow, instead of {letters!r}"
        return
    yield from (
        f"{letter} in {letters!r} is not in the alphabet"
        for letter in sorted(set(letters) - set(",->"))
        if letter not in alphabet
    )
    inputs, operands = letters.partition("->")[0].split(","), call.args[1:]
    if len(inputs) != len(operands) or any(isinstance(node, ast.Starred) for node in operands):
        yield f"{letters!r} has {len(inputs)} inputs but the call has {len(operands)} operands"
        return
    for axes, node in zip(inputs, operands, strict=True):
        name, source = suffix(node), ast.unparse(node)
        if name is None and strict:
            yield f"operand {source} of {letters!r} needs a name that ends in _{axes}"
        elif name is not None and name != axes:
            yield f"operand {source} is written {axes} in {letters!r}"


def einsum_faults(source: str, *, strict: bool, alphabet: Container[str] = ALPHABET) -> list[str]:
    """Compare the letters of each einsum with the names around it.

    Args:
      source: Python source.
      strict: an operand without axes in its name is a fault as well.
      alphabet: the letters that exist.
    Returns: one line for each fault, with the line number.
    """
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and einsum_call(node):
            faults += [f"{node.lineno}: {text}" for text in call_faults(node, strict, alphabet)]
        match node:
            case ast.Assign(targets=targets, value=value):
                pass
            case (
                ast.AnnAssign(target=target, value=ast.expr() as value)
                | ast.AugAssign(target=target, value=value)
                | ast.NamedExpr(target=target, value=value)
            ):
                targets = [target]
            case _:
                continue
        for target in targets:
            for call in results(value):
                name, axes = suffix(target), output(call)
                if name is not None and axes is not None and name != axes:
                    faults.append(f"{node.lineno}: {ast.unparse(target)} gets axes {axes}")
    return faults


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_letters_are_the_axes_of_the_names(path: Path) -> None:
    strict = path.is_relative_to(ROOT / "jax_attn")
    faults = einsum_faults(path.read_text(encoding="utf-8"), strict=strict)
    assert not faults, "\n".join(f"{path.relative_to(ROOT)}:{fault}" for fault in faults)


GOOD = [
    'q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, params["wq_DNH"])',
    'q_BTNH = jnp.einsum("BTD, DNH -> BTNH", x_BTD, params.wq_DNH, precision=highest)',
    's_BKGTS = scale * einsum("BTKGH,BSKH->BKGTS", q_BTKGH.astype(f32), k_BSKH)',
    'o_BTD = x_BTD + jax.numpy.einsum("BTF,FD->BTD", gate * h_BTF, w_FD).astype(dtype)',
    'p_S = e_S / np.einsum("S->", e_S)',
    's_TS = np.einsum("TH,SH->TS", LOG2_E * q_TH, -k_SH)',
    'total = np.einsum("TS,SE->TE", p_TS * mask_TS, v_SE)',
    'o_TE: Array = np.einsum("TS,SE->TE", p_TS, v_SE)[:, ::2]',
    'x_BTD = f("BTD,DF", y_TB)',
]
BAD = {
    'y = jnp.einsum("BTD,DNH->BTNH", x_BTD, w_DHN)': "w_DHN is written DNH",
    'y = jnp.einsum("BTD,DNH->BTNH", x_BTD, params["wq_DHN"])': "is written DNH",
    'y = jnp.einsum("BTD,DF->BTF", x_BTD.astype(f32), p.w_FD)': "p.w_FD is written DF",
    'y = jnp.einsum("SD->S", -x_TD)': "-x_TD is written SD",
    'y = jnp.einsum("SD->S", scale * x_TD)': "is written SD",
    'y_BFT = jnp.einsum("BTD,DF->BTF", x_BTD, w_DF)': "y_BFT gets axes BTF",
    'y_TB = scale * jnp.einsum("BTD->BT", x_BTD).astype(f32)': "y_TB gets axes BT",
    'y_TB: Array = jnp.einsum("BTD->BT", x_BTD)': "y_TB gets axes BT",
    'y_TB += jnp.einsum("BTD->BT", x_BTD)': "y_TB gets axes BT",
    'f(y_TB := jnp.einsum("BTD->BT", x_BTD))': "y_TB gets axes BT",
    'out["y_TB"] = jnp.einsum("BTD->BT", x_BTD)': "gets axes BT",
    'y = jnp.einsum(f"{a}D->{a}", x_BTD)': "write the letters out",
    "y = jnp.einsum(letters, x_BTD)": "write the letters out",
    "y = einsum(*args)": "write the letters out",
    'y = jnp.einsum("...D,DF->...F", x_BTD, w_DF)': "write every letter out",
    'y = jnp.einsum("BTD,DF", x_BTD, w_DF)': "with an arrow",
    'y = jnp.einsum("BTQ->BT", x_BTQ)': "Q in 'BTQ->BT' is not in the alphabet",
    'y = jnp.einsum("btd->bt", x)': "b in 'btd->bt' is not in the alphabet",
    'y = jnp.einsum("BTD,DF->BTF", x_BTD)': "has 2 inputs but the call has 1 operands",
    'y = jnp.einsum("BTD->BT", *xs)': "operands",
}


@pytest.mark.parametrize("source", GOOD)
def test_accepts(source: str) -> None:
    assert einsum_faults(source, strict=True) == []


@pytest.mark.parametrize(("source", "fault"), BAD.items())
def test_catches(source: str, fault: str) -> None:
    found = einsum_faults(source, strict=False)
    assert found
    assert fault in found[0]


def test_operands_without_axes_fail_in_the_library_alone() -> None:
    for operand in ("x", "f(x_BTD)", "x_BTD[0]", "a_TS @ b_SD", "a_T * b_TD"):
        source = f'y = jnp.einsum("TD->T", {operand})'
        assert einsum_faults(source, strict=False) == []
        assert einsum_faults(source, strict=True) == [
            f"1: operand {operand} of 'TD->T' needs a name that ends in _TD"
        ]


def test_names_the_line() -> None:
    source = 'x = 1\n\ny_T = jnp.einsum("TD->TD", x_TD)\n'
    assert einsum_faults(source, strict=True) == ["3: y_T gets axes TD"]
