"""Keys of a request beside those that are used, and what becomes of them.

They are those of OpenAI's client and of the servers that speak its form (vLLM, SGLang, LMDeploy,
llama.cpp).
"""

from collections.abc import Mapping, Sequence

from vfjax.atomic import JSON

ROLES = ("system", "developer", "user", "assistant")
"""Of messages."""

TEMPLATE = frozenset(("reasoning_effort", "verbosity", "thinking_token_budget", "enable_thinking"))
"""Keys for the chat templates that read them; other models answer as they do."""

IGNORED = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "priority"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction"),
        *("cache_salt", "keep_alive", "cache_prompt", "session_id"),
        "parallel_tool_calls",  # there are no tools
        *("length_penalty", "early_stopping"),  # of beams
        *("spaces_between_special_tokens", "truncation_side", "include_reasoning"),
        *("separate_reasoning", "stream_reasoning"),
    )
)
"""Keys that change no answer here, whatever their value; they are for the server's own house, or
belong to something that these models or the other keys don't have."""

ONLY: Mapping[str, Sequence[JSON]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "custom_logit_processor": (),
    "custom_params": (),
    "do_sample": (True,),
    "documents": ([],),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "ebnf": (),
    "ec_transfer_params": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": ("",),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "ignore_eos": (False,),
    "images": ([],),
    "include_stop_str_in_output": (False,),
    "input": (),
    "instructions": (),
    "json_schema": (),
    "kv_transfer_params": (),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "lora_path": (),
    "lora_request": (),
    "max_length": (),
    "max_new_tokens": (),
    "max_output_tokens": (),
    "max_pixels": (),
    "media_io_kwargs": ({},),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_pixels": (),
    "min_tokens": (0,),
    "mirostat": (0,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"], []),
    "moderation": (),
    "n_predict": (-1,),
    "no_repeat_ngram_size": (0,),
    "no_stop_trim": (False,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "options": ({},),
    "penalty_alpha": (0,),
    "presence_penalty": (0,),
    "prompt": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "random_seed": (),
    "regex": (),
    "repetition_detection": (),
    "return_logprob": (False,),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_weight_versions": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stop_regex": ([],),
    "stop_token_ids": ([],),
    "structural_tag": (),
    "structured_outputs": (),
    "system": (),
    "tfs_z": (1,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_a": (0,),
    "top_h": (),
    "truncate_prompt_tokens": (-1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "watermark": (False,),
    "web_search_options": (),
    "xtc_probability": (0,),
}
"""Keys that would change an answer -> the values at which they don't; others are refused. null is
as good as no key everywhere."""

MESSAGE: Mapping[str, Sequence[JSON]] = {
    "annotations": ([],),
    "audio": (),
    "audios": ([],),
    "documents": ([],),
    "function_call": (),
    "image": (),
    "image_url": (),
    "images": ([],),
    "prefix": (False,),
    "partial": (False,),
    "refusal": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
    "tools": ([],),
    "video": (),
    "videos": ([],),
}
"""The same of a message."""

PART: Mapping[str, Sequence[JSON]] = {
    "audio": (),
    "audio_url": (),
    "file": (),
    "image": (),
    "image_url": (),
    "input_audio": (),
    "max_pixels": (),
    "min_pixels": (),
    "resized_height": (),
    "resized_width": (),
    "text": ("",),
    "video": (),
    "video_url": (),
}
"""The same of a part of a message beside what its type names, and of what its image_url holds."""


def allowed(value: object, values: Sequence[JSON]) -> bool:
    """Whether a value is one of those; true is not 1 here."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in values
    )
