"""Sources of data: what is read is what is there, and what cannot be read is named."""

import gzip
import json
import mailbox
import pathlib
import re
import shutil
import sys
import types

import pytest
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import MissingMandatoryValue, OmegaConf

import experiments.data
from experiments.data import files, huggingface, jsonl, parquet, splits, text, tokens
from experiments.data.corpus import Sampler
from experiments.run.folders import RunError
from experiments.shell.explanations import explain
from tests.experiments.documents import WORDS, config, write_texts


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """The library `datasets` keeps its cache to this run and asks nobody."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


def everything(data):
    """All documents, trained on or held out; none of WORDS has an empty line in it."""
    held_out = data.validation.tobytes().split(b"\ndocument")
    held_out = [held_out[0], *(b"document" + part for part in held_out[1:])]
    return sorted([*data.documents(), *held_out])


EXPECTED = sorted(word.encode() for word in WORDS)


def test_text_is_read_from_a_folder_or_a_glob_without_hidden_files(tmp_path):
    write_texts(tmp_path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/no.txt").write_text("no")
    (tmp_path / "no.bin").write_bytes(b"\0")
    assert everything(text.load(path=str(tmp_path))) == EXPECTED
    assert everything(text.load(path=f"{tmp_path}/**/*.txt")) == EXPECTED
    half = everything(text.load(path=f"{tmp_path}/part0/*"))
    assert half == sorted(word.encode() for word in WORDS[::2])


def test_one_large_file_is_cut_at_line_ends(tmp_path):
    lines = "".join(f"line {i} of the file\n" for i in range(500)) + "no newline at the end"
    (tmp_path / "all.txt").write_text(lines)
    data = text.load(path=str(tmp_path / "all.txt"), piece_size=300)
    found = [*data.documents(), data.validation.tobytes()]
    assert sorted(b"".join(found).split()) == sorted(lines.encode().split())
    assert all(300 <= len(piece) < 330 for piece in found[:-2])
    assert "".join(text.pieces(lines, 300)) == lines
    with pytest.raises(ValueError, match="1 documents, 1 of them distinct.*data.piece_size=N"):
        text.load(path=str(tmp_path / "all.txt"))
    with pytest.raises(ValueError, match="data.piece_size=0 characters: give at least 1"):
        text.load(path=str(tmp_path / "all.txt"), piece_size=0)


def test_text_of_another_encoding_is_read_as_utf_8(tmp_path):
    for encoding in ("latin-1", "utf-16"):
        for name in ("ä", "ö"):
            (tmp_path / f"{name}.txt").write_text(f"naïve {name}", encoding=encoding)
        data = text.load(path=str(tmp_path), encoding=encoding)
        both = sorted([*data.documents(), data.validation.tobytes()])
        assert both == sorted(["naïve ä".encode(), "naïve ö".encode()])


def test_non_text_input_is_named_with_file_and_line(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes("first\nsecond\nna\xefve".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"bad\.txt, line 3: byte 0xef at offset 15 is not utf-8.*encoding=latin-1"
    ):
        text.load(path=str(tmp_path))
    for content in (b"plain\0text", gzip.compress(b"text" * 99, mtime=0)):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.txt is not a text file: it has a NUL byte"):
            text.load(path=str(tmp_path))
    for name in ("utf-9", "undefined", "zip"):
        with pytest.raises(
            ValueError, match=f"data.encoding='{name}' is not an encoding of text that Python knows"
        ):
            text.load(path=str(tmp_path), encoding=name)


@pytest.mark.parametrize("source", [text, jsonl, parquet], ids=lambda m: m.__name__[17:])
def test_missing_and_empty_input_is_named(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.path='.*gone' is neither a file nor a f"):
        source.load(path=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"no file matches it as a glob"):
        source.load(path=f"{tmp_path}/*.nothing")
    with pytest.raises(
        FileNotFoundError, match=rf"no .*\*\{source.ENDINGS[0]}.* in the folder data\.path="
    ):
        source.load(path=str(tmp_path))
    if source is not parquet:
        (tmp_path / f"empty{source.ENDINGS[0]}").write_text("")
        with pytest.raises(ValueError, match=r"files, all empty|0 documents, 0 of them distinct"):
            source.load(path=str(tmp_path))


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def test_json_lines_are_read_by_field(tmp_path):
    # U+2028 ends a line for str.splitlines, and stands unescaped in a JSON string.
    contents = [*WORDS, "document with\u2028a separator", "", None]
    path = write_lines(tmp_path / "a.jsonl", [{"id": 1, "body": c} for c in contents])
    path.write_text(path.read_text() + "\n  \n")
    expected = sorted([*EXPECTED, "document with\u2028a separator".encode()])
    assert everything(jsonl.load(path=str(path), field="body")) == expected


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a"', r"line 2: not JSON \(.* at column 13\)\. A file of JSON Lines"),
        ('["text"]', r'line 2: list where an object such as \{"text": "\.\.\."\} was'),
        ('{"body": "a", "id": 2}', r"line 2: no field 'text'; the fields are: body, id\."),
        ('{"text": {"deep": 1}}', r"line 2: the field 'text' holds \{'deep': 1\} \(dict\), not"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, " + message):
        jsonl.load(path=str(tmp_path))


def test_json_lines_that_are_no_utf_8_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "na\xefve"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: byte 0xef"):
        jsonl.load(path=str(tmp_path))


def write_parquet(path, table):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return path


def test_parquet_is_read_by_column(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"n": [*range(13)], "body": [*WORDS, None]})
    assert everything(parquet.load(path=str(path), field="body")) == EXPECTED


def test_parquet_that_cannot_be_read_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"n": [1, 2], "body": ["a", "b"]})
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; the columns are: n, body"):
        parquet.load(path=str(path))
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: the field 'n' holds 1 \(int\), not"):
        parquet.load(path=str(path), field="n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet \(.*\): copy it"):
        parquet.load(path=str(path), field="body")


@pytest.mark.parametrize(
    "library, call",
    [
        ("pyarrow", lambda path: parquet.read(path, field="text")),
        ("datasets", lambda path: huggingface.load(path="json", data_files=str(path))),
        ("tokenizers", lambda path: tokens.open_tokenizer(str(path))),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_extra(library, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "file").write_text("{}")
    extra = "parquet" if library == "pyarrow" else library
    with pytest.raises(ValueError, match=rf"library {library}: pip install '\.\[{extra}\]'"):
        call(tmp_path / "file")


def test_a_data_set_is_streamed_and_judged_by_what_it_holds_out(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": word} for word in WORDS * 2])
    data = huggingface.load(path="json", data_files=str(path), validation_fraction=0.3)
    held_out = set(EXPECTED) - set(data.documents())
    assert 0 < len(held_out) < 12
    # Both copies of a document are on one side; the held-out ones count once.
    assert len(list(data.documents())) == 2 * (12 - len(held_out))
    assert len(data.validation) == sum(map(len, held_out)) + len(held_out) - 1
    less = huggingface.load(
        path="json", data_files=str(path), validation_fraction=0.3, validation_bytes=1
    )
    assert 0 < len(less.validation) < len(data.validation)
    assert list(less.documents()) == list(data.documents())


def test_a_data_set_with_a_validation_split_trains_on_no_copy_of_it(tmp_path):
    train = write_lines(tmp_path / "train.jsonl", [{"text": word} for word in WORDS])
    judged = write_lines(tmp_path / "valid.jsonl", [{"text": word} for word in WORDS[9:]])
    data = huggingface.load(
        path="json",
        data_files={"train": str(train), "valid": str(judged)},
        validation_split="valid",
    )
    assert list(data.documents()) == [word.encode() for word in WORDS[:9]]
    assert data.validation.tobytes() == "\n".join(WORDS[9:]).encode()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(path="nobody/nothing"), r"data set 'nobody/nothing', split 'train', cannot be op"),
        (dict(split="other"), r"data set 'json', split 'other', cannot be opened \(Bad split"),
        (dict(data_files="gone.jsonl"), r"data set 'json', split 'train', cannot be opened"),
        (dict(field="body"), r"data set 'json': no field 'body'; the fields are: text\. Give data"),
        (dict(field="n"), r"data set 'json', record 1: the field 'n' holds 0 \(int\), not text"),
        (dict(validation_fraction=1e-9), "split 'train' gives no document to evaluate on"),
        (dict(validation_fraction=2), r"validation_fraction=2 must be strictly between"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_named(settings, message, tmp_path):
    extra = {"n": 0} if settings.get("field") == "n" else {}
    path = write_lines(tmp_path / "a.jsonl", [{"text": word, **extra} for word in WORDS])
    given = dict(path="json", data_files=str(path)) | settings
    if given["path"] != "json":
        del given["data_files"]
    with pytest.raises(ValueError, match=message):
        huggingface.load(**given)


def test_a_data_set_without_training_documents_is_an_error(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "the same"}] * 3)
    data = huggingface.load(
        path="json",
        data_files={"train": str(path), "valid": str(path)},
        validation_split="valid",
        prefetch=0,
    )
    batches = data.batches(seed=0, batch_size=1, length=4)
    with pytest.raises(RunError, match="none of the 3 records can be trained on"):
        next(batches)


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot be read: Is a directory"):
        files.read_text(tmp_path, encoding="utf-8")


@pytest.mark.parametrize("name", ["text", "jsonl", "parquet", "huggingface", "stdlib_by_name"])
def test_every_source_is_a_config(name, tmp_path):
    write_texts(tmp_path)
    write_lines(tmp_path / "a.jsonl", [{"text": word} for word in WORDS])
    write_parquet(tmp_path / "a.parquet", {"text": WORDS})
    place = {
        "stdlib_by_name": [f"data.root={write_python(tmp_path)}"],
        "huggingface": ["data.path=json", f"data.data_files={tmp_path}/a.jsonl"],
    }.get(name, [f"data.path={tmp_path}"])
    data = instantiate(config(f"data={name}", "data.validation_fraction=0.3", *place).data)
    assert everything(data) == EXPECTED
    held_out = [word for word in EXPECTED if word not in set(data.documents())]
    expected = splits.by_name if name == "stdlib_by_name" else splits.by_content
    named = {f"{i:02d}.py": word.encode() for i, word in enumerate(WORDS)}
    assert {named[n] for n in expected(named, 0.3, 0).validation} == set(held_out)


def write_python(folder):
    (folder / "python").mkdir()
    for i, word in enumerate(WORDS):
        (folder / f"python/{i:02d}.py").write_text(word)
    return folder / "python"


@pytest.mark.parametrize("name", ["text", "jsonl", "parquet", "huggingface"])
def test_a_path_that_is_not_given_is_asked_for(name):
    with pytest.raises(MissingMandatoryValue) as raised:
        instantiate(config(f"data={name}").data)
    assert explain(raised.value) == "data.path must be given: data.path=VALUE on the command line"


PAGE = (pathlib.Path(__file__).resolve().parents[2] / "docs/guides/data.md").read_text()


def block(language):
    return re.search(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)[1]


def test_the_source_that_the_page_adds_works_as_it_says(tmp_path, monkeypatch):
    box = mailbox.mbox(tmp_path / "all.mbox")
    for word in WORDS:
        message = mailbox.mboxMessage()
        message.set_payload(word)
        box.add(message)
    box.flush()
    module = types.ModuleType("experiments.data.mail")
    exec(block("python"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(experiments.data, "mail", module, raising=False)
    settings = OmegaConf.create(block("yaml"))
    data = instantiate(settings, path=str(tmp_path / "all.mbox"))
    read = b"\n".join([*data.documents(), data.validation.tobytes()])
    assert all(read.count(word.strip().encode()) == 1 for word in WORDS[1:])
    assert "reset" in next(data.batches(seed=0, batch_size=2, length=16))
    with pytest.raises(InstantiationException) as raised:
        instantiate(settings, path="gone")
    assert "data.path='gone' is not a file: give an mbox" in explain(raised.value)


def test_the_settings_that_the_page_names_exist():
    given = re.findall(r"experiments\.train( [^\n`#|]*)", PAGE)
    assert len(given) > 6
    for arguments in given:
        names = [word for word in arguments.split() if "=" in word and "data=mail" not in arguments]
        cfg = config(*names)
        assert "_target_" in cfg.data
    for path in re.findall(r"experiments\.data\.\w+\.[A-Z]+", PAGE):
        assert isinstance(get_object(path), Sampler)


def test_a_stream_is_not_continued_in_other_files(tmp_path):
    def batches(**more):
        files = {"path": "json", "data_files": str(tmp_path / "*.jsonl"), "prefetch": 0}
        data = huggingface.load(**files, validation_fraction=0.3, **more)
        return data.batches(seed=0, batch_size=1, length=4)

    path = write_lines(tmp_path / "a.jsonl", [{"text": word} for word in WORDS * 2])
    state = batches().get_state()
    batches().set_state(state)
    whole = path.read_text()
    for content, said in (
        (whole.replace("t", "T", 1), "files was"),
        (whole + whole, "files was"),
    ):
        path.write_text(content)
        with pytest.raises(RunError, match=said):
            batches().set_state(state)
    path.write_text(whole)
    batches().set_state(state)
    write_lines(tmp_path / "b.jsonl", [{"text": "more"}])
    with pytest.raises(RunError, match=r"files was '\w+' and is '\w+'"):
        batches().set_state(state)
    with pytest.raises(RunError, match=r"held-out text was"):
        batches(seed=1).set_state(state)


def test_the_digest_of_files_sees_sizes_and_pieces_and_not_the_folder(tmp_path, monkeypatch):
    digests = set()
    for name, content in (("a", b"x" * 99), ("b", b"x" * 98), ("c", b"x" * 98 + b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(content)
        digests.add(huggingface.digest_of_files([tmp_path / name / "file"]))
    assert len(digests) == 3 and huggingface.digest_of_files([]) is None
    shutil.move(tmp_path / "c", tmp_path / "d")
    assert huggingface.digest_of_files([tmp_path / "d" / "file"]) in digests
    # Beyond `WHOLE`, pieces at both ends and between count.
    monkeypatch.setattr(huggingface, "WHOLE", 10)
    monkeypatch.setattr(huggingface, "MIB", 10)
    monkeypatch.setattr(huggingface, "PIECES", 3)
    found = set()
    for at in (0, 50, 98):
        content = bytearray(b"x" * 99)
        content[at] = 0
        (tmp_path / "a" / "file").write_bytes(content)
        found.add(huggingface.digest_of_files([tmp_path / "a" / "file"]))
    assert len(found) == 3
