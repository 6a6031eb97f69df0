"""Vocabularies of the members of a fusion: tokens that some have and others lack, tokenizers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from converters.layouts import Source, has_tokenizer
from converters.load import TOKENIZER_FILES
from converters.tokenizer import tokenizer_of
from vfjax import InputError
from vfjax.merge import LazyTensor, Stacked
from vfjax.merge.family import VOCABULARY

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
    llms: Mapping[str, Mapping[str, LazyTensor]], vocab: str | None
) -> dict[str, Mapping[str, LazyTensor]]:
    """The models with as many rows as the first, or as the member whose tokens are kept.

    The others have the first model's rows of the tokens that they lack: their deltas are zero.
    """
    if vocab is None:
        return dict(llms)
    first = next(iter(llms))
    out: dict[str, dict[str, LazyTensor]] = {label: dict(llm) for label, llm in llms.items()}
    for name, like in llms[first].items():
        if not name.endswith(VOCABULARY):
            continue
        kept = llms[first if vocab == BASE else vocab][name]
        rows, total = like.shape[0], kept.shape[0]
        for label, llm in llms.items():
            own = llm[name]
            if own.shape[0] < rows:
                raise InputError(
                    f"{said(label)}: {name}",
                    found=f"{own.shape[0]} tokens",
                    expected=f"at least the {rows} of {first}",
                    fix="merge models whose added tokens are at the end",
                )
            extra = (kept, rows, total - rows)
            out[label][name] = Stacked((own, 0, rows), *([extra] if total > rows else []))
    return dict(out)


def same_tokens(sources: Sequence[Source], llms: Iterable[Mapping[str, LazyTensor]]) -> None:
    """Raises InputError if a token has one id here and another there: rows would be mixed up.

    Args:
        sources: those that have a tokenizer are compared with the first that has.
        llms: ids from the shortest embedding on are not merged, so they may differ.
    """
    rows = min(llm["model.embed_tokens.weight"].shape[0] for llm in llms)
    known = [source for source in sources if has_tokenizer(source.home)]
    files = [{n: p.read_bytes() for n, p in tokenizer_files([each]).items()} for each in known]
    if all(each == files[0] for each in files):
        return  # as is usual: transformers, which takes seconds, is not needed
    first, *others = (tokenizer_of(source).get_vocab() for source in known)
    for source, words in zip(known[1:], others, strict=True):
        found = ((own, first.get(word, own), word) for word, own in words.items())
        conflicts = [x for x in found if x[0] != x[1] and min(x[:2]) < rows]
        if conflicts:
            own, other, word = min(conflicts)
            raise InputError(
                f"{source.path}: tokenizer",
                found=f"id {own} for {word!r}",
                expected=f"{other}, as in {known[0].path}",
                fix="merge models of one tokenizer, or set family to False to merge all the same",
            )


def tokenizer_files(order: Sequence[Source]) -> dict[str, Path]:
    """Those of the first folder that has a tokenizer."""
    home = next((source.home for source in order if has_tokenizer(source.home)), None)
    files = {} if home is None else {name: home / name for name in TOKENIZER_FILES}
    return {name: path for name, path in files.items() if path.is_file()}
