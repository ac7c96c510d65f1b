"""What generation shows and reads: whole characters, stop strings, prompts from files, commands."""

import json
import math
import os
import pathlib
import re
import shlex

import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments import generate
from experiments.data.tokens import BYTES, Tokenizer
from experiments.run.folders import RunError
from experiments.text import sampling
from experiments.text.prompts import read_prompts, stop_strings
from experiments.text.sampling import Rule, check_generation, complete, sample_text
from experiments.text.transcript import Transcript
from jaxpara.nn import decoder, mixers
from jaxpara.recurrence import cells
from tests.experiments.saved_run import MODEL, call, random_params, save_run

WORDS = ["de", "f ", "é", "end", " ", "x"]
PIECES = Tokenizer(
    vocab_size=len(WORDS),
    encode=lambda text: np.array([WORDS.index(text.decode())]),
    decode=lambda ids: "".join(WORDS[i] for i in ids).encode(),
    separator=(4,),
)


def given(text, *, stop=(), pieces=1, prompt=b"p"):
    """What a transcript gives out, piece by piece; and the transcript."""
    transcript = Transcript(BYTES, list(prompt), stop)
    out = [transcript.add(text[i : i + pieces]) for i in range(0, len(text), pieces)]
    return [*out, transcript.end()], transcript


@pytest.mark.parametrize("pieces", [1, 2, 3, 100])
def test_a_stream_holds_whole_characters_and_all_of_them(pieces):
    text = "aé€😀z\u0301"
    out, transcript = given(text.encode(), pieces=pieces)
    assert "".join(out) == transcript.continuation == text
    assert all("\ufffd" not in piece for piece in out)


def test_characters_come_as_soon_as_their_last_byte_does():
    assert given("é€a".encode())[0] == ["", "é", "", "", "€", "a", ""]


def test_bytes_that_are_no_character_show_once_that_is_certain():
    assert given(b"\xffa\xc3(")[0] == ["", "\ufffda", "", "\ufffd(", ""]
    assert given(b"a\xe2\x82")[0] == ["a", "", "", "\ufffd"]


def test_a_character_that_the_prompt_begins_is_ended_by_the_continuation():
    out, transcript = given(b"\xa9!", prompt=b"caf" + b"\xc3")
    assert transcript.prompt == "caf" and "".join(out) == "é!"


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one\n\ntwo\n\n", ["\n\n"], ("one", "\n\n")),
        ("one\ntwo", ["\n\n"], ("one\ntwo", None)),
        ("aab!", ["ab"], ("a", "ab")),
        # The first to be complete ends the text, however many tokens come at a time.
        ("xabcd", ["abcd", "c"], ("xab", "c")),
        ("xabcd", ["bc", "abc"], ("x", "abc")),
        ("größe", ["ö"], ("gr", "ö")),
        ("stop", ["stop"], ("", "stop")),
        ("ends in st", ["stop"], ("ends in st", None)),
    ],
)
def test_the_first_stop_string_ends_the_text_and_is_no_part_of_it(text, stop, expected, pieces):
    out, transcript = given(text.encode(), stop=stop, pieces=pieces)
    assert ("".join(out), transcript.stopped) == expected
    assert transcript.continuation == expected[0]
    if transcript.stopped is not None:
        assert transcript.add(b"more") == transcript.end() == ""


def test_only_a_possible_stop_string_is_held_back():
    assert given(b"a\nb", stop=["\n\n"])[0] == ["a", "", "\nb", ""]


def test_a_stop_string_is_not_looked_for_in_the_prompt():
    out, transcript = given(b"f x", prompt=b"de", stop=["def"])
    assert "".join(out) == "f x" and transcript.stopped is None


def test_a_tokenizer_is_a_pair_of_functions():
    transcript = Transcript(PIECES, PIECES.encode(b"de"), ["nd"])
    assert transcript.prompt == "de"
    assert [transcript.add([i]) for i in (1, 5, 3)] == ["f ", "x", "e"]
    assert transcript.stopped == "nd"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "def \n  x = [1,\n", ["def ", "  x = [1,"]),
        ("a.txt", "a\r\nb", ["a", "b"]),
        ("a.jsonl", '{"prompt": "a\\n"}\n{"prompt": "é", "more": 1}\n', ["a\n", "é"]),
    ],
)
def test_prompts_are_read_as_they_stand(tmp_path, name, content, expected):
    assert read_prompts(write(tmp_path, name, content), field="prompt") == expected


