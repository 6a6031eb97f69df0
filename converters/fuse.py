"""Members' folders -> one fused folder: merged LLM, branches as they are; files to files."""

import dataclasses
import functools
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from converters.adapters import named_base
from converters.audit import audit, mapped, stat, unread
from converters.branches import Tensors, branch_name, branch_tensors, own_embeddings
from converters.card import CARD, PLOT, by_layer, card, plot
from converters.export import to_bytes, with_dtype
from converters.layouts import Source, assign, has_tokenizer, open_source, settle
from converters.load import float_dtype
from converters.mergekit import layer_lists, read_yaml, widest
from converters.request import Request, check_request, make_request
from converters.tables import LAYOUTS
from converters.tables.visionfuse import arrange, fused_config
from converters.towers import Towers
from converters.vocabulary import (
    BASE,
    one_head,
    one_vocabulary,
    said,
    same_tokens,
    same_vocabulary,
    tokenizer_files,
)
from converters.writer import Content, plan_shards, stage_of, write_folder
from vfjax import InputError, __version__
from vfjax.chat import CHAT_TEMPLATE
from vfjax.merge import (
    METHODS,
    Account,
    LazyTensor,
    Merged,
    Merger,
    Recipe,
    check_family,
    from_config,
)
from vfjax.merge.family import check_names, check_weights


def fuse(
    members: Mapping[str, str | Path],
    out: str | Path,
    *,
    progress: Callable[[int], object] | None = None,
    resume: bool = False,
    **options: Any,
) -> Source:
    """Fuses MLLMs of one family (VisionFuse, arXiv 2412.01289) and writes the result.

    All source files are read once before anything is written, if they have changed since they last
    were: for NaN, infinities and SHA-256.

    Args:
        members: see `Request`.
        out: folder to make.
        progress: called with the number of bytes after each write.
        resume: go on where a killed run of the same request stopped, if there is one.
        options: the other attributes of `Request`.

    Returns:
        The fused folder, opened.

    Raises:
        InputError: members of different families, unreadable folders, wrong arguments, NaN in a
            source, a source that changes meanwhile, `out` exists, disk full; nothing is left at
            `out` then.
    """
    fusion = Fusion(make_request(members, out, options))
    fusion.write(progress, resume)
    return open_source(out)


def open_member(path: str | Path, request: Request, below: str | None = None) -> Source:
    """A member, completed from the LLM `below` it, or that it names, or else from the base."""
    base = below or named_base(path, request.towers) or request.base
    source = open_source(path, towers=request.towers, base=base)
    if below is not None and source.base is None:
        raise InputError(
            f"{below}+{path}",
            found="a whole checkpoint behind the +",
            expected="an adapter",
            fix="name one of the two",
        )
    return source


def dry_run(members: Mapping[str, str | Path], out: str | Path, **options: Any) -> dict[str, Any]:
    """What `fuse` would do with the same arguments; reads headers only.

    Returns:
        "files", name -> bytes; "tensors", how many; "parameters"; "read", bytes of the sources;
        "methods", name -> number of tensors.

    Raises:
        InputError: as `fuse`, but for what only the values tell.
    """
    return Fusion(make_request(members, out, options)).describe()


