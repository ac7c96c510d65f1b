"""Eight CPU devices, one compilation cache, and programs that XLA compiles in half the time."""

import hashlib
import logging.config
import os
import pathlib
import platform
import signal

import pytest

import tests.durations as durations

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _machine() -> str:
    """A short name of this CPU: compiled code must not travel to one without its instructions."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
        lines = {x for x in text.splitlines() if x.startswith(("model name", "flags"))}
    except OSError:
        lines = {platform.processor(), platform.machine()}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]


def pytest_addoption(parser):
    parser.addoption(
        "--write-durations", action="store_true", help="write what the tests cost to the table"
    )
    parser.addoption(
        "--cheap", action="store_true", help=f"leave out what took over {durations.CHEAP} CPU s"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.began = durations.now()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    result = yield
    item.user_properties.append(("cpu_s", durations.now() - item.began))
    return result


def pytest_terminal_summary(terminalreporter, config):
    reports = [r for each in terminalreporter.stats.values() for r in each]
    costs = {
        report.nodeid: dict(report.user_properties)["cpu_s"]
        for report in reports
        if getattr(report, "when", "") == "teardown" and report.user_properties
    }
    if not costs:
        return
    terminalreporter.section("what the tests cost")
    for line in durations.lines(costs, durations.read()):
        terminalreporter.write_line(line)
    if config.getoption("--write-durations"):
        durations.write(durations.by_wing(costs))
        durations.LIST.write_text("".join(f"{name}\n" for name in durations.dear(costs)))


def pytest_configure(config):
    # Of two processes neither would say so.
    for place in (argument.partition("::")[0] for argument in config.args):
        if not pathlib.Path(place).exists():
            raise pytest.UsageError(f"there is no {place}")
    # A shell that starts us in the background has told us to ignore Ctrl-C, and everything that
    # we start would too: the tests of it need what a person at the keyboard has.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Subprocesses that tests start inherit these two. `make gpu` selects -m gpu and keeps the GPU.
    if config.getoption("markexpr") != "gpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cache = os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache" / _machine())
    )

    import jax  # only now: it reads the variables above

    jax.config.update("jax_traceback_filtering", "off")  # a failure seen once must say where
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Fast tests compile without LLVM's optimisations, slow ones and a GPU's with them.

    Those of `nn` never do: they compile for longer than they run, and none of them is about the
    rounding of a compiled program. A hook, since what a module's fixtures compile counts as the
    first test's. What an earlier test of the process has compiled is used again as it is. The
    processes that a test starts do as it does.
    """
    import jax

    quick = not any(item.get_closest_marker(mark) for mark in ("slow", "gpu"))
    quick |= durations.wing_of(item.nodeid) == "nn"
    jax.config.update("jax_disable_most_optimizations", quick)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))


def pytest_ignore_collect(collection_path, config):
    # Where the GPU is there may be no Hydra and no Flax, which other files import.
    if config.getoption("markexpr") == "gpu" and collection_path.name.startswith("test_"):
        return True if "@pytest.mark.gpu" not in collection_path.read_text() else None


@pytest.fixture(scope="session", autouse=True)
def no_handlers_from_imports():
    # Hydra closes every logging handler that it finds, and absl's closes a stderr that is not the
    # present one: in a test with capsys that is pytest's own. Closed here, it closes nothing.
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})


def pytest_collection_modifyitems(config, items):
    if config.getoption("--cheap"):
        dear = set(durations.LIST.read_text().split())
        left = [item for item in items if durations.function_of(item.nodeid) in dear]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if durations.function_of(item.nodeid) not in dear]
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import jax

    if jax.default_backend() != "gpu":
        for item in marked:
            item.add_marker(
                pytest.mark.skip(reason="needs a GPU; run `make gpu` where there is one")
            )
