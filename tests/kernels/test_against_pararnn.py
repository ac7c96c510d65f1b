"""The comparison with other people's kernels: layouts, and what it says where it cannot run."""

import functools
import importlib.util
import sys
import types

import numpy as np
import pytest

from benchmarks import against_pararnn


def test_gates_reach_each_kernel_in_its_own_layout():
    gates = [np.arange(24.0).reshape(2, 3, 4) + 100 * i for i in range(3)]  # T, B, D
    cuda, triton = against_pararnn.channels_first(gates), against_pararnn.batch_first(gates)
    assert cuda.shape == (3, 4, 2, 3) and triton.shape == (3, 2, 12)
    for t, b, d, gate in np.ndindex(2, 3, 4, 3):
        assert cuda[b, d, t, gate] == triton[b, t, 4 * gate + d] == gates[gate][t, b, d]
    assert cuda.flags.c_contiguous and triton.flags.c_contiguous


def test_a_checkout_is_known_by_its_folders(tmp_path):
    with pytest.raises(SystemExit, match="has neither pararnn/csrc .* nor src/pararnn/kernels"):
        against_pararnn.rival_in(tmp_path)
    (tmp_path / "a/pararnn/csrc").mkdir(parents=True)
    (tmp_path / "b/src/pararnn/kernels").mkdir(parents=True)
    assert against_pararnn.rival_in(tmp_path / "a")[:2] == (
        "CUDA (apple/ml-pararnn)",
        tmp_path / "a",
    )
    assert against_pararnn.rival_in(tmp_path / "b")[1] == tmp_path / "b/src"


def test_without_torch_or_a_gpu_it_says_so(tmp_path):
    (tmp_path / "pararnn/csrc").mkdir(parents=True)
    absent = importlib.util.find_spec("torch") is None
    said = "torch is not installed" if absent else "both torch and JAX must see the GPU"
    with pytest.raises(SystemExit, match=said):
        against_pararnn.main([str(tmp_path)])


class Tensor(np.ndarray):
    """As much of a tensor as the comparison uses, on NumPy: no torch and no GPU."""

    def permute(self, *axes):
        return self.transpose(axes)

    def cpu(self):
        return self

    cuda = contiguous = cpu

    def numpy(self):
        return np.asarray(self)

    def unbind(self, axis):
        return [self.take(i, axis).view(Tensor) for i in range(self.shape[axis])]

    def narrow(self, axis, start, length):
        return self.take(range(start, start + length), axis).view(Tensor)

    def flip(self, axis):
        return np.flip(self, axis)


class Torch:
    """As much of the module."""

    sigmoid, tanh = staticmethod(lambda x: 1 / (1 + np.exp(-x))), staticmethod(np.tanh)
    zeros_like = staticmethod(np.zeros_like)
    cat = staticmethod(lambda arrays, axis: np.concatenate(arrays, axis).view(Tensor))
    from_numpy = staticmethod(lambda array: array.astype(np.float64).view(Tensor))

    class cuda:  # noqa: N801
        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                pass

            def elapsed_time(self, end):
                return 20.0

        def synchronize():
            pass


def stepped(h, gates, weights):
    (x_z, x_r, x_n), (w_z, w_r, w_n) = gates, weights
    z, r = Torch.sigmoid(x_z + w_z * h), Torch.sigmoid(x_r + w_r * h)
    return h + z * (np.tanh(x_n + w_n * r * h) - h)


def solved(gates, weights):
    """States of a GRU from zero, `[T, B, D]`, step by step."""
    h, states = 0.0, []
    for row in zip(*gates, strict=True):
        h = stepped(h, row, weights)
        states.append(h)
    return np.stack(states)


def slope(h, gates, weights):
    """`dh'/dh` by central differences."""
    up, down = (stepped(h + e, gates, weights) for e in (1e-6, -1e-6))
    return (up - down) / 2e-6


def adjoint(states, gates, weights, given):
    """Total cotangents of the states, `[T, B, D]`, backwards in time."""
    total, flowing = np.zeros(states.shape), 0.0
    for t in reversed(range(len(states))):
        total[t] = given[t] + flowing
        before = states[t - 1] if t else np.zeros(states.shape[1:])
        flowing = total[t] * slope(before, [g[t] for g in gates], weights)
    return total


