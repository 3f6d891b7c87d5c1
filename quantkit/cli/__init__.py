"""The command line. The only package that prints, and the only place where an error becomes text and an exit status."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from quantkit.cli import advise, compare, convert, imatrix, inspect, perplexity
from quantkit.errors import QuantkitError, Resumable, UsageError
from quantkit.later import torch, torch_is_there

app = typer.Typer(
    name="quantkit",
    help="Takes a quantized GGUF back to fp16 and on to GPTQ, AWQ and other GGUF types, and measures every output.",
    epilog="Exit codes: 0 done, 2 usage, 65 bad input, 70 an output failed its check, 75 run the same again later.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("convert")(convert.command)
app.command("perplexity")(perplexity.command)
app.command("advise")(advise.command)
app.command("compare")(compare.command)
app.command("imatrix")(imatrix.command)
app.command("inspect")(inspect.command)


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"quantkit {version('gguf-quantkit')}")
        raise typer.Exit


@app.callback()
def _every_command(
    wanted: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_tell_version)
    ] = False,
) -> None:
    pass


class Interrupted(BaseException):
    """A signal that ends the program, as an exception: partial outputs are removed on its way up."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


def main() -> None:
    """Run the command line: every foreseen error is one line on stderr and an exit status of its own."""
    # What imports make stays: to search all of it for garbage time and again takes a sixth of their time.
    gc.set_threshold(*gc.get_threshold()[:2], 100)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last is not everywhere; one that is ignored stays so
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of a code page without Δ or ±, which become ?
            stream.reconfigure(errors="replace")
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except typer.TyperException as e:
        _fail(f"{e.format_message()} (see quantkit --help)", 2)
    except QuantkitError as e:
        _fail(str(e), e.exit_code)
    except MemoryError:
        _fail("out of memory; close other programs, or pass fewer --samples", Resumable.exit_code)
    except (Interrupted, typer.Abort) as e:
        print("quantkit: interrupted; nothing was left half-written", file=sys.stderr, flush=True)
        os._exit(e.code if isinstance(e, Interrupted) else 130)  # no thread is waited for that still runs a block
    except RuntimeError as e:
        if not (torch_is_there() and isinstance(e, torch.OutOfMemoryError)):
            raise
        _fail("out of device memory; pass a shorter --seqlen, another --vram, or --device cpu", Resumable.exit_code)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as e:
        place = f"{e.filename}: " if e.filename else ""
        _fail(f"{place}{e.strerror or e}; check that path and what you may do there", UsageError.exit_code)


def _interrupt(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would end the removal of what is half-written
    raise Interrupted(number)


def _fail(message: str, code: int) -> None:
    print("quantkit: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
