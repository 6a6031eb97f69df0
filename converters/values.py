"""Configs read key by key: each value has the type asked for, each key a fate.

A reader takes values out of a `Values`, which remembers the keys. Those that nobody took must be
known to be without effect, at any value or at some (`Unused`, which stands beside the reader); all
others are refused by name: vfjax would not compute what they ask for.
"""

import dataclasses
import math
from collections.abc import Callable, Container, Mapping
from typing import Any, TypeVar

from vfjax import InputError
from vfjax.atomic import JSON
from vfjax.errors import cut
from vfjax.nn.layers import ACTIVATIONS

Unused = dict[str, tuple[Any, ...] | None]
"""Key -> the values at which it changes nothing, None for any."""

Pairs = tuple[tuple[int, int], ...]

Absent = TypeVar("Absent", bound=None)
"""None where that is the default of a key, else nothing: what an absent value may be beside."""

Choice = TypeVar("Choice", bound=str)
"""The texts, or literals, that one is chosen from."""

ANY = None
"""At any value."""

MOST = 1 << 20
"""Largest size, if nothing else is said; far beyond any model's."""

DEEPEST = 1000
"""Most layers, or experts: each is an object of its own here."""

MOST_ID = (1 << 31) - 1
"""Largest id of a token, which is an int32."""

REQUIRED: Any = object()
"""In place of a default, for keys that must be there."""

FORMULAS = {"gelu_new": "gelu_pytorch_tanh", "gelu_python": "gelu", "swish": "silu"}
"""Second names of activations in transformers -> first ones."""


