"""Prompts of transformers' folders against transformers' own processors, id by id."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import converters
from converters.chat import read_chat_template
from converters.fusion import Fusion
from converters.inspect import inspect
from converters.load import model_config
from converters.processor import processor
from converters.request import Request
from tests.checkpoints import hf_llava_folder, llava_next_folder, write_json
from vfjax import InputError, Processor
from vfjax.atomic import read_json
from vfjax.text.messages import Message, tokenize

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + "
    "': ' }}{% endif %}{% for part in message['content'] if part.type == 'image' %}{{ '<image>\\n' "
    "}}{% endfor %}{% for part in message['content'] if part.type == 'text' %}{{ part.text + ' ' "
    "}}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Pictures before texts, as in the published LLaVA-1.5."""

BOS = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{% for part in "
    "message['content'] %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
"""With BOS and ends of turns, pictures where they are said."""

TEXTS = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + "
    "eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Of an LLM: contents are texts."""

PROMPTS = (
    "<image>\nWhat?",
    "USER: <image>\nWhat is it? ASSISTANT:",
    "a <image> b",
    "<image><image>\n\n two  spaces",
    " <image>",
    "no picture",
    "<s>USER: <image> x</s>[INST] <image>",
)
PICTURE = Image.new("RGB", (30, 20), (9, 99, 199))


def llama(shared: Path, folder: Path, **options) -> transformers.PreTrainedTokenizerBase:
    """Llama-2's tokenizer with the picture's token, as the published ports have it."""
    home = shutil.copytree(shared / "tokenizers" / "llama2", folder)
    write_json(
        home / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **options},
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    tokenizer.add_tokens([transformers.AddedToken("<image>", special=True, normalized=False)])
    return tokenizer


@pytest.fixture(scope="module")
def folders(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LLaVA-1.5 with both kinds of Llama-2's tokenizer, and LLaVA-1.6; ports saved whole."""
    root, out = tmp_path_factory.mktemp("ports"), {}
    sizes = {"vocab_size": 32064, "hidden_size": 16, "num_hidden_layers": 1}
    for name, legacy in (("llava", False), ("legacy", True), ("next", False)):
        tokenizer = llama(shared, root / f"{name} tokenizer", legacy=legacy)
        folder = out[name] = root / name
        settings = {"patch_size": 7, "num_additional_image_tokens": 1}
        settings["vision_feature_select_strategy"] = "default"
        if name == "next":
            llava_next_folder(folder, text=sizes, image_token_index=32000)
            images = transformers.LlavaNextImageProcessorPil.from_pretrained(folder)
            kind = transformers.LlavaNextProcessor
        else:
            hf_llava_folder(folder, text=sizes, image_token_index=32000)
            images = transformers.CLIPImageProcessorPil.from_pretrained(folder)
            kind = transformers.LlavaProcessor
        for file in folder.glob("*token*"):
            file.unlink()
        (folder / "preprocessor_config.json").unlink()
        kind(images, tokenizer, chat_template=LLAVA, **settings).save_pretrained(folder)
    return out


def ours_of(folder: Path) -> Processor:
    source = converters.open_source(folder)
    return processor(source, model_config(source))


def both(folder: Path) -> tuple[Processor, transformers.ProcessorMixin]:
    return ours_of(folder), transformers.AutoProcessor.from_pretrained(folder)


def theirs_of(them, prompt: str) -> list[int]:
    """Their ids, -200 for each run of a picture's tokens."""
    pictures = [PICTURE] * prompt.count("<image>")
    special = not prompt.startswith("<s>")  # as in apply_chat_template
    ids = them(images=pictures or None, text=prompt, add_special_tokens=special).input_ids[0]
    count = len(them.image_token) and ids.count(32000) // max(len(pictures), 1)
    out: list[int] = []
    while ids:
        out.append(-200 if ids[0] == 32000 else ids[0])
        ids = ids[count if ids[0] == 32000 else 1 :]
    return out


@pytest.mark.parametrize("name", ["llava", "legacy", "next"])
def test_ids_are_those_of_the_folders_own_processor(folders: dict[str, Path], name: str):
    ours, them = both(folders[name])
    for prompt in PROMPTS:
        assert ours.tokenize(prompt) == theirs_of(them, prompt), prompt
    ids = ours.tokenize("<image>\nWhat?")
    assert ids[:4] == ([1, -200, 29871, 13] if name == "legacy" else [1, -200, 13, 5618])
    batch = ours([PICTURE], ["<image>\nWhat?"])
    assert int(batch.mask.sum()) == len(them(images=[PICTURE], text="<image>\nWhat?").input_ids[0])


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {
        "role": "user",
        "content": [{"type": "text", "text": "And"}, {"type": "image"}, {"type": "image"}],
    },
]


def messages(given: list[dict]) -> list[Message]:
    return [Message(m["role"], tuple(p.get("text", PICTURE) for p in m["content"])) for m in given]


@pytest.mark.parametrize(
    ("place", "template"),
    [
        ("jinja", BOS),
        ("jinja", LLAVA),
        ("json", LLAVA),
        ("processor", BOS),
        ("tokenizer", LLAVA),
    ],
)
def test_the_folders_own_chat_template(
    folders: dict[str, Path], tmp_path: Path, template: str, place: str
):
    folder = shutil.copytree(folders["llava"], tmp_path / "llava")
    (folder / "chat_template.jinja").unlink()
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(template)
    else:
        file = {"json": "chat_template.json", "processor": "processor_config.json"}
        path = folder / file.get(place, "tokenizer_config.json")
        write_json(path, {**(read_json(path) if path.is_file() else {}), "chat_template": template})
        if place in ("json", "processor"):  # before others
            (folder / "chat_template.jinja").write_text("{{ 'no' }}")
    ours, them = both(folder)
    if place == "tokenizer":
        assert them.chat_template is None  # theirs has none then; its tokenizer has
        them.chat_template = them.tokenizer.chat_template
    assert ours.template == "chat_template"
    system = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *MESSAGES]
    for said in (MESSAGES[:1], MESSAGES, system):
        expected = them.apply_chat_template(said, add_generation_prompt=True)
        ids, pictures = tokenize(ours, messages(said))
        assert ids == theirs_of(them, expected)
        assert len(pictures) == expected.count("<image>")
    one = them.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)
    assert ours.chat("What is it?") == one
    parts = [{"type": "image", "image": PICTURE}, *MESSAGES[0]["content"][1:]]
    given = [{"role": "user", "content": parts}]
    whole = them.apply_chat_template(
        given, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert int(ours([PICTURE], [one]).mask.sum()) == len(whole.input_ids[0])


@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_template_that_takes_texts_alone(folders: dict[str, Path], tmp_path: Path, images: int):
    """An LLM's: pictures are written before the words."""
    folder = shutil.copytree(folders["llava"], tmp_path / "llava")
    (folder / "chat_template.jinja").write_text(TEXTS)
    ours, them = both(folder)
    said = [{"role": "user", "content": "<image>\n" * images + "What?"}]
    expected = them.apply_chat_template(said, add_generation_prompt=True)
    assert ours.chat("What?", images=images) == expected
    ids, _ = tokenize(ours, [Message("user", (*[PICTURE] * images, "What?"))])
    assert ids == theirs_of(them, expected)


def test_a_named_template_takes_the_place(folders: dict[str, Path], tmp_path: Path):
    """It is tokenised whole all the same; without one of its own a folder has a named one."""
    ours, them = both(folders["llava"])
    ours.template = "vicuna_v1"
    prompt = ours.chat("What?")
    assert prompt.endswith(" USER: <image>\nWhat? ASSISTANT:")
    assert ours.tokenize(prompt) == theirs_of(them, prompt)
    ids, _ = tokenize(ours, [Message("user", (PICTURE, "What?"))])
    assert ids == ours.tokenize(prompt)
    folder = shutil.copytree(folders["llava"], tmp_path / "llava")
    (folder / "chat_template.jinja").unlink()
    alone = ours_of(folder)
    assert (alone.template, alone.image_token) == ("vicuna_v1", "<image>")
    alone.template = "chat_template"
    with pytest.raises(InputError, match="found 'chat_template', and no chat template in the f"):
        alone.chat("What?")
    said = inspect(folders["llava"])
    assert "template chat_template, the folder's own" in said


@pytest.mark.parametrize("template", ["chat_template", "vicuna_v1"])
def test_placeholders_in_peoples_words_are_words(folders: dict[str, Path], template: str):
    ours = ours_of(folders["llava"])
    ours.template = template
    said = "Is <image> <image> a tag?"
    ids, pictures = tokenize(ours, [Message("user", (PICTURE, said))])
    assert (ids.count(-200), len(pictures)) == (1, 1)
    plain, _ = tokenize(ours, [Message("user", (PICTURE, "Is it a tag?"))])
    where = plain.index(-200)
    assert ids[: where + 3] == plain[: where + 3]
    text = ours.tokenizer.decode([i for i in ids if i != -200])
    assert said in text and 32000 not in ids


TEXTS_AND_PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% else %}{{ raise_exception('no picture first') }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def test_templates_that_fail(folders: dict[str, Path]):
    ours = ours_of(folders["llava"])
    for template, line in (
        ("{{ raise_exception('no system here') }}", r"fails \(TemplateError: no system here\)"),
        ("{% for m in", r"fails \(TemplateSyntaxError: "),
        ("{{ messages.__class__.__mro__ }}", r"fails \(SecurityError: "),
        ("hello", "writes 0 <image> for 1 picture"),
        (TEXTS_AND_PARTS, r"takes parts and fails on a picture \(TemplateError: no picture"),
    ):
        ours.chat_template = template
        with pytest.raises(InputError, match=f"chat_template: found one that {line}"):
            ours.chat("What?")


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("chat_template.jinja", b"\xe9", r"no text \('utf-8' codec"),
        ("chat_template.json", b'{"chat_template": ["x"]}', r"\['x'\], expected a template"),
        ("chat_template.json", b'{"chat_template": [{"name": "a"}]}', r"\[\{'name': 'a'\}\], exp"),
        ("chat_template.json", b'{"chat_template": [{"name": ["a"]}]}', r"\[\{'name': \['a'\]"),
    ],
)
def test_files_that_hold_no_template(tmp_path: Path, name: str, content: bytes, found: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}\S*( \S+)?: found {found}"):
        read_chat_template(tmp_path)