class Fusion:
    """A request with its sources opened and its tensors planned; nothing is read but headers."""

    def __init__(self, request: Request):
        recipe: Recipe | None = None
        below: dict[str, str] = {}
        check_request(request)
        if request.recipe is not None:
            recipe, folders, below = read_yaml(request.recipe)
            if recipe.unread:
                skipped = ", ".join(recipe.unread)
                warnings.warn(f"{request.recipe}: the method does not read {skipped}", stacklevel=3)
            home = folders.pop(BASE, None)
            request = dataclasses.replace(request, members=folders, base=home)
        elif "weights" in getattr(METHODS.get(request.method), "params", ()):
            even = {"weights": (1 / len(request.members),) * len(request.members)}
            request = dataclasses.replace(request, params={**even, **request.params})
        self.request, self.out = request, Path(request.out)
        base = request.base
        opened = {
            name: open_member(path, request, below.get(name))
            for name, path in request.members.items()
        }
        self.base = None if recipe is None else recipe.base
        if base is not None:
            self.base, opened = BASE, {BASE: open_source(base, base=below.get(BASE)), **opened}
        elif self.base is not None:  # one of the members
            opened = {self.base: opened[self.base], **opened}
        self.opened = opened
        self.files = {
            f"{label}/{name}": path
            for label, source in opened.items()
            for name, path in source.weight_files().items()
        }
        self.before = {path: stat(path) for path in self.files.values()}
        rows: dict[str, Any] = {} if request.vocab is None else {"vocab_size": None}
        check_family({name: {**source.llm, **rows} for name, source in opened.items()})
        parts = {name: mapped(source) for name, source in opened.items()}
        self.skip = {
            f"{label}/{name}": names
            for label, source in opened.items()
            for names in [unread(source, self._read(label, parts[label]))]
            for name in source.weight_files()
        }
        self.llms = llms = one_head(opened, {name: part["llm"] for name, part in parts.items()})
        if request.family and request.recipe is None:
            same_tokens(list(opened.values()), llms.values())
        self.recipe = recipe or from_config(
            {
                "method": request.method,
                "members": list(request.members),
                "base": self.base,
                "params": dict(request.params),
                "rules": list(request.rules),
            }
        )
        self.merged = self._merge(one_vocabulary(llms, request.vocab))
        self.result = _describe(opened, list(request.members), self.out, request.template)
        self.result.llm = self._llm_config()
        owner = next((x for x in self._tokenizers() if has_tokenizer(x.home)), self.result)
        self.result.tokenizer = owner.tokenizer
        arrange(self.result, request.positions, request.mask)
        self.weights: Tensors = dict(self.merged)
        if request.export == "model":
            for name in request.members:
                self.weights |= branch_tensors(name, opened[name], parts[name])
            if request.router == "member":
                self.weights |= own_embeddings(self.result, opened, llms)

    def _read(self, label: str, parts: Mapping[str, Tensors]) -> Mapping[str, Tensors]:
        """The components that go into the output: without branches, the LLM alone."""
        whole = self.request.export == "model" and label in self.request.members
        return parts if whole else {"llm": parts["llm"]}

    def _merge(self, llms: Mapping[str, Mapping[str, LazyTensor]]) -> dict[str, Merged]:
        recipe, request = self.recipe, self.request
        if missing := sorted(set(recipe.models) - set(llms)):
            raise InputError(
                "recipe", found=f"model {missing[0]!r}", expected=", ".join(llms), fix="name it"
            )
        layers = self._layers
        if len({*layers.values()}) == 1:
            (first, names), *others = ((name, list(llms[name])) for name in llms)
            for label, other in others:
                check_names(label, other, first, names)
        plans = recipe.plan({name: list(x) for name, x in llms.items()}, layers)
        dtype = request.dtype or recipe.out_dtype or recipe.dtype
        merger = Merger(float_dtype(dtype), request.seed, request.account)
        like = next(iter(llms.values()))
        out: dict[str, Merged] = {}
        for name, plan in plans.items():
            members = [(said(label), llms[label][tensor]) for label, tensor in plan.members]
            base = None if plan.base is None else llms[plan.base[0]][plan.base[1]]
            label = "" if plan.base is None else said(plan.base[0])
            origin = None if base is None else (label, base)
            own = like[name].dtype if name in like else None
            if request.recipe is not None:
                own = widest([x for _, x in members] + ([] if base is None else [base]))
            out[name] = merger.add(name, plan.method, plan.params, members, origin, own)
        return out

    @functools.cached_property
    def _layers(self) -> dict[str, int]:
        return {name: s.table("llm").config(s.llm).layers for name, s in self.opened.items()}

    def _llm_config(self) -> dict[str, Any]:
        config = with_dtype(self.result.llm, widest(list(self.merged.values())))
        origins = self.recipe.origins(self._layers)
        config["num_hidden_layers"] = len(origins)
        config |= layer_lists({name: s.llm for name, s in self.opened.items()}, origins)
        config["vocab_size"] = self.merged["model.embed_tokens.weight"].shape[0]
        if "lm_head.weight" in self.merged:
            config["tie_word_embeddings"] = False
        return config

    def write(self, progress: Callable[[int], object] | None, resume: bool) -> None:
        """Reads the sources, writes the folder."""
        request = self.request
        self._check_stage()
        digests = audit(self.files, request.checksums, self.skip)
        self._check_weights()
        config = self.result.llm
        if request.export == "model":
            config = fused_config(self.result, self._record(digests))
        files: dict[str, Content] = {
            "config.json": to_bytes(config),
            **self._prompt_files(),
            CARD: lambda: self._card(digests),
        }
        if self._counted() and request.account and find_spec("matplotlib"):
            files[PLOT] = lambda: plot(self._rows, self._tuned)
        write_folder(
            self.out,
            {"": self.weights},
            files=files,
            shard_bytes=request.shard_bytes,
            progress=progress,
            key=self._key(),
            resume=resume,
        )

    def _check_stage(self) -> None:
        stage = stage_of(self.out.absolute()).resolve()
        for path in self.files.values():
            if stage in path.absolute().resolve().parents:
                raise InputError(
                    path.parent,
                    found="a source in the folder that is written to before it takes its name",
                    expected="sources elsewhere",
                    fix="move it, or choose another output",
                )

    def _prompt_files(self) -> dict[str, Content]:
        """The tokenizer's, and the first member's chat template, which may be another folder's."""
        files: dict[str, Content] = {**tokenizer_files(self._tokenizers())}
        if self.request.export == "model" and self.result.template == CHAT_TEMPLATE:
            files.pop("chat_template.json", None)
            files["chat_template.jinja"] = self.result.chat_template.encode()
        return files

    def _check_weights(self) -> None:
        if self.request.family and self.request.recipe is None:
            check_weights({said(label): tensors for label, tensors in self.llms.items()})

    def source(self) -> Source:
        """The folder that is not written, opened."""
        self._check_weights()
        config = fused_config(self.result, self._record({}))
        homes = [source.home for source in self._tokenizers()]
        home = next((x for x in homes if has_tokenizer(x)), homes[0])
        layout = next(x for x in LAYOUTS if x.name == "visionfuse")
        source = layout.open(home, config, Towers({}, "auto"))
        source.chat_template = self.result.chat_template
        assign(source, layout, self.weights, "auto")
        settle(source)
        return source

    def describe(self) -> dict[str, Any]:
        """See `dry_run`."""
        shards = plan_shards({"": self.weights}, self.request.shard_bytes)
        methods = [x.rule.method.name if x.rule else "unchanged" for x in self.merged.values()]
        return {
            "files": {shard.path: shard.size for shard in shards},
            "tensors": len(self.weights),
            "parameters": sum(math.prod(x.shape) for x in self.weights.values()),
            "read": sum(size for size, *_ in self.before.values()),
            "methods": dict(Counter(methods)),
        }

    def _key(self) -> str:
        """What decides the bytes, but for names and shapes; see `write_folder`."""
        options = dataclasses.asdict(dataclasses.replace(self.request, out=""))
        return json.dumps(
            [options, repr(self.recipe), list(self.before.values()), __version__], default=str
        )

    def _check_unchanged(self) -> None:
        for path, before in self.before.items():
            if not path.is_file() or stat(path) != before:
                raise InputError(
                    path,
                    found="a file that changed while it was read",
                    expected="the same file until the end",
                    fix="wait until it is whole, then run again",
                )

    def _counted(self) -> list[str]:
        """Tensors that all members in turn were merged into, from a base."""
        labels = [said(label) for label in self._tuned]
        return [
            name
            for name, x in self.merged.items()
            if x.rule and x.rule.has_base and [label for label, _ in x.sources[1:]] == labels
        ]

    @property
    def _tuned(self) -> list[str]:
        """The members but for one that is the base."""
        return [label for label in self.request.members if label != self.base]

    @functools.cached_property
    def _rows(self) -> dict[str, Account]:
        found = ((name, self.merged[name].account()) for name in self._counted())
        return by_layer((name, one) for name, one in found if one is not None)

    def _card(self, digests: Mapping[str, str]) -> bytes:
        self._check_unchanged()
        sources = {
            label: {
                "path": source.path.name,
                "files": {n: digests.get(f"{label}/{n}") for n in source.weight_files()},
            }
            for label, source in self.opened.items()
        }
        rows = self._rows if self.request.account else {}
        return card(self._record({}), sources, rows, self._tuned)

    def _record(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """What was done, from what: every source file by its SHA-256."""
        request = self.request
        record: dict[str, Any] = {"method": request.method, "params": dict(request.params)}
        if request.recipe is not None:
            record = {"recipe": Path(request.recipe).read_text()}
            if self.recipe.unread:
                record["unread"] = list(self.recipe.unread)
        if request.rules:
            record["rules"] = [list(rule) for rule in request.rules]
        if digests:
            record["sources"] = {
                label: {name: digests[f"{label}/{name}"] for name in source.weight_files()}
                for label, source in self.opened.items()
            }
        return record | {"seed": request.seed, "vfjax": __version__}

    def _tokenizers(self) -> list[Source]:
        """The folders to look for a tokenizer in: for a model the members', for an LLM the base's.

        But if a member's added tokens are kept, or a recipe names a source, its own.
        """
        order = list(self.opened.values())
        if self.request.export == "model":
            order = [self.opened[name] for name in self.request.members] + order[:1]
        wanted = self.recipe.tokenizer_source
        named = self.request.vocab if self.request.vocab in self.request.members else None
        if wanted in self.opened:
            named = wanted
        if wanted is not None:
            same_vocabulary(order)
        return order if named is None else [self.opened[named], *order]


def _describe(
    opened: Mapping[str, Source], members: Sequence[str], out: Path, template: str | None
) -> Source:
    """The fused folder's normal form: all members' branches, the first opened model's LLM."""
    reference = next(iter(opened.values()))
    branches = [
        {**branch, "name": branch_name(name, opened[name], branch["name"])}
        for name in members
        for branch in opened[name].branches
    ]
    llm = {**reference.llm, "architectures": [reference.table("llm").architecture]}
    first = opened[members[0]]
    template = template or first.template
    if template == CHAT_TEMPLATE and not first.chat_template:
        raise InputError(
            "template",
            found=f"{CHAT_TEMPLATE!r}, and no chat template in {first.path}",
            expected="a first member that has one, or the name of a template",
            fix="name another",
        )
    return Source(
        out,
        "visionfuse",
        {},
        llm,
        branches,
        template,
        chat_template=first.chat_template,
        image_token=first.image_token,
    )
