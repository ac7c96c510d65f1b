"""Small documents, and configs over them, for the tests of data."""

from hydra import compose, initialize_config_module

WORDS = [f"document {i}, with the word {'x' * i}\n" for i in range(12)]


def write_texts(folder, contents=WORDS):
    for i, content in enumerate(contents):
        path = folder / f"part{i % 2}/{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def config(*overrides, name="train"):
    with initialize_config_module("experiments.conf", version_base="1.3"):
        return compose(name, overrides=list(overrides))
