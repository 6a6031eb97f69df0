"""mergekit's YAML, already parsed -> a recipe.

Follows config.py, plan.py and merge_methods of mergekit 0.1.5; where it drops a tensor silently,
this raises `InputError`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vfjax.merge import parse
from vfjax.merge.methods.registry import METHODS
from vfjax.merge.parse import Value
from vfjax.merge.recipe import Chain, Formula, Recipe, Settings, Slice, Source

FAMILY = {"scale": 1.0, "density": 1.0, "normalize": False}
VOTE, TRIM = {"vote": "weighted"}, {"trim": "tensor"}
CRUMBS = FAMILY | TRIM | {"rescale": "none", "gamma": 0.01}
DARE = FAMILY | {"rescale": "norm"}
DELLA = DARE | {"epsilon": 0.15}
DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"normalize": True},
    "nuslerp": {"flatten": True, "row_wise": False},
    "multislerp": {"normalize": True},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "model_stock": {"filter_wise": False},
    "sce": {"select_topk": 1.0},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
    "task_arithmetic": {"scale": 1.0, "normalize": False},
    "ties": FAMILY | TRIM | VOTE | {"normalize": True, "rescale": "none"},
    "breadcrumbs": CRUMBS,
    "breadcrumbs_ties": CRUMBS | VOTE,
    "dare_linear": DARE,
    "dare_ties": DARE | VOTE,
    "della_linear": DELLA,
    "della": DELLA | VOTE | {"normalize": True},
}
"""Method -> mergekit's defaults, by our names, so that a YAML means here what it means there."""
YAML_NAMES = {
    "": {"weights": "weight", "scale": "lambda"},
    "passthrough": {"scale": "scale"},
    "nuslerp": {"flatten": "nuslerp_flatten", "row_wise": "nuslerp_row_wise"},
    "multislerp": {"normalize": "normalize_weights"},
}
"""Method, or "" for any -> our parameter -> mergekit's, where it differs."""
KEYS = frozenset(
    {
        "weight",
        "density",
        "gamma",
        "epsilon",
        "lambda",
        "normalize",
        "rescale",
        "int8_mask",
        "scale",
        "t",
        "filter_wise",
        "select_topk",
        "max_iter",
        "tol",
        "r",
        "alpha",
        "eps",
        "nuslerp_flatten",
        "nuslerp_row_wise",
        "normalize_weights",
    }
)
"""Parameters of any of mergekit's methods. It skips those that a method doesn't read, and so do we;
others are refused as misspelt."""
READ = {("multislerp", "eps")}
"""Methods' parameters that mergekit reads and we don't have."""
RESCALE: dict[Value, Value] = {True: "norm", False: "none"}
"""mergekit's `rescale: true` restores the delta's L1 norm."""
SAME_ALONE = ("slerp", "nuslerp", "multislerp", "karcher", "arcee_fusion")
"""Methods that return a lone tensor as it is."""

TOP_KEYS = (
    "models",
    "slices",
    "modules",
    "merge_method",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)


def from_mergekit(config: Mapping[str, Any]) -> Recipe:
    """The recipe of a parsed mergekit YAML, as mergekit 0.1.5 reads it.

    A base among the models is no member of a method that reads the base (its own parameters are
    then without effect), and is an ordinary member of one that does not; `models` without the base
    have it appended. mergekit's defaults are filled in. After the last slice all its sources are
    merged into the final norm and head; mergekit drops those beyond the first slice's number of
    sources.

    Args:
        config: mapping with the keys of mergekit's `MergeConfiguration`, references as strings.

    Returns:
        The recipe; its `unread` names the parameters that the method does not read.

    Raises:
        InputError: unknown key, method or parameter; value of the wrong type; not exactly one of
            models, slices and modules; a missing base; a model listed twice.
    """
    parse.keys("recipe", config, TOP_KEYS)
    method, base = (
        parse.method(config.get("merge_method"), "merge_method"),
        parse.text(config, "base_model"),
    )
    form = parse.one_of("recipe", config, ("models", "slices", "modules"))
    reader = _Reader(method, base)
    outer = (
        reader.settings("parameters", config.get("parameters")),
        {key: parse.setting(key, value) for key, value in DEFAULTS.get(method, {}).items()},
    )
    if form == "modules":
        modules = {}
        for key, given in parse.mapping("modules", config["modules"]).items():
            where = f"modules.{key}"
            parse.keys(where, given, ("models", "slices", "parameters"))
            own = reader.settings(f"{where}.parameters", given.get("parameters"))
            modules[key] = reader.slices(f"{where}.", given, (own, *outer))
    else:
        modules = {"": reader.slices("", config, outer)}
    if config.get("tokenizer") and config.get("tokenizer_source"):
        parse.fail("tokenizer", "tokenizer_source too", "one of the two", "remove one")
    sources = [s.model for pieces in modules.values() for piece in pieces for s in piece.sources]
    return Recipe(
        models=tuple(dict.fromkeys([base, *sources] if base else sources)),
        modules=modules,
        base=base,
        dtype=_dtype(config, "dtype"),
        out_dtype=_dtype(config, "out_dtype"),
        tokenizer_source=parse.text(config, "tokenizer_source"),
        tokenizer=parse.mapping("tokenizer", config.get("tokenizer")) or None,
        chat_template=parse.text(config, "chat_template"),
        unread=tuple(reader.unread),
    )


