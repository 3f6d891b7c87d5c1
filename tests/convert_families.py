"""llama.cpp's own converter on many folders at once: `convert_families.py CONVERTER FOLDER... `, each to FOLDER.gguf.

One process, since starting it takes longer than converting a toy. Toys have a vocabulary that the converter does not
know by its hash, so its name is given; every family's vocabulary is read as byte-level BPE, and by the plain class,
since the classes of some families add tokens of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock


def main(converter: Path, folders: list[Path]) -> None:
    sys.path[:0] = [str(converter), str(converter / "gguf-py")]
    import convert_hf_to_gguf
    import transformers
    from conversion import base, get_model_class

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
    transformers.AutoTokenizer.from_pretrained = transformers.PreTrainedTokenizerFast.from_pretrained
    for folder in folders:
        name = base.ModelBase.load_hparams(folder, False)["architectures"][0]
        get_model_class(name).set_vocab = base.TextModel._set_vocab_gpt2
        arguments = ["convert", str(folder), "--outfile", f"{folder}.gguf", "--outtype", "f32"]
        with mock.patch("sys.argv", arguments):
            convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(f) for f in sys.argv[2:]])
