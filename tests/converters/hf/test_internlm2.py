"""InternLM2 in torch is a Llama whose queries, keys and values are one layer's."""

import torch
import transformers

from tests.checkpoints import make_llama
from tests.internvl import INTERNLM2, grouped


def test_a_llama_of_other_names() -> None:
    """Hidden states and a cache's; gradients reach all parameters."""
    llama = make_llama(3).model
    old, state = llama.state_dict(), {}
    for name, value in old.items():
        if ".q_proj." in name:
            qkv = [old[name.replace(".q_", f".{x}_")] for x in "qkv"]
            name, value = name.replace("self_attn.q_proj", "attention.wqkv"), grouped(*qkv, 8)
        if "self_attn.k_" in name or "self_attn.v_" in name:
            continue
        for was, now in INTERNLM2[2:]:
            name = name.replace(was, now)
        state[name] = value
    keys = llama.config.to_dict() | {"model_type": "internlm2", "bias": False}
    config = transformers.AutoConfig.for_model(**keys)
    own = transformers.AutoModel.from_config(config)
    own.load_state_dict(state)
    ids = torch.tensor([[5, 9, 2, 7], [0, 0, 3, 4]])
    mask = (ids > 0).long()
    with torch.no_grad():
        expected = llama(ids, attention_mask=mask).last_hidden_state
    found = own(ids, attention_mask=mask)
    torch.testing.assert_close(found.last_hidden_state[mask > 0], expected[mask > 0])
    first = own(ids[:, :3], attention_mask=mask[:, :3], use_cache=True)
    more = own(ids[:, 3:], attention_mask=mask, cache=first.cache)
    torch.testing.assert_close(more.last_hidden_state[:, 0], expected[:, 3])
    found.last_hidden_state.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in own.parameters())
