"""What a user states over a source, facts of its configuration and a chat template: its outputs say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader
from llama_oracle import chat
from test_convert import quantkit
from test_families import agree, ours, theirs
from toy import tokenizer, toy_model, write_family, write_toy
from transformers import AutoConfig, AutoTokenizer

from quantkit import chat as templates
from quantkit.chat import render
from quantkit.model import open_model

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
DIALOGUE = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Of what?\nSay it in [two] <words>."},
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *DIALOGUE]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", toy_model(), T.F32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_family(tmp_path_factory.mktemp("folder") / "llama", "llama")


def converted(source: Path, out: Path, target: str, *options: object) -> tuple[Path, dict]:
    code, stdout, stderr = quantkit("convert", source, "-o", out, "--to", target, "--no-eval", "--json", *options)
    assert code == 0, stderr
    record = json.loads(stdout)
    return out / record["variants"][0]["path"], record


FACTS = {"rope_theta": 1e6, "max_position_embeddings": 4096, "bos_token_id": 5, "rope_scaling.rope_type": "linear"}
FACTS |= {"rope_scaling.factor": 2.0}
OPTIONS = [option for key, value in FACTS.items() for option in ("--override", f"{key}={value}")]
SCALING = {"rope_type": "linear", "factor": 2.0}


def test_facts_over_a_gguf_go_to_every_output(toy, tmp_path):
    gguf, record = converted(toy, tmp_path / "gguf", "F32", *OPTIONS)
    assert record["source"]["overrides"] == FACTS and record["recipe"]["override"] == [
        f"{k}={v}" for k, v in FACTS.items()
    ]
    fields = GGUFReader(gguf).fields
    assert fields["llama.rope.freq_base"].contents() == 1e6 and fields["llama.context_length"].contents() == 4096
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 5
    made, _ = converted(toy, tmp_path / "folder", "fp32", *OPTIONS)
    config = AutoConfig.from_pretrained(made)
    assert config.rope_parameters == SCALING | {"rope_theta": 1e6}
    assert (config.max_position_embeddings, config.bos_token_id) == (4096, 5)
    agree(theirs(gguf), ours(made))


def test_facts_over_a_folder_go_to_every_output(folder, tmp_path):
    options = [o for k, v in FACTS.items() if k.startswith("rope") for o in ("--override", f"{k}={v}")]
    gguf, record = converted(folder, tmp_path / "out", "F32", *options)
    assert open_model(gguf).config["rope_theta"] == 1e6 and open_model(gguf).config["rope_scaling"] == SCALING
    assert record["source"]["overrides"]["rope_theta"] == 1e6


def test_a_window_that_the_converter_dropped_makes_a_mistral_again(toy):
    model = open_model(toy, ["sliding_window=256"])
    assert (model.config["model_type"], model.config["sliding_window"]) == ("mistral", 256)


def test_scores_are_of_the_facts_as_stated(toy):
    scored = [
        json.loads(quantkit("perplexity", toy, "--ctx", 64, "--chunks", 2, "--json", *options)[1])["perplexity"]
        for options in ((), ("--override", "rope_theta=40000"), ("--override", "rope_theta=99"))
    ]
    assert scored[0] == scored[1] != scored[2]


@pytest.mark.parametrize(
    ("fact", "says"),
    [
        ("rope_thea=1e6", "no fact 'rope_thea' of this model; known: rope_theta"),
        ("llama.rope.freq_base=1e6", "no fact 'llama.rope.freq_base'"),
        ("rope_theta=many", "rope_theta is a number, not 'many'"),
        ("rope_theta=nan", "'nan' is out of range for rope_theta"),
        ("num_hidden_layers=2.5", "num_hidden_layers is a whole number, not '2.5'"),
        ("head_dim=0", "'0' is out of range for head_dim"),
        ("add_bos_token=perhaps", "add_bos_token is true or false, not 'perhaps'"),
        ("rope_theta", "'rope_theta' is not KEY=VALUE"),
    ],
)
def test_what_is_no_fact_is_refused(fact, says, toy, tmp_path):
    code, _, stderr = quantkit("convert", toy, "-o", tmp_path / "out", "--to", "fp16", "--override", fact)
    assert code == 2 and says in stderr and len(stderr.splitlines()) == 1, stderr
    assert not (tmp_path / "out").exists()


def test_a_fact_that_the_tensors_contradict_is_refused(toy, tmp_path):
    code, _, stderr = quantkit("inspect", toy, "--override", "num_hidden_layers=4")
    assert code == 65 and "the tensor blk.3.attn_norm.weight is missing" in stderr


def test_no_template_is_invented(toy, folder, tmp_path):
    made, record = converted(toy, tmp_path / "none", "fp16")
    assert record["source"]["chat_template"] == "none" and not (made / "chat_template.jinja").exists()
    for source, target in ((toy, "fp16"), (toy, "Q8_0"), (folder, "fp16"), (folder, "Q8_0")):
        name = f"{source.name}-{target}"
        made, record = converted(source, tmp_path / name, target, "--chat-template", "mistral", "--no-calibration")
        assert record["source"]["chat_template"] == "built-in mistral"
        assert open_model(made).tokenizer().chat_template == templates.load_template("mistral").text
    assert AutoTokenizer.from_pretrained(tmp_path / "llama-fp16" / "fp16").chat_template.startswith("{%- set opens")


def test_a_given_template_takes_the_place_of_the_sources(folder, tmp_path):
    own = tmp_path / "mine.jinja"
    own.write_text("{{ messages[0]['content'] }}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "its own"}))
    made, record = converted(folder, tmp_path / "out", "fp16", "--chat-template", own)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(made).chat_template == own.read_text()
    assert "chat_template" not in json.loads((made / "tokenizer_config.json").read_text())
    assert record["source"]["chat_template"] == "file mine.jinja"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("vicuna", None, "vicuna: no such chat template; give a Jinja file or one of: chatml, gemma, llama-2"),
        ("odd.jinja", b"{% for m in messages %}", "not a Jinja template"),
        ("odd.jinja", b"\xff\xfe", "not a Jinja template"),
    ],
)
def test_what_is_no_template_is_refused(name, text, says, toy, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text)
    given = path if text is not None else name
    code, _, stderr = quantkit("convert", toy, "-o", tmp_path / "o", "--to", "fp16", "--chat-template", given)
    assert code == 65 and says in stderr and len(stderr.splitlines()) == 1, stderr


def test_a_template_is_not_run_when_it_is_read(tmp_path):
    """A loop that would never end is read in no time."""
    (tmp_path / "bomb.jinja").write_text(
        "{% for i in range(99999999) %}{% for j in range(99999999) %}{% endfor %}{% endfor %}"
    )
    assert templates.load_template(str(tmp_path / "bomb.jinja")).text.startswith("{% for i")


@pytest.mark.parametrize(
    ("name", "theirs", "dialogue"),
    [
        ("chatml", "chatml", WITH_SYSTEM),
        ("llama-3", "llama3", WITH_SYSTEM),
        ("gemma", "gemma", WITH_SYSTEM),
        ("phi-3", "phi3", WITH_SYSTEM),
        ("mistral", "mistral-v1", DIALOGUE),
        ("mistral", "mistral-v1", WITH_SYSTEM),
        ("mistral-v3", "mistral-v3", WITH_SYSTEM),
    ],
)
def test_built_in_templates_are_llama_cpps(name, theirs, dialogue):
    text = templates.load_template(name).text
    assert render(dialogue, text, SPECIAL).removeprefix("<s>") == chat(theirs, dialogue, add_assistant=False)
    mine = tokenizer()
    mine.chat_template = text  # rendered by transformers, up to where the model is to speak
    asked = mine.apply_chat_template(dialogue, add_generation_prompt=True, tokenize=False)
    asked = asked.replace("<|s|>", "").replace("<|e|>", "</s>")
    assert asked == chat(theirs, dialogue, add_assistant=True)


def test_llama_2_is_as_its_makers_wrote_it():
    """Meta's `llama/generation.py`: every turn of the user opens with BOS, every answer ends with EOS."""
    said = render(WITH_SYSTEM, templates.load_template("llama-2").text, SPECIAL)
    assert said == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho are you? [/INST] A model. </s>"
        "<s>[INST] Of what?\nSay it in [two] <words>. [/INST]"
    )


def test_turns_out_of_order_are_refused():
    text = templates.load_template("mistral").text
    assert render(DIALOGUE[1:], text, SPECIAL) is None
