"""Traces a few steps and computes the share of time of each part of the model.

Every operation in the trace is looked up in the compiled program, where it carries the names of its
scopes: `newton_scan`, `attention`, `optimizer`. Matrix products outside these are "matmul". An
operation that XLA fused from several parts counts by the fusion's name. An instant in which several
operations run is divided between them. An instant without operations is "data" if a batch is being
fetched, and otherwise "idle": dispatch, Python, and the tracing itself, which slows many short
operations down. The shares therefore add up to one.
"""

import csv
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.run.plain_files import replacing
from experiments.run.task import Batches
from jaxpara.types import Step

PARTS = ("recurrence", "attention", "matmul", "optimizer", "other", "data", "idle")
SCOPES = {
    "newton_scan": "recurrence",
    "jaxpara_solve": "recurrence",
    "attention": "attention",
    "optimizer": "optimizer",
}
CONTAINERS = {"while", "call", "conditional"}
PRODUCTS = {"dot", "convolution", "ragged-dot"}
FETCHING, WINDOW = "jaxpara data", "jaxpara traced steps"
ASIDE = "jaxpara aside"  # evaluations and checkpoints between traced steps: not counted


class Program(NamedTuple):
    """The operations of a compiled program.

    Attributes:
      module: its name, as in the trace.
      parts: part by operation.
      containers: operations that hold others, as loops do.
    """

    module: str
    parts: Mapping[str, str]
    containers: frozenset[str]


class Operation(NamedTuple):
    """One operation in a trace, in nanoseconds."""

    thread: str
    name: str
    module: str
    start: float
    end: float


class Trace(NamedTuple):
    """The contents of a trace.

    Attributes:
      operations: of the devices.
      fetching: when batches were fetched, `(start, end)`.
      aside: when the program did something other than training.
      window: `(start, end)` of the traced steps.
    """

    operations: list[Operation]
    fetching: list[tuple[float, float]]
    aside: list[tuple[float, float]]
    window: tuple[float, float]


def _scope(name: str) -> str | None:
    words = re.split(r"[/();]", name)
    return next((part for scope, part in SCOPES.items() if scope in words), None)


def read_program(text: str) -> Program:
    """Finds the part of every operation of a compiled program.

    Args:
      text: of the optimised HLO.

    Returns:
      The program. An operation without its own scope takes that of its enclosing loop or call.
    """
    module = re.match(r"HloModule ([\w.\-]+)", text)
    own: dict[str, str | None] = {}
    home: dict[str, str] = {}  # operation -> computation
    caller: dict[str, str] = {}  # computation -> operation that runs it
    products: set[str] = set()  # computations that hold a matrix product
    containers = set()
    computation = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = header[1]
            continue
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*?\s([a-z][\w\-]*)\(", line)
        if not found:
            continue
        name, opcode = found.groups()
        meta = re.search(r'op_name="([^"]*)"', line)
        path = meta[1] if meta else ""
        home[name] = computation
        part = _scope(path)
        # Vendors' products are custom calls; other operations may inherit a product's name.
        vendor = opcode == "custom-call" and path.endswith(("dot_general", "conv_general_dilated"))
        if opcode in PRODUCTS or vendor:
            products.add(computation)
            part = part or "matmul"
        own[name] = part
        if opcode in CONTAINERS:
            containers.add(name)
        for called in re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", line):
            caller[called] = name
        for several in re.findall(r"(?:branch|called)_computations=\{([^}]*)\}", line):
            caller.update(dict.fromkeys(re.findall(r"[\w.\-]+", several), name))
    for product in products:
        # A fusion is named after its last operation; a product inside it dominates its cost.
        outer = caller.get(product)
        if outer is not None and outer not in containers:
            own[outer] = own[outer] or "matmul"

    def part_of(name: str, depth: int = 0) -> str:
        found = own[name]
        above = caller.get(home[name])
        if found in (None, "matmul") and above in own and depth < 50:
            outer = part_of(above, depth + 1)
            found = outer if outer in SCOPES.values() or found is None else found
        return found or "other"

    return Program(
        module[1] if module else "", {name: part_of(name) for name in own}, frozenset(containers)
    )


def read_trace(folder: Path) -> Trace:
    """Reads the trace that JAX wrote.

    Args:
      folder: given to `jax.profiler.start_trace`.

    Returns:
      The trace. Operations come from the devices' own lines if there are any (GPU, TPU), and
      otherwise from the CPU threads that ran them.
    """
    [file] = sorted(folder.rglob("*.xplane.pb"))[-1:]
    operations: dict[bool, list[Operation]] = {True: [], False: []}
    marked: dict[str, list[tuple[float, float]]] = {FETCHING: [], ASIDE: [], WINDOW: []}
    with warnings.catch_warnings():
        # jaxlib's own types lack a __module__ on Python 3.12.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            device = plane.name.startswith("/device:")
            for line in plane.lines:
                for event in line.events:
                    span = (event.start_ns, event.start_ns + event.duration_ns)
                    if event.name in marked:
                        marked[event.name].append(span)
                    elif event.duration_ns > 0:
                        stats = dict(event.stats)
                        if name := stats.get("hlo_op"):
                            module = str(stats.get("hlo_module", ""))
                            thread = f"{plane.name} {line.name}"
                            operations[device].append(Operation(thread, str(name), module, *span))
    ran = operations[bool(operations[True])]
    return Trace(ran, marked[FETCHING], marked[ASIDE], marked[WINDOW][-1])


def _innermost(operations: Iterable[Operation]) -> Iterable[tuple[float, float, Operation]]:
    """Cuts each thread's time into pieces by the innermost running operation."""
    threads: dict[str, list[Operation]] = {}
    for operation in operations:
        threads.setdefault(operation.thread, []).append(operation)
    for events in threads.values():
        stack: list[Operation] = []
        now = 0.0
        for event in sorted(events, key=lambda e: (e.start, -e.end)):
            while stack and stack[-1].end <= event.start:
                done = stack.pop()
                if done.end > now:
                    yield now, done.end, done
                    now = done.end
            if stack and event.start > now:
                yield now, event.start, stack[-1]
            now = max(now, event.start)
            stack.append(event)
        while stack:
            done = stack.pop()
            if done.end > now:
                yield now, done.end, done
                now = done.end


def divide(trace: Trace, program: Program) -> dict[str, float]:
    """Divides the time of the traced steps between the parts.

    Args:
      trace: from `read_trace`.
      program: from `read_program`.

    Returns:
      Part -> nanoseconds of all traced steps together.
    """
    first, last = trace.window
    changes: list[tuple[float, int, str, str]] = []  # time, +1 or -1, kind, part

    def add(start: float, end: float, kind: str, part: str) -> None:
        start, end = max(start, first), min(end, last)
        if end > start:
            changes.extend([(start, 1, kind, part), (end, -1, kind, part)])

    for start, end, operation in _innermost(trace.operations):
        ours = operation.module == program.module
        part = program.parts.get(operation.name, "other") if ours else "other"
        # A loop waits in one thread while its body runs in another: it counts only when alone.
        alone = ours and operation.name in program.containers
        add(start, end, "container" if alone else "operation", part)
    for start, end in trace.fetching:
        add(start, end, "host", "data")
    for start, end in trace.aside:
        add(start, end, "aside", "aside")
    changes.sort(key=lambda change: change[0])
    running = {kind: Counter() for kind in ("aside", "operation", "container", "host")}
    total: Counter = Counter()
    now = first
    for when, sign, kind, part in [*changes, (last, 0, "host", "data")]:
        if when > now:
            busy = next((c for c in running.values() if c.total()), Counter(idle=1))
            for name, count in busy.items():
                total[name] += (when - now) * count / busy.total()
            now = when
        running[kind][part] += sign
    return {part: total[part] for part in PARTS}


def write(path: Path, times: Mapping[str, float], steps: int) -> None:
    """Writes the shares as a table.

    Args:
      path: a CSV file.
      times: from `divide`.
      steps: how many were traced.
    """
    whole = sum(times.values())
    with replacing(path) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "share", "milliseconds_per_step"])
        for part, time in times.items():
            writer.writerow([part, f"{time / whole:.6f}", f"{time / steps / 1e6:.4f}"])


