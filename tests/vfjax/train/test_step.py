"""A training step against the same model in torch: transformers' LLM and tower, PEFT's adapters."""

import copy
import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import converters
from tests.checkpoints import make_llama, upstream_llava_folder
from vfjax import Batch, InputError
from vfjax.llm.llama import Llama
from vfjax.sharding import by_token, divides, make_mesh, place
from vfjax.train import (
    Group,
    LoRAConfig,
    Optim,
    add_lora,
    answer_loss,
    gradients,
    init,
    make_step,
    merge_lora,
    split,
)
from vfjax.train import step as steps
from vfjax.train.flops import step_flops
from vfjax.train.optim import name_of

PICTURE, IGNORE = -200, -100
CONNECTOR = r"branches/.*/connector/"
GROUPS = {
    "projector": (Group(CONNECTOR, 1e-3),),
    "lora": (Group(CONNECTOR, 1e-3), Group(r".*/[ab]$", 3e-3)),
    "full": (Group(CONNECTOR, 1e-3, 0.1), Group("llm/", 3e-4, 0.1)),
}
LORA = LoRAConfig(rank=4, alpha=8.0)
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("train") / "llava"
    return path, upstream_llava_folder(
        path, llm=make_llama(1), weights="safetensors", vision={"num_hidden_layers": 2}
    )


def rows(step: int) -> tuple[list[np.ndarray], list[list[int]], list[list[int]]]:
    """Pictures, ids and labels of four rows of unlike lengths, the last without a picture."""
    rng = np.random.default_rng(step)
    pictures = list(rng.integers(0, 256, (3, 28, 28, 3), dtype=np.uint8))
    ids, labels = [], []
    for row in range(4):
        question = rng.integers(3, 300, 3 + row).tolist()
        answer = rng.integers(3, 300, 2 + 2 * row).tolist()
        start = [1, PICTURE, *question] if row < 3 else [1, *question]
        ids.append(start + answer)
        labels.append([IGNORE] * len(start) + answer)
    return pictures, ids, labels


def stacked(*batches: Batch) -> Batch:
    return jax.tree.map(lambda *x: np.stack(x), *batches)


def batch_of(processor, step: int) -> Batch:
    pictures, ids, labels = rows(step)
    return processor(pictures, input_ids=ids, labels=labels)


