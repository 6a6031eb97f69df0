"""Opening a checkpoint folder: its layout's normal form, with all its tensors in their places."""

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from converters import adapters
from converters.adapted import completed
from converters.files import gguf, hub
from converters.files.others import TOWER, no_model
from converters.params.table import Place, placed
from converters.quantised import lazy
from converters.source import LAYOUTS, TEMPLATE, Layout, Source, is_tower, layout_of
from converters.towers import Prefixes, Tensors, Tower, Towers, pairs
from converters.values import Values
from vfjax import InputError
from vfjax.errors import counted, cut
from vfjax.merge import LazyTensor, equal


def open_source(
    path: str | Path,
    *,
    towers: Mapping[str, str | Path] | None = None,
    tower_source: str = "auto",
    base: str | Path | None = None,
) -> Source:
    """A checkpoint folder in normal form; reads headers only, but for `settle`.

    Args:
        path: a folder with config.json and weights, or one that holds a LoRA adapter or a projector
            for a base LLM; or `org/name[@revision]`, see `hub.folder`. So too of `towers` and
            `base`.
        towers: name of a vision tower in config.json -> the folder where it is; so too of the base.
        tower_source: see `Towers.source`.
        base: folder of that base LLM, in place of the one that the configs name; of an `mmproj`
            file its LLM's GGUF file. A folder that is complete does not read it.

    Raises:
        InputError: no such folder, a config of no known layout, unreadable weights, a vision tower
            or base that is nowhere to be found, or tensors that don't fit the base; or the hub
            refuses one of them.
    """
    path = hub.folder(gguf.joined(path, base))
    if not path.is_dir() or not adapters.is_part(path) and not (path / "config.json").exists():
        raise no_model(path)
    places = Towers(towers or {}, tower_source)
    contents = adapters.read(path, base, places)
    config = contents.config
    Values(config, str(contents.home / "config.json")).text("model_type", None)
    layout = layout_of(config)
    if layout is None:
        kinds = ", ".join(sorted(x.name for x in LAYOUTS))
        tower = is_tower(config)
        raise InputError(
            contents.home / "config.json",
            found=f"model_type {cut(repr(config.get('model_type')))}" + ", a vision tower" * tower,
            expected=f"one of the layouts {kinds}",
            fix=TOWER if tower else "this kind of checkpoint is not supported",
        )
    source = layout.open(contents.home, config, places)
    template = source.template
    if all(branch.code == "transformers" for branch in source.branches):
        template = template or "plain"  # a template is not needed to open it there
    if source.branches and not template:
        source.table("llm")  # an LLM that is not known is said first
        raise InputError(
            contents.home / "config.json",
            found=f"no {TEMPLATE}, and an LLM of type {source.llm.get('model_type')!r}",
            expected="the name of one of vfjax.text.prompts.TEMPLATES",
            fix=f"add {TEMPLATE} with that which the model was trained with",
        )
    source = dataclasses.replace(
        source, path=path, template=template, base=contents.base, files=contents.files
    )
    tensors = contents.tensors
    if contents.base is not None:
        tied = source.config_of("llm").tied
        tensors = completed(contents, layout.prefixes(source), tied=tied)
    source = settled(assigned(source, layout, tensors, tower_source))
    found = [contents.tensors, *(tower.tensors for tower in source.towers.values())]
    every = (tensor for tensors in found for tensor in tensors.values())
    return dataclasses.replace(source, quantised=lazy.kinds(every))


def open_members(
    members: Mapping[str, str | Path],
    base: str | Path | None = None,
    towers: Mapping[str, str | Path] | None = None,
    below: Mapping[str, str] | None = None,
) -> dict[str, Source]:
    """Several folders in normal form, by name; those on the hub are downloaded side by side.

    Args:
        members: name -> folder, or name on the hub.
        base: what completes those that lack a base, and whose own is nowhere; or is on the hub
            alone: one that is given is not worth a download.
        towers: see `open_source`.
        below: name -> the LLM that an adapter is put on, whatever it was trained on.

    Raises:
        InputError: see `open_source`; a whole checkpoint where an adapter should be.
    """

    def one(path: str | Path, under: str | None) -> Source:
        path = hub.folder(path)
        own = under or adapters.named_base(path, towers, local=base is not None)
        source = open_source(path, towers=towers, base=own or base)
        if under is not None and source.base is None:
            raise InputError(
                f"{under}+{path}",
                found="a whole checkpoint behind the +",
                expected="an adapter",
                fix="name one of the two",
            )
        return source

    remote = sum(hub.parse(path) is not None for path in members.values())
    pool = ThreadPoolExecutor(max(1, remote))
    try:
        tasks = {n: pool.submit(one, path, (below or {}).get(n)) for n, path in members.items()}
        return {name: task.result() for name, task in tasks.items()}
    finally:  # of an error, or Ctrl-C, without waiting for what is still downloaded
        pool.shutdown(wait=False, cancel_futures=True)


