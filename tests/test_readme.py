"""The README's own lines of Python, run as they stand."""

from __future__ import annotations

import textwrap
from pathlib import Path

from gguf import GGMLQuantizationType as T
from toy import toy_model, write_toy

from quantkit.model import open_model

README = Path(__file__).resolve().parents[1] / "README.md"


def test_what_it_says_of_python_runs(tmp_path, monkeypatch, capsys):
    write_toy(tmp_path / "model.gguf", toy_model(), T.F32)
    monkeypatch.chdir(tmp_path)
    section = README.read_text().split("## From Python\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("    ") or not line]
    exec(textwrap.dedent("\n".join(lines)), {})
    assert capsys.readouterr().out.count("VariantDone(") == 2
    made = [
        open_model(path).name for path in (tmp_path / "out" / "gptq-4bit-32g", tmp_path / "out" / "model-Q4_K_M.gguf")
    ]
    assert made == ["gptq-4bit-32g", "model"]
