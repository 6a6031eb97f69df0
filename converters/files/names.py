"""Names of the files that a checkpoint folder may hold, beside weights and inside its towers."""

KINDS = {
    "config.json": ("model", "pytorch_model"),
    "open_clip_config.json": ("open_clip_model", "open_clip_pytorch_model", "model"),
}
"""Config file of a tower's folder -> stems of its weights files; ours are called "model"."""

PREPROCESSOR = "preprocessor_config.json"

SLOT = "vision_tower"
"""What the names of towers' folders inside a checkpoint, and of their files there, begin with."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""Files that hold a vocabulary."""

PAIR = ("vocab.json", "merges.txt")
"""Files that hold one together, where transformers 4 wrote a Qwen's or GPT-2's with
`use_fast=False`."""

TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *PAIR,
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files that travel with a language model."""

PROCESSOR_FILES = (
    PREPROCESSOR,
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files that say how pictures and videos are prepared."""

SETTINGS = "adapter_config.json"

ADAPTER, EXTRA, PROJECTOR = "adapter_model", "non_lora_trainables", "mm_projector"
"""Stems of weights files of folders that hold a part of a model."""

README = "README.md"
"""The model card, which says the license."""