class Twin:
    """The same LLaVA in torch, with transformers' schedule, torch's clipping and AdamW."""

    def __init__(self, member, kind: str):
        member = copy.deepcopy(member)
        self.tower, self.connector, self.llm = member.tower, member.connector, member.llm
        for module in (self.tower, self.connector, self.llm):
            module.requires_grad_(False)
        self.connector.requires_grad_(True)
        if kind == "full":
            self.llm.requires_grad_(True)
        if kind == "lora":
            names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, bias="none")
            self.llm = peft.get_peft_model(self.llm, config)
        self.kind = kind

    def loss(self, processor, step: int) -> torch.Tensor:
        pictures, ids, labels = rows(step)
        pixels = torch.tensor(
            batch_of(processor, step).images["clip"].given.pixels[: len(pictures)]
        )
        states = self.tower(pixels.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
        visual = iter(self.connector(states[-2][:, 1:]))
        total, count = 0.0, 0
        for row, target in zip(ids, labels, strict=True):
            parts, goal = [], []
            for token, label in zip(row, target, strict=True):
                if token == PICTURE:
                    parts.append(next(visual))
                    goal += [IGNORE] * len(parts[-1])
                else:
                    parts.append(self.llm.get_input_embeddings()(torch.tensor([token])))
                    goal.append(label)
            logits = self.llm(inputs_embeds=torch.cat(parts)[None]).logits[0, :-1]
            goal = torch.tensor(goal[1:])
            total += torch.nn.functional.cross_entropy(
                logits, goal, ignore_index=IGNORE, reduction="sum"
            )
            count += int((goal != IGNORE).sum())
        return total / count

    def named(self) -> dict[str, torch.Tensor]:
        """What trains, under our names."""
        out = {}
        for module, start in ((self.connector, "connector"), (self.llm, "llm")):
            out |= {
                ours(f"{start}.{name}"): p
                for name, p in module.named_parameters()
                if p.requires_grad
            }
        return out

    def optimizer(self, groups) -> tuple[torch.optim.Optimizer, object]:
        params = []
        for name, p in self.named().items():
            group = groups[0] if name.startswith("branches/") else groups[1]
            decay = group.weight_decay if p.ndim > 1 else 0.0
            params.append({"params": [p], "lr": group.learning_rate, "weight_decay": decay})
        adamw = torch.optim.AdamW(params)
        schedule = transformers.get_cosine_schedule_with_warmup(adamw, 2, STEPS)
        return adamw, schedule


def ours(name: str) -> str:
    """A torch parameter's name in vfjax."""
    name = name.replace("base_model.model.", "").replace(".default", "")
    swaps = (
        ("connector.0.", "branches.clip.connector.projector.layers.0."),
        ("connector.2.", "branches.clip.connector.projector.layers.1."),
        ("llm.model.layers.", "llm.blocks."),
        ("llm.model.embed_tokens.weight", "llm.embedding"),
        ("llm.model.norm", "llm.norm"),
        ("llm.lm_head", "llm.head"),
        ("self_attn.", "attn."),
        ("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "out"),
        ("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down"),
        ("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2"),
        ("lora_A.weight", "a"), ("lora_B.weight", "b"),
    )  # fmt: skip
    for old, new in swaps:
        name = name.replace(old, new)
    norm = "norm" in name
    return name.replace(".weight", ".scale" if norm else ".kernel").replace(".", "/")


def numpy_of(name: str, x: torch.Tensor) -> np.ndarray:
    x = x.detach().numpy()
    return x if x.ndim == 1 or name == "llm/embedding" else x.T


def flat(state: nnx.State) -> dict[str, np.ndarray]:
    return {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(state)}


def prepared(folder, kind: str):
    """Ours and the twin, with the same adapters."""
    path, member = folder
    model, processor = converters.load(path, dtype="float32")
    twin = Twin(member, kind)
    if kind == "lora":
        add_lora(model, LORA)
        rng = np.random.default_rng(5)
        names = dict(twin.named())
        for _, layer in nnx.iter_modules(model):
            if hasattr(layer, "b") and hasattr(layer, "scale"):  # B = 0 would hide A's gradient
                layer.b[...] = jnp.asarray(rng.normal(0, 0.02, layer.b.shape), jnp.float32)
        graph, params, frozen = split(model, GROUPS[kind])
        for name, value in flat(params).items():
            if name.endswith(("/a", "/b")):
                with torch.no_grad():
                    names[name].copy_(torch.tensor(value.T))
    else:
        graph, params, frozen = split(model, GROUPS[kind])
    assert set(flat(params)) == set(twin.named())
    return processor, graph, params, frozen, twin


def close(found: np.ndarray, expected: np.ndarray, limit: float, what: str) -> None:
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12)
    assert error <= limit, (what, error)


@pytest.mark.parametrize("kind", GROUPS)
def test_loss_and_gradients_equal_torch(folder, kind: str) -> None:
    processor, graph, params, frozen, twin = prepared(folder, kind)
    expected = twin.loss(processor, 0)
    expected.backward()
    expected = expected.detach()
    loss, grads = jax.jit(gradients, static_argnames="dtype")(
        graph, params, frozen, stacked(batch_of(processor, 0)), dtype=jnp.float32
    )
    assert abs(float(loss) / float(expected) - 1) < 1e-5
    found = flat(grads)
    for name, p in twin.named().items():
        close(found[name], numpy_of(name, p.grad), 1e-4, name)


@pytest.mark.parametrize("kind", GROUPS)
def test_twenty_steps_equal_torch(folder, kind: str) -> None:
    """AdamW, warm-up and cosine, clipping, a rate and a decay for each group."""
    processor, graph, params, frozen, twin = prepared(folder, kind)
    optim = Optim(STEPS, warmup=0.1, clip=1.0)
    tx = optim.build(GROUPS[kind])
    state = init(params, tx, None)
    step = make_step(graph, tx, state)
    adamw, schedule = twin.optimizer(GROUPS[kind])
    for i in range(STEPS):
        state, metrics = step(state, frozen, stacked(batch_of(processor, i)))
        loss = twin.loss(processor, i)
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(twin.named().values()), 1.0)
        adamw.step()
        schedule.step()
        assert abs(float(metrics["loss"]) / loss.item() - 1) < 1e-3
        assert abs(float(metrics["grad_norm"]) / float(norm) - 1) < 1e-2
    found = flat(state.params)
    for name, p in twin.named().items():
        close(found[name], numpy_of(name, p), 1e-3, name)
    assert step._cache_size() == 1


