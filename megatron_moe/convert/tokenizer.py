"""Tokenizer files in the one form in which every version of transformers gives the same ids.

That form is tokenizer.json with the class PreTrainedTokenizerFast; under a named class, 5.x rebuilds the pipeline and
can give other ids. A SentencePiece file goes along under its usual name, tokenizer.model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_moe.config.data import DataConfig
from megatron_moe.config.errors import DataError
from megatron_moe.config.optional import require
from megatron_moe.config.whole_file import write_whole
from megatron_moe.convert.hf_folder import read_json
from megatron_moe.convert.hf_writer import write_json
from megatron_moe.convert.sentencepiece_model import parse_model, to_tokenizer

END_OF_TEXT = "<|endoftext|>"
# of a tokenizer.json that comes without a tokenizer_config.json; as when training
USUAL_END_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")

# where two implementations of a tokenizer differ, if they do: blanks, line ends, accents, ligatures, rare scripts
SAMPLES = (
    "Hello world. Experts choose tokens; tokens choose experts!",
    "  leading,  double   and trailing blanks  ",
    "def f(x: int) -> int:\n    if x > 1:\n\t\treturn x * f(x - 1)\n\n    return 1\n",
    '{"key": [1, 2.5e-3, null], "other": "0123456789"}\r\n\r\n',
    "naïve café, Ünïcödé e\u0301, ﬁ ﬂ ½ Ⅷ ™, em\u2014dash, \u201cquotes\u201d, non\u00a0breaking, zero\u200bwidth",
    "日本語のテキスト。中文文本，한국어 텍스트. Русский текст, Ελληνικά, עברית, العربية, हिन्दी",
    "🙂🎉👩\u200d👩\u200d👧 ∑∂√∞ αβγ",
    "aaaaaaaa abababab aaaa-bbbb__cccc\\dddd\x7f",
    "",
    " ",
    "\n",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenizerExport:
    """A tokenizer, ready to be written: ids below vocab_size, special tokens as role -> (text, id)."""

    vocab_size: int | None
    special: dict[str, tuple[str, int]] = field(default_factory=dict)
    tokenizer_json: dict[str, Any] | None = None
    files: dict[str, bytes] = field(default_factory=dict)

    def id_of(self, role: str) -> int | None:
        """The id of "eos_token" and its like; None when there is none."""
        return self.special[role][1] if role in self.special else None

    def write(self, folder: Path, *, max_length: int) -> None:
        """Put the files into a model folder; max_length: tokens that the model is declared for."""
        for name, content in self.files.items():
            write_whole(folder / name, content)
        if self.tokenizer_json is None:
            return
        texts = {role: text for role, (text, _) in self.special.items()}
        added = {str(token["id"]): _without_id(token) for token in self.tokenizer_json.get("added_tokens", [])}
        if "tokenizer.json" not in self.files:
            write_json(folder / "tokenizer.json", self.tokenizer_json)
        write_json(folder / "special_tokens_map.json", texts)
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": max_length,
                "clean_up_tokenization_spaces": False,
                "added_tokens_decoder": added,
                **texts,
            },
        )


def read_tokenizer(data: DataConfig) -> TokenizerExport:
    """The tokenizer of a run; DataError names the file that is missing or broken."""
    match data.tokenizer_type:
        case "SentencePieceTokenizer":
            return from_sentencepiece(_existing(data.tokenizer_model, "--tokenizer-model"))
        case "HuggingFaceTokenizer":
            path = Path(data.tokenizer_model or "")
            return from_hugging_face(_existing(path / "tokenizer.json" if path.is_dir() else path, "--tokenizer-model"))
        case "GPT2BPETokenizer":
            return from_gpt2(_existing(data.vocab_file, "--vocab-file"), _existing(data.merge_file, "--merge-file"))
        case "ByteTokenizer":
            return from_bytes()
        case _:
            log.warning("%s has no files; the folder gets no tokenizer", data.tokenizer_type)
            return TokenizerExport(vocab_size=None)


def from_sentencepiece(path: Path, samples: Sequence[str] = SAMPLES) -> TokenizerExport:
    """tokenizer.model, and tokenizer.json if it gives the same ids on all samples."""
    data = path.read_bytes()
    model = parse_model(data, str(path))
    library = require("sentencepiece", extra="data")
    try:
        processor = library.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise DataError(f"{path} is not a SentencePiece model ({error}); give the .model file.") from error
    tokenizer = to_tokenizer(model)
    differing = None if tokenizer is None else first_difference(processor, tokenizer, samples)
    if tokenizer is None or differing is not None:
        reason = "has nothing for its kind" if tokenizer is None else f"would give other ids for {differing!r}"
        log.warning(
            "%s: no tokenizer.json is written, for the tokenizers library %s; tokenizer.model is copied: load it with "
            "the sentencepiece library",
            path,
            reason,
        )
        tokenizer = None
    ids = {role: getattr(processor, f"{role.removesuffix('_token')}_id")() for role in ROLES}
    return TokenizerExport(
        vocab_size=len(model.pieces),
        special={role: (processor.id_to_piece(number), number) for role, number in ids.items() if number >= 0},
        tokenizer_json=None if tokenizer is None else json.loads(tokenizer.to_str()),
        files={"tokenizer.model": data},
    )


def first_difference(processor: Any, tokenizer: Any, samples: Sequence[str]) -> str | None:
    """The first sample for which a SentencePieceProcessor and a tokenizers.Tokenizer give other ids."""
    for text in samples:
        if list(processor.encode(text, out_type=int)) != tokenizer.encode(text, add_special_tokens=False).ids:
            return text
    return None


def from_hugging_face(path: Path) -> TokenizerExport:
    """A tokenizer.json as it is; special tokens by the files beside it, else by their usual names."""
    content = read_json(path)
    library = require("tokenizers", extra="data")
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for each kind of broken file
        raise DataError(f"{path} is not a tokenizer.json of the tokenizers library: {error}.") from error
    config = path.with_name("tokenizer_config.json")
    told = read_json(config) if config.is_file() else {}
    texts = {role: told[role]["content"] if isinstance(told.get(role), dict) else told.get(role) for role in ROLES}
    if "eos_token" not in told:
        texts["eos_token"] = next((text for text in USUAL_END_TOKENS if tokenizer.token_to_id(text) is not None), None)
    ids = {role: (text, tokenizer.token_to_id(text)) for role, text in texts.items() if isinstance(text, str)}
    return TokenizerExport(
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        special={role: (text, number) for role, (text, number) in ids.items() if number is not None},
        tokenizer_json=content,
        files={"tokenizer.json": path.read_bytes()},
    )


def from_gpt2(vocab_file: Path, merge_file: Path) -> TokenizerExport:
    """GPT-2's two files as one tokenizer.json."""
    vocabulary = read_json(vocab_file)
    library = require("tokenizers", extra="data")
    try:
        model = library.models.BPE.from_file(str(vocab_file), str(merge_file))
    except Exception as error:  # the library raises bare Exception for each kind of broken file
        raise DataError(f"{vocab_file} and {merge_file} are not GPT-2's vocab.json and merges.txt: {error}.") from error
    return _byte_level(library, model, end=vocabulary.get(END_OF_TEXT), vocab_size=max(vocabulary.values()) + 1)


