"""Every test runs in float32 on eight fake CPU devices; `float64` lends double precision to one test."""

import os

# JAX reads the platform when it is imported and the devices when its backend starts, so both stand before the import.
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest


@pytest.fixture
def float64():
    """Double precision inside the test, for finite differences; JAX's default comes back after it."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def compile_quickly():
    """For modules whose programs run once or twice: compiled in half the time, to run slower."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a module's shapes serve no other one, and are gigabytes by the end."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def _eight_float32_cpu_devices():
    """A plugin that started JAX earlier would make the two settings above void without a word."""
    assert jax.device_count() == 8
    assert jax.default_backend() == "cpu"
    assert not jax.config.jax_enable_x64