ENDS = LLAVA.replace("{{ part.text + ' ' }}", "{{ part.text }}{{ eos_token if message['role'] == "
                     "'assistant' else ' ' }}")  # fmt: skip


def test_training_in_the_folders_own_template(folders: dict[str, Path], tmp_path: Path):
    ours, them = both(folders["llava"])
    turns = [("<image>\nWhat?", "A cat."), ("Sure?", "Yes.")]
    with pytest.raises(InputError, match="found one with no stop token after an answer"):
        ours.labels(turns)
    folder = shutil.copytree(folders["llava"], tmp_path / "llava")
    (folder / "chat_template.jinja").write_text(ENDS)
    ours, them = both(folder)
    ids, labels = ours.labels(turns)
    assert ids == theirs_of(them, ours.render(turns))
    kept = [i for i, label in zip(ids, labels, strict=True) if label == i]
    assert all(label in (i, -100) for i, label in zip(ids, labels, strict=True))
    assert "".join(ours.tokenizer.decode(kept).split()) == "ACat.</s>Yes.</s>".replace("C", "c")
    ours.template = "vicuna_v1"
    ids, labels = ours.labels(turns)
    prompt = ours.render(turns)
    assert ids == ours.tokenize(prompt)
    assert labels[-1] == ids[-1] == 2 and labels[0] == -100


