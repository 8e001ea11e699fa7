"""What the TPUs are: generations of chips, and the slices that are let, in one table with sources.

Nothing here asks a device or imports JAX. Where sources differ (by up to 15 %) the vendor's figure
stands; tests hold it against JAX's own table and against what libtpu describes.

Sources:
  [docs] Google Cloud's pages on v4, v5e, v5p, v6e and TPU7x, and on their configurations;
    https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
  [book] Austin et al., How to Scale Your Model, 2025, https://jax-ml.github.io/scaling-book
  [libtpu] libtpu 0.0.42 and 0.0.50: what its compiler describes and what it lets a program use.
"""

import dataclasses
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of TPU; rates and sizes are of a chip unless a name says otherwise."""

    name: str
    """As in `v5e-16`."""
    prefix: str
    """Of the accelerator type on Google Cloud, as in `v5litepod-16`. [docs]"""
    kind: str
    """What JAX calls a device (`device_kind`). [libtpu]"""
    compiler: str
    """What libtpu's compiler calls it, as in `v5e:4x4`. [libtpu]"""
    cores_per_chip: int
    """TensorCores. [docs]"""
    devices_per_chip: int
    """Devices that JAX sees: two TensorCores are one device where they share memory. [libtpu]"""
    counts_cores: bool
    """Whether the number in an accelerator type counts TensorCores; else it counts chips. [docs]"""
    bf16_flops: float
    """Peak, a second. [docs]"""
    hbm_bytes: float
    """[docs]; of v5p, where those say 95, what holds the usable memory. [libtpu]"""
    usable_hbm_bytes: float
    """What the compiler lets a program use of a device's memory. [libtpu]"""
    hbm_bytes_per_s: float
    """[docs]"""
    ici_bytes_per_s: float
    """One link between neighbouring chips, one way. [book]; 7x by [docs]: 1,200 GB/s over 6 links,
    both ways."""
    torus_dims: int
    """2 or 3. [docs]"""
    clock_hz: float
    """Implied by the peak rate and the size of the matrix units, each of whose cells multiplies and
    adds once a cycle, in v6e and 7x twice. [book]"""
    mxus_per_core: int
    """[docs]"""
    mxu_width: int
    """[docs]"""
    vmem_bytes_per_core: int
    """[libtpu]"""
    max_chips: int
    """Of one slice. [docs]"""
    runtime: str
    """Image of a TPU VM; empty where that API does not know the generation. [docs]"""
    machine: str
    """Of Compute Engine; `{chips}` of one host. [docs]"""

    @property
    def device_bf16_flops(self) -> float:
        """Peak rate of what JAX sees as a device."""
        return self.bf16_flops / self.devices_per_chip

    @property
    def device_hbm_bytes_per_s(self) -> float:
        """Memory bandwidth of what JAX sees as a device."""
        return self.hbm_bytes_per_s / self.devices_per_chip


GENERATIONS = (
    Generation(
        "v4", "v4", "TPU v4", "v4", 2, 1, True,
        275e12, 32 * GIB, 30.75 * GIB, 1228e9, 45e9, 3, 1.05e9, 4, 128, 16 * 2**20, 4096,
        "tpu-ubuntu2204-base", "ct4p-hightpu-{chips}t",
    ),
    Generation(
        "v5e", "v5litepod", "TPU v5 lite", "v5e", 1, 1, False,
        197e12, 16 * GIB, 15.75 * GIB, 819e9, 45e9, 2, 1.5e9, 4, 128, 128 * 2**20, 256,
        "v2-alpha-tpuv5-lite", "ct5lp-hightpu-{chips}t",
    ),
    Generation(
        "v5p", "v5p", "TPU v5", "v5p", 2, 1, True,
        459e12, 96 * GIB, 95.74 * GIB, 2765e9, 90e9, 3, 1.75e9, 4, 128, 64 * 2**20, 6144,
        "v2-alpha-tpuv5", "ct5p-hightpu-{chips}t",
    ),
    Generation(
        "v6e", "v6e", "TPU v6 lite", "v6e", 1, 1, False,
        918e12, 32 * GIB, 31.25 * GIB, 1638e9, 90e9, 2, 1.75e9, 2, 256, 128 * 2**20, 256,
        "v2-alpha-tpuv6e", "ct6e-standard-{chips}t",
    ),
    Generation(
        "7x", "tpu7x", "TPU7x", "tpu7x", 2, 2, True,
        2307e12, 192 * GIB, 94.75 * GIB, 7380e9, 100e9, 3, 2.2e9, 2, 256, 64 * 2**20, 9216,
        "", "tpu7x-standard-{chips}t",
    ),
)  # fmt: skip