@dataclasses.dataclass(frozen=True)
class Values:
    """A config, or a section of one.

    Methods that take a value raise InputError if it is of another type, or out of range; or if it
    is absent and the default is `REQUIRED`. null is refused where the default is not None, unless
    `null` allows it.

    Attributes:
        data: the mapping itself.
        where: what to call it in errors.
        defaults: values of absent keys, before those that the methods are given.
        taken: keys that were.
        parts: sections that were.
    """

    data: Mapping[str, JSON]
    where: str
    defaults: Mapping[str, JSON] = dataclasses.field(default_factory=dict)
    taken: set[str] = dataclasses.field(default_factory=set)
    parts: dict[str, "Values"] = dataclasses.field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def over(self, defaults: Mapping[str, JSON]) -> "Values":
        """The same with other defaults; what is taken of it is taken of this one."""
        return dataclasses.replace(self, defaults={**self.defaults, **defaults})

    def put(self, values: Mapping[str, JSON]) -> "Values":
        """The same with other values in place of its own, or beside them."""
        return dataclasses.replace(self, data={**self.data, **values})

    def error(self, key: str, expected: str, fix: str = "correct the file") -> InputError:
        """That a key's value is not what it should be."""
        found = cut(repr(self.data.get(key, self.defaults.get(key))))
        return InputError(f"{self.where}: {key}", found=found, expected=expected, fix=fix)

    def any(self, key: str, default: object = None) -> Any:  # JSON that the caller takes apart
        """The value as it is, of whatever type."""
        self.taken.add(key)
        value = self.data.get(key, self.defaults.get(key, default))
        if value is REQUIRED:
            raise InputError(
                self.where, found=f"no key {key!r}", expected="it", fix="complete the file"
            )
        return value

    def _take(  # Any: `good` tells what it is, each method what that means
        self,
        key: str,
        default: object,
        good: Callable[[Any], bool],
        expected: str,
        null: bool = False,
    ) -> Any:
        value = self.any(key, default)
        if value is None and (null or default is None):
            return None
        if not good(value):
            raise self.error(key, expected)
        return value

    def whole(
        self,
        key: str,
        default: int | Absent = REQUIRED,
        *,
        least: int = 1,
        most: int = MOST,
    ) -> int | Absent:
        """A whole number within bounds, a positive one by default."""
        expected = f"a whole number from {least} to {most}"
        return self._take(key, default, lambda x: _is_whole(x, least, most), expected)

    def wholes(
        self,
        key: str,
        default: tuple[int, ...] | Absent = REQUIRED,
        *,
        least: int,
        most: int = MOST,
    ) -> tuple[int, ...] | Absent:
        """A list of them, as a tuple."""
        expected = f"a list of whole numbers from {least} to {most}"

        def good(value: object) -> bool:
            items = value if isinstance(value, list | tuple) else [None]
            return all(_is_whole(x, least, most) for x in items)

        found = self._take(key, default, good, expected)
        return tuple(found) if isinstance(found, list | tuple) else found

    def pairs(self, key: str, default: Pairs | Absent = REQUIRED) -> Pairs | Absent:
        """A list of pairs of positive whole numbers, as tuples."""

        def good(value: object) -> bool:
            pairs = value if isinstance(value, list | tuple) else [None]
            return all(
                isinstance(x, list | tuple)
                and len(x) == 2
                and all(_is_whole(n, 1, MOST) for n in x)
                for x in pairs
            )

        found = self._take(key, default, good, "pairs of positive whole numbers")
        return tuple((a, b) for a, b in found) if isinstance(found, list | tuple) else found

    def side(self, key: str, default: int) -> int:
        """Side of a square: one number, or the same twice."""
        value = self.any(key, default)
        if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if not _is_whole(value, 1, MOST):
            raise self.error(key, f"a whole number from 1 to {MOST}, the side of a square")
        return value

    def number(
        self, key: str, default: float | Absent = REQUIRED, *, least: float = 0.0
    ) -> float | Absent:
        """A finite number, not below `least`."""
        found = self._take(
            key, default, lambda x: is_number(x) and x >= least, f"a number from {least:g}"
        )
        return float(found) if is_number(found) else found

    def numbers(
        self, key: str, default: tuple[float, ...] | Absent = REQUIRED
    ) -> tuple[float, ...] | Absent:
        """A list of finite numbers, as a tuple."""

        def good(value: object) -> bool:
            return isinstance(value, list | tuple) and all(map(is_number, value))

        found = self._take(key, default, good, "a list of numbers")
        return tuple(map(float, found)) if isinstance(found, list | tuple) else found

    def flag(self, key: str, default: bool = REQUIRED, *, null: bool = False) -> bool:
        """True or False; null, where allowed, counts as the latter."""
        return bool(self._take(key, default, lambda x: isinstance(x, bool), "true or false", null))

    def text(self, key: str, default: str | Absent = REQUIRED) -> str | Absent:
        """Text."""
        return self._take(key, default, lambda x: isinstance(x, str), "text")

    def choice(
        self, key: str, options: tuple[Choice, ...], default: Choice | Absent = REQUIRED
    ) -> Choice | Absent:
        """One of a few texts; null counts as absent."""
        value = self.any(key, default)
        if value is None and default is not REQUIRED:
            return default
        if value not in options:
            fix = "correct the config, or this kind of model is not supported"
            raise self.error(key, ", ".join(map(repr, options)), fix)
        return value

    def activation(self, key: str, default: str | Absent) -> str | Absent:
        """An activation, under its name in `vfjax.nn.layers.ACTIVATIONS`."""
        value = self.text(key, default)
        if value is None:
            return value
        if (found := FORMULAS.get(value, value)) not in ACTIVATIONS:
            known = ", ".join((*ACTIVATIONS, *FORMULAS))
            raise self.error(key, known, "this activation is not supported yet")
        return found

    def ids(self, key: str) -> tuple[int, ...]:
        """Ids of tokens: null, one or a list of them."""
        value = self.any(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_whole(x, -MOST_ID, MOST_ID) for x in found):
            raise self.error(key, "the id of a token, or a list of ids")
        return tuple(found)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of texts, or null for none."""
        value = self.any(key)
        found = [] if value is None else value
        if not isinstance(found, list | tuple) or not all(isinstance(x, str) for x in found):
            raise self.error(key, "a list of names")
        return tuple(found)

    def mapping(
        self, key: str, default: Mapping[str, Any] | Absent = REQUIRED
    ) -> Mapping[str, Any] | Absent:
        """A mapping, for another reader to take apart."""
        return self._take(key, default, lambda x: isinstance(x, Mapping), "a mapping")

    def section(self, key: str, default: Mapping[str, JSON] | None = REQUIRED) -> "Values":
        """A section; null counts as an empty one where the default is None."""
        if key not in self.parts:
            self.parts[key] = Values(self.mapping(key, default) or {}, f"{self.where}: {key}")
        return self.parts[key]

    def rest(self, own: Container[str] = (), *prefixes: str) -> dict[str, Any]:
        """The keys that are not this reader's own, by name or prefix, for another to take."""
        keys = [key for key in self.data if key not in own and not key.startswith(prefixes)]
        found = {key: self.data[key] for key in keys}
        self.taken.update(found)
        return found

    def done(self, unused: Unused) -> None:
        """Says that all that has an effect was taken.

        Args:
            unused: the keys that are known to have none.

        Raises:
            InputError: another key is there, or one of these with a value that has an effect. A
                null under a key that nobody knows asks for nothing.
        """
        for key, value in self.data.items():
            if key in self.taken or key == "model_type":  # by which the reader was found
                continue
            if key not in unused:
                if value is not None:
                    raise self.error(
                        key,
                        "no such key: it may change what the model computes, and vfjax does not "
                        "know it",
                        "remove it if it changes nothing, or this model is not supported",
                    )
                continue
            values = unused[key]
            if values is not ANY and not any(_same(value, x) for x in values):
                known = " or ".join(map(repr, values))
                raise self.error(key, known, "other values are not supported")


