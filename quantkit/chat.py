"""Chat templates: a model's own words around a dialogue, rendered in a sandbox.

A template is a program that came with the model. It is never run on opening a file, only to calibrate on dialogues.
Where a model came without one, the user may name one: a file, or one of those in `chat_templates/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import BadInput, FormatError

if TYPE_CHECKING:
    import jinja2

TEMPLATE_DATE = datetime(2024, 7, 26)  # what Llama 3's own template writes where it cannot ask for the date

BUILT_IN = Path(__file__).with_name("chat_templates")


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text and where it comes from, in words."""

    source: str
    text: str


def load_template(name: str) -> ChatTemplate:
    """The template in the file `name`, or the built-in one of that name; parsed in the sandbox, not rendered.

    Raises BadInput where there is neither, FormatError for what is no Jinja template.
    """
    path, source = Path(name), f"file {Path(name).name}"
    if not path.is_file() and "/" not in name:
        path, source = BUILT_IN / f"{name}.jinja", f"built-in {name}"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in BUILT_IN.glob("*.jinja")))
        raise BadInput("no such chat template", where=name, hint=f"give a Jinja file or one of: {known}")
    try:
        text = path.read_text(encoding="utf-8")
        _template(text)
    except Exception as e:  # not text, or whatever the parser raises on foreign input
        raise FormatError(f"not a Jinja template ({e})", where=path, hint="check the file") from None
    return ChatTemplate(source, text)


def render(messages: Sequence[Mapping[str, str]], template: str, special: Mapping[str, str]) -> str | None:
    """The dialogue as the template writes it, or None where the template refuses it.

    `special` holds the texts of `bos_token` and `eos_token`, which templates write themselves.
    """
    try:
        return _template(template).render(messages=list(messages), add_generation_prompt=False, **special)
    except Exception:  # the template is a program from elsewhere: it may raise anything, and calibration can go on
        return None


@cache
def _template(source: str) -> jinja2.Template:
    """A chat template in a sandbox (it comes with the model: foreign code), with what templates expect to find there.

    Not transformers' own renderer: it puts today's date where a template asks for one, and then two runs would differ.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant wrote, for training; here its body is rendered and no more."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # jinja2's own escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": TEMPLATE_DATE.strftime}
    return environment.from_string(source)
