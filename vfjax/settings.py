"""What a folder says of every answer: its generation_config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vfjax.errors import InputError

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "diversity_penalty": (0.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "min_length": (0, 1),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "watermarking_config": (),
}
"""Settings of generation_config.json that change greedy answers and are not supported -> values,
beside none and empty ones, at which they do not. `repetition_penalty` is; those of sampling are
not read; the rest say how transformers computes."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a folder's generation_config.json says of every answer.

    Attributes:
        repetition_penalty: see `vfjax.generate`.
        penalise_prompt: whether it is for the words of the prompt, too, as in transformers; codes
            that hand embeddings to transformers (LLaVA's and what grew from it) have no ids there.
        unsupported: settings of `NEUTRAL` that would change the answers.
    """

    repetition_penalty: float = 1.0
    penalise_prompt: bool = True
    unsupported: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, found: Mapping[str, Any], penalise_prompt: bool, where: object) -> "Settings":
        """The settings of a generation_config.json.

        Raises:
            InputError: a penalty that is no number above 0.
        """
        penalty = 1.0 if (value := found.get("repetition_penalty")) is None else value
        if type(penalty) not in (int, float) or not 0 < penalty < 1e30:
            raise InputError(
                f"{where}: repetition_penalty",
                found=ascii(penalty)[:80],
                expected="a number above 0",
                fix="correct it",
            )
        others = {
            name: value
            for name, neutral in NEUTRAL.items()
            if (value := found.get(name)) is not None and value not in (*neutral, [], {})
        }
        return cls(float(penalty), penalise_prompt, others)

    def check(self) -> None:
        """Raises InputError for a setting that would change the answers and is not supported."""
        for name, value in self.unsupported.items():
            raise InputError(
                f"generation_config.json: {name}",
                found=ascii(value)[:80],
                expected="none, as it is not supported",
                fix="remove it from the file, or set processor.settings = vfjax.Settings()",
            )


NONE = Settings()
"""Of a folder that says nothing."""