HALF = r"a\.jsonl', line 2 holds \\ud800, half of a character: leave it out, or give both"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", r"a\.txt' is empty: give a file with a prompt on each line"),
        ("a.txt", "a\n\nb\n", r"a\.txt', line 2 is empty, .*leave the line out"),
        ("a.txt", b"caf\xe9", r"is not UTF-8 \(byte 3\): convert it"),
        ("a.jsonl", '{"prompt": "a"}\nb\n', r"a\.jsonl', line 2 is not JSON .*or plain lines"),
        ("a.jsonl", '{"text": "a"}', r"line 1 has no text in the field 'prompt' \(text\): give fi"),
        ("a.jsonl", '{"prompt": 3}', "line 1 has no text in the field 'prompt'"),
        ("a.jsonl", '["a"]', r"line 1 has no text in the field 'prompt' \(list\)"),
        ("a.jsonl", '{"prompt": ""}', "line 1 is empty, and the model needs one token"),
        ("a.jsonl", '{"prompt": "p"}\n{"prompt": "\\ud800x"}', HALF),
        ("a.jsonl", '{"prompt": "p"}\n{"prompt": "x\\udcff"}', HALF.replace("d800", "dcff")),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_by_line(tmp_path, name, content, message):
    with pytest.raises(RunError, match=message):
        read_prompts(write(tmp_path, name, content), field="prompt")


def test_a_pipe_and_a_device_are_no_files_of_prompts(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (str(tmp_path / "pipe.jsonl"), "/dev/zero"):
        with pytest.raises(RunError, match=r"cannot be read \(it is neither a file nor a folder\)"):
            read_prompts(path, field="prompt")


def test_a_missing_file_of_prompts_is_named(tmp_path):
    with pytest.raises(RunError, match=r"prompts='gone\.txt' cannot be read \(No such file"):
        read_prompts("gone.txt", field="prompt")


@pytest.mark.parametrize(
    "typed, expected",
    [
        (None, ()),
        ("def ", ("def ",)),
        (r'["\n\n", "def "]', ("\n\n", "def ")),
        (["a", "b"], ("a", "b")),
        (OmegaConf.create(["a", 5]), ("a", "5")),
        (5, ("5",)),
    ],
)
def test_stop_strings_are_one_string_or_a_json_list(typed, expected):
    assert stop_strings(typed) == expected


@pytest.mark.parametrize("typed", [r"[\n\n,def ]", '["a"', "[1, 2]"])
def test_stop_strings_that_the_shell_has_unquoted_are_explained(typed):
    with pytest.raises(RunError, match="not a JSON list of strings: put it in single quotes"):
        stop_strings(typed)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(prompt=b""), "the prompt is empty.*give prompt="),
        (dict(length=0), "length=0 tokens to draw: give at least 1"),
        (dict(temperature=-1.0), r"temperature=-1\.0 is negative or not finite: give 0"),
        (dict(temperature=math.nan), "temperature=nan is negative or not finite"),
        (dict(top_k=0), "top_k=0: give at least 1, or null"),
        (dict(top_p=0.0), r"top_p=0\.0 is a share .* above 0 and at most 1, or null"),
        (dict(top_p=1.1), r"top_p=1\.1 is a share of the probability"),
        (dict(stop=("",)), "give a list of strings, none of them empty"),
        (dict(stop="ab"), "stop='ab': give a list of strings"),
    ],
)
def test_generation_refuses_what_cannot_be_drawn(bad, message):
    with pytest.raises(ValueError, match=message):
        check_generation(**{**dict(prompt=b"x", length=1, temperature=1.0), **bad})


def test_batches_and_blocks_have_a_size():
    model = decoder(256, 8, 1, mixer=mixers.recurrent(cells.min_gru))
    with pytest.raises(ValueError, match="block=0 tokens at a time: give at least 1"):
        sampling.sampler(model, Rule(1, 0.0), block=0)
    with pytest.raises(ValueError, match="batch_size=0 prompts at a time: give at least 1"):
        list(complete(sampling.sampler(model, Rule(1, 0.0)), {}, [], seed=0, batch_size=0))


@pytest.fixture(scope="module")
def attention():
    model = decoder(256, 8, 1, mixer=mixers.attention(heads=2))
    return model, random_params(model)


def test_a_length_beyond_the_memory_is_refused_before_allocation(attention):
    with pytest.raises(ValueError, match=r"state takes [\d,]+\.\d GB for 1 rows .*smaller length"):
        sample_text(*attention, prompt="a", seed=0, length=2**40, temperature=0.0)


