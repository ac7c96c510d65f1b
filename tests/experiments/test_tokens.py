"""Tokenizers: bytes come back, figures stay per byte, what cannot be read is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments.data import text, tokens
from experiments.data.corpus import judged_by
from experiments.data.packing import PACKED
from experiments.data.streaming import StreamBatches
from experiments.inject import injection
from experiments.run import checkpoints, opening, trust
from experiments.run.folders import RunError
from experiments.text.trained import tokenizer_of
from experiments.train_tokenizer import job as train_job
from experiments.train_tokenizer import train as train_tokenizer
from tests.experiments.documents import WORDS, config, write_texts

EXPECTED = [word.encode() for word in WORDS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "deep/tokenizer.json"
    corpus = [word.encode() for word in WORDS] + ["naïve 𝄞 ☃".encode()]
    assert train_tokenizer(corpus, vocab_size=300, size=10**6, output=path) == 300
    return str(path)


def test_a_tokenizer_gives_the_bytes_back_also_token_by_token(tokenizer):
    t = tokens.open_tokenizer(tokenizer)
    assert t.vocab_size == 300
    for content in ("document 3, with the word", " naïve\r\n\t𝄞☃ \x00\x7f", "日本語", ""):
        ids = t.encode(content.encode())
        assert t.decode(ids) == content.encode()
        # A token may end inside a character: the bytes of each are still its own.
        assert b"".join(t.decode([i]) for i in ids) == content.encode()
    assert len(t.encode(WORDS[5].encode())) < len(WORDS[5]) / 2
    assert t.decode(t.separator) == b"<|endoftext|>"
    # Only the end of a document is one, whatever is written in it.
    written = t.encode(b"a<|endoftext|>b")
    assert t.decode(written) == b"a<|endoftext|>b" and t.separator[0] not in written
    assert b"<|endoftext|>" not in b"".join(t.decode([i]) for i in range(1, 300))


@pytest.mark.parametrize("together", [1, 5, 1000])
def test_many_texts_are_encoded_as_each_is(together, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "TOGETHER", together)
    t = tokens.open_tokenizer(tokenizer)
    one_by_one = [t.encode(text).tolist() for text in EXPECTED]
    assert [ids.tolist() for ids in t.encode_all(EXPECTED)] == one_by_one
    joined = tokens.tokenize(EXPECTED, t)
    assert joined.ids.tolist() == [i for ids in one_by_one for i in [*ids, *t.separator]]


def test_bits_per_byte_divide_by_the_held_out_bytes(tokenizer, tmp_path):
    write_texts(tmp_path)
    data = text.load(path=str(tmp_path), tokenizer=tokenizer, prefetch=0)
    t = data.tokenizer
    documents = [d for d in EXPECTED if d not in set(data.documents())]
    count = sum(len(t.encode(document)) for document in documents) + len(documents) - 1
    assert data.bytes_per_token == pytest.approx(len(data.validation) / count)
    batch = next(data.batches(seed=0, batch_size=2, length=8))
    assert batch["tokens"].max() < 300 and batch["tokens"].dtype == np.int32
    starts = batch["tokens"][:, :-1][batch["reset"]]
    assert set(starts.tolist()) <= {int(t.encode(document)[0]) for document in EXPECTED}


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer='gone\.json' is not a file: t"):
        tokens.open_tokenizer("gone.json")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"t\.json is not a file of the library tokenizers"):
        tokens.open_tokenizer(str(tmp_path / "t.json"))
    with pytest.raises(RunError, match=r"vocab_size=256: .*need at least 257"):
        train_tokenizer([b"a"], vocab_size=256, size=1, output=tmp_path / "no.json")


def test_the_tokenizer_command_prints_its_figure_and_the_next_command(tmp_path, capsys):
    write_texts(tmp_path)
    output = tmp_path / "t.json"
    given = ["data=text", f"data.path={tmp_path}", "vocab_size=280", f"output={output}"]
    train_job(config(*given, name="train_tokenizer"))
    said = capsys.readouterr().out
    assert f"train with it: python -m experiments.train data.tokenizer={output} model.vo" in said
    held_out = text.load(path=str(tmp_path)).validation.tobytes()
    count = len(tokens.open_tokenizer(str(output)).encode(held_out))
    assert f"{len(held_out) / count:.2f} bytes per token on {len(held_out)} held-out" in said


def test_a_tokenizer_learns_from_no_more_than_it_is_given(tmp_path):
    many = (word.encode() for word in WORDS * 100)
    train_tokenizer(many, vocab_size=260, size=100, output=tmp_path / "t.json")
    assert sum(1 for _ in many) == 1200 - 4


class Many:
    """Documents for `StreamBatches`: one, again and again."""

    def __next__(self):
        return b"x"

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


@pytest.mark.parametrize("size, kind", [(256, "uint8"), (65536, "uint16"), (70000, "uint32")])
def test_no_token_number_wraps(size, kind):
    ids = np.array([0, size // 2, size - 1], np.int32)
    t = tokens.Tokenizer(size, lambda text: ids, bytes, (size - 1,))
    found = tokens.tokenize([b"x"], t)
    assert found.ids.tolist() == [*ids, size - 1] and found.ids.dtype == kind
    batch = next(StreamBatches(Many(), t, seed=0, rows=1, length=7, block=1))
    assert batch["tokens"].tolist() == [[*ids, size - 1] * 2]
    # A tokenizer that says it has fewer: 4464 = 70000 - 65536 would be another token.
    for wrong in ([size], [-1], [0, 2**31 - 1]):
        short = t._replace(encode=lambda text, wrong=wrong: np.array(wrong))
        with pytest.raises(
            ValueError, match=rf"the token {wrong[-1]}, but its vocabulary has {size}"
        ):
            tokens.tokenize([b"x"], short)
        with pytest.raises(ValueError, match="numbered below its size"):
            next(StreamBatches(Many(), short, seed=0, rows=1, length=7, block=1))
    with pytest.raises(ValueError, match=f"the token {size}, but"):
        tokens.tokenize([b"x"], t._replace(separator=(size,)))


def test_a_tokenizer_whose_numbers_have_gaps_is_as_large_as_the_last_one(tokenizer, tmp_path):
    values = json.loads(Path(tokenizer).read_text())
    content = values["added_tokens"][0]["content"]
    values["model"]["vocab"][content] = values["added_tokens"][0]["id"] = 69999
    (tmp_path / "gaps.json").write_text(json.dumps(values))
    t = tokens.open_tokenizer(str(tmp_path / "gaps.json"))
    assert t.vocab_size == 70000 and t.separator == (69999,)
    assert t.digest != tokens.open_tokenizer(tokenizer).digest
    assert tokens.tokenize([b"a"], t).ids.dtype == np.uint32
    assert tokens.tokenize([b"a"], t).ids[-1] == 69999


def test_a_run_keeps_its_tokenizer_and_refuses_another(tokenizer, tmp_path):
    cfg = OmegaConf.create(
        {"data": {"_target_": "experiments.data.text.load", "path": "x", "tokenizer": tokenizer}}
    )
    folder = tmp_path / "run"
    opening.open_run(folder, cfg)
    assert (folder / "tokenizer.json").read_bytes() == Path(tokenizer).read_bytes()
    opened = trust.open_config(folder)
    assert opened.data.tokenizer == str(folder / "tokenizer.json")
    t = tokenizer_of(folder, opened)  # the original may be gone
    position = {"data": {"position": 0, "in": {"tokenizer": t.digest}}}
    with checkpoints.saver(folder, keep_last=1, keep_best=0, best=("x", "min")) as save:
        save(injection.state_after(1), position, None)
    assert tokenizer_of(folder, opened).digest == t.digest
    values = json.loads(Path(tokenizer).read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**values, "padding": None}))
    with pytest.raises(RunError, match=f"is not the tokenizer that .* digest was '{t.digest}'"):
        tokenizer_of(folder, opened)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RunError, match="(?s)asks to read data.tokenizer=.*trust="):
        tokenizer_of(folder, trust.open_config(folder))
    with trust.granted([tokenizer]):
        assert tokenizer_of(folder, trust.open_config(folder)).vocab_size == 300


def edited(tokenizer, folder, **change):
    path = folder / "edited.json"
    path.write_text(json.dumps({**json.loads(Path(tokenizer).read_text()), **change}))
    return str(path)


FIXED = {
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "!",
}
CUT = {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
LONG = "a long text of many words, all of which count\n" * 20


@pytest.mark.parametrize(
    "change",
    [
        {"truncation": CUT},
        {"truncation": {**CUT, "stride": 5}},
        {"padding": {**FIXED, "strategy": {"Fixed": 10**12}}},
        {"padding": {**FIXED, "strategy": "BatchLongest", "pad_to_multiple_of": 2**40}},
    ],
    ids=["cut", "overlap", "fixed", "multiple"],
)
def test_text_is_neither_cut_nor_padded(change, tokenizer, tmp_path):
    plain = tokens.open_tokenizer(tokenizer)
    t = tokens.open_tokenizer(edited(tokenizer, tmp_path, **change))
    assert t.encode(LONG.encode()).tolist() == plain.encode(LONG.encode()).tolist()
    assert t.digest != plain.digest  # it is another file


def test_a_text_has_always_the_same_tokens(tokenizer, tmp_path):
    model = {**json.loads(Path(tokenizer).read_text())["model"], "dropout": 0.5}
    t = tokens.open_tokenizer(edited(tokenizer, tmp_path, model=model))
    assert len({tuple(t.encode(LONG.encode())) for _ in range(3)}) == 1


LOSSY = {
    "lowercase": ({"normalizer": {"type": "Lowercase"}}, "A text", "'A text.*becomes 'a text"),
    "accents": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
        "nai\u0308ve",
        "naïve",
    ),
    "unknown words": (
        {
            "model": {
                "type": "WordLevel",
                "vocab": {"[UNK]": 1, "text": 2, "\n": 3},
                "unk_token": "[UNK]",
            },
            "decoder": None,
            "pre_tokenizer": {"type": "Whitespace"},
        },
        "a text",
        r"becomes '\[UNK\]",
    ),
    "not UTF-8": ({}, b"na\xefve", "Make the text UTF-8"),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_text_that_does_not_come_back_has_no_bits_per_byte(kind, tokenizer, tmp_path):
    change, content, message = LOSSY[kind]
    raw = content if isinstance(content, bytes) else content.encode()
    t = tokens.open_tokenizer(edited(tokenizer, tmp_path, **change))
    with pytest.raises(ValueError, match=f"(?s)edited.json does not give the .*{message}") as told:
        judged_by([b"x\n" if kind == "not UTF-8" else b"", raw], t, PACKED)
    assert len(str(told.value).splitlines()) <= 3
    exact = tokens.open_tokenizer(tokenizer)
    documents = [b"", "nai\u0308ve A\n".encode()]
    assert judged_by(documents, exact, PACKED)[2] > 0


def test_a_space_that_a_tokenizer_puts_in_front_of_a_text_is_no_loss(tokenizer, tmp_path):
    cut = {**json.loads(Path(tokenizer).read_text())["pre_tokenizer"], "add_prefix_space": True}
    spaced = edited(tokenizer, tmp_path, pre_tokenizer=cut)
    t = tokens.open_tokenizer(spaced)
    assert t.decode(t.encode(b"text").tolist()) == b" text"
    assert judged_by([b"text", b"of words"], t, PACKED)[2] > 0


def test_a_lossy_tokenizer_makes_no_run(tokenizer, tmp_path):
    write_texts(tmp_path, [f"Text {i}, of Some words\n" for i in range(40)])
    lossy = edited(tokenizer, tmp_path, normalizer={"type": "Lowercase"})
    with pytest.raises(ValueError, match="does not give the held-out text back"):
        text.load(path=str(tmp_path), tokenizer=lossy)


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
BLOWN = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 1000}
BETWEEN = {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "e"}
BROKEN = {
    "panic": {"normalizer": CHARSMAP},
    "no unknown word": {
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"},
        "decoder": None,
    },
    "no unknown piece": {
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"a": 0},
        },
        "decoder": None,
    },
    "no tokens": {
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        "decoder": None,
        "added_tokens": [],
    },
    "growth": {"normalizer": {"type": "Sequence", "normalizers": [BLOWN] * 3}},
    "growth between": {"normalizer": {"type": "Sequence", "normalizers": [BETWEEN] * 40}},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_the_library_raises_is_an_error_that_names_the_file(kind, tokenizer, tmp_path):
    path = edited(tokenizer, tmp_path, **BROKEN[kind])
    with pytest.raises(ValueError, match=r"edited\.json .*(give|or null for bytes)") as told:
        tokens.open_tokenizer(path).encode(b"some text, some more")
    assert len(str(told.value).splitlines()) <= 3


def test_decoders_have_bytes_for_every_number(tokenizer, tmp_path):
    model = json.loads(Path(tokenizer).read_text())["model"]
    odd = {**model, "vocab": {**model["vocab"], "a b": 5000}}
    t = tokens.open_tokenizer(edited(tokenizer, tmp_path, model=odd))
    assert t.decode([5000]) == b"a b" and t.decode([4000]) == b""
    strip = {"type": "Strip", "content": "a", "start": 10, "stop": 10}
    t = tokens.open_tokenizer(edited(tokenizer, tmp_path, decoder=strip))
    with pytest.raises(ValueError, match=r"edited\.json cannot decode its own tokens"):
        t.decode(t.encode(b"a").tolist())
