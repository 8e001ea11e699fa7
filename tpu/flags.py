"""Flags of the TPU's compiler: presets with reasons, and a check before a run depends on them.

  python -m tpu.flags --target=v5e-16              # an export line, and why each flag is in it
  python -m tpu.flags --target=2*v5e-16 --use=memory
  python -m tpu.flags --check="--xla_tpu_scoped_vmem_limit_kib=65536"

A flag that this libtpu does not know ends the interpreter when JAX starts on a TPU; one without its
two dashes is left out in silence. --check finds both here, in a process of its own, without a TPU.
Presets were not timed on a TPU: measure a run with a preset and without it.
Exit status: 0 all is well, 1 a flag is unknown or its value bad, 2 wrong arguments.
"""

import dataclasses
import difflib
import importlib.util
import mmap
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Sequence

from rich.console import Console

from jax_attn.command_line import parse
from tpu import topology

NO_LIBTPU = "libtpu, the TPU's compiler, is not installed: pip install 'jax[tpu]'"
XLA = "https://openxla.org/xla/flags_guidance"
JAX = "https://docs.jax.dev/en/latest/xla_flags.html"
MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext benchmarks/xla_flags_library.py"
ALL = tuple(generation.name for generation in topology.GENERATIONS)
LIMIT_S = 300  # for one start of libtpu, which takes seconds


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag, why it is set, and who says so."""

    name: str
    value: str
    why: str
    source: str
    use: str = "overlap"
    """overlap: communication hidden behind compute; memory: when a step does not fit."""
    generations: tuple[str, ...] = ALL
    several_slices: bool = False
    """Of use between slices only."""

    @property
    def text(self) -> str:
        """As LIBTPU_INIT_ARGS takes it."""
        return f"--{self.name}={self.value}"


FLAGS = (
    Flag(
        "xla_tpu_enable_latency_hiding_scheduler", "true",
        "schedules work between the start and the done of a collective; the default, written out "
        "because all below depends on it",
        XLA,
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion", "true",
        "runs a collective inside the matmul that stands between its start and its done",
        JAX,
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true",
        "the same for all-gathers, which is how fsdp brings its parameters; default: by target",
        JAX,
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps", "true",
        "lets one collective go on through several matmuls, for long ones",
        JAX,
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true",
        "the same for all-reduces, off by default: gradients of data parallelism",
        XLA, generations=("v5e",),
    ),
    Flag(
        "xla_tpu_overlap_compute_collective_tc", "true",
        "overlaps both on one TensorCore, where there is no second core to fuse with",
        JAX, generations=("v5e", "v6e"),
    ),
    Flag(
        "xla_tpu_megacore_fusion_allow_ags", "true",
        "fuses all-gathers with matmuls on the two TensorCores that are one device",
        JAX, generations=("v4", "v5p"),
    ),
    Flag(
        "xla_tpu_enable_data_parallel_all_reduce_opt", "true",
        "makes room to hide the all-reduces of gradients between slices",
        JAX, several_slices=True,
    ),
    Flag(
        "xla_tpu_data_parallel_opt_different_sized_ops", "true",
        "pipelines these also where sizes differ from layer to layer; takes more memory",
        JAX, several_slices=True,
    ),
    Flag(
        "xla_latency_hiding_scheduler_rerun", "5",
        "schedules again, each time with less memory, until the step fits",
        XLA, use="memory",
    ),
    Flag(
        "xla_tpu_rwb_fusion", "false",
        "does not fuse a reduction with the broadcast of it, which may take more memory",
        XLA, use="memory",
    ),
    Flag(
        "xla_tpu_scoped_vmem_limit_kib", "98304",
        "fast memory of one operation, of 128 MiB instead of 16: larger blocks for Pallas kernels "
        "and fusions, less room for prefetches; what MaxText sets for dense models",
        MAXTEXT, use="kernels", generations=("v6e",),
    ),
)  # fmt: skip
USES = tuple(dict.fromkeys(flag.use for flag in FLAGS))


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with one flag."""

    flag: str
    what: str


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the command."""

    target: str = ""
    use: str = "overlap"
    check: str = ""


def preset(target: topology.Slice, use: str = "overlap") -> tuple[Flag, ...]:
    """Choose the flags for a slice.

    Args:
      target: from `topology.find`.
      use: "overlap", "memory" or "kernels".
    Returns: the flags, in order.
    Raises: ValueError: there is no such use.
    Example:
      >>> [f.value for f in preset(topology.find("v5p-16"), "memory")]
      ['5', 'false']
    """
    if use not in USES:
        raise ValueError(f"--use must be {', '.join(USES)}, got {use!r}")
    return tuple(
        flag
        for flag in FLAGS
        if flag.use == use
        and target.generation.name in flag.generations
        and (target.slices > 1 or not flag.several_slices)
    )


def misspelt(text: str) -> tuple[Problem, ...]:
    """Find what libtpu would leave out in silence, before it is asked.

    Args:
      text: as in LIBTPU_INIT_ARGS.
    Returns: a problem for each word that is no flag.
    Example:
      >>> misspelt("xla_a=1 --xla_b=2")
      (Problem(flag='xla_a=1', what='has no --, so libtpu leaves it out in silence'),)
    """
    return _split(text)[1]


def _split(text: str) -> tuple[list[str], tuple[Problem, ...]]:
    """Return the flags in a text, and what is in it that is none."""
    words: list[str] = []
    found: list[Problem] = []
    for word in text.split():  # libtpu too splits at spaces and knows no quotation marks
        if word == "--":
            found.append(Problem(word, "ends the flags: libtpu leaves out what follows"))
        elif not word.startswith("-"):
            what = "has no --, so libtpu leaves it out in silence"
            if words and "=" not in words[-1]:
                what = f"stands apart from {words[-1]}; write {words[-1]}={word}"
                words[-1] = f"{words[-1]}={word}"
            found.append(Problem(word, what))
        elif re.match(r"--?(undefok|flagfile|fromenv|tryfromenv|help\w*)(=|$)", word):
            found.append(Problem(word, "sets nothing of the compiler's; write each flag itself"))
        elif not re.fullmatch(r"--?\w+(=.*)?", word):
            found.append(Problem(word, "is no flag; write --name=value"))
        else:
            words.append(word)
    names = [_name(word) for word in words]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            found.append(Problem(f"--{name}", "is given twice; the last one counts"))
    return words, tuple(found)


def check(text: str) -> tuple[Problem, ...]:
    """Find the flags that the libtpu installed here does not know, or whose values it refuses.

    It is asked in a process of its own, which such a flag ends; no TPU is needed, and the
    environment of this process stays as it is.

    Args:
      text: as in LIBTPU_INIT_ARGS.
    Returns: the problems; none if all is well.
    Raises: ValueError: libtpu is not installed, or did not start for another reason.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(NO_LIBTPU)
    words, spelling = _split(text)
    found = list(spelling)
    # What is known to be bad is left out and the rest asked again, so that nothing hides behind it.
    while words:
        status, said = _start(words)
        problems = read_errors(said)
        if status == 0 and not problems:
            break
        bad = {problem.flag.removeprefix("--") for problem in problems}
        left = [word for word in words if _name(word) not in bad]
        if len(left) == len(words):
            last = next((line for line in reversed(said.splitlines()) if line.strip()), "nothing")
            raise ValueError(f"libtpu did not start with {' '.join(words)}; it said: {last:.300}")
        found += [_with_hint(problem) for problem in problems]
        words = left
    return tuple(dict.fromkeys(found))