def test_accumulated_parts_equal_one_batch(folder) -> None:
    """Tokens count alike, however unevenly the parts' rows are labelled."""
    path, _ = folder
    model, processor = converters.load(path, dtype="float32")
    pictures, ids, labels = rows(3)
    graph, params, frozen = split(model, GROUPS["full"])
    whole = stacked(processor(pictures, input_ids=ids, labels=labels))
    parts = stacked(
        processor(pictures[:2], input_ids=ids[:2], labels=labels[:2]),
        processor([pictures[2], pictures[2]], input_ids=[ids[2], [1, PICTURE, 5]],
                  labels=[labels[2], [IGNORE] * 3]),
    )  # fmt: skip
    labels[3] = [IGNORE] * len(ids[3])
    whole = stacked(processor(pictures, input_ids=ids, labels=labels))
    expected, grads = gradients(graph, params, frozen, whole, jnp.float32)
    found, ours = gradients(graph, params, frozen, parts, jnp.float32)
    assert abs(float(found) / float(expected) - 1) < 1e-5
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(grads), strict=True):
        close(np.asarray(a), np.asarray(b), 1e-4, "gradient")


def test_merged_adapters_say_the_same(folder) -> None:
    path, _ = folder
    model, processor = converters.load(path, dtype="float32")
    add_lora(model, LORA)
    for _, layer in nnx.iter_modules(model):
        if hasattr(layer, "b") and hasattr(layer, "scale"):
            layer.b[...] = 0.1 * jax.random.normal(jax.random.key(0), layer.b.shape)
    batch = batch_of(processor, 0)
    expected = np.asarray(model(batch))[batch.mask]
    found = np.asarray(merge_lora(model)(batch))[batch.mask]
    close(found, expected, 1e-5, "logits")
    assert not any(name.endswith("/a") for name in flat(nnx.state(model)))


def test_state_is_sharded_as_its_parameters(folder) -> None:
    """Moments lie where the parameter lies; what is frozen has none; one compilation."""
    path, _ = folder
    mesh = make_mesh(4, 2)
    model, processor = converters.load(path, mesh=mesh, dtype="float32")
    graph, params, frozen = split(model, GROUPS["full"])
    tx = Optim(STEPS).build(GROUPS["full"])
    state = init(params, tx, mesh)
    step = make_step(graph, tx, state, mesh=mesh)
    sizes = sorted(x.size for x in jax.tree.leaves(params))
    for i in range(2):
        batches = place(stacked(batch_of(processor, i)), mesh)
        state, metrics = step(state, frozen, batches)
    assert step._cache_size() == 1
    moments = [x for x in jax.tree.leaves(state.opt) if x.ndim]
    assert sorted(x.size for x in moments) == sorted(itertools.chain(sizes, sizes))
    specs = {x.sharding.spec for x in moments if x.shape == (32, 48)}  # gate and up
    assert specs == {PartitionSpec("fsdp", "model")}

    alone, _ = converters.load(path, dtype="float32")
    graph, params, frozen = split(alone, GROUPS["full"])
    single = init(params, tx, None)
    plain = make_step(graph, tx, single)
    for i in range(2):
        single, expected = plain(single, frozen, stacked(batch_of(processor, i)))
    assert abs(float(metrics["loss"]) / float(expected["loss"]) - 1) < 1e-5


