"""What several files of this wing train on."""

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of small Python files, so that no test reads the whole standard library."""
    root = tmp_path_factory.mktemp("text")
    for i in range(20):
        (root / f"f{i}.py").write_text(f"def f_{i}(x):\n    return x + {i}\n" * 20)
    return root
