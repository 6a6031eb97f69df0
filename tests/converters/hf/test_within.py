"""What visual tokens ask for within the LLM, as its layers are called in other ways."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from converters.hf.branch import Branch, VisualTokens
from converters.hf.within import ASKED, asking, listen


class Asker(Branch):
    """A branch whose tokens are given a third of themselves and what was seen."""

    layers = (0, 2)

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def within(self, layer: int, x: Tensor, seen: tuple[Tensor]) -> Tensor:
        return x / 3 + seen[0] * (layer + 1)


@pytest.fixture(scope="module")
def llm() -> transformers.LlamaModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=9)
    made = transformers.LlamaModel(config)
    listen(made, [Asker(), Branch.__new__(Branch)])
    return made


def ask(visual: Tensor, mask: Tensor | None = None) -> dict:
    """Five tokens of another branch, then four, of which three have seen something."""
    seen = (torch.arange(24.0).reshape(3, 8),)
    other = VisualTokens(torch.zeros(5, 8), torch.ones(5).bool())
    own = VisualTokens(torch.zeros(4, 8), torch.ones(4).bool(), seen=seen)
    mask = torch.ones_like(visual).bool() if mask is None else mask
    return {ASKED: asking(visual, mask, [other, own], [Asker(), Asker()])}


def test_whose_tokens_are_moved(llm: transformers.LlamaModel) -> None:
    """Its own, that are read, and that have seen something: behind layer 0 by its rule."""
    x = torch.randn(1, 6, 8)
    visual = torch.tensor([[-1, 0, 5, 7, 8, 6]])  # text, another's, own 0, 2, a newline, own 1
    mask = torch.tensor([[True] * 5 + [False]])
    layer = copy.deepcopy(llm).layers[0]
    at = torch.arange(6)[None]
    turns = llm.rotary_emb(x, at)
    plain = layer(x, position_embeddings=turns)
    found = layer(x, position_embeddings=turns, **ask(visual, mask))
    wanted = plain.clone()
    seen = torch.arange(24.0).reshape(3, 8)
    wanted[0, [2, 3]] += plain[0, [2, 3]] / 3 + seen[[0, 2]]
    torch.testing.assert_close(found, wanted)
    assert torch.equal(
        llm.layers[1](x, position_embeddings=turns, **ask(visual)),
        llm.layers[1](x, position_embeddings=turns),
    )
    assert (
        asking(visual, mask, [VisualTokens(torch.zeros(9, 8), torch.ones(9).bool())], [Asker()])
        is None
    )


def test_layers_that_are_computed_again(llm: transformers.LlamaModel) -> None:
    """The same gradients by checkpointing, with another forward pass between."""
    visual = torch.tensor([[-1, 5, 6, -1]])
    found = []
    for again in (False, True):
        model = copy.deepcopy(llm).train()
        if again:
            model.activation_checkpointing_enable()
        x = torch.linspace(-1, 1, 32).reshape(1, 4, 8).requires_grad_()
        out = model(inputs_embeds=x, use_cache=False, **ask(visual)).last_hidden_state
        model(inputs_embeds=x.detach(), use_cache=False, **ask(visual.flip(1)))
        out.square().sum().backward()
        found.append((out.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1])
    plain = model(inputs_embeds=x, use_cache=False).last_hidden_state
    assert not torch.allclose(plain, found[0][0])