def test_activations_by_token(folder) -> None:
    """Sequence parallelism: the same loss, and what lies between blocks is divided by tokens."""
    path, _ = folder
    mesh, found = make_mesh(2, 4), {}
    for stream in (None, by_token(mesh)):
        model, processor = converters.load(path, mesh=mesh, dtype="float32")
        model.llm.remat, model.llm.stream = True, stream
        graph, params, frozen = split(model, GROUPS["full"])
        tx = Optim(STEPS).build(GROUPS["full"])
        state = init(params, tx, mesh)
        batches = place(stacked(batch_of(processor, 0)), mesh)
        b, t = batches.tokens.shape[1:]
        program = make_step(graph, tx, state, mesh=mesh).lower(state, frozen, batches).compile()
        share = f"f32[{b // 2},{t // 4},{model.config.llm.width}]"
        _, metrics = program(state, frozen, batches)
        found[stream] = float(metrics["loss"]), share in program.as_text()
    (plain, before), (loss, after) = found.values()
    assert abs(loss / plain - 1) < 1e-5
    assert after and not before
    assert not divides(by_token(mesh), (2, 6, 32)) and divides(by_token(mesh), (2, 8, 32))


def test_shared_parameters_are_gathered(folder) -> None:
    """fsdp: what lies between blocks stays divided by rows; only gradients are reduced."""
    path, _ = folder
    mesh = make_mesh(1, 1, 8)
    model, processor = converters.load(path, mesh=mesh, dtype="float32")
    graph, params, frozen = split(model, GROUPS["full"])
    state = init(params, Optim(STEPS).build(GROUPS["full"]), mesh)
    pictures, ids, labels = rows(0)
    batch = stacked(processor(2 * pictures, input_ids=2 * ids, labels=2 * labels))
    over = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    batches = jax.device_put(batch, over)
    step = make_step(graph, Optim(STEPS).build(GROUPS["full"]), state, mesh=mesh)
    text = step.lower(state, frozen, batches).compile().as_text()
    reduced = " ".join(re.findall(r"= (.*?) all-reduce\(", text))
    tokens = batch.tokens.shape[-1]
    assert "all-gather(" in text and reduced
    assert not re.search(rf"\[\d+,{tokens},\d+\]", reduced)


def test_no_backward_through_what_is_frozen(tmp_path) -> None:
    """A frozen encoder's block adds its eight forward products, and none of a backward pass."""
    products = {}
    for layers in (2, 3):
        path = tmp_path / str(layers)
        vision = {"num_hidden_layers": layers}
        upstream_llava_folder(path, llm=make_llama(1), weights="safetensors", vision=vision)
        model, processor = converters.load(path, dtype="float32")
        graph, params, frozen = split(model, GROUPS["projector"])
        batches = stacked(batch_of(processor, 0))
        lowered = jax.jit(gradients, static_argnames="dtype").lower(
            graph, params, frozen, batches, dtype=jnp.float32
        )
        products[layers] = lowered.as_text().count("stablehlo.dot_general")
    assert products[3] - products[2] == 8


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((Group("connectr", 1e-3),), "train[0].pattern: found 'connectr'"),
        ((Group(".*", 1e-3), Group("llm/", 1e-3)), "train[1].pattern: found 'llm/'"),
    ],
)
def test_a_pattern_that_names_nothing(folder, groups, message: str) -> None:
    model, _ = converters.load(folder[0])
    with pytest.raises(InputError) as error:
        split(model, groups)
    assert message in str(error.value)


def test_lora_where_there_is_no_layer(folder) -> None:
    model, _ = converters.load(folder[0])
    with pytest.raises(InputError, match=r"lora\.pattern: found 'vision/"):
        add_lora(model, LoRAConfig(pattern="vision/.*"))