def read_errors(said: str) -> tuple[Problem, ...]:
    """Read what libtpu writes to its standard error about flags.

    Args:
      said: the text.
    Returns: a problem for each flag that it names.
    Example:
      >>> read_errors("ERROR: Unknown command line flag 'xla_a'")
      (Problem(flag='--xla_a', what='is not known to this libtpu'),)
    """
    unknown = re.findall(r"^ERROR: Unknown command line flag '([^']*)'", said, re.M)
    missing = re.findall(r"^ERROR: Missing the value for the flag '([^']*)'", said, re.M)
    illegal = re.findall(r"^ERROR: Illegal value '(.*)' specified for flag '([^']*)'", said, re.M)
    return (
        *(Problem(f"--{name}", "is not known to this libtpu") for name in unknown),
        *(Problem(f"--{name}", "needs a value") for name in missing),
        *(
            Problem(f"--{name}", f"does not take the value {value!r}")
            for value, name in illegal
            if name not in missing
        ),
    )


def _name(word: str) -> str:
    return word.lstrip("-").partition("=")[0]


def _start(words: Sequence[str]) -> tuple[int, str]:
    """Start libtpu with flags in a process of its own; return its status and what it wrote."""
    code = (
        "from jax.experimental import topologies;"
        "topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "LIBTPU_INIT_ARGS": " ".join(words),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"libtpu did not start within {LIMIT_S} s with {' '.join(words)}"
        ) from None
    return done.returncode, done.stderr