@pytest.mark.parametrize("name", ["llava", "next"])
@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 14},
        {"num_additional_image_tokens": 0},
        {"vision_feature_select_strategy": "full"},
        {"vision_feature_select_strategy": None},
        {"vision_feature_select_strategy": None, "num_additional_image_tokens": 0},
        {"image_token": "<pic>"},
    ],
)
@torch.no_grad()
def test_what_the_processor_counts(
    folders: dict[str, Path], tmp_path: Path, name: str, changes: dict
):
    """Refused by name where transformers' model refuses what its processor counts."""
    folder = shutil.copytree(folders[name], tmp_path / name)
    file = folder / "processor_config.json"
    write_json(file, read_json(file) | changes)
    them = transformers.AutoProcessor.from_pretrained(folder)
    try:
        inputs = them(images=[PICTURE], text=f"{them.image_token} x", return_tensors="pt")
        transformers.AutoModelForImageTextToText.from_pretrained(folder)(**inputs)
    except (ValueError, RuntimeError):
        with pytest.raises(InputError, match="processor_config.json: .*; |<pic>: found none in"):
            ours_of(folder)
    else:
        count = int(ours_of(folder)([PICTURE], ["<image> x"]).mask.sum())
        assert count == inputs["input_ids"].shape[1]


def test_a_picture_token_of_another_id(folders: dict[str, Path], tmp_path: Path):
    folder = shutil.copytree(folders["llava"], tmp_path / "llava")
    config = read_json(folder / "config.json")
    key = "image_token_id" if "image_token_id" in config else "image_token_index"
    write_json(folder / "config.json", config | {key: 31999})
    with pytest.raises(InputError, match="<image>: found id 32000 in the tokenizer, expected 319"):
        ours_of(folder)


