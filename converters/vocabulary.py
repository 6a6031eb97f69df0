"""Vocabularies of the members of a fusion: tokens that some have and others lack, tokenizers."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from converters import registry
from converters.files.names import TOKENIZER_FILES
from converters.params.table import Table
from converters.source import Branch, Source, has_tokenizer
from converters.tokenizer import tokenizer_of
from vfjax import InputError
from vfjax.atomic import JSON
from vfjax.errors import counted
from vfjax.merge import LazyTensor, Stacked
from vfjax.merge.compatibility import VOCABULARY
from vfjax.text.chat import CHAT_TEMPLATE
from vfjax.text.prompts import IMAGE_TOKEN, get_template

BASE = "base"
"""The base's label among the members."""


def said(label: str) -> str:
    """A model in an error."""
    return BASE if label == BASE else f"member {label!r}"


def one_head(
    sources: Mapping[str, Source], llms: Mapping[str, Mapping[str, LazyTensor]]
) -> dict[str, dict[str, LazyTensor]]:
    """The models with a head each, if one has its own: a tied one's is its embedding.

    Raises:
        InputError: some have neither a head nor a tie, others have.
    """
    out = {label: dict(llm) for label, llm in llms.items()}
    bare = [label for label, source in sources.items() if source.seen.get("headless")]
    if bare and len(bare) < len(out):
        raise InputError(
            f"{said(bare[0])}: lm_head.weight",
            found="none, and an embedding that is not tied",
            expected="a head in all of them, or in none",
            fix="name the folder of the whole causal language model",
        )
    if any("lm_head.weight" in llm for llm in llms.values()):
        for llm in out.values():
            llm.setdefault("lm_head.weight", llm["model.embed_tokens.weight"])
    return out


def one_vocabulary(
    llms: Mapping[str, Mapping[str, LazyTensor]], vocab: str | None, base: str | None
) -> dict[str, Mapping[str, LazyTensor]]:
    """The models with as many rows as the base, or as the member whose tokens are kept.

    Rows beyond the base's are that member's in all. A row that a model lacks otherwise is the
    base's, so that its delta is zero; without a base, the kept member's.

    Raises:
        InputError: the base's tokens are to be kept, and there is none.
    """
    if vocab is None:
        return dict(llms)
    if vocab == BASE and base is None:
        raise InputError(
            "vocab", found=repr(BASE), expected="a member", fix="name a base, or a member here"
        )
    whose = base if vocab == BASE else vocab
    assert whose is not None
    out: dict[str, dict[str, LazyTensor]] = {label: dict(llm) for label, llm in llms.items()}
    for name, kept in llms[whose].items():
        if not name.endswith(VOCABULARY):
            continue
        total, origin = kept.shape[0], kept if base is None else llms[base][name]
        shared = origin.shape[0] if base else min(llm[name].shape[0] for llm in llms.values())
        for label, llm in llms.items():
            own, parts, end = llm[name], [], 0
            for rows, most in ((own, min(own.shape[0], shared)), (origin, shared), (kept, total)):
                if (stop := min(most, total)) > end:
                    parts.append((rows, end, stop - end))
                    end = stop
            out[label][name] = Stacked(*parts)
    return dict(out)