# Shapes of slices by their chips: one list for two dimensions, one for three. Others are let too
# (multiples of 4 in each dimension); these are the ones that a number alone names. [docs]
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
CUBES = (
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8),
    (8, 8, 12), (8, 8, 16), (8, 12, 16), (8, 16, 16), (12, 16, 16), (16, 16, 16), (16, 16, 24),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are let together."""

    generation: Generation
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Devices that JAX sees in all slices."""
        return self.slices * self.chips * self.generation.devices_per_chip

    @property
    def chips_per_host(self) -> int:
        """Chips of one host: 4, but 1 or 8 where a flat slice has one host alone."""
        return self.chips if self.generation.torus_dims == 2 and self.chips <= 8 else 4

    @property
    def hosts(self) -> int:
        """Hosts, and so processes, of one slice."""
        return max(self.chips // self.chips_per_host, 1)

    @property
    def topology(self) -> str:
        """As Google Cloud writes it: `4x4`."""
        return "x".join(map(str, self.shape))

    @property
    def compiler_name(self) -> str:
        """As libtpu's compiler takes it: `v5e:4x4`."""
        return f"{self.generation.compiler}:{self.topology}"

    @property
    def accelerator_type(self) -> str:
        """As `gcloud` takes it: `v5litepod-16`."""
        per_chip = self.generation.cores_per_chip if self.generation.counts_cores else 1
        return f"{self.generation.prefix}-{self.chips * per_chip}"

    @property
    def name(self) -> str:
        """As this project writes it: `v5e-16`, `2*v5e-16` for two slices; `v4:4x4x16`, by its
        shape, where its number means another shape or none."""
        number = self.accelerator_type.rpartition("-")[2]
        several = f"{self.slices}*" if self.slices > 1 else ""
        if _numbered(self.generation).get(number) == self.shape:
            return f"{several}{self.generation.name}-{number}"
        return f"{several}{self.generation.name}:{self.topology}"

    @property
    def machine_type(self) -> str:
        """Of each host on Compute Engine."""
        return self.generation.machine.format(chips=self.chips_per_host)

    @property
    def wrap(self) -> tuple[bool, ...]:
        """For each dimension, whether a link leads from its end back to its start: in three
        dimensions where all are multiples of 4, in two where one is 16. [docs]"""
        if self.generation.torus_dims == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * 3


def find(text: str) -> Slice:
    """Find the slice that a name means.

    Args:
      text: `v5e-16`, `v5litepod-16`, `v5p-16` (8 chips: the number counts TensorCores there),
        `v5e:4x4` by its shape, or any of these with how many slices before it: `2*v5e-16`.
    Returns: the slice.
    Raises: ValueError: no such generation, number or shape; it says which there are.
    Example:
      >>> find("v5p-16").topology, find("v5p-16").devices, find("v6e-16").hosts
      ('2x2x2', 8, 4)
      >>> find("2*v5e:4x4").name
      '2*v5e-16'
    """
    several, star, rest = text.strip().lower().rpartition("*")
    if star and not (several.isdigit() and int(several)):
        raise ValueError(f"target {text!r}: what stands before * must be a number of slices")
    slices = int(several) if star else 1
    by_shape = ":" in rest
    name, _, size = rest.partition(":") if by_shape else rest.rpartition("-")
    generation = _generation(name, text)
    shapes = _shapes(generation)
    if by_shape:
        parts = size.split("x")
        if len(parts) != generation.torus_dims or not all(p.isdigit() and int(p) for p in parts):
            example = "x".join(map(str, shapes[3]))
            raise ValueError(f"target {text!r}: its shape must look like {example}, got {size!r}")
        shape = tuple(map(int, parts))
        in_cubes = generation.torus_dims == 3 and all(n % 4 == 0 for n in shape)
        if shape not in shapes and not in_cubes:
            there = ", ".join("x".join(map(str, s)) for s in shapes)
            raise ValueError(f"target {text!r}: {generation.name} has the shapes {there}")
        found = Slice(generation, shape, slices)
    else:
        made = _numbered(generation)
        if size not in made:
            unit = "TensorCores" if generation.counts_cores else "chips"
            example = "x".join(map(str, shapes[3]))
            raise ValueError(
                f"target {text!r}: {generation.name} is let with {', '.join(made)} {unit}; another "
                f"shape is named by its chips: {generation.name}:{example}"
            )
        found = Slice(generation, made[size], slices)
    if found.chips > generation.max_chips:
        raise ValueError(
            f"target {text!r}: {found.chips} chips, a slice of {generation.name} has at most "
            f"{generation.max_chips}"
        )
    return found


def _shapes(generation: Generation) -> tuple[tuple[int, ...], ...]:
    """List the shapes that a number alone names."""
    every = FLAT if generation.torus_dims == 2 else CUBES
    return tuple(shape for shape in every if math.prod(shape) <= generation.max_chips)


def _numbered(generation: Generation) -> dict[str, tuple[int, ...]]:
    """Map the numbers of accelerator types to the shapes that they mean."""
    every = _shapes(generation)
    return {Slice(generation, s).accelerator_type.rpartition("-")[2]: s for s in every}


def of_kind(kind: str) -> Generation | None:
    """Find the generation whose devices JAX calls `kind` (`device.device_kind`), if one is."""
    return next((g for g in GENERATIONS if g.kind == kind), None)


def _generation(name: str, text: str) -> Generation:
    for generation in GENERATIONS:
        if name in (generation.name, generation.prefix, generation.compiler):
            return generation
    there = ", ".join(g.name for g in GENERATIONS)
    raise ValueError(f"target {text!r}: no such TPU; there are {there}, as in v5e-16")
