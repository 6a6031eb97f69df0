"""Text in pieces: whole characters, nothing that changes afterwards."""

import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from vfjax import Processor
from vfjax.text.stream import Text

BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPM = ["<unk>", "<s>", "</s>", *BYTES, "▁the", "▁cat", "▁,", *".és#▁</>", "##", "</"]
WORDS = ["<unk>", "<s>", "</s>", "a", "cat", ",", ".", "n't", "'s", "'", "!", "###"]


def spm() -> PreTrainedTokenizerFast:
    """SentencePiece with bytes, as Llama has it."""
    model = models.BPE({token: i for i, token in enumerate(SPM)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def words(clean: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=clean
    )


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes and pairs of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet[-40:] for b in alphabet[-8:]]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {
    "sentencepiece": spm,
    "words": lambda: words(False),
    "words, cleaned up": lambda: words(True),
    "bytes": byte_level,
}


def processor(tokenizer, template: str = "default") -> Processor:
    return Processor(SimpleNamespace(), tokenizer, template)


def pieces(text: Text, ids: list[int], sizes: list[int]) -> list[str]:
    out, first = [], 0
    for size in sizes:
        out.append(text.add(ids[first : first + size], first + size >= len(ids)))
        first += size
    assert first >= len(ids)
    return out


@pytest.mark.parametrize("template", ["default", "vicuna_v1"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_of_random_ids_make_the_text(name: str, template: str):
    """Broken characters, special tokens, the stops `###` and `</s>` among them."""
    tokenizer, rng = TOKENIZERS[name](), random.Random(0)
    made = processor(tokenizer, template)
    grown = 0
    for _ in range(300):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 20))]
        found = pieces(Text(made), ids, [rng.randrange(1, 4) for _ in range(20)])
        assert "".join(found) == made.decode(ids), ids
        grown += sum(map(bool, found)) > 1
    assert grown > 30


def test_real_tokenizers(shared):
    llama = LlamaTokenizer.from_pretrained(
        shared / "tokenizers" / "llama2", add_bos_token=True, legacy=True
    )
    bpe = PreTrainedTokenizerFast(
        tokenizer_file=str(shared / "golden" / "tokenizers" / "bpe_tokenizer.json")
    )
    said = "Ça va? 你好, 世界! 👩‍👩‍👧 don't , stop . naïve \u200d end "
    for tokenizer in (llama, bpe):
        made = processor(tokenizer, "vicuna_v1")
        ids = tokenizer(said, add_special_tokens=False).input_ids
        found = pieces(Text(made), ids, [1] * len(ids))
        assert "".join(found) == made.decode(ids) == said.strip()
        assert all("\ufffd" not in piece for piece in found)
        rng = random.Random(1)
        for _ in range(200):
            ids = [rng.randrange(len(tokenizer)) for _ in range(12)]
            ids = [i if rng.random() < 0.6 else 3 + i % 256 for i in ids]  # Llama's bytes
            assert "".join(pieces(Text(made), ids, [1] * 12)) == made.decode(ids)


def test_what_may_become_a_stop_waits():
    tokenizer = words(False)
    text = Text(processor(tokenizer), stop=["cat ,"])
    ids = tokenizer.convert_tokens_to_ids(["a", "cat", "a", "cat", ",", "a"])
    found = [text.add([i], last=i == len(ids) - 1) for i in ids]
    assert found == ["a", "", " cat a", "", "", ""]
    assert text.stopped
    assert text.text == "a cat a"
    assert text.add(ids, last=True) == ""
