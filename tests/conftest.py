"""Settings for the whole suite: eight virtual CPU devices, reproducible property tests, GPU tests skipped
with the reason shown where there is no GPU."""

import gc
import os
import sys
import time

# Read by jax when it is first imported, so before anything else here. `JAX_PLATFORMS=cuda pytest -m gpu`
# runs the GPU tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    eight = "--xla_force_host_platform_device_count=8"
    # Eight devices share few cores: one may reach a collective long after another. XLA ends the process after 40 s.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), eight, patience)).strip()
# XLA's pool of worker threads is as large as the machine has cores, and a collective holds its thread until all
# devices are there: with fewer threads than devices the last one may find none left, and XLA ends the process.
os.environ.setdefault("NPROC", "16")
# Compiling for a TPU slice without a TPU: ask no metadata server, and let several test runs share libtpu.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Plots need no display, and nothing in the suite may reach for the network.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest

# No deadline: the first example of a property compiles. Derandomized: a red suite is red for everybody;
# HYPOTHESIS_PROFILE=explore looks for new examples.
_health = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=_health)
hypothesis.settings.register_profile("explore", deadline=None, suppress_health_check=_health)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.fixture(autouse=True, scope="module")
def _compiled_code_goes_with_its_file():
    """Forget compiled programs after each file: each takes places in the process's memory map, which Linux limits
    (vm.max_map_count, 65530), and the compiler crashes where there are none left."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()  # modules of NNX hold each other


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Compile what tests marked `optimized` run as users do, whatever JAX_DISABLE_MOST_OPTIMIZATIONS says; also what
    their fixtures run."""
    if not item.get_closest_marker("optimized"):
        return (yield)
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    try:
        return (yield)
    finally:
        jax.config.update(name, before)


@pytest.hookimpl(tryfirst=True)  # before any fixture is made
def pytest_runtest_setup() -> None:
    """Where a time is set after which no test is to start (`.ci/run` does, for the slow suite), skip what comes later,
    saying so: on a slow machine a suite ends with what it found, rather than being killed."""
    latest = os.environ.get("NO_TEST_STARTS_AFTER")  # seconds since 1970, as `date +%s` prints them
    if latest and time.time() > float(latest):
        pytest.skip("no time left (NO_TEST_STARTS_AFTER)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu`, saying why, where jax has no GPU."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import jax

    if jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason=f"needs a GPU; jax runs on {jax.default_backend()} here")
        for item in gpu_tests:
            item.add_marker(skip)
