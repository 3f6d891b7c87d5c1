"""What a model is, from its headers alone."""

from __future__ import annotations

import json

from test_convert import quantkit


def test_a_real_model_is_described(smollm2):
    code, stdout, stderr = quantkit("inspect", smollm2, "--json")
    assert code == 0, stderr
    found = json.loads(stdout)
    expected = {
        "architecture": "llama",
        "parameters": 134515008,
        "bytes": smollm2.stat().st_size,
        "types": {"Q4_1": 210, "F32": 61, "Q8_0": 1},
        "context": 8192,
        "vocabulary": 49152,
        "tokenizer": "gpt2",
        "pre_tokenizer": "smollm",
        "chat_template": "the source's own",
        "license": "apache-2.0",
    }
    assert {k: found[k] for k in expected} == expected
    assert 5.7 < found["bits_per_weight"] < 5.8


def test_a_person_reads_it_too(smollm2):
    code, stdout, _ = quantkit("inspect", smollm2)
    assert code == 0 and "98.4 MB" in stdout and "210 Q4_1" in stdout and "134,515,008" in stdout
