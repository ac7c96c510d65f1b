"""pallas_kernels.dispatch: what is chosen, what is refused, and what the refusals say."""

import types

import jax
import pytest

from pallas_kernels import NoImplementation, choose, compat, first_that_works, unfit


def named(name):
    return lambda *args: (name, *args)


OPS = {name: named(name) for name in ("xla", "mosaic_gpu", "mosaic_tpu", "sequential")}


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("cpu", "sequential"), ("cuda", "mosaic_gpu"), ("gpu", "mosaic_gpu"), ("tpu", "mosaic_tpu")],
)
def test_none_takes_the_first_that_runs_on_the_platform_and_xla_last(platform, expected):
    name, function = choose(OPS, platform=platform)
    assert name == expected
    assert function(3) == (expected, 3)


def test_xla_is_chosen_when_nothing_else_runs():
    assert choose({"xla": named("xla"), "mosaic_tpu": named("t")}, platform="cuda")[0] == "xla"


def test_a_name_and_a_sequence_of_names_are_obeyed_in_order():
    assert choose(OPS, "xla", platform="cuda")[0] == "xla"
    assert choose(OPS, ("mosaic_tpu", "sequential", "xla"), platform="cpu")[0] == "sequential"


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'cuda_fused' is not known.*'xla', 'mosaic_gpu'"):
        choose(OPS, "cuda_fused", platform="cpu")
    with pytest.raises(ValueError, match="names nothing"):
        choose(OPS, (), platform="cpu")
    with pytest.raises(ValueError, match="empty"):
        choose({}, platform="cpu")


def test_a_named_implementation_that_cannot_run_here_says_where_it_runs():
    with pytest.raises(NoImplementation, match=r"(?s)'cpu'.*mosaic_gpu: .*cuda or gpu, not on cpu"):
        choose(OPS, "mosaic_gpu", platform="cpu")


def test_refusals_try_the_next_and_are_reported_together():
    def refuses(x):
        raise NotImplementedError("T=3 is not a multiple of 8")

    ops = {"mosaic_tpu": refuses, "xla": named("xla")}
    assert first_that_works(ops, platform="tpu")(7) == ("xla", 7)
    with pytest.raises(NoImplementation, match="multiple of 8") as caught:
        first_that_works(ops, "mosaic_tpu", platform="tpu")(7)
    assert list(caught.value.reasons) == ["mosaic_tpu"]


def test_a_defect_is_not_taken_for_a_refusal():
    def broken(x):
        raise TypeError("defect")

    with pytest.raises(TypeError, match="defect"):
        first_that_works({"a": broken, "xla": named("xla")}, platform="cpu")(1)


def on_a(monkeypatch, kind, **capability):
    """As if JAX saw one GPU."""
    device = types.SimpleNamespace(device_kind=kind, **capability)
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    monkeypatch.setattr(compat, "mosaic_gpu", lambda: None)  # as with a JAX that has the kernels


def test_unsupported_gpus_run_no_kernel_and_the_call_continues(monkeypatch):
    refused = []
    ops = {"mosaic_gpu": lambda: refused.append("ran"), "xla": named("xla")}
    on_a(monkeypatch, "NVIDIA A100", compute_capability="8.0")
    assert first_that_works(ops, platform="gpu")() == ("xla",) and not refused
    with pytest.raises(NoImplementation, match=r"Hopper or newer.*this is NVIDIA A100 \(8.0\)"):
        first_that_works(ops, "mosaic_gpu", platform="gpu")()
    for capability in ("9.0", "10.0", "12.1"):
        on_a(monkeypatch, "newer", compute_capability=capability)
        assert unfit("gpu") is None
    on_a(monkeypatch, "AMD Instinct", compute_capability="gfx90a")
    assert "gfx90a" in str(unfit("gpu"))
    on_a(monkeypatch, "a device that says nothing")
    assert "unknown" in str(unfit("gpu"))
    assert unfit("tpu") is None and unfit("cpu") is None


def test_an_old_jax_runs_no_gpu_kernel_and_the_reason_is_its_version(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda: (0, 10))
    assert "Mosaic GPU needs JAX >= 0.11" in str(unfit("gpu")) and unfit("tpu") is None