def describe(times: Mapping[str, float], steps: int) -> str:
    """Formats the shares in one line, the largest first.

    Args:
      times: from `divide`.
      steps: how many were traced.

    Returns:
      The line.
    """
    whole = sum(times.values())
    order = sorted(times.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{part} {time / whole:.1%}" for part, time in order if time > 0)
    return f"a traced step takes {whole / steps / 1e6:.1f} ms: {parts}"


class _Fetching:
    """Batches whose fetching is visible in a trace; the protocol of `task.Batches`."""

    def __init__(self, batches: Batches):
        self._batches = batches
        self.get_state = batches.get_state
        self.set_state = batches.set_state

    def __next__(self) -> Any:
        with jax.profiler.TraceAnnotation(FETCHING):
            return next(self._batches)


@contextmanager
def profiled(
    step: Step,
    batches: Batches,
    *,
    folder: Path,
    start: int,
    steps: int,
    text: Callable[[], str],
    say: Callable[[str], None],
) -> Iterator[tuple[Step, Batches]]:
    """Wraps a step and its batches so that a few calls are traced.

    Args:
      step: compiled at its first call, which is not traced.
      batches: its inputs.
      folder: of the run: gets `trace/` for Perfetto or TensorBoard, and `profile.csv`.
      start: steps before the traced ones.
      steps: how many are traced.
      text: gives the compiled program, once the first step is done.
      say: prints a line.

    Yields:
      Step and batches to train with.
    """
    calls = 0
    window = jax.profiler.TraceAnnotation(WINDOW)

    def begin(state) -> None:
        nonlocal window
        jax.block_until_ready(state)
        shutil.rmtree(folder / "trace", ignore_errors=True)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow down the steps that it traces
        jax.profiler.start_trace(str(folder / "trace"), profiler_options=options)
        window = jax.profiler.TraceAnnotation(WINDOW)
        window.__enter__()

    def end(state) -> None:
        jax.block_until_ready(state)
        window.__exit__(None, None, None)
        jax.profiler.stop_trace()
        trace = read_trace(folder / "trace")
        if not trace.operations:
            say(f"no profile: this backend's trace names no operations; look at {folder}/trace")
            return
        times = divide(trace, read_program(text()))
        write(folder / "profile.csv", times, steps)
        say(describe(times, steps))

    def call(state, batch):
        nonlocal calls
        # The window opens after the step before it, so that it includes the fetching of each batch.
        result = step(state, batch)
        calls += 1
        if calls == start:
            begin(result)
        elif calls == start + steps:
            end(result)
        return result

    try:
        yield call, _Fetching(batches)
    finally:
        if start <= calls < start + steps:
            jax.profiler.stop_trace()
        if calls < start + steps:
            say(f"no profile: the run ended after {calls} of trace.start + trace.steps steps")
