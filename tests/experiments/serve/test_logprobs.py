"""Log probabilities in the server's answers, and the names of tokens there."""

import numpy as np
import pytest
import tokenizers
import transformers

import vfjax
from experiments.serve.logprobs import Names
from tests import checkpoints
from tests.experiments.answers import events
from tests.experiments.serving import URL, ask


def test_log_probabilities(client, loaded):
    """OpenAI's form, by OpenAI's own types; whole and streamed."""
    types = pytest.importorskip("openai.types.chat")
    body = ask("red", temperature=3, seed=1, max_tokens=7, logprobs=True, top_logprobs=3)
    answer = client.post(URL, json=body).json()
    (choice,) = types.ChatCompletion.model_validate(answer).choices
    tokens = choice.logprobs.content
    assert len(tokens) == answer["usage"]["completion_tokens"] == 7
    model, processor = loaded
    hidden = processor.tokenizer.get_added_vocab()  # special: no text shows them
    shown = [token for token in tokens if token.token.strip() not in hidden]
    joined = b"".join(bytes(token.bytes) for token in shown).decode()
    assert joined.split() == choice.message.content.split()
    batch = processor([], [processor.chat("red", images=0)])
    how = {"max_new_tokens": 7, "sampling": vfjax.Sampling(3.0, seed=1), "stop": processor.stops}
    (piece,) = vfjax.stream_ids(model, batch, every=7, logprobs=20, **how)
    (expected,) = piece.logs
    np.testing.assert_allclose([token.logprob for token in tokens], expected.chosen, atol=1e-5)
    for token, values, ids in zip(tokens, expected.top, expected.ids, strict=True):
        found = [(other.token.strip(), other.logprob) for other in token.top_logprobs]
        assert [name for name, _ in found] == processor.tokenizer.convert_ids_to_tokens(ids[:3])
        np.testing.assert_allclose([value for _, value in found], values[:3], atol=1e-5)
    chunks = events(client.post(URL, json=body | {"stream": True}))
    streamed = [
        token
        for chunk in chunks
        for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == answer["choices"][0]["logprobs"]["content"]
    body |= {"top_logprobs": None, "stop": joined.split()[2]}
    cut = client.post(URL, json=body).json()
    assert len(cut["choices"][0]["logprobs"]["content"]) == 3 == cut["usage"]["completion_tokens"]
    assert cut["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_names_of_tokens(tmp_path):
    """With the space before; bytes of a character's parts, of both kinds of tokenizer."""
    words = ["<unk>", "<s>", "a", "\u2581red", "<0xE2>", "\u2581"]
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    )
    engine.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(),
         tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    names = Names(transformers.PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>"))
    assert [names.name(i) for i in (3, 5, 4, 1)] == [
        *((" red", b" red"), (" ", b" "), ("\N{REPLACEMENT CHARACTER}", b"\xe2"), ("<s>", b"<s>")),
    ]
    checkpoints.tokenizer_files(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    names = Names(tokenizer)
    ids = tokenizer("na\u00efve \U0001f600", add_special_tokens=False).input_ids
    assert b"".join(names.name(i)[1] for i in ids).decode() == "na\u00efve \U0001f600"
