"""Run on 8 CPU devices, with silent rank promotion forbidden. Set before JAX is imported.

Nearly all of a test's time is compiling. So XLA makes the same programs of the same fusions, but
has LLVM optimise them little: half the time. `make test-long` compiles as users do.
"""

import os
import pathlib
import signal

# A shell that runs this in the background has Ctrl-C ignored, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

DEVICES = "--xla_force_host_platform_device_count"
OPTIMISED = "--xla_backend_optimization_level"
for flag, value in ((DEVICES, 8), (OPTIMISED, 0)):
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda,cpu runs the suite on a GPU

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from jax_attn.kernels import native  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# Contracts are not test files, but their asserts should say as much.
pytest.register_assert_rewrite(
    "tests.attention_contract",
    "tests.derivatives_contract",
    "tests.masked_contract",
    "tests.observe_contract",
    "tests.oracle",
)


@pytest.fixture(scope="session", autouse=True)
def without_the_compiled_kernel():
    """What `implementation=None` runs must not depend on what this machine has compiled; the
    kernel's own tests put it back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: pathlib.Path("not compiled"))
        yield


# The first example of a shape compiles, so time says nothing about an example.
hypothesis.settings.register_profile("default", deadline=None, max_examples=30)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=15, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """Skip what a kernel that does not take every call refuses by its name."""
    try:
        return (yield)
    except ValueError as error:
        name = getattr(pyfuncitem.cls, "implementation", None)
        if getattr(pyfuncitem.cls, "refuses", False) and f"implementation={name!r}" in str(error):
            pytest.skip(str(error))
        raise


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark `long` all but a few cases of a test that asks for that: n of them, evenly spaced.

    The longest test, which waits for pip, starts first, so that the others run beside it.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("long"):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for each in cases.values():
        mark = each[0].get_closest_marker("few")
        n = mark.args[0] if mark else 0
        quick = {i * len(each) // n for i in range(n)}
        for i in set(range(len(each))) - quick:
            each[i].add_marker(pytest.mark.long)
    items.sort(key=lambda item: "wheel_test" not in item.nodeid)