def test_unknown_keys_of_the_processor(folders: dict[str, Path], tmp_path: Path):
    folder = shutil.copytree(folders["llava"], tmp_path / "llava")
    file = folder / "processor_config.json"
    write_json(file, read_json(file) | {"video_processor": {"size": 3}})
    with pytest.raises(InputError, match="processor_config.json: video_processor: found {'size"):
        converters.open_source(folder)


def test_a_fusion_keeps_the_first_members_prompts(folders: dict[str, Path], tmp_path: Path):
    """Its template, as a file of its own, and its way to tokenise."""
    second = shutil.copytree(folders["llava"], tmp_path / "second")
    (second / "chat_template.jinja").write_text(BOS)
    members = {"a": folders["llava"], "b": second}
    options = {"method": "linear", "family": False}
    converters.fuse(members, tmp_path / "out", account=False, **options)
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["template"], config["image_token"]) == ("chat_template", "<image>")
    assert [branch["code"] for branch in config["branches"]] == ["transformers"] * 2
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == LLAVA
    expected, found = ours_of(folders["llava"]), ours_of(tmp_path / "out")
    assert found.chat("What?") == expected.chat("What?")
    assert found.tokenize(found.chat("What?")) == expected.tokenize(expected.chat("What?"))
    params = {"weights": [0.5, 0.5]}
    fusion = Fusion(Request(members, "", template="vicuna_v1", params=params, **options))
    assert (fusion.result.template, fusion.result.image_token) == ("vicuna_v1", "<image>")
    fusion = Fusion(Request({"b": second, **members}, "", params=params, **options))
    assert fusion.source().chat_template == BOS


@pytest.mark.parametrize(("asked", "expected"), [(BOS, BOS), (None, LLAVA)])
def test_the_chat_template_of_a_recipe(
    folders: dict[str, Path], tmp_path: Path, asked: str | None, expected: str
):
    """In place of the first member's; written, and in memory."""
    parts = [{"model": str(folders[x]), "parameters": {"weight": 1}} for x in ("llava", "next")]
    recipe = {"models": parts, "merge_method": "linear", "tokenizer_source": "base"}
    recipe["base_model"] = str(folders["llava"])
    write_json(tmp_path / "recipe.yml", recipe | ({"chat_template": asked} if asked else {}))
    fusion = Fusion(Request({}, str(tmp_path / "out"), recipe=tmp_path / "recipe.yml"))
    assert fusion.source().chat_template == expected
    converters.fuse({}, tmp_path / "out", recipe=tmp_path / "recipe.yml", account=False)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == expected
    assert read_json(tmp_path / "out" / "config.json")["template"] == "chat_template"
    assert '"visionfuse"]' in (tmp_path / "out" / "MERGE.md").read_text().splitlines()[2]


def test_a_tokenizer_without_the_pictures_token(folders: dict[str, Path]):
    """As of a fusion on a base that lacks it: the same ids."""
    ours = ours_of(folders["llava"])
    expected = [ours.tokenize(prompt) for prompt in (*PROMPTS, "a</s> <image></s>b")]
    ours.image_token = "<other>"
    renamed = [prompt.replace("<image>", "<other>") for prompt in (*PROMPTS, "a</s> <image></s>b")]
    assert [ours.tokenize(prompt) for prompt in renamed] == expected
    ours.tokenizer.eos_token = None  # nothing to stand in
    assert ours.tokenize("no picture") == expected[PROMPTS.index("no picture")]
    with pytest.raises(InputError, match="found neither <other> nor an end of text"):
        ours.tokenize("<other>")
