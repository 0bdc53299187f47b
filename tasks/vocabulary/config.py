"""The kinds of vocabulary."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.config import FrozenModel
from models.tokenizer import Roles

ROLES = Roles(bos="<bos>", eos="<eos>", pad="<pad>")
"""The special tokens of every vocabulary that is made here."""
UNKNOWN = "<unk>"
"""What SentencePiece wants a token for, though with byte fallback no text ever has it."""
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""The tokens of byte fallback, as SentencePiece calls them."""


class Own(FrozenModel):
    """What every vocabulary has that is made here."""

    special_tokens: tuple[str, ...] = ()
    """Special tokens beside <pad>, <bos> and <eos>, such as the markers of a chat, in the order of their ids."""

    @model_validator(mode="after")
    def _check_special_tokens(self) -> Self:
        for number, token in enumerate(self.specials):
            if token in self.specials[:number]:
                raise ValueError(f"special_tokens: {token!r} is there twice (<pad>, <bos> and <eos> always are)")
            # A single character could be needed as itself, and white space has other names inside tokenizers.
            if not re.fullmatch(r"[^\s▁]{2,}", token) or token in (UNKNOWN, *BYTE_TOKENS):
                raise ValueError(f"special_tokens: {token!r} cannot be one: two characters or more, no white space")
        return self

    @property
    def specials(self) -> tuple[str, ...]:
        """All special tokens, in the order of their ids, which begin at 0."""
        return (ROLES.pad, ROLES.bos, ROLES.eos, *self.special_tokens)


class Characters(Own):
    """A token for each of some characters; no other can be represented."""

    kind: Literal["characters"]
    """One token for each character."""
    characters: str = Field(min_length=1)
    """The characters, in the order of their ids."""

    @model_validator(mode="after")
    def _check_characters(self) -> Self:
        twice = next((c for number, c in enumerate(self.characters) if c in self.characters[:number]), None)
        if twice is not None:
            raise ValueError(f"characters: {twice!r} is there twice")
        return self


class Bytes(Own):
    """A token for each byte of UTF-8."""

    kind: Literal["bytes"]
    """One token for each byte."""


class Trained(Own):
    """What a vocabulary has that is learnt from documents."""

    kind: str
    """How it is learnt."""
    vocab_size: int = Field(gt=0)
    """Tokens in all, special ones and the 256 bytes included; a text too small for so many is refused."""
    digits: Literal["split", "keep"] = "split"
    """Whether each digit is a token of its own, or digits may be joined."""
    training_bytes: int = Field(default=256 << 20, gt=0)
    """Bytes of text that it is learnt from at most: documents from all over each source, by the sources' weights."""

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if self.vocab_size <= self.reserved:
            raise ValueError(
                f"vocab_size {self.vocab_size} is too small: special tokens and bytes alone are {self.reserved}"
            )
        return self

    @property
    def reserved(self) -> int:
        """Tokens that every text needs."""
        return len(self.specials) + 256


class ByteBPE(Trained):
    """Byte-level BPE (GPT-2): words as bytes, joined pair by pair. Any text comes back as it was."""

    kind: Literal["byte_bpe"]
    """Byte-level BPE, trained by `tokenizers`."""


class WithFallback(Trained):
    """What a vocabulary of characters has whose rare ones are spelled in bytes. White space U+2581 comes back as a
    space; all else comes back as it was."""

    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    """Share of the text's characters that get a token of their own, the most frequent ones first."""


class BPE(WithFallback):
    """BPE over characters with byte fallback, in the form that Llama's tokenizer has."""

    kind: Literal["bpe"]
    """BPE with byte fallback, trained by `tokenizers`."""


class SentencePiece(WithFallback):
    """BPE or a unigram language model over characters with byte fallback, and `tokenizer.model` beside the JSON. It is
    learnt in memory, of which Unigram takes about twenty times the text."""

    kind: Literal["sentencepiece_bpe", "sentencepiece_unigram"]
    """Trained by the SentencePiece library."""

    @property
    def reserved(self) -> int:
        """Tokens that every text needs."""
        return len(self.specials) + 1 + 256


class Hub(FrozenModel):
    """A tokenizer of the Hugging Face hub, or in a folder as the hub has it, with the ids that it has there."""

    kind: Literal["hub"]
    """One that is fetched."""
    id: str
    """Its id, such as `HuggingFaceTB/SmolLM2-135M`, or a folder, such as that of a published model."""
    revision: str | None = None
    """The commit (40 hexadecimal digits), branch or tag that is fetched from the network; Cairn fills in the commit.
    What lies on this machine is told by its digest."""
    digest: str | None = None
    """SHA-256 over the names and bytes of its files; Cairn fills it in where they are on this machine, and refuses
    files that are not what it says."""


Vocabulary = Annotated[
    Characters | Bytes | ByteBPE | BPE | SentencePiece | Hub,
    Field(discriminator="kind"),
]
