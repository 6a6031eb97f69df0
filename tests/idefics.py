"""Idefics3's and SmolVLM's folders as transformers writes them, for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from tests.checkpoints import randomize, text_config, write_json

TILE, LONGEST = 28, 112
AROUND, PICTURE, WHOLE, END = "<fake_token_around_image>", "<image>", "<global-img>", "<|im_end|>"
SPECIAL = [
    *("<|im_start|>", END, AROUND, PICTURE, WHOLE),
    *(f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)),
]
"""Tiles of a fourth row or column have marks that are many tokens."""
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def make_tokenizer(special: Sequence[str] = SPECIAL) -> transformers.PreTrainedTokenizerFast:
    """Byte-level, with merges over newlines and of a space with the word behind it."""
    words = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Y"), ("ĠY", "o"), ("o", "u"), ("ĊĊ", "W")]
    words += [a + b for a, b in merges]
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, merges)
    )
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    engine.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token="<|im_start|>", eos_token=END, pad_token=END
    )
    added = [tokenizers.AddedToken(t, normalized=False, special=True) for t in special]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_processor(**images: Any) -> transformers.Idefics3Processor:
    pictures = transformers.Idefics3ImageProcessorPil(
        **{"size": {"longest_edge": LONGEST}, "max_image_size": {"longest_edge": TILE}} | images
    )
    tokenizer = make_tokenizer()
    return transformers.Idefics3Processor(
        pictures, tokenizer, image_seq_len=4, chat_template=TEMPLATE
    )


def make_folder(
    path: Path, family: str = "idefics3", *, tied: bool = False, vocab: int = 320, **images: Any
) -> Any:
    """Model and processor as transformers writes them; torchvision, which is not there, writes
    SmolVLM's.
    """
    processor = make_processor(**images)
    smol = family == "smolvlm"
    kinds = {
        "idefics3": (transformers.Idefics3Config, transformers.Idefics3ForConditionalGeneration),
        "smolvlm": (transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration),
    }
    config, model = kinds[family]
    theirs = model(
        config(
            vision_config={
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 7,
                "layer_norm_eps": 1e-3,
            },
            text_config=text_config(max_position_embeddings=1024, vocab_size=vocab).to_dict(),
            image_token_id=processor.image_token_id,
            tie_word_embeddings=tied,
            pad_token_id=0,
        )
    )
    theirs.tie_weights()
    randomize(theirs, 7)
    theirs.save_pretrained(path)
    processor.save_pretrained(path)
    if smol:
        file = path / "processor_config.json"
        whole = json.loads(file.read_text())
        whole["processor_class"] = "SmolVLMProcessor"
        pictures = whole["image_processor"]
        pictures["image_processor_type"] = "SmolVLMImageProcessor"
        films = SmolVLMVideoProcessor(
            size={"longest_edge": 2 * TILE},
            max_image_size={"longest_edge": TILE},
            num_frames=8,
            fps=1,
        )
        whole["video_processor"] = json.loads(films.to_json_string())
        write_json(file, whole)
    return theirs
