"""Injects faults into runs' folders and counts the outcomes: `python -m experiments.faults`.

    python -m experiments.faults                 # all kinds, one or two minutes on two cores
    python -m experiments.faults only=hostile    # one of them
    python -m experiments.faults share=0.1       # a tenth of the faults

Every fault must be refused, with a message of at most three lines, or survived, with exactly the
saved numbers. Otherwise the exit code is 1.
"""

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from omegaconf import DictConfig

import jaxpara as jp
from experiments.adapt import adapter_files
from experiments.data.tokens import open_tokenizer
from experiments.inject import hostile
from experiments.inject.injection import (
    Event,
    flip,
    is_right,
    judge,
    restore,
    save_steps,
    state_after,
)
from experiments.run import checkpoints, claim, folders, seals, trust, unicode
from experiments.shell import build
from experiments.shell.explanations import explain

LIMITS = (0, 1, 100, 500, 1000, 2000, 4000, 8000)  # bytes that a file may have on a "full disk"
PATIENCE = 120  # seconds for a child on a busy machine
MODEL = {
    "_target_": "jaxpara.nn.decoder",
    "vocab_size": 256,
    "width": 8,
    "layers": 1,
    "mixer": {
        "_target_": "jaxpara.nn.mixers.recurrent",
        "cell": {"_target_": "hydra.utils.get_method", "path": "jaxpara.cells.min_gru"},
    },
}


Kind = Callable[[Path, np.random.Generator, float], Iterator[Event]]


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]


def bit_flips(place: Path, rng: np.random.Generator, share: float) -> Iterator[Event]:
    """Flips one bit of a file of a checkpoint, of frozen parameters, or of adapters."""
    run = place / "run"
    save_steps(run, 1)
    frozen = place / "frozen"
    with checkpoints.saver(
        frozen,
        keep_last=1,
        keep_best=0,
        best=("loss", "min"),
        trainable=lambda params: {"kernel": False, "bias": True},
    ) as save:
        save(state_after(1), {"data": {"position": 1}}, None)
    adapted = jp.lora(rank=2).attach(jax.random.key(0), {"kernel": jnp.ones((8, 8))})
    adapter_files.save(run, adapted)
    for what, folder, read in (
        ("a bit of a checkpoint", run / checkpoints.FOLDER, lambda: restore(run)),
        ("a bit of frozen parameters", frozen / "frozen", lambda: restore(frozen)),
        ("a bit of adapters", run / adapter_files.FOLDER, lambda: adapter_files.load(run)),
    ):
        files = _files(folder)
        sizes = np.array([path.stat().st_size for path in files], float)
        # Each file in turn, then bits wherever they are.
        more = rng.choice(len(files), size=3 * len(files), p=sizes / sizes.sum())
        chosen = [*range(len(files)), *more]
        for number in chosen[: max(1, round(share * len(chosen)))]:
            whole = files[number].read_bytes()
            flip(files[number], rng)
            event = judge(what, read, lambda found: False)
            if event.end == "refused" and files[number].name not in event.said:
                event = Event(what, "wrong", f"not by name: {event.said}")
            yield event
            files[number].write_bytes(whole)
        read()


def _harms(step: Path, other: Path, rng: np.random.Generator) -> dict[str, Callable[[Path], None]]:
    """Lists the faults of a file of a step, by name."""

    def swap(path: Path) -> None:
        twin = other / path.relative_to(step)
        path.write_bytes(twin.read_bytes() if twin.is_file() else b"")

    return {
        "a truncated file": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "an empty file": lambda path: path.write_bytes(b""),
        "a missing file": Path.unlink,
        "random bytes": lambda path: path.write_bytes(rng.bytes(path.stat().st_size)),
        "a file of another step": swap,
        "deep JSON": lambda path: path.write_text("[" * 100_000, encoding="utf-8"),
        "a file too many": lambda path: (
            path.with_name("more").write_text("x", encoding="utf-8") and None
        ),
    }


def damaged_steps(place: Path, rng: np.random.Generator, share: float) -> Iterator[Event]:
    """Damages the newer of two checkpoints; the older one must be read."""
    run = place / "run"
    save_steps(run, 2)
    before, last = (checkpoints.path_of(run, step) for step in (1, 2))
    copy = place / "copy"
    shutil.copytree(last, copy)
    names = [path.relative_to(last) for path in _files(last)]
    count = max(1, round(share * 8))
    for what, harm in _harms(last, before, rng).items():
        for number in rng.choice(len(names), size=count, replace=False):
            path = last / names[number]
            harm(path)
            same = path.is_file() and path.read_bytes() == (copy / names[number]).read_bytes()
            step = 2 if same and what != "a file too many" else 1

            def right(found: Any, step: int = step) -> bool:
                return int(found[0].step) == step and is_right(found)

            yield judge(what, lambda: restore(run), right)
            shutil.rmtree(last)
            shutil.copytree(copy, last)


