"""Texts: where they come from, how they are cut into rows, what counts as overlap. Closed forms, no network."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import zipfile
from dataclasses import dataclass

import huggingface_hub
import pyarrow
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from pyarrow import parquet

from quantkit import texts
from quantkit.corpus import Message, Text, calibration_batch, evaluation_chunks
from quantkit.errors import BadInput, UsageError
from quantkit.overlap import overlap, refuse_overlap
from quantkit.texts import load_text

BOS, EOS = 1, 2


@dataclass(frozen=True)
class Letters:
    """A tokenizer whose ids are code points; the special tokens <s> and </s> are 1 and 2."""

    bos: int | None = BOS
    eos: int | None = EOS
    add_bos: bool = True
    chat_template: str | None = None

    @property
    def backend(self):
        return self

    def id_to_token(self, token):
        return {BOS: "<s>", EOS: "</s>"}[token]

    def encode(self, text):
        return [ord(letter) for letter in text]

    def encode_special(self, text):
        return self.encode(text.replace("<s>", chr(BOS)).replace("</s>", chr(EOS)))


def text_of(*documents, name="t"):
    return Text(name, documents, hashlib.sha256(repr(documents).encode()).hexdigest(), "made up")


def as_string(row):
    return "".join(map(chr, row.tolist()))


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("suffix", [".txt", ".raw", ""])
def test_a_plain_file_is_one_document_exactly(tmp_path, suffix):
    path = tmp_path / f"book{suffix}"
    path.write_bytes("\ufeff \r\n= Überschrift =\n\n%%%%\n\n ende \n".encode())
    text = load_text(path)
    assert text.documents == ("\ufeff \r\n= Überschrift =\n\n%%%%\n\n ende \n",)
    assert text.plain().encode() == path.read_bytes()
    assert (text.name, text.source) == ("book", str(path))
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_jsonl_holds_texts_and_dialogues(tmp_path):
    path = tmp_path / "data.jsonl"
    dialogue = [{"role": "user", "content": "2+2?", "extra": 0}, {"role": "assistant", "content": "4"}]
    rows = [{"text": "one\u2028line", "id": 7}, {"text": " "}, {"messages": dialogue}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    text = load_text(str(path))
    assert text.documents == ("one\u2028line", (Message("user", "2+2?"), Message("assistant", "4")))
    assert text.plain() == "one\u2028line\n\nuser: 2+2?\nassistant: 4"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": 3}', 'line 2: a document needs a string "text"'),
        ("[1]", 'line 2: a document needs a string "text"'),
        ('{"text": "open', "line 2: not JSON"),
        ('{"messages": [{"role": "user", "content": ["a part"]}]}', 'line 2: a message needs a "role" and a "content"'),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, complaint):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n' + line)
    with pytest.raises(BadInput) as caught:
        load_text(path)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.txt", None, "no such text file.*default, demo, wikitext2"),
        ("empty.txt", b"", "no text in it"),
        ("blank.jsonl", b"\n \n", "no text in it"),
        ("latin1.txt", "naïve".encode("latin-1"), r"not UTF-8 text \(at byte 2\)"),
    ],
)
def test_an_unusable_file_is_refused_in_one_line(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=complaint) as caught:
        load_text(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(BadInput, match="pip install pyarrow"):
        load_text(path)


def test_parquet_has_a_document_a_row(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "two"]}), tmp_path / "good.parquet")
    assert load_text(tmp_path / "good.parquet").documents == ("one", "two")
    parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "numbers.parquet")
    (tmp_path / "none.parquet").write_bytes(b"no parquet at all")
    for name in ("other", "numbers", "none"):
        with pytest.raises(BadInput, match="text"):
            load_text(tmp_path / f"{name}.parquet")


def archive(tmp_path, members):
    path = tmp_path / "wikitext-2-raw-v1.zip"
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in members.items():
            bundle.writestr(name, content)
    return str(path)


def test_wikitext2_is_the_raw_file_from_a_pinned_revision(tmp_path, monkeypatch):
    raw = b" \n = Title = \n \n Words . \n"
    path = archive(tmp_path, {"wikitext-2-raw/wiki.test.raw": raw, "wikitext-2-raw/wiki.train.raw": b"other"})
    asked = {}

    def download(**request):
        asked.update(request)
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(texts, "WIKITEXT2_SHA256", hashlib.sha256(raw).hexdigest())
    text = load_text("wikitext2")
    assert text.plain().encode() == raw
    assert len(asked["revision"]) == 40 and asked["revision"] in text.source
    assert asked["repo_type"] == "dataset"


@pytest.mark.parametrize("members", [{"wikitext-2-raw/wiki.test.raw": b"altered"}, {"other": b""}])
def test_wikitext2_that_is_not_the_published_text_is_refused(tmp_path, monkeypatch, members):
    path = archive(tmp_path, members)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **request: path)
    with pytest.raises(BadInput, match=r"pass that file"):
        load_text("wikitext2")


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("cannot find it\nand more"), ConnectionError()])
def test_wikitext2_without_network_says_to_pass_a_file(monkeypatch, error):
    def download(**request):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(BadInput, match=r"cannot be downloaded.*pass that file") as caught:
        load_text("wikitext2")
    assert "\n" not in str(caught.value)


def test_the_default_text_is_read_file_by_file(tmp_path, monkeypatch):
    folder = tmp_path / "calibration" / "default"
    folder.mkdir(parents=True)
    for name in texts.DEFAULT_FILES[:-1]:
        (folder / name).write_text(f"{name} one\n\n%%%%\n\n%%%% is not a line\nof its own\n%%%%\n")
    (folder / texts.DEFAULT_FILES[-1]).write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    monkeypatch.setattr(texts, "resource", tmp_path.joinpath)
    text = load_text("default")
    assert text.documents[:3] == ("prose-en.txt one", "%%%% is not a line\nof its own", "prose-multi.txt one")
    assert text.documents[8:] == ((Message("user", "hello"),),)
    whole = b"".join((folder / name).read_bytes() for name in texts.DEFAULT_FILES)
    assert (text.sha256, text.source) == (hashlib.sha256(whole).hexdigest(), "built-in")


def test_the_texts_that_ship_share_nothing():
    default, demo = load_text("default"), load_text("demo")
    assert refuse_overlap(default, demo) is None
    assert len(demo.plain().split()) > 24 * 512 / 1.3  # enough for 24 chunks of 512 tokens
    assert {type(document) for document in default.documents} == {str, tuple}


# ------------------------------------------------------------------------------------------------------ rows of tokens


def test_a_text_that_covers_the_request_exactly_gives_consecutive_rows():
    batch = calibration_batch(text_of("abcdefghijk"), Letters(), samples=3, seqlen=4)
    assert batch.dtype == torch.long
    assert [as_string(row) for row in batch] == ["\x01abc", "defg", "hijk"]


def test_a_longer_text_gives_evenly_spaced_windows():
    batch = calibration_batch(text_of("0123456789" * 10), Letters(add_bos=False), samples=4, seqlen=3)
    assert [as_string(row) for row in batch] == ["012", "567", "012", "567"]  # from 0, 25, 50, 75


def test_a_shorter_text_gives_the_rows_it_has():
    tokenizer = Letters(add_bos=False)
    assert calibration_batch(text_of("a" * 19), tokenizer, samples=8, seqlen=5).shape == (3, 5)
    with pytest.raises(BadInput, match="4 tokens do not fill one sample of 5"):
        calibration_batch(text_of("a" * 4), tokenizer, samples=8, seqlen=5)
    with pytest.raises(UsageError):
        calibration_batch(text_of("a" * 4), tokenizer, samples=0, seqlen=2)


@pytest.mark.parametrize("seed", range(5))
def test_every_kind_is_present_in_proportion(seed):
    kinds = {"a": 2000, "b": 5000, "c": 3000}  # letters of each kind, in documents of ten
    text = text_of(*(kind * 10 for kind, count in kinds.items() for _ in range(count // 10)))
    batch = calibration_batch(text, Letters(add_bos=False), samples=50, seqlen=20)
    for kind, count in kinds.items():
        share = (batch == ord(kind)).float().mean().item()
        assert share == pytest.approx(count / 10000, abs=1 / 50)


def test_the_seed_chooses_the_windows_and_nothing_else_does():
    text = text_of(*(chr(0x4E00 + number) * 50 for number in range(40)))
    draw = [calibration_batch(text, Letters(), samples=5, seqlen=16, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_every_document_begins_with_bos_once():
    greeting = (Message("user", "q"), Message("assistant", "r"))
    template = "{{ bos_token }}{% for message in messages %}[{{ message['role'][0] }}]{{ message.content }}{% endfor %}"
    for tokenizer, expected in [
        (Letters(chat_template=template), "\x01[u]q[a]r\x01text"),
        (Letters(chat_template=template, add_bos=False), "\x01[u]q[a]rtext"),
        (Letters(chat_template="{{ messages[0].content + eos_token }}"), "\x01q\x02\x01text"),
        (Letters(), "\x01user: q\nassistant: r\x01text"),
        (Letters(bos=None, add_bos=False), "user: q\nassistant: rtext"),
    ]:
        batch = calibration_batch(text_of(greeting, "text"), tokenizer, samples=1, seqlen=len(expected), seed=1)
        assert as_string(batch[0]) == expected


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "<q>"),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content|tojson }}{% endfor %}", '"<q>"'),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ raise_exception('no user role') }}", None),
        ("{% if %}", None),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", None),
        ("{{ messages[0] + 1 }}", None),
    ],
)
def test_templates_find_what_they_expect_and_cannot_do_harm(template, rendered):
    dialogue = (Message("user", "<q>"), Message("assistant", "r"))
    tokenizer = Letters(chat_template=template, add_bos=False)
    expected = "user: <q>\nassistant: r" if rendered is None else rendered
    batch = calibration_batch(text_of(dialogue), tokenizer, samples=1, seqlen=len(expected))
    assert as_string(batch[0]) == expected


def test_chunks_are_llama_cpps():
    ids = list(range(100, 112))
    assert evaluation_chunks(ids, 5, Letters(add_bos=False)).tolist() == [ids[:5], ids[5:10]]
    # With BOS the text moves up by one, and later chunks lose their first token to it.
    assert evaluation_chunks(ids, 5, Letters()).tolist() == [[BOS, *ids[:4]], [BOS, *ids[5:9]]]
    assert evaluation_chunks([BOS, *ids], 5, Letters()).tolist() == [[BOS, *ids[:4]], [BOS, *ids[5:9]]]
    assert evaluation_chunks(ids, 4, Letters(), chunks=2).shape == (2, 4)
    assert evaluation_chunks(ids, 4, Letters(), chunks=99).shape == (3, 4)


def test_a_text_shorter_than_a_chunk_is_told_which_ctx_fits():
    with pytest.raises(BadInput, match=r"has 301 tokens, one chunk needs 512; --ctx 256 fits"):
        evaluation_chunks(range(2, 302), 512, Letters())
    for ids in ([], [7, 8, 9]):
        with pytest.raises(BadInput, match="longer text"):
            evaluation_chunks(ids, 512, Letters(add_bos=False))
    for ctx, chunks in [(3, None), (512, 0)]:
        with pytest.raises(UsageError):
            evaluation_chunks(range(1000), ctx, Letters(), chunks)


# ------------------------------------------------------------------------------------------------------------- overlap

SENTENCE = "the quick brown fox jumps over the lazy dog while seven quiet owls look on from above"
WORDS = SENTENCE.split()  # 17


def test_overlap_counts_n_grams_without_case_and_punctuation():
    evaluation = text_of(SENTENCE)
    calibration = text_of("Before. " + ", ".join(WORDS[1:15]).upper() + "! After")
    found = overlap(calibration, evaluation)  # 14 shared words hold 2 of the 5 13-grams
    assert (found.shared, found.total, found.share) == (2, 5, 0.4)
    assert found.example == " ".join(WORDS[1:14])
    assert overlap(text_of(" ".join(WORDS[:12])), evaluation).share == 0
    assert overlap(evaluation, text_of("too short")).share == 0


def test_n_grams_do_not_cross_documents():
    calibration = text_of(" ".join(WORDS[:9]), (Message("user", " ".join(WORDS[9:])),))
    assert overlap(calibration, text_of(SENTENCE), n=9).shared == 1


def test_a_character_is_a_word_where_there_are_no_spaces():
    sentence = "灯台の光は夜の海を照らしている。"
    found = overlap(text_of(f"abc{sentence}"), text_of(sentence))
    assert (found.shared, found.total) == (3, 3)  # 15 characters without the full stop
    hindi = "नमस्ते दुनिया"
    assert overlap(text_of(hindi), text_of(hindi), n=2).total == 1  # vowel signs do not break a word


def test_overlap_is_refused_or_warned_of():
    evaluation = text_of(SENTENCE, name="book")
    with pytest.raises(UsageError, match="same text"):
        refuse_overlap(evaluation, evaluation)
    with pytest.raises(UsageError, match=r'"the quick brown .* owls".*--force'):
        refuse_overlap(text_of(f"x {SENTENCE}"), evaluation)
    warning = refuse_overlap(text_of(f"x {SENTENCE}"), evaluation, force=True)
    assert warning.startswith("5 of 5 13-word sequences of the evaluation text book") and "\n" not in warning
    assert refuse_overlap(text_of("something else"), evaluation) is None


def test_overlap_is_fast():
    text = text_of(" ".join(str(number * 7919 % 50021) for number in range(230_000)))  # 1.3 MB
    start = time.perf_counter()
    overlap(text, text)
    assert time.perf_counter() - start < 5  # 0.7 s alone; room for a busy machine