def test_text_longer_than_the_model_can_hold_is_an_error(attention):
    model, params = attention
    short = model._replace(start=lambda params, batch, length: model.start(params, batch, 6))
    with pytest.raises(ValueError, match="gave NaN within the first 8 tokens .*max_length"):
        sample_text(short, params, prompt="abc", seed=0, length=8, temperature=0.0)
    assert sample_text(short, params, prompt="abc", seed=0, length=3, temperature=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that did not train: its config and its first parameters."""
    return save_run(tmp_path_factory.mktemp("run") / "run")


def test_one_prompt_is_streamed_and_the_speed_is_said_on_stderr(run, tmp_path, capsys):
    arguments = (f"run={run}", "prompt=a [b] = ", "length=9", "block=4", "temperature=0")
    assert call(generate, tmp_path, *arguments) is None
    shown = capsys.readouterr()
    assert shown.out.startswith("a [b] = ") and shown.out.endswith("\n")
    speed = r"prefill: 8 tokens, [\d,]+ tokens/s; decode: 9 tokens, [\d,]+ tokens/s; compiling: "
    assert re.search(speed, shown.err)
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


def test_prompts_from_a_file_become_json_lines_that_equal_single_prompts(run, tmp_path, capsys):
    prompts = write(tmp_path, "p.jsonl", '{"q": "a\\n"}\n{"q": "é"}\n{"q": "xyz"}\n')
    common = (f"run={run}", "length=6", "top_p=0.9", "samples=2")
    one_by_one = ("field=q", f"prompts={prompts}", "batch_size=4", f"output={tmp_path}/o.jsonl")
    assert call(generate, tmp_path, *common, *one_by_one) is None
    assert capsys.readouterr().out == ""
    written = (tmp_path / "o.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in written]
    assert [(r["prompt"], r["sample"]) for r in records] == [
        (prompt, sample) for prompt in ("a\n", "é", "xyz") for sample in (0, 1)
    ]
    assert call(generate, tmp_path, *common, "prompt=é") is None
    assert capsys.readouterr().out.splitlines() == written[2:4]


def test_stop_strings_reach_the_model_as_typed(run, tmp_path, capsys):
    assert call(generate, tmp_path, f"run={run}", "prompt=a", "length=8", "temperature=0") is None
    text = capsys.readouterr().out[1:-1]
    stop = json.dumps(["never, ever", text[2]])
    assert (
        call(generate, tmp_path, f"run={run}", "prompt=a", "temperature=0", f"stop={stop}") is None
    )
    assert capsys.readouterr().out == "a" + text[: text.index(text[2])] + "\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prompt="], "error: the prompt is empty"),
        (["prompt=a", "prompts=b"], "error: prompt='a' and prompts='b': give only one"),
        (["prompts=gone.txt"], r"error: prompts='gone.txt' cannot be read"),
        (["temperature=-1"], "error: temperature=-1: expected a number"),
        (["top_p=0"], "error: top_p=0"),
        (["samples=0"], "error: samples=0: expected a whole number"),
        (["stop=[a"], "error: stop=.* is not a JSON list"),
        (["samples=2", "batch_size=0"], "error: batch_size=0"),
    ],
)
def test_what_a_person_can_put_right_is_one_line(run, tmp_path, arguments, message):
    assert re.search(message, call(generate, tmp_path, f"run={run}", *arguments) or "no error")


def test_a_refused_command_leaves_no_output(run, tmp_path):
    common = (f"run={run}", "output=o.jsonl", "length=4", "temperature=0")
    assert str(call(generate, tmp_path, *common, "prompt=")).startswith("error: the prompt is")
    assert list(tmp_path.iterdir()) == []
    assert call(generate, tmp_path, *common, "prompt=a") is None
    assert (tmp_path / "o.jsonl").read_text().count("\n") == 1


def test_a_run_of_something_else_than_text_is_refused(tmp_path):
    OmegaConf.save({"model": {**MODEL, "vocab_size": 6}}, tmp_path / "config.yaml")
    message = call(generate, tmp_path, f"run={tmp_path}", "prompt=a")
    assert re.search("is not of a language model: it knows 6 tokens, and text has 256", message)


def test_a_run_with_a_tokenizer_speaks_its_tokens(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    trained.train_from_iterator(["def f(x): return x\n"] * 20, trainer)
    trained.save(str(tmp_path / "t.json"))
    model = {**MODEL, "vocab_size": 320}  # more rows than tokens, as one pads them
    folder = save_run(tmp_path / "run", model=model, data={"tokenizer": str(tmp_path / "t.json")})
    given = [f"run={folder}", "trust=./t.json"]  # no copy in its folder
    assert call(generate, tmp_path, *given, "prompt=def f(", "length=20", "temperature=2") is None
    shown = capsys.readouterr()
    tokens = len(trained.encode("def f(").ids)
    assert shown.out.startswith("def f(") and f"prefill: {tokens} tokens" in shown.err
    (tmp_path / "t.json").unlink()
    assert "data.tokenizer=" in call(generate, tmp_path, *given, "prompt=a")


def test_the_page_about_sampling_runs_and_its_settings_exist():
    root = pathlib.Path(__file__).resolve().parents[2]
    page = (root / "docs/guides/sampling.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    exec(code, {})
    commands = re.findall(r"^python -m experiments\.(\w+) (.*)$", page, re.M)
    assert {program for program, _ in commands} == {"generate", "evaluate"}
    for program, words in commands:
        known = OmegaConf.load(root / f"experiments/conf/{program}.yaml")
        for word in shlex.split(words):
            key = word.partition("=")[0]
            assert key.split(".")[0] in {*known, "data"}, f"{program} has no {key}"
