"""LLaVA's two stages beside a loop in torch that is written to its scripts (scripts/v1_5)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import converters
from experiments.configs import train as configs
from experiments.tasks import train as task
from tests import checkpoints
from vfjax.data import Batches, Conversations

STEPS, BATCH, IGNORE = 20, 4, -100
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def write_rows(folder: Path) -> None:
    """Captions of pictures; and talks of two turns, a third of them without a picture."""
    rng = np.random.default_rng(0)
    captions, talks = [], []
    for i in range(22):
        size = tuple(int(n) for n in rng.integers(20, 70, 2))
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        words = "".join(rng.choice(list("abcde "), 6)) + "."
        picture = {"id": str(i), "image": f"{i}.png"}
        asked = {"from": "human", "value": "<image>\nWhat?"}
        said = {"from": "gpt", "value": words}
        captions.append({**picture, "conversations": [asked, said]})
        more = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": words[::-1]}]
        if i % 3:
            talks.append({**picture, "conversations": [asked, said, *more]})
        else:
            talks.append({"conversations": [{"from": "human", "value": "Why?"}, said, *more]})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "talks.json").write_text(json.dumps(talks))


def ids_and_labels(row: dict, tokenizer, plain: bool) -> tuple[list[int], list[int]]:
    """`preprocess_plain` and `preprocess_v1`: answers are learnt, and what ends them."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    talk = [message["value"] for message in row["conversations"]]
    if plain:
        words = encode(talk[1] + "\n")
        return [1, -200, *words], [IGNORE, IGNORE, *words]
    ids, labels = [1], [IGNORE]
    for k in range(0, len(talk), 2):
        question = (SYSTEM + " " if k == 0 else "") + "USER: " + talk[k] + " ASSISTANT:"
        before, _, after = question.partition("<image>")
        asked = [*encode(before), -200, *encode(after)] if "<image>" in question else encode(before)
        said = encode(" " + talk[k + 1]) + [2]
        ids += asked + said
        labels += [IGNORE] * len(asked) + said
    return ids, labels


def square(picture: Image.Image, mean: list[float]) -> Image.Image:
    """LLaVA's `expand2square`."""
    side = max(picture.size)
    out = Image.new("RGB", (side, side), tuple(int(255 * x) for x in mean))
    out.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return out


def step_loss(member, rows, folder: Path, images, tokenizer, plain: bool) -> torch.Tensor:
    """One rank's loss: the mean over the labelled tokens of its rows."""
    total, count = torch.zeros(()), 0
    for row in rows:
        parts, goal = [], []
        if "image" in row:
            picture = Image.open(folder / row["image"]).convert("RGB")
            picture = picture if plain else square(picture, images.image_mean)
            pixels = images.preprocess(picture, return_tensors="pt")["pixel_values"]
            states = member.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            visual = member.connector(states)[0]
        ids, labels = ids_and_labels(row, tokenizer, plain)
        for token, label in zip(ids, labels, strict=True):
            if token == -200:
                parts.append(visual)
                goal += [IGNORE] * len(visual)
            else:
                parts.append(member.llm.get_input_embeddings()(torch.tensor([token])))
                goal.append(label)
        logits = member.llm(inputs_embeds=torch.cat(parts)[None]).logits[0, :-1]
        target = torch.tensor(goal[1:])
        total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        count += int((target != IGNORE).sum())
    return total / count


def trained(member, stage: str, order: list[list[int]], folder: Path, tokenizer) -> list[float]:
    """The losses of a stage: AdamW without decay, warm-up 0.03, cosine, no clipping."""
    plain = stage == "align"
    rows = json.loads((folder / ("captions.json" if plain else "talks.json")).read_text())
    images = transformers.CLIPImageProcessorPil.from_pretrained(folder / "llava" / "vision_tower")
    member.tower.requires_grad_(False)
    member.llm.requires_grad_(not plain)  # tune_mm_mlp_adapter
    params = [*member.connector.parameters(), *(() if plain else member.llm.parameters())]
    adamw = torch.optim.AdamW(params, lr=1e-3 if plain else 2e-5, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(adamw, 1, STEPS)  # ceil(0.03 * 20)
    losses = []
    for numbers in order:
        loss = step_loss(member, [rows[n] for n in numbers], folder, images, tokenizer, plain)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_two_stages_are_llavas(tmp_path: Path) -> None:
    llm = checkpoints.make_llama(1)
    member = checkpoints.upstream_llava_folder(
        tmp_path / "llava", llm=llm, weights="safetensors", vision={"num_hidden_layers": 2}
    )
    write_rows(tmp_path)
    config = configs.get_config("llava")
    changes = {"model": str(tmp_path / "llava"), "dtype": "float32", "report": False}
    for stage, file in (("align", "captions"), ("tune", "talks")):
        own = {"data": (f"{tmp_path / file}.json={tmp_path}",), "batch": BATCH, "steps": STEPS}
        changes |= {f"stages.{stage}.{key}": value for key, value in own.items()}
        changes[f"stages.{stage}.length"] = 512
    config.update_from_flattened_dict(changes)
    task.run(config, tmp_path / "out")

    _, processor = converters.load(tmp_path / "llava")
    for stage, file in (("align", "captions"), ("tune", "talks")):
        data = Conversations(tmp_path / f"{file}.json", tmp_path)
        grouped = config.stages[stage].by_modality
        batches = Batches(
            [(data, 1)], processor, batch=BATCH, seed=0, steps=STEPS, by_modality=grouped
        )
        order = [[n for _, n in batches.rows(step)] for step in range(STEPS)]
        mixed = [len({bool(data.pictures[n]) for n in rows}) for rows in order]
        assert stage == "align" or mixed.count(2) <= 2 * 2  # the ends of two epochs and more
        lines = (tmp_path / "out" / stage / "metrics.jsonl").read_text().split("\n")[:-1]
        found = [json.loads(line)["loss"] for line in lines]
        expected = trained(member, stage, order, tmp_path, processor.tokenizer)
        assert found == pytest.approx(expected, rel=1e-3)
        assert len(found) == STEPS and np.std(expected) > 0.01
