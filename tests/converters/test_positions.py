"""Members with one position a token and with three, in one model, against transformers' parts."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import converters
from converters.fusion import Fusion
from converters.request import Request
from converters.vocabulary import Vocabularies
from tests import qwen_vl
from tests.checkpoints import write_json
from tests.pairs import AFTER, BEFORE, PAIRS, Shown, fuse_pair, in_line
from tests.qwen_vl import END, PICTURE, START, assert_close, picture
from tests.torch_fused import logits_of, open_in_torch
from vfjax import CacheFusion, InputError
from vfjax.model import Batch, encode, forward


class Pair(NamedTuple):
    home: Path
    names: list[str]
    vocab: str
    base: Any
    theirs: list[Any]
    shown: list[Shown]
    plain: Batch
    batch: Batch

    @property
    def request(self) -> dict[str, Any]:
        members = {name: self.home / name for name in self.names}
        return {"members": members, "base": self.home / "base", "vocab": self.vocab}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory) -> Pair:
    _, vocab, *members = PAIRS[request.param]
    home = tmp_path_factory.mktemp("pair")
    base, theirs = fuse_pair(request.param, home)
    image = picture(61, 47)
    with torch.no_grad():
        shown = [see(own, image) for own, (_, see) in zip(theirs, members, strict=True)]
    model, processor = converters.load(home / "out")
    batch = processor([image], input_ids=[[*BEFORE, -200, *AFTER]])
    names = [request.param, "other"]
    return Pair(home, names, vocab, base, theirs, shown, batch, encode(model, batch))


def merged(pair: Pair) -> dict[str, torch.Tensor]:
    """The mean of the members' LLMs: the base and half of each delta."""
    base = pair.base.state_dict()
    states = []
    for theirs in pair.theirs:
        own = {f"model.{k}": x for k, x in theirs.model.get_decoder().state_dict().items()}
        states.append(own | {"lm_head.weight": theirs.lm_head.weight.detach()})
    kept = states[0] if pair.vocab != "base" else base
    out = {}
    for name, first in base.items():
        few, every = len(first), []
        for x in (first, *(state[name] for state in states)):
            n = min(len(x), few)
            every.append(torch.cat([x[:n], first[n:], kept[name][few:]]))
        start, *members = (x.double() for x in every)
        out[name] = (start + sum(0.5 * (x - start) for x in members)).float()
    return out


@torch.no_grad()
def assembled(pair: Pair, positions: str, mask: str, pictures: int = 1) -> np.ndarray:
    """Logits of words before pictures, both members' tokens of each, words behind them."""
    weights = merged(pair)
    table, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    core = copy.deepcopy(pair.theirs[1].model.get_decoder())
    for name, p in core.named_parameters():
        p.data = weights[f"model.{name}"]
    before, after = (in_line(ids, table[:0]) for ids in (BEFORE, AFTER))
    x, place, segments, start, longest = [], [], [], 0, 0
    added: list[torch.Tensor] = []
    deep: list[tuple[torch.Tensor, ...]] = []
    numbered = [*enumerate(pair.shown, 1)] * pictures
    for k, part in ((0, before), *numbered, (0, after)):
        ids = torch.tensor(part.ids)
        values = table[ids.clamp(min=0)].clone()
        values[ids < 0] = part.values
        if k < 2:  # the text goes on, or the next picture, behind the longest branch
            start, longest = start + longest, 0
        seen = torch.zeros(len(ids), dtype=torch.bool)
        if part.deep:
            seen, deep = ids < 0, [*deep, part.deep]
        added.append(seen)
        x.append(values)
        place.append(start + part.place)
        segments += [k] * len(ids)
        if k and positions == "parallel":
            longest = max(longest, part.span)
        else:
            start += part.span
    of = torch.tensor(segments)
    see = torch.ones(len(of), len(of)).tril().bool()
    if mask == "block":
        see &= (of[:, None] == of) | (of[:, None] == 0) | (of == 0)
    at = torch.cat(place).T[:, None]
    more = {}
    if deep:
        more["visual_pos_masks"] = torch.cat(added)[None]
        more["deepstack_visual_embeds"] = [torch.cat(each) for each in zip(*deep, strict=True)]
    hidden = core(
        inputs_embeds=torch.cat(x)[None],
        position_ids=at if pair.vocab != "smolvlm" else at[0],
        attention_mask=torch.where(see, 0.0, torch.finfo(torch.float32).min)[None, None],
        **more,
    ).last_hidden_state
    return (hidden[0] @ head.T).numpy()


