"""A fusion: its members opened, its tensors planned; then written, or handed over."""

import dataclasses
import functools
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from converters.alike import check_llm_alone
from converters.branches import (
    Tensors,
    branch_tensors,
    first_seeing,
    joined,
    own_embeddings,
    owners,
)
from converters.chat import read_chat_template
from converters.export import to_bytes
from converters.files import hub
from converters.files.checksums import audit, mapped, unread
from converters.files.names import README
from converters.files.output import stage_of
from converters.files.paths import stand_in, stat
from converters.files.shards import plan_shards
from converters.files.writer import Content, write_folder
from converters.fingerprint import fingerprint, sampled
from converters.folder import assigned, open_members, open_source, settled
from converters.formats.visionfuse import arranged, fused_config
from converters.mergekit import Yaml, read_yaml
from converters.model_card import CARD, PLOT, Listed, by_layer, card, plot, readme
from converters.params.table import restored
from converters.plan import Part, layers_of, llm_config, merge_parts
from converters.positions import compared, shared_llm
from converters.request import Request, check_request
from converters.source import LAYOUTS, Source
from converters.tensor_names import by_folder
from converters.tokenizer_union import made_tokenizer
from converters.towers import Towers
from converters.vocabulary import (
    BASE,
    Vocabularies,
    one_head,
    one_vocabulary,
    said,
    tokenizer_files,
)
from converters.whole import Whole, merge_whole, with_tensors
from vfjax import InputError, __version__
from vfjax.atomic import findable
from vfjax.merge import (
    METHODS,
    Account,
    Recipe,
    check_family,
    from_config,
)
from vfjax.merge.compatibility import check_weights
from vfjax.text.chat import CHAT_TEMPLATE

LOG = logging.getLogger(__name__)