def known() -> frozenset[str]:
    """Return the names of flags that can be read from libtpu's file: most, perhaps not all."""
    spec = importlib.util.find_spec("libtpu")
    places = (spec.submodule_search_locations or []) if spec else []
    for place in places:
        file = pathlib.Path(place) / "libtpu.so"
        if file.is_file():
            with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                names = re.findall(rb"AbslFlagHelpGenFor(\w+?)8NonConst", data)
            return frozenset(name.decode() for name in names)
    return frozenset()


def _with_hint(problem: Problem) -> Problem:
    if "not known" not in problem.what:
        return problem
    near = difflib.get_close_matches(_name(problem.flag), sorted(known()), n=1, cutoff=0.7)
    hint = f"; did you mean --{near[0]}?" if near else ""
    return dataclasses.replace(problem, what=problem.what + hint)


def show(target: topology.Slice, flags: Sequence[Flag]) -> None:
    """Print an export line, and each flag with its reason."""
    console = Console(soft_wrap=not sys.stdout.isatty())
    if not flags:
        print(f"# no flags for {target.name}: the compiler's defaults stand")
        return
    # The line is for a shell: never wrapped, and the rest is comments to it.
    print(f"export LIBTPU_INIT_ARGS={shlex.quote(' '.join(flag.text for flag in flags))}")
    width = console.width - 6 if sys.stdout.isatty() else 94
    for flag in flags:
        print(f"# {flag.text}")
        for line in textwrap.wrap(f"{flag.why} [{flag.source}]", max(width, 30)):
            print(f"#     {line}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      argv: its arguments; default `sys.argv[1:]`.
    Returns: its exit status.
    """
    cfg = parse(Config, {"default": {}}, __doc__ or "", _joined(argv))
    try:
        if bool(cfg.target) == bool(cfg.check):
            raise ValueError('give --target=v5e-16, or --check="--flag=value ..."; see --help')
        if cfg.check and not cfg.check.strip():
            raise ValueError("--check has no flag in it")
        if cfg.target:
            target = topology.find(cfg.target)
            show(target, preset(target, cfg.use))
            return 0
        problems = check(cfg.check)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for problem in problems:
        print(f"error: {problem.flag} {problem.what}", file=sys.stderr)
    if not problems:
        names = len(cfg.check.split())
        print(f"{names} flag{'s' * (names > 1)}: this libtpu knows them and takes their values")
    return 1 if problems else 0


def _joined(argv: Sequence[str] | None) -> list[str]:
    """Let `--check "..."` be written with a space too."""
    words = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(words[:-1]):
        if word == "--check":
            return [*words[:i], f"--check={words[i + 1]}", *words[i + 2 :]]
    return words


if __name__ == "__main__":
    raise SystemExit(main())