def from_bytes() -> TokenizerExport:
    """Each byte of the UTF-8 text is its id; 256 ends a document."""
    library = require("tokenizers", extra="data")
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())} | {END_OF_TEXT: 256}
    return _byte_level(library, library.models.BPE(vocab=vocabulary, merges=[]), end=256, vocab_size=257, regex=False)


def _byte_level(library: Any, model: Any, *, end: int | None, vocab_size: int, regex: bool = True) -> TokenizerExport:
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.decoder = library.decoders.ByteLevel()
    if end is not None:
        tokenizer.add_special_tokens([library.AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return TokenizerExport(
        vocab_size=vocab_size,
        special={} if end is None else {"eos_token": (END_OF_TEXT, end)},
        tokenizer_json=json.loads(tokenizer.to_str()),
    )


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in GPT-2's vocabulary: itself where it prints, else one from 256 on."""
    printing = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) if byte in printing else chr(256 + others.index(byte)) for byte in range(256)]


def _without_id(token: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in token.items() if name != "id"}


def _existing(path: str | Path | None, flag: str) -> Path:
    if path is None or not Path(path).is_file():
        raise DataError(
            f"{flag}: there is no tokenizer file {path}; give its place with --tokenizer-model, or leave the "
            f"tokenizer out with --no-tokenizer."
        )
    return Path(path)