class Fusion:
    """A request with its sources opened and its tensors planned; nothing is read but headers."""

    def __init__(self, request: Request, yaml: Yaml | None = None):
        recipe: Recipe | None = None
        below: dict[str, str] = {}
        check_request(request)
        self.yaml = yaml if request.recipe is None or yaml else read_yaml(request.recipe)
        self.inner: dict[str, Fusion] = {}
        if self.yaml is not None:
            recipe, folders, below = self.yaml.recipe, dict(self.yaml.folders), self.yaml.below
            plain = Request({}, "", recipe=request.recipe, export=request.export, seed=request.seed)
            self.inner = {
                name: Fusion(plain, dataclasses.replace(each, text=self.yaml.text))
                for name, each in self.yaml.merges.items()
            }
            if recipe.unread:
                skipped = ", ".join(recipe.unread)
                warnings.warn(f"{request.recipe}: the method does not read {skipped}", stacklevel=3)
            home = folders.pop(BASE, None)
            request = dataclasses.replace(request, members=folders, base=home)
        elif "weights" in getattr(METHODS.get(request.method), "params", ()):
            even = {"weights": (1 / len(request.members),) * len(request.members)}
            request = dataclasses.replace(request, params={**even, **(request.params or {})})
        self.request, self.out = request, stand_in(request.out)
        base = request.base
        outer = {name: path for name, path in request.members.items() if name not in self.inner}
        found = open_members(outer, request.base, request.towers, below)
        opened = {
            name: self.inner[name].source() if name in self.inner else found[name]
            for name in request.members
        }
        self.base = None if recipe is None else recipe.base
        if base is not None:
            inner = self.inner.get(BASE)
            first = inner.source() if inner else open_source(base, base=below.get(BASE))
            self.base, opened = BASE, {BASE: first, **opened}
        elif self.base is not None:  # one of the members
            opened = {self.base: opened[self.base], **opened}
        self.opened = opened
        self.files = {
            f"{label}/{name}": path
            for label in opened
            for name, path in self._weight_files(label).items()
        }
        self.before = {path: stat(path) for path in self.files.values()}
        union = recipe is not None and (recipe.tokenizer_source or recipe.tokenizer)
        free: dict[str, Any] = {"vocab_size": None} if union or request.vocab else {}
        if recipe is not None and recipe.is_sliced:
            free["num_hidden_layers"] = None
        facts = {name: {**compared(source), **free} for name, source in opened.items()}
        check_family(facts, theta=request.family)
        parts = {name: mapped(source, request.export) for name, source in opened.items()}
        self.skip: dict[str, set[str]] = {}
        for label, source in opened.items():
            if label in self.inner:
                inside = self.inner[label].skip
                self.skip |= {f"{label}/{name}": names for name, names in inside.items()}
                continue
            names = unread(source, self._read(label, parts[label]))
            self.skip |= {f"{label}/{name}": names for name in source.weight_files()}
        self.llms = llms = one_head(opened, {name: part["llm"] for name, part in parts.items()})
        known = Vocabularies(opened)
        rows = {name: llm["model.embed_tokens.weight"].shape[0] for name, llm in llms.items()}
        if request.family and request.recipe is None:
            known.check(rows)
        self.recipe = recipe or from_config(
            {
                "method": request.method,
                "members": list(request.members),
                "base": self.base,
                "params": dict(request.params or {}),
                "rules": list(request.rules),
            }
        )
        others = self.yaml.tokenizers if self.yaml else {}
        self.made = made_tokenizer(self.recipe, others, opened, llms)
        rowed = llms if union else one_vocabulary(llms, request.vocab, self.base)
        self.vocabulary: list[str] = []
        self.whole: Whole | None = None
        if request.export == "whole":
            parts = {label: {**part, "llm": dict(rowed[label])} for label, part in parts.items()}
            self.whole = merge_whole(self.recipe, request, opened, parts, self.made)
            self.merged = {k: x for found in self.whole.merged.values() for k, x in found.items()}
            result = dataclasses.replace(opened[self.whole.like], llm=self.whole.llm)
        else:
            check_llm_alone(self.recipe)
            part = Part(self.recipe, rowed, layers_of(opened))
            (self.merged,) = merge_parts(self.recipe, request, [part], self.made)
            members = list(request.members)
            llm = shared_llm(opened, members if request.export == "model" else ())
            result = joined(opened, members, self.out, request.template, llm)
            llm = llm_config(result.llm, self.merged, self.recipe, opened)
            result = dataclasses.replace(result, llm=llm)
            result = arranged(result, request.positions, request.mask)
        self.result = result
        if self.made is None:
            kept = self._keep_tokenizer(known, rows)
        else:
            first = next(iter(opened.values()))
            kind = dict(self.made.tokenizer)
            self.owner = dataclasses.replace(
                first, path=self.made.folder, base=None, tokenizer=kind
            )
            total, words = self.result.llm["vocab_size"], self.made.words
            self.vocabulary = known.changes(next(iter(opened)), rows, total, words)
            kept = words
        self.result = dataclasses.replace(self.result, tokenizer=self.owner.tokenizer)
        self.weights: Tensors = dict(self.merged)
        if request.export == "llm":
            own = self.result.table("llm").prefixes
            self.weights = {restored(name, own): x for name, x in self.merged.items()}
        if self.whole is not None:
            self.result = self.whole.source(self.owner, request, self.recipe)
        if request.export == "model":
            asked = self.recipe.chat_template and read_chat_template(self.owner.path)
            if asked and request.template in (None, CHAT_TEMPLATE):
                self.result = dataclasses.replace(
                    self.result, template=CHAT_TEMPLATE, chat_template=asked
                )
            for name in request.members:
                self.weights |= branch_tensors(name, opened[name], parts[name])
            if request.router == "member":
                branches, tables = own_embeddings(self.result, opened, llms)
                self.result = dataclasses.replace(self.result, branches=branches)
                self.weights |= tables
            owner, total = owners(opened, request.members), self.result.llm["vocab_size"]
            branches = tuple(
                known.renumbered(branch, owner[branch.name], kept, total)
                for branch in self.result.branches
            )
            self.result = dataclasses.replace(self.result, branches=branches)

    def _read(self, label: str, parts: Mapping[str, Tensors]) -> Mapping[str, Tensors]:
        """The components that go into the output: without branches, the LLM alone."""
        if self.request.export == "whole":
            spare = self.opened[label].spare
            return {**parts, **{f"spare {part}": dict(x) for part, x in spare.items()}}
        whole = self.request.export == "model" and label in self.request.members
        return parts if whole else {"llm": parts["llm"]}

    def write(
        self, progress: Callable[[int], object] | None, resume: bool, readme: bytes | None = None
    ) -> None:
        """Reads the sources, writes the folder; with a card for the hub, if there is one.

        The other arguments are those of `converters.fuse`.
        """
        request = self.request
        self._check_stage()
        self._say()
        digests = audit(self.files, request.checksums, self.skip)
        self._check_weights()
        config = self.result.llm
        if request.export == "model":
            config = fused_config(self.result, self._record(digests))
        files: dict[str, Content] = {
            "config.json": to_bytes(config),
            **self._prompt_files(),
            **(self.whole.files(self.result, self.recipe) if self.whole else {}),
            CARD: lambda: self._card(digests),
        }
        if self._counted() and request.account and find_spec("matplotlib"):
            files[PLOT] = lambda: plot(self._rows, self._tuned)
        if readme is not None:
            files[README] = readme
        write_folder(
            self.out,
            by_folder(self.weights),
            files=files,
            shard_bytes=request.shard_bytes,
            progress=progress,
            key=self._key(),
            resume=resume,
        )

    def readme(self, name: str, remote_code: bool) -> bytes:
        """The card for the hub, see `model_card.readme`."""
        kind = "llm" if self.request.export == "llm" else self.result.kind
        folders = [source.path for source in self.opened.values()]
        return readme(name, kind, folders, self._record({}), remote_code)

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
        """The tokenizer's, and the chat template, which may be another folder's."""
        files: dict[str, Content] = {**tokenizer_files(self.owner)}
        if self.request.export == "model" and self.result.template == CHAT_TEMPLATE:
            files.pop("chat_template.json", None)
            files["chat_template.jinja"] = self.result.chat_template.encode()
        return files

    def _keep_tokenizer(
        self, known: Vocabularies, rows: Mapping[str, int]
    ) -> Mapping[str, int] | None:
        """Whose tokenizer is written, and what that drops or adds.

        Returns:
            Token -> id of it; None if there is none, or all have the same.
        """
        total, order = self.result.llm["vocab_size"], self._tokenizers()
        seeing = self.request.members if self.request.export == "model" else ()
        if self.request.vocab in self.request.members:  # which is asked for
            seeing = ()
        label = known.owner(order, rows, total, known.marks(seeing))
        self.owner = self.opened[order[0] if label is None else label]
        self.vocabulary = known.changes(label, rows, total)
        if self.request.export != "llm" and not self.request.template and self.result.branches:
            prompted = first_seeing(self.opened, self.request.members)
            known.check_template(prompted, label, self.result.template)
        if self.request.export == "model":
            for member in self.request.members:
                known.check_marks(member, label)
        return None if label is None or known.alike else known.words(label)

    def _say(self) -> None:
        for line in self.vocabulary:
            LOG.warning("vocabulary: %s", line)
        for line in self.whole.kept if self.whole else ():
            LOG.warning("%s", line)

    def _check_weights(self) -> None:
        if self.request.family and self.request.recipe is None:
            # A head beside a tied embedding, or in the place of one, need not be like another.
            check_weights(
                {
                    said(label): {n: x for n, x in llm.items() if n != "lm_head.weight"}
                    if (source := self.opened[label]).own_head or source.config_of("llm").tied
                    else llm
                    for label, llm in self.llms.items()
                }
            )
            for sources in self.whole.beside() if self.whole else ():
                check_weights({said(label): tensors for label, tensors in sources.items()})

    def source(self) -> Source:
        """The folder that is not written, opened."""
        self._say()
        self._check_weights()
        if self.whole is not None:
            return with_tensors(self.result, by_folder(self.weights))
        config = fused_config(self.result, self._record({}))
        layout = next(x for x in LAYOUTS if x.name == "visionfuse")
        source = layout.open(self.owner.home, config, Towers({}, "auto"))
        source = dataclasses.replace(source, chat_template=self.result.chat_template)
        return settled(assigned(source, layout, self.weights))

    def facts(self) -> dict[str, Any]:
        """What several processes agree on before one of them merges, see `fingerprint`."""
        recipe = self.request.recipe
        facts = {} if recipe is None else {"recipe": sampled(findable(recipe))}
        for label, source in self.opened.items():
            if inner := self.inner.get(label):
                facts |= {f"{label}: {name}": value for name, value in inner.facts().items()}
            else:
                facts |= fingerprint(source, label)
        return facts

    def describe(self) -> dict[str, Any]:
        """See `converters.dry_run`."""
        shards = plan_shards(by_folder(self.weights), self.request.shard_bytes)
        methods = [x.method for x in self.merged.values()]
        return {
            "files": {shard.path: shard.size for shard in shards},
            "tensors": len(self.weights),
            "parameters": sum(math.prod(x.shape) for x in self.weights.values()),
            "read": sum(size for size, *_ in self.before.values()),
            "methods": dict(Counter(methods)),
            "vocabulary": self.vocabulary,
        }

    def _key(self) -> str:
        """What decides the bytes, but for names and shapes; see `write_folder`."""
        options = dataclasses.asdict(dataclasses.replace(self.request, out=""))
        return json.dumps(
            [
                options,
                repr(self.recipe),
                repr(self.yaml),
                self.made and self.made.digest,
                list(self.before.values()),
                __version__,
            ],
            default=str,
        )

    def _weight_files(self, label: str) -> dict[str, Path]:
        inner = self.inner.get(label)
        return inner.files if inner else self.opened[label].weight_files()

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
            if x.has_base and [label for label, _ in x.sources[1:]] == labels
        ]

    @property
    def _tuned(self) -> list[str]:
        """The members but for one that is the base."""
        return [label for label in self.request.members if label != self.base]

    @functools.cached_property
    def _rows(self) -> dict[str, Account]:
        modules = self.whole.modules() if self.whole else {}
        found = ((name, self.merged[name].account()) for name in self._counted())
        return by_layer((modules.get(n, ""), n, one) for n, one in found if one is not None)

    def _card(self, digests: Mapping[str, str]) -> bytes:
        self._check_unchanged()
        sources = {
            label: Listed(
                hub.named(source.path) or source.path.name,
                {n: digests.get(f"{label}/{n}") for n in self._weight_files(label)},
                source.quantised,
            )
            for label, source in self.opened.items()
        }
        rows = self._rows if self.request.account else {}
        fused = self.request.export == "model"
        return card(self._record({}), sources, rows, self._tuned, fused=fused)

    def _record(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """What was done, from what: every source file by its SHA-256."""
        request = self.request
        record: dict[str, Any] = {"method": request.method, "params": dict(request.params or {})}
        if self.yaml is not None:
            record = {"recipe": self.yaml.text}
            if self.recipe.unread:
                record["unread"] = list(self.recipe.unread)
        if self.whole is not None:
            record["export"] = request.export
        if request.rules:
            record["rules"] = [list(rule) for rule in request.rules]
        if digests:
            record["sources"] = {
                label: {name: digests[f"{label}/{name}"] for name in self._weight_files(label)}
                for label in self.opened
            }
        if repositories := self._repositories():
            record["repositories"] = repositories
        if self.vocabulary:
            record["vocabulary"] = self.vocabulary
        if self.whole is not None and self.whole.kept:
            record["kept"] = self.whole.kept
        return record | {"seed": request.seed, "vfjax": __version__}

    def _repositories(self) -> dict[str, str]:
        """Label of a source, as of its files -> `org/name@commit`, of those from the hub."""
        out: dict[str, str] = {}
        for label, source in self.opened.items():
            if inner := self.inner.get(label):
                out |= {f"{label}/{name}": x for name, x in inner._repositories().items()}
                continue
            places = {label: source.path, f"{label}/base": source.base}
            places |= {f"{label}/{part}": tower.path for part, tower in source.towers.items()}
            found = {name: hub.named(path) for name, path in places.items() if path is not None}
            own = found[label]
            out |= {k: x for k, x in found.items() if x is not None and (k == label or x != own)}
        return out

    def _tokenizers(self) -> list[str]:
        """Whose tokenizer is looked for first: for a model the members', for an LLM the base's.

        But if a member's added tokens are kept, its own; if a recipe makes one, that.
        """
        order = list(self.opened)
        if self.request.export != "llm":
            order = [*self.request.members, *order]
        if self.whole is not None:
            order = [self.whole.like, *order]
        named = self.request.vocab
        return [named, *order] if named in self.opened and named != BASE else order