def assigned(
    source: Source, layout: Layout, tensors: Mapping[str, LazyTensor], tower_source: str = "auto"
) -> Source:
    """The source with a folder's tensors distributed over its components.

    Args:
        source: what the layout made of config.json.
        layout: of the folder.
        tensors: all of the folder's.
        tower_source: see `Towers.source`.

    Raises:
        InputError: a tensor that belongs to no component, or a tower without weights.
    """
    names = placed(tensors, layout.prefixes(source))
    if unknown := sorted(set(tensors) - set(names)):
        raise InputError(
            f"{source.path}: {unknown[0]}",
            found=f"{counted(len(unknown), 'tensor')} belonging to no part",
            expected="the names of layout " + layout.name,
            fix="check that config.json belongs to these weights",
        )
    source = _held(source, [place for place, _ in names.values()], tower_source)
    parts: dict[str, Tensors] = {}
    spare: dict[str, Tensors] = {}
    found: dict[str, list[tuple[str, str]]] = {}
    unread = []
    for old, (place, pair) in names.items():
        if place.part in source.towers:
            unread.append(old)
            continue
        table = source.table(place.part)
        if table.spares(place.name):
            spare.setdefault(place.part, {})[old] = tensors[old]
        if not table.ignores(place.name):
            own = table.split(place.name, tensors[old]) or {place.name: tensors[old]}
            parts.setdefault(place.part, {}).update(own)
            found.setdefault(place.part, []).append(pair)
    prefixes: dict[str, Prefixes] = {part: pairs(each) for part, each in found.items()}
    for part, tower in source.towers.items():
        parts[part], spare[part], prefixes[part] = tower.tensors, tower.spare, tower.prefixes
    return dataclasses.replace(
        source, parts=parts, spare=spare, prefixes=prefixes, unread=tuple(sorted(unread))
    )


def settled(source: Source) -> Source:
    """The source with the head that its LLM's tensors say.

    Under a config that ties it to the embedding as transformers does (modeling_utils.py,
    tie_weights), by values: a head that equals the embedding is left out, one that does not is
    kept, and the LLM's config in the normal form is no longer tied. Of a head alone the embedding
    is taken. Without a head or a tie (LlamaModel saved alone) there are hidden states only.
    Whether Phi's head has a bias (PhiForCausalLM's does, LLaVA's around a Phi does not) no config
    says.
    """
    table, tensors = source.table("llm"), dict(source.parts.get("llm", {}))
    config = source.config_of("llm")
    (name, like) = next((rule.source, rule.like) for rule in table.rules if rule.like)
    seen = {
        "headless": not config.tied and name not in tensors and like in tensors,
        "head_bias": config.head_bias and name.replace(".weight", ".bias") in tensors,
    }
    source = dataclasses.replace(source, seen=seen)
    if not config.tied or name not in tensors:
        return source
    if like in tensors and not equal(tensors[name], tensors[like]):
        llm = {**source.llm, "tie_word_embeddings": False}
        return dataclasses.replace(source, llm=llm, own_head=True)
    head, same = tensors.pop(name), {}
    if like in tensors:
        same = {name: like}
    else:
        tensors[like] = head
    return dataclasses.replace(source, parts={**source.parts, "llm": tensors}, same=same)


def _held(source: Source, places: Sequence[Place], tower_source: str) -> Source:
    """The source with those of its towers in `held` whose tensors are read from the checkpoint."""
    there = {part for part, _ in places}
    towers, held = dict(source.towers), {}
    branches = {branch.name: branch for branch in source.branches}
    for part, tower in source.towers.items():
        own = _reads_own(part, tower, there, source.tuned, tower_source)
        if tower.repo is not None and not own:
            try:
                towers[part] = tower.whole(f"{source.path}: {part}")
                continue
            except hub.Absent:  # without a network only the checkpoint has it
                if part not in there:
                    raise
                own = True
        if own:
            held[part] = _as_deep(source, part, towers.pop(part), places)
            branch, name = source.encoders[part]
            branches[branch.name] = branches[branch.name].with_encoder(name, held[part].config)
        elif not tower.tensors:
            raise InputError(
                f"{source.path}: {part}",
                found=f"no weights here, nor in {tower.path or tower.places}",
                expected="the vision tower that config.json names",
                fix="download its weights",
            )
    return dataclasses.replace(source, branches=tuple(branches.values()), towers=towers, held=held)


def _as_deep(source: Source, part: str, tower: Tower, places: Iterable[Place]) -> Tower:
    """A tower with the layers that the checkpoint holds: the last may lack if no tap reads them.

    Dense Connector's code drops SigLIP's last layer before it saves (siglip_encoder.py).
    """
    table = source.table(part)
    count = table.layers(name for own, name in places if own == part)
    if not table.depth or count >= source.config_of(part).layers:
        return tower
    branch, name = source.encoders[part]
    where = branch.part("connector")
    connector = source.table(where).read(Values(branch.connector, f"{source.path}: {where}"))
    if not 0 <= min(connector.taps[name]) <= max(connector.taps[name]) <= count:
        return tower
    return dataclasses.replace(tower, config={**tower.config, table.depth: count})


def _reads_own(
    part: str, tower: Tower, there: Container[str], tuned: Container[str], tower_source: str
) -> bool:
    """Whether the checkpoint's own copy of a tower is read; `there` is what it holds."""
    if part in there and not tower.tensors and tower.repo is None:  # only the checkpoint has it
        return True
    if tower_source != "auto":
        return tower_source == "checkpoint"
    return part in there and part in tuned
