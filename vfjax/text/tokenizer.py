"""What vfjax asks of a tokenizer; those of transformers have all of it."""

from collections.abc import Mapping, Sequence
from typing import Protocol


class Encoding(Protocol):
    """What a tokenizer makes of a text."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Token ids."""


class TextTokenizer(Protocol):
    """What turns text without special tokens into ids."""

    @property
    def bos_token_id(self) -> int | None:
        """Id of what a text begins with."""

    def __call__(self, text: str) -> Encoding:
        """Ids of a text, BOS before them if the tokenizer adds it."""


class Tokenizer(TextTokenizer, Protocol):
    """A transformers tokenizer, slow or fast."""

    @property
    def bos_token(self) -> str | None:
        """What a text begins with."""

    @property
    def eos_token(self) -> str | None:
        """What a text ends with."""

    @property
    def eos_token_id(self) -> int | None:
        """Its id."""

    @property
    def all_special_ids(self) -> Sequence[int]:
        """Ids of BOS, EOS and others like them."""

    @property
    def added_tokens_encoder(self) -> Mapping[str, int]:
        """Token -> id of those that a text is cut at before all else."""

    @property
    def clean_up_tokenization_spaces(self) -> bool:
        """Whether decoding takes spaces before punctuation away."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Encoding:
        """Ids of a text.

        Args:
            text: any.
            add_special_tokens: whether BOS and EOS are added, as the tokenizer does.
        """

    def get_vocab(self) -> dict[str, int]:
        """Token -> id of all."""

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """The token of an id, None for one that is none."""

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of ids.

        Args:
            token_ids: any number.
            skip_special_tokens: leaves special tokens out.
            clean_up_tokenization_spaces: in place of the attribute of that name.
        """

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, object]],
        *,
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool,
        **variables: object,
    ) -> str:
        """A conversation as a prompt.

        Args:
            conversation: its messages.
            chat_template: Jinja.
            tokenize: False gives the text.
            add_generation_prompt: whether an answer is to follow.
            **variables: more that the template reads.
        """
