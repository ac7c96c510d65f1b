"""The command that injects faults: a small part of it, and whether it would notice."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import faults
from experiments.inject import fault_children, injection
from experiments.run import claim, folders, seals, trust
from experiments.run.folders import RunError
from experiments.shell import build
from tests.experiments.programs import ending

PAGE = (folders.REPOSITORY / "docs/measured/faults.md").read_text()
TABLE = [line for line in PAGE.splitlines() if line.count("|") == 7 and "--" not in line]
# Those that start processes of their own, which take seconds each.
QUICK = {"flips": 0.05, "damage": 0.125, "hostile": 1, "garbage": 0.3}


def inject(kind, share):
    return faults.inject(kind, share=share, say=lambda line: None)


@pytest.mark.parametrize("kind", QUICK)
def test_no_fault_is_accepted(kind):
    events = inject(kind, QUICK[kind])
    assert events and [event for event in events if event.end == "wrong"] == []
    names = [line.split(" | ")[:2] for line in faults.rows(kind, events)]
    assert names == [line.split(" | ")[:2] for line in TABLE if line.startswith(f"| {kind} ")]


def test_the_page_holds_what_the_command_prints_for_hostile_folders():
    rows = faults.rows("hostile", inject("hostile", 1))
    assert [line for line in TABLE if line.startswith("| hostile ")] == rows
    assert TABLE[0] == faults.HEADER[0]
    assert {line.split(" | ")[0].strip("| ") for line in TABLE[1:]} == set(faults.KINDS)
    assert all(line.endswith(" | 0 |") for line in TABLE[1:])
    for line in TABLE[1:]:
        injected, refused, survived, wrong = map(int, re.findall(r" (\d+)(?= \|)", line))
        assert injected == refused + survived + wrong


@pytest.mark.untyped  # the hostile weights are numbers, which annotations refuse before
def test_without_the_checks_the_command_says_that_faults_were_accepted(monkeypatch, tmp_path):
    monkeypatch.setattr(seals, "check", lambda *arguments: None)
    monkeypatch.setattr(seals, "check_arrays", lambda *arguments: None)
    assert {event.end for event in inject("flips", 0.05)} >= {"wrong"}
    monkeypatch.setattr(trust, "_is_allowed", lambda name: True)
    assert {event.end for event in inject("hostile", 0.1)} == {"refused", "wrong", "survived"}
    monkeypatch.setattr(build, "_make_within", build.instantiate)
    made = [event for event in inject("hostile", 1) if event.what == "what a constructor has made"]
    assert "it was built" in {event.said for event in made}
    said = ending(faults, tmp_path, "only=hostile", "share=0.05")
    assert re.search(r"error: \d+ faults were neither refused nor survived", said)


def test_long_messages_tracebacks_and_wrong_values_count_as_wrong():
    def fail(error):
        raise error

    def right(value):
        return value == 1

    assert faults.judge("", lambda: 1, right).end == "survived"
    assert faults.judge("", lambda: 2, right).end == "wrong"
    assert faults.judge("", lambda: fail(RunError("a\nb\nc")), right).end == "refused"
    assert faults.judge("", lambda: fail(RunError("a\nb\nc\nd")), right).end == "wrong"
    assert faults.judge("", lambda: fail(ValueError("a")), right).end == "wrong"
    state = injection.state_after(3), {"data": {"position": 3}}
    assert injection.is_right(state)
    bias = state[0].params["bias"].at[0].add(0.5)
    other = state[0]._replace(params={**state[0].params, "bias": bias})
    assert not injection.is_right((other, state[1]))
    assert not injection.is_right((state[0], {"data": {"position": 2}}))


def test_what_the_command_does_not_know_is_said(tmp_path):
    for given in ("only=flip", "shares=1", "share=2", "share=half"):
        assert "give only=KIND of flips, " in ending(faults, tmp_path, given)


def test_help_is_not_an_error(tmp_path, capsys):
    assert ending(faults, tmp_path, "--help") is None
    assert "python -m experiments.faults only=hostile" in capsys.readouterr().out


def test_a_flipped_bit_is_one_bit(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    for _ in range(20):
        injection.flip(file, np.random.default_rng(0))
        assert sum(byte.bit_count() for byte in file.read_bytes()) in (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(faults.KINDS) - set(QUICK)))
def test_no_fault_of_a_process_is_accepted(kind):
    events = inject(kind, 0.1)
    assert events and [event for event in events if event.end == "wrong"] == []


def test_a_folder_is_held_as_the_children_hold_it(tmp_path, monkeypatch):
    said = []

    def look(seconds):
        with monkeypatch.context() as another:  # process, which holds nothing
            another.setattr(claim, "_HELD", {})
            with pytest.raises(RunError, match="is in use by process"):
                with claim.claimed(tmp_path):
                    pass
        said.append(seconds)

    monkeypatch.setattr(fault_children.time, "sleep", look)
    fault_children.hold(tmp_path)
    assert said


def test_digests_of_arrays_see_every_bit_and_dtype_and_shape():
    arrays = [np.zeros(4, np.float32), np.zeros(4, np.int32), np.zeros((2, 2), np.float32)]
    arrays += [np.array([0, 0, 0, -0.0], np.float32), np.zeros(8, jnp.bfloat16), np.float32(0)]
    found = [seals.of_arrays({"a": array})["['a']"] for array in arrays]
    assert len(set(found)) == len(arrays)
    assert seals.of_arrays(jnp.zeros(4)) == seals.of_arrays(np.zeros(4, np.float32))