def test_an_answer_behind_a_token_that_is_left_out(folder) -> None:
    """It is predicted from the last token that was read, as if the other were cut out."""
    model, processor = converters.load(folder[0], dtype="float32")
    branch = model.branches["clip"]
    visual_tokens = type(branch).visual_tokens

    def left_out(self, *args, **more):
        out = visual_tokens(self, *args, **more)
        keep = jnp.arange(len(out.values)) % 16 != 15  # each picture's last
        return dataclasses.replace(out, keep=keep)

    pictures, ids, labels = rows(1)
    ids, labels = [[1, 7, PICTURE, 9, 10, 11]], [[IGNORE] * 3 + [9, 10, 11]]
    batch = processor(pictures[:1], input_ids=ids, labels=labels)
    whole, _ = answer_loss(model, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(branch), "visual_tokens", left_out)
        found, count = answer_loss(model, batch)
        hidden, mask, _ = model.read(batch)
    logits = model.llm.logits(hidden)[0][np.flatnonzero(np.asarray(mask[0]))]
    assert len(logits) == 20 and count == 3  # 21 with the one that was left out
    expected = -sum(jax.nn.log_softmax(logits[16 + i])[9 + i] for i in range(3))
    assert abs(float(found) / float(expected) - 1) < 1e-5
    assert abs(float(whole) / float(expected) - 1) > 1e-3


def test_logits_of_labelled_positions_alone(folder, monkeypatch) -> None:
    """In chunks, of which those without a label are left out; the loss and its gradients stay."""
    _, processor = converters.load(folder[0], dtype="float32")
    batches = stacked(batch_of(processor, 0))
    longest = max(len(row) - row.count(IGNORE) for row in rows(0)[2])

    def found() -> tuple[jax.Array, nnx.State]:
        model, _ = converters.load(folder[0], dtype="float32")
        graph, params, frozen = split(model, GROUPS["projector"])
        return jax.jit(lambda *x: gradients(graph, *x, batches, jnp.float32))(params, frozen)

    whole = found()
    monkeypatch.setattr(steps, "CHUNKS", batches.labels.shape[-1])
    monkeypatch.setattr(steps, "ROWS", 1)
    logits, seen = Llama.logits, []

    def counted(self, hidden: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: seen.append(hidden.shape[1]))
        return logits(self, hidden)

    monkeypatch.setattr(Llama, "logits", counted)
    for a, b in zip(*map(jax.tree.leaves, (whole, found())), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.effects_barrier()
    assert sum(seen) == 2 * longest  # forward, and again in the backward pass


def test_operations_of_a_step(folder) -> None:
    """The LLM's products by hand: forward, inputs' gradients, trained weights' gradients."""
    text = {"tokens": np.ones((1, 2, 8), np.int32), "visual": np.full((1, 2, 8), -1)}
    more = {"mask": np.ones((1, 2, 8), bool), "segments": np.zeros((1, 2, 8), np.int32)}
    batch = Batch(**text, **more, images={}, labels=text["tokens"])
    weights = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48) + 32 * 320
    scores = 2 * 4 * 8 * 8 * 8 * 2  # layers, heads, queries, keys, width of a head, two products
    forward = 2 * (16 * weights + 2 * scores)
    found = {}
    for kind in ("projector", "full"):
        model, _ = converters.load(folder[0], dtype="float32")
        found[kind] = step_flops(*split(model, GROUPS[kind]), batch)
    assert 2 * forward < found["projector"] < 2.2 * forward  # norms, softmax and the like
    assert found["full"] == pytest.approx(1.5 * found["projector"])
    model, processor = converters.load(folder[0], dtype="float32")
    seen = step_flops(*split(model, GROUPS["projector"]), stacked(batch_of(processor, 0)))
    assert seen > 2 * found["projector"]  # pictures, and longer rows


def test_names_of_parameters() -> None:
    keys = [jax.tree_util.GetAttrKey("connector"), jax.tree_util.DictKey("value")]
    assert name_of([*keys, jax.tree_util.DictKey("kernel")]) == "connector/value/kernel"
    assert name_of([*keys[:1], jax.tree_util.GetAttrKey("value")]) == "connector"