@pytest.mark.parametrize("positions", ["running", "parallel"])
def test_two_branches_are_transformers_parts(pair: Pair, positions: str):
    """Each member's tokens and marks at its own places, and the text behind the longest; in vfjax
    and in the class that opens the folder in transformers.
    """
    assert_parts(pair, positions, "causal")


@pytest.mark.parametrize("pair", ["internvl3_5"], indirect=True)
def test_branches_that_do_not_see_one_another(pair: Pair):
    assert_parts(pair, "parallel", "block")


def assert_parts(pair: Pair, positions: str, mask: str) -> None:
    model, _ = converters.load(pair.home / "out", positions=positions, mask=mask)
    found = np.asarray(forward(model, pair.batch))[pair.batch.mask]
    expected = assembled(pair, positions, mask)
    assert_close(found, expected)
    theirs = open_in_torch(pair.home / "out", positions=positions, mask=mask)
    assert_close(logits_of(theirs, pair.plain), expected)


def test_loaded_without_writing(pair: Pair):
    """The bytes and programs of the written folder."""
    written, _ = converters.load(pair.home / "out")
    model, _ = converters.load_fused(**pair.request)
    assert model.config == written.config
    both = (jax.tree.leaves(nnx.state(x)) for x in (model, written))
    assert all(np.array_equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("pair", ["onevision"], indirect=True)
def test_one_branch_is_the_member(pair: Pair):
    """Beside the base, which comes first, and whose weight is zero; text alone reads plain RoPE."""
    texts = {"text": pair.home / "base"}
    for name, kind in zip(pair.names, ("llava_onevision", "qwen2_vl"), strict=True):
        own, maker = converters.load(pair.home / name)
        kind = own.config.branches[0].name
        members = texts | {kind: pair.home / name}
        how = {"method": "linear", "params": {"weights": (0.0, 1.0)}, "vocab": kind}
        model, processor = converters.load_fused(members, **how)
        assert model.config == own.config and kind in processor.config.branches[0].name
        both = (jax.tree.leaves(nnx.state(x)) for x in (model, own))
        assert all(np.array_equal(a, b) for a, b in zip(*both, strict=True))
    maker.lengths = (192,)
    batch = maker([picture(61, 47)], input_ids=[[1, -200, 7]])
    assert np.array_equal(*(np.asarray(forward(x, batch))[batch.mask] for x in (model, own)))
    out = pair.home / "llm"
    how = {"method": "linear", "params": {"weights": (1.0, 1.0)}, "export": "llm"}
    converters.fuse({"other": pair.home / "other", **texts}, out, **how)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(theirs) is transformers.Qwen2ForCausalLM
    model, processor = converters.load(out)
    assert model.config.llm.axes == 1
    with torch.no_grad():
        expected = theirs(torch.tensor([[1, 9, 7, 200]])).logits[0].numpy()
    batch = processor(input_ids=[[1, 9, 7, 200]])
    assert_close(np.asarray(forward(model, batch))[batch.mask], expected)


def planned(pair: Pair, members: dict[str, Path], **options: Any) -> Fusion:
    return Fusion(Request(members, "", **{"vocab": "base", **options}))


def changed(folder: Path, place: Path, rope: dict[str, Any]) -> Path:
    """Links to a folder's files, with other rotary settings of its LLM."""
    place.mkdir()
    for path in folder.iterdir():
        if path.name != "config.json":
            (place / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] |= rope
    write_json(place / "config.json", config)
    return place


@pytest.mark.parametrize("pair", ["onevision"], indirect=True)
def test_positions_are_the_members_that_has_them(pair: Pair, tmp_path: Path):
    """Wherever it stands; one line where two have others, or theta differs."""
    flat, placed = (pair.home / name for name in pair.names)
    base = pair.home / "base"
    for members, first in (
        ({"other": placed, "onevision": flat}, base),
        ({"onevision": flat, "other": placed}, base),
        ({"onevision": flat, "other": placed}, placed),
    ):
        llm = planned(pair, members, base=first).result.llm
        assert llm["model_type"] == "qwen2_vl_text" and llm["vocab_size"] == 320
        assert llm["rope_parameters"]["mrope_section"] == [2, 1, 1]
    llm = planned(pair, {"onevision": flat, "text": base}, base=placed).result.llm
    assert llm["model_type"] == "qwen2_vl_text"
    other = changed(placed, tmp_path / "sections", {"mrope_section": [1, 1, 2]})
    with pytest.raises(InputError) as error:
        planned(pair, {"onevision": flat, "other": placed, "third": other}, base=base)
    assert "mrope_section: found [1, 1, 2] of qwen2_vl_text, expected [2, 1, 1] of" in str(
        error.value
    )
    other = changed(placed, tmp_path / "theta", {"rope_theta": 1e6})
    with pytest.raises(InputError) as error:
        planned(pair, {"onevision": flat, "third": other}, base=base)
    assert "member" not in str(error.value) and "third: rope_theta: found 1000000.0" in str(
        error.value
    )


def test_prompts_have_marks_once(pair: Pair):
    """Of whichever member the chat template is, and whatever stands for a picture in a prompt."""
    texts = [PICTURE + "What?", "<image>What?"]
    first, second = pair.names
    folders = {name: pair.home / name for name in pair.names}
    for order in (folders, {second: folders[second], first: folders[first]}):
        _, processor = converters.load_fused(**{**pair.request, "members": order})
        rows = []
        for prompt in (*texts[pair.vocab == "smolvlm" :], processor.chat("What?")):
            batch = processor([picture(61, 47)], prompts=[prompt])
            rows.append(batch.tokens[0][batch.segments[0] > 0].tolist())
            assert START not in batch.tokens[0][batch.segments[0] == 0].tolist()
        assert all(row == rows[0] for row in rows)
        wanted = 0 if pair.vocab == "smolvlm" else 1
        assert rows[0].count(START) == rows[0].count(END) == wanted


@pytest.mark.parametrize("pair", ["internvl"], indirect=True)
def test_what_the_template_writes_stands_for_a_picture(pair: Pair, tmp_path: Path):
    """Not what the tokenizer, which may be another member's, names so."""
    for path in (pair.home / "out").iterdir():
        if path.name != "tokenizer_config.json":
            (tmp_path / path.name).symlink_to(path)
    config = json.loads((pair.home / "out/tokenizer_config.json").read_text())
    config["extra_special_tokens"] = {"image_token": "<|image_pad|>"}
    write_json(tmp_path / "tokenizer_config.json", config)
    _, processor = converters.load(tmp_path)
    assert processor.tokenizer.image_token == "<|image_pad|>"
    assert processor.image_token == "<IMG_CONTEXT>"
    ids = processor.tokenize(processor.chat("What?"))
    assert ids.count(-200) == 1


@pytest.mark.parametrize("pair", ["onevision"], indirect=True)
def test_marks_follow_their_tokens(pair: Pair):
    """Into another tokenizer; what it lacks is said, but for what stands for a picture."""
    source = converters.open_source(pair.home / "other")
    known = Vocabularies({x: converters.open_source(pair.home / x) for x in pair.names})
    (branch,) = source.branches
    words = dict(known.words("other"))
    words |= {"<|vision_start|>": 7, "new": START, "image": words.pop("<|image_pad|>")}
    assert known.marks(["other"]) == {"<|vision_start|>", "<|vision_end|>"}
    moved = known.renumbered(branch, "other", words, 320).connector
    assert (moved["start"], moved["end"]) == (7, END)
    assert moved["placeholders"] == [qwen_vl.VIDEO]
    assert known.renumbered(branch, "other", None, 320) == branch
    del words["<|vision_start|>"]
    for kept, total, found in ((words, 320, "id 312 of '<|vision_start|>'"), (None, 9, "id 312")):
        with pytest.raises(InputError, match=f"marks of pictures: found {re.escape(found)}"):
            known.renumbered(branch, "other", kept, total)


@pytest.mark.parametrize("pair", ["onevision"], indirect=True)
def test_adamms(pair: Pair, tmp_path: Path):
    """LLMs of two architectures, (1 - alpha) of the first and alpha of the second (arXiv
    2503.23733); tokens, tower and merger are the first's, whose class opens it.
    """
    members, alpha = {"qwen": pair.home / "other", "onevision": pair.home / "onevision"}, 0.3
    how = {"method": "linear", "params": {"weights": (1 - alpha, alpha)}, "vocab": "qwen"}
    how |= {"export": "whole", "rules": [("visual|embed_tokens|lm_head", {"take": "qwen"})]}
    converters.fuse(members, tmp_path / "out", **how)
    second, first = (theirs.state_dict() for theirs in pair.theirs)
    found, report = type(pair.theirs[1]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    mixed = 0
    for name, value in found.state_dict().items():
        expected = first[name].double()
        if "language_model." in name and "embed_tokens" not in name:
            expected = (1 - alpha) * expected + alpha * second[name].double()
            mixed += 1
        limit = 2**-23 * float(expected.abs().max())  # of one rounding
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=limit)
    assert mixed == 2 * 12 + 1
    del how["rules"]
    with pytest.raises(InputError, match="member 'onevision': branches.*joins others as branches"):
        converters.fuse(members, tmp_path / "other", **how)


@pytest.mark.parametrize("pair", ["internvl3_5"], indirect=True)
def test_two_pictures_and_rows_of_other_lengths(pair: Pair):
    """Pictures side by side, each branch starting anew; padding before the shorter rows."""
    model, processor = converters.load(pair.home / "out", positions="parallel")
    image = picture(61, 47)
    rows = [[*BEFORE, *[-200] * count, *AFTER] for count in (2, 1, 0)]
    batch = processor([[image] * 2, [image], []], input_ids=rows, padding="left")
    found = np.asarray(forward(model, batch))
    for k, count in enumerate((2, 1, 0)):
        assert_close(found[k][batch.mask[k]], assembled(pair, "parallel", "causal", count), count)


@pytest.mark.parametrize("pair", ["internvl"], indirect=True)
def test_each_branch_read_by_its_members_llm(pair: Pair):
    """Where all LLMs have the same weights it is the model with parallel positions and a block
    mask, though one of them reads one position a token.
    """
    model, _ = converters.load(pair.home / "out", positions="parallel", mask="block")
    flat = dataclasses.replace(model.llm.config, rope_axes=()).build(rngs=nnx.Rngs(0))
    nnx.update(flat, nnx.state(model.llm))
    fused = CacheFusion(model, [flat, model.llm])
    expected, _ = jax.jit(lambda m, batch: m.prefill(batch, 256))(model, pair.batch)
    found, _ = jax.jit(lambda m, batch: m.prefill(batch, 256))(fused, pair.batch)
    assert_close(np.asarray(found), np.asarray(expected))
    made, _ = converters.load_fused(**pair.request, mode="cache")
    assert [llm.config.axes for llm in made.llms] == [1, 3] and made.merged.config.llm.axes == 3