def _child(*arguments: Any, **options: Any) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.inject.fault_children", *map(str, arguments)],
        cwd=folders.REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        **options,
    )


def kills(place: Path, rng: np.random.Generator, share: float) -> Iterator[Event]:
    """Kills a process that keeps saving at a random moment, then starts the next one."""
    run = place / "run"
    for _ in range(max(1, round(share * 12))):
        before = max(checkpoints.steps(run), default=0)
        with _child("save", run) as process:
            deadline = time.monotonic() + PATIENCE
            while max(checkpoints.steps(run), default=0) < before + 2:
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    yield Event("kill -9 while saving", "wrong", process.communicate()[1])
                    return
                time.sleep(0.005)
            time.sleep(float(rng.uniform(0, 0.3)))
            process.kill()
        whole = max(checkpoints.steps(run))

        def right(found: Any, before: int = before, whole: int = whole) -> bool:
            return before < int(found[0].step) == whole and is_right(found)

        yield judge("kill -9 while saving", lambda: restore(run), right)


def full_disks(place: Path, rng: np.random.Generator, share: float) -> Iterator[Event]:
    """Limits the size of files; earlier checkpoints must stay intact."""
    del rng
    what = "no room for a checkpoint"
    limits = LIMITS[:: max(1, round(1 / share))]
    with _child("fill", place / "run", *limits) as process:
        said, noise = process.communicate(timeout=4 * PATIENCE)
    lines = said.splitlines()
    for number, limit in enumerate(limits):
        line = lines[number] if number < len(lines) else "{}"
        found = {"end": "wrong", "said": f"the program ended: {noise}", **json.loads(line)}
        yield Event(what, found["end"], f"at {limit} bytes: {found['said']}")
    if noise:
        yield Event("anything said besides", "wrong", noise)


def two_processes(place: Path, rng: np.random.Generator, share: float) -> Iterator[Event]:
    """Uses a folder that another process holds, or held when it was killed."""
    del rng

    def take() -> bool:
        with claim.claimed(run):
            return True

    for number in range(max(1, round(share * 4))):
        run = place / f"run{number}"
        with _child("hold", run) as process:
            assert process.stdout is not None
            process.stdout.readline()
            began = time.monotonic()
            event = judge("a folder in use", take, lambda found: False)
            if event.end == "refused" and time.monotonic() - began > 1:
                event = Event(event.what, "wrong", "it took more than a second")
            yield event
            process.kill()
        yield judge("a lock that a killed process left", take, bool)


def _opened(run: Path, values: dict[str, Any], *, read: bool = False) -> DictConfig:
    (run / folders.CONFIG).write_text(yaml.safe_dump(values), encoding="utf-8")
    cfg = trust.open_config(run)
    if read:
        trust.check_paths(cfg, run)
    return cfg


def _built(run: Path, values: dict[str, Any], loaded: Path) -> None:
    """Builds a config's model, where a call of `numpy.load` leaves a file."""
    cfg = _opened(run, values)
    with mock.patch.object(np, "load", lambda *args, **options: loaded.touch()):
        try:
            build.build_model(cfg).init(jax.random.key(0))
        except Exception as error:
            said = explain(error, cfg)  # as the commands do
            if said is None:
                raise
            raise folders.RunError(said) from error


def hostile_folders(place: Path, rng: np.random.Generator, share: float) -> Iterator[Event]:
    """Opens configs that would run code or read foreign files, and links that lead outside."""
    del rng
    run = place / "run"
    run.mkdir()
    canary = place / "canary"
    touch = {"_target_": "pathlib.Path.touch", "_args_": [str(canary)]}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("a constructor of anybody's", {"model": {**MODEL, "mixer": form(name)}})
        for form in hostile.FORMS.values()
        for name in hostile.NAMES
    ]
    cases += [
        ("a constructor of anybody's", {"model": put(MODEL, touch), "trust": ["pathlib"]})
        for put in hostile.PLACES.values()
    ]
    cases += [("a getter misused", {"model": node}) for node in hostile.GETTERS]
    cases += [("a text to be evaluated", {"name": text}) for text in hostile.TEXTS]
    cases += [("a text to be evaluated", {text: 1}) for text in hostile.TEXTS]
    for data in hostile.DATA:
        here = {k: v.format(run=run) if isinstance(v, str) else v for k, v in data.items()}
        cases.append(("data elsewhere", {"data": here, "trust": "/"}))
        cases.append(("data elsewhere", {"task": {"data": [here]}}))
    for what, values in cases[:: max(1, round(1 / share))]:
        event = judge(
            what,
            lambda values=values: _opened(run, values, read=True),
            lambda found: False,
        )
        yield event if not canary.exists() else Event(what, "wrong", "it was run")
    for values in list(hostile.MADE.values())[:: max(1, round(1 / share))]:
        made = {"model": MODEL, **values}
        what = "what a constructor has made"
        event = judge(what, lambda made=made: _built(run, made, canary), lambda found: False)
        yield event if not canary.exists() else Event(what, "wrong", "it was built")
    for target in ("/etc/passwd", "..", str(place)):
        link = run / folders.METRICS
        link.symlink_to(target)
        yield judge("a link out of it", lambda: _opened(run, {"a": 1}), lambda found: False)
        link.unlink()
    yield judge("a folder as it should be", lambda: _opened(run, {"model": MODEL}), lambda c: True)