class GRUDiagMHImpl:
    """Apple's, with its layouts: weights `[D, 3]`, gates `[B, D, T, 3]`, states `[B, D, T]`."""

    @staticmethod
    def time_major(AT, BxpbT):  # noqa: N803
        batch, width, steps, three = BxpbT.shape
        assert three == 3 and AT.shape == (width, 3)
        gates = [np.asarray(BxpbT[..., i]).transpose(2, 0, 1) for i in range(3)]
        return gates, [np.asarray(AT[:, i]) for i in range(3)]

    @classmethod
    def _fused_parallel_fwd(cls, AT, BxpbT):  # noqa: N803
        return solved(*cls.time_major(AT, BxpbT)).transpose(1, 2, 0).view(Tensor)

    @classmethod
    def _fused_parallel_bwd(cls, gradientT, hT, AT, BxpbT):  # noqa: N803
        gates, weights = cls.time_major(AT, BxpbT)
        assert gradientT.shape == hT.shape == BxpbT.shape[:3]
        states, given = (np.asarray(a).transpose(2, 0, 1) for a in (hT, gradientT))
        return adjoint(states, gates, weights, given).transpose(1, 2, 0).view(Tensor)


def newton_gru_fused(wx, a_z, a_r, a_n, h0=None, *, max_iters, omega):
    """The Triton ones, with their layouts: gates `[B, T, 3 D]`, states `[B, T, D]`."""
    assert (max_iters, omega, h0) == (3, 1.0, None) and wx.shape[-1] == 3 * a_z.size
    gates = np.split(np.asarray(wx).transpose(1, 0, 2), 3, -1)
    return solved(gates, [a_z, a_r, a_n]).transpose(1, 0, 2).view(Tensor)


def scan_diag_triton(jac, residual):
    assert jac.shape == residual.shape
    flowing, found = 0.0, []
    for t in range(jac.shape[1]):
        flowing = jac[:, t] * flowing + residual[:, t]
        found.append(flowing)
    return np.stack(found, 1).view(Tensor)


def gru_recurrence_vjp(h_prev, wx, a_z, a_r, a_n, mu):
    gates = np.split(np.asarray(wx), 3, -1)
    assert h_prev.shape == mu.shape == gates[0].shape
    pull = against_pararnn.pulled
    (gwx, (d_z, d_r, d_n)) = pull(Torch, h_prev, gates, [a_z, a_r, a_n], mu, (0, 1))
    return np.concatenate(gwx, -1).view(Tensor), d_z, d_r, d_n


def stand_in(monkeypatch, **modules):
    """A package `pararnn` of these modules."""
    for name in ("pararnn", "pararnn.rnn_cell"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, holds in modules.items():
        module = types.ModuleType(name)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, "pararnn." + name.replace("__", "."), module)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["forward", "forward_backward"])
@pytest.mark.parametrize("call", ["_cuda", "_triton"])
def test_a_correct_rival_has_no_error_and_its_calls_time(call, which, monkeypatch):
    stand_in(
        monkeypatch,
        rnn_cell__gru_diag_mh={"GRUDiagMHImpl": GRUDiagMHImpl},
        kernels={"scan_diag_triton": scan_diag_triton},
        kernels__newton_gru={"newton_gru_fused": newton_gru_fused},
        kernels__vjp_gru={"gru_recurrence_vjp": gru_recurrence_vjp},
    )
    shape = against_pararnn.Shape(9, 2, 5)
    found = against_pararnn.compare(Torch, shape, getattr(against_pararnn, call), which)
    assert found["theirs_ms"] == 2.0 and found["ratio"] == 2.0 / found["ours_ms"]
    assert found["theirs_error"] < 1e-6 and found["ours_error"] < 1e-5


def test_the_jacobian_and_the_cotangents_that_torch_computes_are_those_of_the_step():
    rng = np.random.default_rng(0)
    h, g, *rest = rng.normal(size=(8, 4, 3))
    gates, weights = rest[:3], rest[3:]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9)
    close(against_pararnn.jacobian(Torch, h, gates, weights), slope(h, gates, weights))

    def step(moved_gates, moved_weights):
        return np.sum(g * stepped(h, moved_gates, moved_weights))

    d_gates, d_weights = against_pararnn.pulled(Torch, h, gates, weights, g, ())
    for i in range(3):
        for moved, found in ((gates, d_gates), (weights, d_weights)):
            at, e = (1, 2), 1e-6
            ends = []
            for sign in (e, -e):
                shifted = [m.copy() for m in moved]
                shifted[i][at] += sign
                ends.append(step(*((shifted, weights) if moved is gates else (gates, shifted))))
            close(found[i][at], (ends[0] - ends[1]) / (2 * e))
