"""What tests of generation share."""

import torch

NEW = 32


TEXTS = [[1, 40, 50, 60, 61, 62, 63], [1, 70], [1, 80, 81, 82, 83, 84, 85, 86, 87, 90, 91], [5]]


@torch.no_grad()
def reference(model: torch.nn.Module, rows: list[list[int]], **inputs) -> list[list[int]]:
    """Transformers' greedy tokens of a batch padded on the left, no token ending a row."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    model.generation_config.eos_token_id = None
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        **inputs,
    )
    return out[:, longest:].tolist()
