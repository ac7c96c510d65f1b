"""The comparison with other people's kernels: layouts, and what it says where it cannot run."""

import importlib.util

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
        against_pararnn.which(tmp_path)
    (tmp_path / "a/pararnn/csrc").mkdir(parents=True)
    (tmp_path / "b/src/pararnn/kernels").mkdir(parents=True)
    assert against_pararnn.which(tmp_path / "a")[:2] == ("CUDA (apple/ml-pararnn)", tmp_path / "a")
    assert against_pararnn.which(tmp_path / "b")[1] == tmp_path / "b/src"


def test_without_torch_or_a_gpu_it_says_so(tmp_path):
    (tmp_path / "pararnn/csrc").mkdir(parents=True)
    absent = importlib.util.find_spec("torch") is None
    said = "torch is not installed here" if absent else "both torch and JAX must see the GPU"
    with pytest.raises(SystemExit, match=said):
        against_pararnn.main([str(tmp_path)])


class Torch:
    """As much of torch as the comparison uses, on NumPy: no package and no GPU."""

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

    class Tensor(np.ndarray):
        def permute(self, *axes):
            return self.transpose(axes)

        def cpu(self):
            return self

        def numpy(self):
            return np.asarray(self)


@pytest.mark.slow
def test_a_right_rival_in_its_own_layout_has_no_error_and_its_time_is_a_calls():
    def rival(torch, gates, weights):
        h, states = np.zeros(gates[0].shape[1:]), []
        for x_z, x_r, x_n in zip(*gates, strict=True):
            z, r = (
                1 / (1 + np.exp(-(x + w * h))) for x, w in ((x_z, weights[0]), (x_r, weights[1]))
            )
            h = h + z * (np.tanh(x_n + weights[2] * r * h) - h)
            states.append(h)
        result = np.stack(states).transpose(1, 2, 0).view(torch.Tensor)
        return lambda: result, lambda h: h.permute(2, 0, 1)

    found = against_pararnn.compare(Torch, against_pararnn.Shape(9, 2, 5), rival)
    assert found["theirs_ms"] == 2.0 and found["ratio"] == 2.0 / found["ours_ms"]
    assert found["theirs_error"] < 1e-6 and found["ours_error"] < 1e-5