@dataclasses.dataclass
class _Reader:
    """Reads the parts of a YAML of one method and base.

    Attributes:
        method: key of `METHODS`.
        base: reference of the base model.
        unread: parameters found that the method does not read.
    """

    method: str
    base: str | None
    unread: list[str] = dataclasses.field(default_factory=list)

    def slices(self, where: str, given: Mapping[str, Any], chain: Chain) -> tuple[Slice, ...]:
        """The slices of a mapping with `models` or `slices`; whole models are one slice."""
        if parse.one_of(where.rstrip(".") or "recipe", given, ("models", "slices")) == "models":
            sources = self.sources(f"{where}models", given["models"], ("model", "parameters"))
            if self.base and self.base not in [source.model for source, _ in sources]:
                sources.append((Source(self.base), {}))
            return (_slice(f"{where}models", self.method, self.base, sources, chain),)
        pieces = []
        for i, piece in enumerate(parse.items(f"{where}slices", given["slices"])):
            at = f"{where}slices[{i}]"
            parse.keys(at, piece, ("sources", "base_model", "parameters", "residual_weight"))
            if piece.get("residual_weight") is not None:  # which mergekit reads nowhere
                self.unread.append(f"{at}.residual_weight")
            keys = ("model", "layer_range", "parameters")
            sources = self.sources(f"{at}.sources", piece.get("sources"), keys)
            own = self.settings(f"{at}.parameters", piece.get("parameters"))
            start = parse.text(piece, "base_model", f"{at}.") or self.base
            pieces.append(_slice(at, self.method, start, sources, (own, *chain)))
        return tuple(pieces)

    def sources(
        self, where: str, given: object, keys: Sequence[str]
    ) -> list[tuple[Source, Settings]]:
        """Models, or layers of models, each with its own parameters."""
        sources = []
        for i, source in enumerate(parse.items(where, given)):
            at = f"{where}[{i}]"
            parse.keys(at, source, keys)
            if (model := parse.text(source, "model", f"{at}.")) is None:
                parse.fail(at, "no 'model'", "a path, or path+lora", "name the model")
            span: Sequence[Any] = (0, None)
            if "layer_range" in keys:
                span = parse.items(f"{at}.layer_range", source.get("layer_range"))
                if [type(x) for x in span] != [int, int] or not 0 <= span[0] < span[1]:
                    wanted = "[start, stop] with 0 <= start < stop"
                    parse.fail(f"{at}.layer_range", list(span), wanted, "correct it")
            own = self.settings(f"{at}.parameters", source.get("parameters"), one_member=True)
            sources.append((Source(model, *span), own))
        return sources

    def settings(self, where: str, given: object, one_member: bool = False) -> Settings:
        """A `parameters` mapping by our names, its values as our methods want them."""
        renamed = _yaml_names(self.method)
        known = {renamed.get(ours, ours): ours for ours in METHODS[self.method].params}
        settings = {}
        for key, value in parse.mapping(where, given).items():
            if key not in known and key in KEYS and (self.method, key) not in READ:
                self.unread.append(f"{where}.{key}")
                continue
            kind = parse.kind(where, key, self.method, known)
            if one_member and not parse.is_members(self.method, kind):
                self.unread.append(f"{where}.{key}")  # mergekit looks for it outside the models
                continue

            def convert(x: Value, ours: str = known[key], kind: object = kind) -> Value:
                if ours == "rescale":
                    return RESCALE.get(x, x)
                if kind is bool:
                    return bool(x) if x in (0, 1) else x
                return _number(x)

            value = [value] if isinstance(value, Mapping) else value
            settings[known[key]] = parse.setting(f"{where}.{key}", value, convert)
        return settings


def _yaml_names(method: str) -> dict[str, str]:
    return YAML_NAMES[""] | YAML_NAMES.get(method, {})


def _slice(
    where: str, method: str, base: str | None, sources: list[tuple[Source, Settings]], chain: Chain
) -> Slice:
    """Tells base from members, as mergekit's methods do."""
    parse.no_repeats(where, [source.model for source, _ in sources])
    start = next((source for source, _ in sources if source.model == base), None)
    others = [pair for pair in sources if pair[0] is not start]
    use = METHODS[method].base
    if method == "slerp" and len(sources) > 2:
        listed = ", ".join(source.model for source, _ in sources)
        parse.fail(where, f"{listed} with the base", "two, the base among them", "list these two")
    alone = others if method == "multislerp" and others else sources
    if len(alone) == 1 and (method in SAME_ALONE or (use != "unread" and alone[0][0] is start)):
        return Slice(where, Formula("passthrough", (), ((),)), (alone[0][0],), None)
    needed = use == "required" or method == "slerp" or (method == "nuslerp" and base)
    if needed and start is None:
        found = f"base_model {base!r} not among its models" if base else "no base_model"
        parse.fail(where, found, f"a base among the models, for {method}", "name it and list it")
    if method == "slerp":
        others = [pair for pair in sources if pair[0] is start] + others
    members = sources if use == "unread" and method != "slerp" else others
    each = tuple((own, *chain) for _, own in members)
    formula = Formula(method, chain, each, _yaml_names(method))
    return Slice(where, formula, tuple(s for s, _ in members), start if use != "unread" else None)


def _dtype(config: Mapping[str, Any], key: str) -> str | None:
    """A dtype as mergekit spells it: "torch.float32" too."""
    found = parse.text(config, key)
    return found and found.removeprefix("torch.")


def _number(x: Value) -> Value:
    """YAML 1.1 reads 1e-5 as a string; what is no number is left for `find` to refuse."""
    try:
        return float(x) if isinstance(x, str) else x
    except ValueError:
        return x
