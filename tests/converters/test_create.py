"""New models out of an LLM's folder and encoders' folders: made, written, read back."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.torch import save_file

import converters
from converters.create import describe
from converters.files.reader import read_weights
from converters.load import flatten
from tests import checkpoints
from tests.vfjax.vision.encoders import test_convnext
from vfjax import InputError, Model, Processor
from vfjax.model import forward
from vfjax.sharding import make_mesh
from vfjax.vision.images import preprocess

PICTURE = np.random.default_rng(5).integers(0, 256, (30, 44, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llm`, `llava`, and one folder a kind of encoder, all with 16 patches a picture."""
    path = tmp_path_factory.mktemp("folders")
    checkpoints.llama_folder(path / "llm", 1, num_hidden_layers=1)
    (path / "llm/generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    checkpoints.upstream_llava_folder(path / "llava", 2, vocab_size=320)
    (path / "llava/preprocessor_config.json").write_text("{}")
    for seed, kind in enumerate(checkpoints.TOWERS):
        checkpoints.tower_folder(path / kind, kind, seed)
    checkpoints.tower_folder(path / "coarse", "dinov2", patch_size=14, image_size=28)
    (path / "convnext").mkdir()
    twin = checkpoints.randomize(test_convnext.Twin(), seed=4)
    state = {f"visual.trunk.{name}": x for name, x in twin.state_dict().items()}
    save_file(state, path / "convnext/open_clip_model.safetensors")
    sizes = {"golden_depths": test_convnext.DEPTHS, "golden_dims": test_convnext.WIDTHS}
    vision = {"timm_model_name": "convnext_large", "image_size": 64, **sizes}
    config = {"model_cfg": {"vision_cfg": vision}}
    checkpoints.write_json(path / "convnext/open_clip_config.json", config)
    return path


def logits(model: Model, processor: Processor) -> np.ndarray:
    batch = processor(images=[PICTURE], prompts=[processor.chat("What is it?")])
    return np.asarray(forward(model, batch))[batch.mask]


def exported(path: Path) -> tuple[dict[str, Any], set[str]]:
    """config.json and the names of the connector's tensors."""
    parts = ("mm_projector", ".connector.", "model.sampler.", "vlm_uni_")
    names = {n for n in read_weights(path) if any(part in n for part in parts)}
    return json.loads((path / "config.json").read_text()), names


MLP = {f"model.mm_projector.{i}.{end}" for i in (0, 2) for end in ("weight", "bias")}


@pytest.mark.parametrize(
    ("encoder", "connector", "aux", "keys", "names", "tokens", "taps"),
    [
        (
            "clip",
            {"kind": "mlp"},
            None,
            {
                "model_type": "llava_llama",
                "mm_projector_type": "mlp2x_gelu",
                "mm_vision_select_layer": -2,
                "mm_vision_select_feature": "patch",
                "mm_hidden_size": 32,
                "image_aspect_ratio": "pad",
            },
            MLP,
            16,
            {"encoder": (-2,)},
        ),
        (
            "siglip",  # no class token
            {"kind": "mlp", "projector": "linear", "select": -1},
            None,
            {"mm_projector_type": "linear", "mm_vision_select_feature": "cls_patch"},
            {"model.mm_projector.weight", "model.mm_projector.bias"},
            16,
            {"encoder": (-1,)},
        ),
        (
            "dinov2",
            {"kind": "dci", "side": 2},
            None,
            {
                "mm_dense_connector_type": "dci",
                "mm_dense_connector_layers": 3,
                "mm_dense_connector_side": 2,
                "mm_hidden_size": 96,
            },
            MLP,
            4,
            {"encoder": (-2, 0, 1, 2)},
        ),
        (
            "clip",
            {"kind": "sti"},
            None,
            {"mm_dense_connector_type": "sti", "mm_hidden_size": 32},
            MLP,
            16 + 2 + 2,
            {"encoder": (-2, 0, 1)},
        ),
        (
            "dinov2_with_registers",  # five tokens before the patches: not LLaVA's layout
            {"kind": "sci"},
            None,
            {"model_type": "visionfuse"},
            {n.replace("model.mm_projector", "branches.dinov2.connector") for n in MLP},
            16,
            {"encoder": (-2, 0, 1)},
        ),
        (
            "clip",
            {"kind": "comm", "layers": [1, 3], "layers_aux": [3], "blocks": 2, "ratio": 2},
            "dinov2_with_registers",
            {
                "model_type": "llava_llama",
                "mm_projector_type": "comm",
                "mm_comm": {"layers": [1, 3], "layers_aux": [3], "blocks": 2, "ratio": 2},
                "mm_vision_tower_aux": "vision_tower_aux",
            },
            {
                f"model.mm_projector.{part}.{name}"
                for part, count in (("encoder", 2), ("aux", 1))
                for name in (
                    "logits",
                    *(
                        f"layers.{i}.{layer}.{end}"
                        for i in range(count)
                        for layer in ("norm", "linear")
                        for end in ("weight", "bias")
                    ),
                )
            }
            | {
                f"model.mm_projector.{layer}.{end}"
                for layer in ("projector", *(f"aux.mlp.{i}.fc{k}" for i in (0, 1) for k in (1, 2)))
                for end in ("weight", "bias")
            },
            16,
            {"encoder": (1, 3), "aux": (3,)},
        ),
        (
            "clip",
            {"kind": "mgm", "image_grid": 2, "image_global": True, "image_size_aux": 128},
            "convnext",
            {
                "model_type": "mgm",
                "architectures": ["MGMLlamaForCausalLM"],
                "mm_hidden_size_aux": sum(test_convnext.WIDTHS),
                "image_size_aux": 128,
                "image_grid": 2,
                "image_global": True,
            },
            MLP
            | {
                f"model.vlm_uni_{part}_projector.{layer}.{end}"
                for part in ("query", "aux", "val")
                for layer in (0, 1)
                for end in ("weight", "bias")
            },
            5 * 16,
            {"encoder": (-2,), "aux": (0, 1, 2, 3)},
        ),
        (
            "clip",
            {"kind": "slime", "queries": 4, "top_p": 0.5, "separator": 7},
            None,
            {
                "mm_projector_type": "gated",
                "mm_resampler_dim": 4,
                "mm_resampler_topp": 0.5,
                "seperator": 7,
            },
            {
                *(n.replace("mm_projector.", "mm_projector.projection.") for n in MLP),
                "model.mm_projector.w_gate",
                *(
                    f"model.{part}.{name}"
                    for part in ("mm_projector.attn", "sampler.post_qformer")
                    for name in (
                        *("query", "pos_embed", "attn.in_proj_weight", "attn.in_proj_bias"),
                        *(
                            f"{layer}.{end}"
                            for layer in ("ln_q", "ln_kv", "ln_post", "attn.out_proj")
                            for end in ("weight", "bias")
                        ),
                    )
                ),
            },
            16 + 1 + 7 * 4,
            {"encoder": (-2,)},
        ),
    ],
)
def test_round_trip(
    folders: Path,
    tmp_path: Path,
    encoder: str,
    connector: dict[str, Any],
    aux: str | None,
    keys: dict[str, Any],
    names: set[str],
    tokens: int,
    taps: dict[str, tuple[int, ...]],
):
    second = folders / aux if aux else None
    made = converters.create(folders / "llm", folders / encoder, connector, aux=second, seed=3)
    expected = logits(*made)
    assert np.isfinite(expected).all()
    converters.export(made[0], tmp_path / "out")
    config, found = exported(tmp_path / "out")
    assert {key: config.get(key) for key in keys} == keys
    assert found == names
    (tmp_path / "out").rename(tmp_path / "elsewhere")  # nothing but the folder itself is needed
    read = converters.load(tmp_path / "elsewhere")
    np.testing.assert_array_equal(logits(*read), expected)
    assert read[1].template == made[1].template and read[1].stop_ids == made[1].stop_ids == (2, 7)
    for model, _ in (made, read):
        (branch,) = model.config.branches
        assert branch.tokens == tokens and branch.architecture.connector.taps == taps
    one, two = (flatten(nnx.state(model)) for model, _ in (made, read))
    assert one.keys() == two.keys()
    for name, param in one.items():
        np.testing.assert_array_equal(param.get_value(), two[name].get_value(), err_msg=name)


def test_onevision_around_qwen2(folders: Path, tmp_path: Path):
    """In its authors' layout, the newline drawn as they draw it."""
    checkpoints.llama_folder(tmp_path / "llm", 1, num_hidden_layers=1, model_type="qwen2")
    kind = {"kind": "onevision", "most": 4}
    model, processor = converters.create(tmp_path / "llm", folders / "siglip", kind, seed=3)
    assert processor.template == "qwen_1_5"
    converters.export(model, tmp_path / "out")
    config, found = exported(tmp_path / "out")
    assert found == MLP and "model.image_newline" in read_weights(tmp_path / "out")
    assert config["model_type"] == "llava_qwen"
    assert config["image_aspect_ratio"] == "anyres_max_4"
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    again, read = converters.load(tmp_path / "elsewhere")
    assert read.template == "qwen_1_5" and again.config == model.config
    (branch,) = model.config.branches
    assert branch.architecture.most == 4 and len(branch.architecture.pinpoints) == 36
    one, two = (flatten(nnx.state(x)) for x in (model, again))
    for name, param in one.items():
        np.testing.assert_array_equal(param.get_value(), two[name].get_value(), err_msg=name)
    newline = np.asarray(one["branches/siglip/connector/newline"].get_value())
    assert 0.6 < newline.std() * 32**0.5 < 1.4  # normal, of deviation 1 / sqrt(32)


@pytest.mark.parametrize(
    ("llm", "kind", "layout", "template"),
    [
        ("qwen2", "mlp", "visionfuse", "qwen_1_5"),
        ("gemma", "sti", "visionfuse", "gemma"),
        ("llama", "onevision", "visionfuse", "vicuna_v1"),
        ("llama", "mlp", "llava", "vicuna_v1"),
    ],
)
def test_layout_and_template_by_the_llm(
    folders: Path, tmp_path: Path, llm: str, kind: str, layout: str, template: str
):
    checkpoints.llama_folder(tmp_path / "llm", 1, num_hidden_layers=1, model_type=llm)
    source = describe(tmp_path / "llm", folders / "clip", {"kind": kind})
    assert (source.layout, source.template) == (layout, template)
    assert source.llm["model_type"] == llm


def test_weights_are_of_the_folders_and_the_seed(folders: Path):
    """LLM and encoder as their folders hold them; the connector by the seed, mesh or not."""
    connector = {"kind": "mlp"}
    place = folders / "llm", folders / "clip", connector
    model, _ = converters.create(*place, seed=3)
    params = flatten(nnx.state(model))
    llm, _ = converters.load(folders / "llm")
    encoder = converters.load_encoder(folders / "clip")
    for start, part in (("llm/", llm.llm), ("branches/clip/encoder/", encoder)):
        for name, param in flatten(nnx.state(part)).items():
            np.testing.assert_array_equal(param.get_value(), params[start + name].get_value())
    mesh = make_mesh(4, 2)
    sharded = flatten(nnx.state(converters.create(*place, seed=3, mesh=mesh)[0]))
    for name, param in sharded.items():
        np.testing.assert_array_equal(param.get_value(), params[name].get_value(), err_msg=name)
    kernel = "branches/clip/connector/projector/layers/0/kernel"
    assert len(sharded[kernel].get_value().sharding.device_set) == 8
    other = flatten(nnx.state(converters.create(*place, seed=4, dtype="bfloat16")[0]))
    assert {p.dtype for p in other.values()} == {np.dtype(jnp.bfloat16)}
    assert not np.array_equal(other[kernel].get_value(), sharded[kernel].get_value())
    bias = kernel.replace("kernel", "bias")
    for name in (kernel, bias):  # torch's Linear: uniform, kernel and bias
        spread = np.abs(np.asarray(params[name].get_value())) * 32**0.5
        assert spread.max() < 1 and 0.4 < spread.mean() < 0.6
    flax = flatten(nnx.state(converters.create(*place, seed=3, init="flax")[0]))
    spread = np.asarray(flax[kernel].get_value()).std() * 32**0.5  # variance 1 / fan in
    assert 0.8 < spread < 1.2 and not np.asarray(flax[bias].get_value()).any()


def test_comm_shows_both_encoders_the_same_pixels(folders: Path):
    aux = folders / "dinov2"
    model, processor = converters.create(
        folders / "llm", folders / "clip", {"kind": "comm"}, aux=aux, aspect="crop"
    )
    (branch,) = model.config.branches
    batch = processor(images=[PICTURE], prompts=[processor.chat("?")])
    given, path = batch.images["clip"].given, branch.architecture
    one, two = (np.asarray(x)[0] for x in (given.pixels, given.others["aux"]))
    own = path.images, path.images_aux
    assert own[0].mean != own[1].mean and own[1].mean == (0.485, 0.456, 0.406)
    shown = [
        x * np.float32(s.std) + np.float32(s.mean) for x, s in zip((one, two), own, strict=True)
    ]
    np.testing.assert_allclose(*shown, atol=1e-6)
    np.testing.assert_array_equal(one, preprocess(Image.fromarray(PICTURE), own[0]))
    assert path.connector.aux.layers == (3,)  # the last quarter, at least one


def test_llm_of_a_multimodal_folder(folders: Path, tmp_path: Path):
    model, processor = converters.create(
        folders / "llava", folders / "siglip", {"kind": "mlp"}, template="llama3", aspect="crop"
    )
    whole, _ = converters.load(folders / "llava")
    assert (folders / "llava/preprocessor_config.json").is_file()
    for one, two in zip(jax.tree.leaves(model.llm), jax.tree.leaves(whole.llm), strict=True):
        np.testing.assert_array_equal(one, two)
    assert [b.name for b in model.config.branches] == ["siglip"]
    converters.export(model, tmp_path / "out")
    assert not (tmp_path / "out/preprocessor_config.json").exists()  # of another encoder
    again, reader = converters.load(tmp_path / "out")
    assert processor.template == reader.template == "llama3"
    assert again.config.branches[0] == model.config.branches[0]


@pytest.mark.parametrize(
    ("encoder", "connector", "more", "message"),
    [
        ("clip", {"kind": "comm"}, {"aux": "coarse"}, "16 tokens of one encoder, 4 of the other"),
        ("clip", {"kind": "comm", "join": "tokens"}, {"aux": "siglip"}, "widths 32 and 24"),
        ("clip", {"kind": "comm", "layers": [1, 4]}, {}, "found [1, 4], expected at least one"),
        ("clip", {"kind": "comm", "depth": 2}, {}, "depth: found no such option"),
        ("clip", {"kind": "resampler"}, {}, "found 'resampler', expected comm, sti, sci, dci"),
        ("clip", {}, {}, "kind: found None"),
        ("clip", {"kind": "mlp", "select": 5}, {}, "found [5], expected at least one index"),
        ("clip", {"kind": "sti", "side": 2}, {}, "side: found no such option"),
        ("clip", {"kind": "mlp"}, {"aux": "dinov2"}, "take 'comm' or 'mgm'"),
        ("clip", {"kind": "mgm"}, {}, "aux: found none, expected a ConvNeXt"),
        ("clip", {"kind": "mgm"}, {"aux": "dinov2"}, "expected an OpenCLIP ConvNeXt"),
        ("clip", {"kind": "mgm", "image_size_aux": 80}, {"aux": "convnext"}, "found 80"),
        ("clip", {"kind": "slime"}, {}, "separator: found 1919, expected the id of a token, below"),
        ("clip", {"kind": "mlp"}, {"template": "none"}, "template: found 'none'"),
        ("clip", {"kind": "mlp"}, {"aspect": "anyres"}, "aspect: found 'anyres'"),
        ("siglip", {"kind": "sci"}, {}, "layers: found 2, expected 3 or more"),
        ("bare", {"kind": "mlp"}, {}, "preprocessor_config.json: found no file"),
        ("nowhere", {"kind": "mlp"}, {}, "nowhere"),
    ],
)
def test_bad_input(
    folders: Path,
    tmp_path: Path,
    encoder: str,
    connector: dict[str, Any],
    more: dict[str, str],
    message: str,
):
    if encoder == "bare":
        (tmp_path / "bare").mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "bare" / name).write_bytes((folders / "clip" / name).read_bytes())
    place = tmp_path if encoder == "bare" else folders
    more = {k: folders / v if k == "aux" else v for k, v in more.items()}
    with pytest.raises(InputError) as error:
        converters.create(folders / "llm", place / encoder, connector, **more)
    assert message in str(error.value) and "\n" not in str(error.value)