def _is_whole(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object) -> bool:
    """Whether a value of JSON is a finite number, and fits a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _same(value: object, other: object) -> bool:
    """Equality that tells 1 from True, as JSON does; 1 and 1.0 are the same."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


GENERATION = (
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "target_lookbehind",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
)
"""Settings of generation, which transformers 5 drops from a config.json."""

PRETRAINED: Unused = {
    **dict.fromkeys(GENERATION, ANY),
    "_attn_implementation": ANY,  # one formula each
    "_attn_implementation_autoset": ANY,
    "_attn_implementation_internal": ANY,
    "_commit_hash": ANY,
    "_experts_implementation": ANY,
    "_experts_implementation_internal": ANY,
    "_flash_attn_2_enabled": ANY,
    "_name_or_path": ANY,
    "add_cross_attention": (False,),
    "architectures": ANY,  # tables and layouts that go by it read it
    "attn_implementation": ANY,
    "auto_map": ANY,  # code in the folder, which is never run
    "base_model": ANY,  # where it comes from
    "bos_token_id": ANY,
    "chunk_size_feed_forward": ANY,  # the same in pieces
    "cross_attention_hidden_size": (None,),
    "custom_pipelines": ANY,
    "decoder_start_token_id": ANY,
    "dtype": ANY,  # parameters are as stored, or as `load` is told
    "eos_token_id": ANY,  # read by `converters.processor`
    "experts_implementation": ANY,
    "finetuning_task": ANY,
    "gradient_checkpointing": ANY,
    "id2label": ANY,
    "initializer_factor": ANY,
    "initializer_range": ANY,
    "is_composition": ANY,
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "label2id": ANY,
    "name_or_path": ANY,
    "num_labels": ANY,
    "output_attentions": ANY,
    "output_hidden_states": ANY,
    "pad_token_id": ANY,
    "prefix": ANY,
    "problem_type": ANY,
    "pruned_heads": ({}, None),
    "return_dict": ANY,
    "sep_token_id": ANY,
    "task_specific_params": ANY,
    "tf_legacy_loss": ANY,
    "tie_encoder_decoder": (False,),
    "tokenizer_class": ANY,
    "torch_dtype": ANY,
    "torchscript": ANY,
    "transformers.js_config": ANY,
    "transformers_version": ANY,
    "unsloth_fixed": ANY,
    "unsloth_version": ANY,
    "use_bfloat16": ANY,
    "use_cache": ANY,
}
"""Keys of transformers' PreTrainedConfig, versions 4 and 5, for any kind of model."""