def garbage(place: Path, rng: np.random.Generator, share: float) -> Iterator[Event]:
    """Reads invalid seals and tokenizers."""
    folder = place / "sealed"
    folder.mkdir()
    (folder / "file").write_text("x", encoding="utf-8")
    tokenizer = place / "tokenizer.json"
    contents = [b"", b"{", b"[]", b"null", b"\xef\xbb\xbf{}", b"\xff\xfe", b"[" * 100_000]
    contents += [b'{"files": 3}', b'{"files": {}, "digest": 1}', b'{"a":' * 9999, b"1e999"]
    contents += [rng.bytes(int(n)) for n in rng.integers(1, 999, size=20)]
    for content in contents[:: max(1, round(1 / share))]:
        (folder / seals.SEAL).write_bytes(content)
        yield judge("a seal", lambda: seals.check(folder), lambda found: False)
        tokenizer.write_bytes(content)

        def read() -> None:
            try:
                open_tokenizer(str(tokenizer))
            except ValueError as error:  # the programs make one line of it
                raise folders.RunError(str(error)) from error

        yield judge("a tokenizer", read, lambda found: False)


KINDS: dict[str, Kind] = {
    "flips": bit_flips,
    "damage": damaged_steps,
    "kills": kills,
    "full": full_disks,
    "processes": two_processes,
    "hostile": hostile_folders,
    "garbage": garbage,
}


def inject(kind: str, *, share: float = 1.0, say: Callable[[str], None] = print) -> list[Event]:
    """Injects the faults of one kind.

    Args:
      kind: a key of `KINDS`.
      share: of the faults.
      say: prints a line of progress now and then.

    Returns:
      The outcome of each.
    """
    began, events = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        for event in KINDS[kind](Path(place).resolve(), np.random.default_rng(0), share):
            events.append(event)
            if event.end == "wrong":
                say(f"{kind}: WRONG: {event.what}: {event.said[:500]}")
            elif len(events) % 25 == 0:
                say(f"{kind}: {len(events)} faults, {time.monotonic() - began:.0f} s")
    say(f"{kind}: {len(events)} faults in {time.monotonic() - began:.0f} s")
    return events


def rows(kind: str, events: list[Event]) -> list[str]:
    """Formats the lines of the table for one kind.

    Args:
      kind: a key of `KINDS`.
      events: from `inject`.

    Returns:
      Lines of Markdown: kind, fault, injected, refused, survived, wrong.
    """
    lines = []
    for what in dict.fromkeys(event.what for event in events):
        ends = [event.end for event in events if event.what == what]
        counts = [len(ends), *(ends.count(end) for end in ("refused", "survived", "wrong"))]
        lines.append(f"| {kind} | {what} | {' | '.join(map(str, counts))} |")
    return lines


HEADER = ("| kind | fault | injected | refused | survived | wrong |", "|---|---|---|---|---|---|")


def main() -> None:
    """The command line."""
    unicode.show_all()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    chosen = given.pop("only", None)
    try:
        share = float(given.pop("share", 1))
    except ValueError:
        share = math.nan
    if given or (chosen is not None and chosen not in KINDS) or not 0 < share <= 1:
        raise SystemExit(
            f"error: {' '.join(sys.argv[1:])}: give only=KIND of {', '.join(KINDS)}, or "
            "share=NUMBER from 0 to 1"
        )

    shown = sys.stderr

    def say(line: str) -> None:
        print(line, file=shown, flush=True)

    kinds = list(KINDS) if chosen is None else [chosen]
    with contextlib.redirect_stderr(io.StringIO()):  # what each fallback says
        found = {kind: inject(kind, share=share, say=say) for kind in kinds}
    print("\n".join([*HEADER, *(line for kind in kinds for line in rows(kind, found[kind]))]))
    wrong = sum(event.end == "wrong" for events in found.values() for event in events)
    if wrong:
        raise SystemExit(f"error: {wrong} faults were neither refused nor survived")


if __name__ == "__main__":
    main()