class Vocabularies:
    """The tokens of the models that are merged, read when they are asked for.

    Args:
        opened: label -> model.
    """

    def __init__(self, opened: Mapping[str, Source]):
        self.opened = {label: x for label, x in opened.items() if has_tokenizer(x.home)}
        files = [
            {name: path.read_bytes() for name, path in tokenizer_files(source).items()}
            for source in self.opened.values()
        ]
        self.alike = all(each == files[0] for each in files)
        """As is usual: transformers, which takes seconds, is not needed to compare them."""
        self._words: dict[str, dict[str, int]] = {}

    def words(self, label: str) -> dict[str, int]:
        """Token -> id of a model that has a tokenizer."""
        if label not in self._words:
            tokenizer = tokenizer_of(self.opened[label])
            assert tokenizer is not None, label
            self._words[label] = tokenizer.get_vocab()
        return self._words[label]

    def fits(self, label: str, rows: int) -> bool:
        """Whether all ids of a model's tokenizer are below `rows`."""
        return max(self.words(label).values(), default=0) < rows

    def check(self, rows: Mapping[str, int]) -> None:
        """Raises InputError if a token has one id here and another there: rows would be mixed up.

        Args:
            rows: label -> rows of the embedding; ids beyond one of two are not merged.
        """
        if self.alike:
            return
        first, *others = self.opened
        for label in others:
            one, other = self.words(first), self.words(label)
            shared = min(rows[first], rows[label])
            found = ((own, one.get(word, own), word) for word, own in other.items())
            if conflicts := [x for x in found if x[0] != x[1] and min(x[:2]) < shared]:
                own, expected, word = min(conflicts)
                raise InputError(
                    f"{self.opened[label].path}: tokenizer",
                    found=f"id {own} for {word!r}",
                    expected=f"{expected}, as in {self.opened[first].path}",
                    fix="merge models of one tokenizer, or set family to False to merge all the "
                    "same",
                )

    def marks(self, labels: Iterable[str]) -> set[str]:
        """Tokens that stand around and within the pictures of some models."""
        if self.alike:
            return set()
        return {
            word
            for label in labels
            if label in self.opened
            for branch in self.opened[label].branches
            for word in (*branch.connector.get("words", ()), *self._named(label, branch))
        }

    def _named(self, label: str, branch: Branch) -> list[str]:
        """Tokens that a branch's config names by their ids, and that a tokenizer must have."""
        keys = [key for key, needed in _table(branch).ids.items() if needed]
        found = [i for key in keys for i in _numbers(branch.connector.get(key))]
        words = self._by_id(label)
        return [words[i] for i in found if i in words]

    def _by_id(self, label: str) -> dict[int, str]:
        return {i: word for word, i in self.words(label).items()}

    def renumbered(
        self, branch: Branch, label: str, kept: Mapping[str, int] | None, total: int
    ) -> Branch:
        """A branch with the ids that its marks have in the tokenizer that is kept.

        Args:
            branch: of the model `label`.
            label: a model.
            kept: token -> id of that tokenizer; None: there is none, or all are the same.
            total: rows of the written embedding.

        Raises:
            InputError: a mark that the tokenizer lacks, or whose row is dropped.
        """
        ids = _table(branch).ids
        if not ids or branch.connector.get("vocab"):  # ids of an embedding of its own
            return branch
        kept = kept or {}
        words = self._by_id(label) if kept and label in self.opened else {}
        used = set(kept.values())

        def moved(value: JSON, needed: bool) -> JSON:
            if isinstance(value, Mapping):
                return {key: moved(x, needed) for key, x in value.items()}
            if isinstance(value, list | tuple):
                found = [moved(x, needed) for x in value]
                return [x for x in found if x is not None]
            assert isinstance(value, int)
            word = words.get(value)
            new = value if word is None else kept.get(word, None if value in used else value)
            if new is not None and new < total:
                return new
            if needed:
                raise InputError(
                    f"{said(label)}: marks of pictures",
                    found=f"id {value}" + (f" of {word!r}" if word else ""),
                    expected=f"a token of the {total} that are kept",
                    fix=f"vocab={label!r} keeps its rows and tokens",
                )
            return None

        connector = {
            key: moved(value, ids[key]) if key in ids else value
            for key, value in branch.connector.items()
        }
        return dataclasses.replace(branch, connector=connector)

    def owner(
        self,
        order: Sequence[str],
        rows: Mapping[str, int],
        total: int,
        marks: Collection[str] = (),
    ) -> str | None:
        """Whose tokenizer goes with an embedding of `total` rows: the first that fits it.

        Args:
            order: labels, the preferred first.
            rows: label -> rows of the embedding.
            total: of the written embedding.
            marks: tokens of pictures; a tokenizer that has them all goes before those that don't.

        Returns:
            A label; None if no model has a tokenizer.

        Raises:
            InputError: all have more tokens than rows are kept.
        """
        known = [label for label in order if label in self.opened]
        fit = [label for label in known if rows[label] <= total or self.fits(label, total)]
        if fit:
            whole = (label for label in fit if not marks or self.words(label).keys() >= set(marks))
            return next(whole, fit[0])
        if known:
            source = self.opened[known[0]]
            raise InputError(
                f"{source.path}: tokenizer",
                found=f"{max(self.words(known[0]).values()) + 1} tokens",
                expected=f"at most the {total} rows that are kept",
                fix=f"vocab={known[0]!r} keeps its rows; or add the base's tokenizer to the base",
            )
        return None

    def changes(
        self,
        owner: str | None,
        rows: Mapping[str, int],
        total: int,
        made: Mapping[str, int] | None = None,
    ) -> list[str]:
        """A sentence for each model whose rows or tokens the result has not just as they were.

        Args:
            owner: whose tokenizer is kept, None if no model has one.
            rows: label -> rows of the embedding.
            total: of the written embedding.
            made: token -> id of a tokenizer that was made in place of the owner's: rows moved with
                their tokens.
        """
        out = []
        for label, count in rows.items():
            said_of = [f"{count - total} of {count} rows dropped"] if count > total else []
            more = f"{counted(total - count, 'row')} more than its {count}"
            said_of += [more] if count < total else []
            differ = said_of or not self.alike or made is not None
            if owner is not None and label in self.opened and differ:
                own, kept = self.words(label), self.words(owner) if made is None else made
                gone = [word for word in own if word not in kept]
                if made is None:
                    gone = [word for word, i in own.items() if kept.get(word) != i or i >= total]
                said_of += [f"without its tokens {_some(gone, own)}"] if gone else []
                new = [word for word, i in kept.items() if word not in own and i < total]
                whose = f" of {said(owner)}" if made is None else ""
                said_of += [f"with {_some(new, kept)}{whose}"] if new else []
            if said_of:
                out.append(f"{said(label)}: {', '.join(said_of)}")
        return out

    def check_template(self, label: str, owner: str | None, name: str) -> None:
        """Raises InputError if the prompts of a member need tokens that are dropped.

        Args:
            label: the member whose template is used.
            owner: whose tokenizer is kept.
            name: of the template.
        """
        if self.alike or owner is None or label not in self.opened:
            return
        known, kept = name != CHAT_TEMPLATE, self.words(owner)
        whole = get_template(name).text if known else self.opened[label].chat_template
        whole = whole.replace(self.opened[label].image_token or IMAGE_TOKEN, "")
        tokenizer = tokenizer_of(self.opened[label])
        tokens = () if tokenizer is None else tokenizer.added_tokens_encoder
        if gone := [word for word in tokens if word in whole and word not in kept]:
            raise InputError(
                f"{self.opened[label].path}: tokenizer",
                found=f"{gone[0]!r}, which prompts of template {name} need, among dropped tokens",
                expected="all of the template's tokens",
                fix=f"vocab={label!r} keeps them",
            )

    def check_marks(self, label: str, owner: str | None) -> None:
        """Raises InputError if tokens that a member has around pictures are dropped.

        Args:
            label: the member.
            owner: whose tokenizer is kept.
        """
        if self.alike or owner is None or label not in self.opened:
            return
        own, kept = self.words(label), self.words(owner)
        for branch in self.opened[label].branches:
            for word in branch.connector.get("words", ()):
                if word in own and kept.get(word) != own[word]:
                    raise InputError(
                        f"{self.opened[label].path}: tokenizer",
                        found=f"{word!r}, which stands around its pictures, among dropped tokens",
                        expected="all that its pictures need",
                        fix=f"vocab={label!r} keeps them",
                    )


def _table(branch: Branch) -> Table:
    return registry.find(branch.connector, branch.part("connector"))


def _numbers(value: JSON) -> Iterator[int]:
    """All ids in a value of a config."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for x in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(x)


def _some(words: Sequence[str], ids: Mapping[str, int]) -> str:
    """The first few of some tokens, by id."""
    found = sorted(words, key=lambda word: ids[word])
    shown = ", ".join(f"{word[:40]!r} ({ids[word]})" for word in found[:4])
    return shown + (f" and {len(found) - 4} others" if len(found) > 4 else "")


def tokenizer_files(source: Source) -> dict[str, Path]:
    """Name -> file of those that travel with a model's LLM."""
    files = {name: source.home / name for name in TOKENIZER_FILES}
    files[source.generation.name] = source.generation
    return {name: path for name, path in files.items() if path.is_file()}
