"""Merge recipes: from a mergekit YAML or from our configs to one plan for each output tensor.

No files and no arrays: a recipe sees tensor names and numbers of layers, so a wrong one fails
before any work. The mergekit side follows its config.py, plan.py and merge_methods; where mergekit
ignores a key or drops a tensor silently, this raises `InputError`.

A parameter is a scalar, a list (a gradient: linear for numbers, in steps for switches and strings,
over the layers of a slice, whose first is at 0 and last at 1; a lone layer is at 1, tensors outside
the layers at 0) or a list of {filter, value}, the first filter found in the tensor's name counting.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from vfjax.errors import InputError
from vfjax.merge.methods import METHODS, Each, Weights, find

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
    "task_arithmetic": {"scale": 1.0},
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
NO_EFFECT = ("int8_mask",)
"""Parameters of mergekit that change its memory use only: accepted and dropped."""
RESCALE = {True: "norm", False: "none"}
"""mergekit's `rescale: true` restores the delta's L1 norm."""
SAME_ALONE = ("slerp", "nuslerp", "multislerp", "karcher", "arcee_fusion")
"""Methods that return a lone tensor as it is."""

TOP_KEYS = (
    *("models", "slices", "modules", "merge_method", "base_model", "parameters", "dtype"),
    *("out_dtype", "tokenizer_source", "tokenizer", "chat_template"),
)
CONFIG_KEYS = ("method", "base", "members", "params", "rules")
LAYER = re.compile(r"((?:.*?\.)?layers\.)(\d+)(\..+)")

Setting = tuple[tuple[str, tuple[Any, ...]], ...]
"""A parameter as written: (filter, values over the layers) cases; a scalar is a list of one."""
Settings = Mapping[str, Setting]
Chain = tuple[Settings, ...]
"""Where a parameter is looked up: the first that has a value for the tensor counts."""
Levels = tuple[Settings, list[Settings]]
"""Parameters written for all members, and for each."""
Stem = tuple[str, str]
"""A tensor's name before and after its layer number; (name, "") outside the layers."""
Tensors = Mapping[int | None, Mapping[Stem, str]]
"""Layer, None for outside -> the names of a model's tensors."""


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """How one output tensor is made.

    Attributes:
        method: key of `METHODS`.
        base: (model, tensor), if the method reads a base.
        members: (model, tensor), in order.
        params: numbers, switches and strings; tuples of one number a member where the method has
            one a member.
    """

    method: str
    base: tuple[str, str] | None
    members: tuple[tuple[str, str], ...]
    params: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Formula:
    """A method, and where its parameters are found: those for all members, and each member's."""

    method: str
    shared: Chain
    each: tuple[Chain, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """Layers start to stop (None: to the last) of a model."""

    model: str
    start: int = 0
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Slice:
    """Consecutive output layers, merged from as many layers of each source."""

    where: str
    formula: Formula
    members: tuple[Source, ...]
    base: Source | None

    @property
    def sources(self) -> tuple[Source, ...]:
        """The members, then the base."""
        return self.members + ((self.base,) if self.base else ())


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A merge, resolved but for the tensors' names.

    Attributes:
        models: all model references as written ("path+lora" too), each once, the base included.
        modules: sub-module -> its slices; "" stands for every sub-module.
        base: reference of the base model.
        rules: (pattern, label to take from or formula): the first whose pattern is found in the
            output name replaces the slice's formula.
        dtype: of the arithmetic, as the YAML has it.
        out_dtype: of the output, as the YAML has it.
        tokenizer_source: "union", "base" or a model reference.
        tokenizer: mergekit's `tokenizer` mapping, unread.
        chat_template: a name or a jinja template.
    """

    models: tuple[str, ...]
    modules: Mapping[str, tuple[Slice, ...]]
    base: str | None = None
    rules: tuple[tuple[re.Pattern[str], str | Formula], ...] = ()
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: Mapping[str, Any] | None = None
    chat_template: str | None = None

    def plan(
        self, names: Mapping[str, Sequence[str]], layers: Mapping[str, int], module: str = ""
    ) -> dict[str, TensorPlan]:
        """The plan of every output tensor.

        Output layers are numbered in the slices' order. The embedding is planned with the first
        slice, the final norm and the head with the last, as in mergekit's plan.py.

        Args:
            names: model -> names of its tensors ("model.layers.3.mlp.up_proj.weight").
            layers: model -> number of its decoder layers.
            module: sub-module to plan, if the recipe has `modules`.

        Returns:
            Output name -> plan, in natural order (layer 2 before layer 10).

        Raises:
            InputError: unknown module; layers that a model lacks or that differ in number; a tensor
                that one source has and another lacks; a parameter that is missing or ill-typed, or
                a number of members that the method does not take.
        """
        key = "" if "" in self.modules else module
        if key not in self.modules:
            _fail("modules", repr(module), ", ".join(self.modules), "plan one of these")
        slices = self.modules[key]
        models = {source.model for piece in slices for source in piece.sources}
        tensors = {m: _by_layer(m, names[m], layers[m]) for m in self.models if m in models}
        plans = self._outside(slices[0], tensors, embedding=True)
        plans |= self._outside(slices[-1], tensors, embedding=False)
        first = 0
        for piece in slices:
            count = _layer_count(piece, layers)
            for step in range(count):
                t = step / (count - 1) if count > 1 else 1.0
                here = {s.model: tensors[s.model][s.start + step] for s in piece.sources}
                for before, after in dict.fromkeys(stem for held in here.values() for stem in held):
                    name = f"{before}{first + step}{after}"
                    found = {model: held.get((before, after)) for model, held in here.items()}
                    plans[name] = self._tensor(name, piece, found, t)
            first += count
        return {name: plans[name] for name in sorted(plans, key=_natural)}

    def _outside(
        self, piece: Slice, tensors: Mapping[str, Tensors], embedding: bool
    ) -> dict[str, TensorPlan]:
        here = {s.model: tensors[s.model][None] for s in piece.sources}
        names = dict.fromkeys(name for held in here.values() for name, _ in held)
        return {
            name: self._tensor(name, piece, {m: held.get((name, "")) for m, held in here.items()})
            for name in names
            if ("embed" in name) == embedding
        }

    def _tensor(
        self, name: str, piece: Slice, found: Mapping[str, str | None], t: float = 0.0
    ) -> TensorPlan:
        """One plan; `found` has each source's tensor, None where it lacks it."""

        def at(model: str) -> tuple[str, str]:
            if (tensor := found[model]) is None:
                has = next(other for other, held in found.items() if held)
                fix = "merge models of one architecture, or take this tensor from one by a rule"
                _fail(model, f"no tensor for {name!r}", f"one, as in {has}", fix)
            return model, tensor

        formula = piece.formula
        for pattern, action in self.rules:
            if pattern.search(name):
                if isinstance(action, str):
                    return TensorPlan("passthrough", None, (at(action),), {})
                formula = action
                break
        members = tuple(at(source.model) for source in piece.members)
        base = None
        if METHODS[formula.method].base != "unread":
            base = _start(name, formula.method, piece)
        params = _params(name, formula, members, t)
        find(formula.method, params, len(members))
        return TensorPlan(formula.method, at(base) if base else None, members, params)


def _params(
    tensor: str, formula: Formula, members: Sequence[tuple[str, str]], t: float
) -> dict[str, Any]:
    """The values for one tensor; those that nobody set are left to the method's defaults.

    mergekit matches a filter with the output's name, but for a member's own parameter with the
    name in that member.
    """
    params: dict[str, Any] = {}
    for key, param in METHODS[formula.method].params.items():
        found = [_look_up(key, formula.shared, tensor, t)]
        if _is_members(formula.method, param.annotation):
            pairs = zip(formula.each, members, strict=True)
            found = [_look_up(key, chain, name, t) for chain, (_, name) in pairs]
        if None not in found:
            params[key] = tuple(found) if param.annotation in (Weights, Each) else found[0]
        elif param.default is param.empty or any(value is not None for value in found):
            whose = f" for {members[found.index(None)][0]}" if len(found) > 1 else ""
            fix = "set it, or add a filter that fits this tensor"
            _fail(tensor, f"no {key!r}{whose}", f"a value, for {formula.method}", fix)
    return params


def _look_up(key: str, chain: Chain, name: str, t: float) -> Any:
    for settings in chain:
        for part, values in settings.get(key, ()):
            if part in name:
                return _at(values, t)
    return None


def _at(values: Sequence[Any], t: float) -> Any:
    """The value at t in [0, 1]: linear between numbers, the one before t otherwise."""
    place = t * (len(values) - 1)
    low = int(place)
    if low == place or any(isinstance(x, bool | str) for x in values):
        return values[low]
    part = place - low
    return (1 - part) * values[low] + part * values[low + 1]


def _by_layer(model: str, names: Iterable[str], count: int) -> Tensors:
    found: dict[int | None, dict[Stem, str]] = {None: {}} | {i: {} for i in range(count)}
    for name in names:
        match = LAYER.fullmatch(name)
        layer = int(match[2]) if match else None
        if layer not in found:
            _fail(f"{model}: {name}", f"layer {layer}", f"{count} layers", "correct its config")
        found[layer][(match[1], match[3]) if match else (name, "")] = name
    if empty := [layer for layer, held in found.items() if layer is not None and not held]:
        wanted = f"{count} layers"
        _fail(model, f"no tensors of layer {empty[0]}", wanted, "complete the checkpoint")
    return found


def _layer_count(piece: Slice, layers: Mapping[str, int]) -> int:
    counts = {}
    for source in piece.sources:
        has = layers[source.model]
        stop = has if source.stop is None else source.stop
        if stop > has:
            found = f"layer_range [{source.start}, {stop}]"
            _fail(f"{piece.where}: {source.model}", found, f"at most {has} layers", "shorten it")
        counts[source.model] = stop - source.start
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} of {model}" for model, count in counts.items())
        _fail(piece.where, f"layers: {found}", "as many of each model", "correct the layer_range")
    return next(iter(counts.values()))


def _start(tensor: str, method: str, piece: Slice) -> str | None:
    """The base that a method reads."""
    base = piece.base.model if piece.base else None
    if base is None and METHODS[method].base == "required":
        _fail(tensor, "no base", f"one, for {method}", "name a base")
    if base in [source.model for source in piece.members]:
        _fail(tensor, f"the base {base} among the members", f"others, for {method}", "remove it")
    return base


def _natural(name: str) -> list[str | int]:
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]


def from_mergekit(config: Mapping[str, Any]) -> Recipe:
    """The recipe of a parsed mergekit YAML.

    As in mergekit, a base among the models is no member of a method that reads the base (its own
    parameters are then without effect), and is an ordinary member of one that does not; `models`
    without the base have it appended. mergekit's defaults are filled in. `residual_weight`, which
    mergekit reads nowhere, is refused. After the last slice all its sources are merged into the
    final norm and head; mergekit drops those beyond the first slice's number of sources.

    Args:
        config: mapping with the keys of mergekit's `MergeConfiguration`.

    Returns:
        The recipe.

    Raises:
        InputError: unknown key, method or parameter; value of the wrong type; not exactly one of
            models, slices and modules; a missing base; a model listed twice.
    """
    _keys("recipe", config, TOP_KEYS)
    method, base = _method(config.get("merge_method"), "merge_method"), _text(config, "base_model")
    form = _one_of("recipe", config, ("models", "slices", "modules"))
    outer = (
        _yaml_settings("parameters", config.get("parameters"), method),
        {key: _setting(key, value) for key, value in DEFAULTS.get(method, {}).items()},
    )
    if form == "modules":
        modules = {}
        for key, given in _mapping("modules", config["modules"]).items():
            where = f"modules.{key}"
            _keys(where, given, ("models", "slices", "parameters"))
            own = _yaml_settings(f"{where}.parameters", given.get("parameters"), method)
            modules[key] = _slices(f"{where}.", given, method, base, (own, *outer))
    else:
        modules = {"": _slices("", config, method, base, outer)}
    if config.get("tokenizer") and config.get("tokenizer_source"):
        _fail("tokenizer", "tokenizer_source too", "one of the two", "remove one")
    sources = [s.model for pieces in modules.values() for piece in pieces for s in piece.sources]
    return Recipe(
        models=tuple(dict.fromkeys([base, *sources] if base else sources)),
        modules=modules,
        base=base,
        dtype=_text(config, "dtype"),
        out_dtype=_text(config, "out_dtype"),
        tokenizer_source=_text(config, "tokenizer_source"),
        tokenizer=_mapping("tokenizer", config.get("tokenizer")) or None,
        chat_template=_text(config, "chat_template"),
    )


def _slices(
    where: str, given: Mapping[str, Any], method: str, base: str | None, chain: Chain
) -> tuple[Slice, ...]:
    """The slices of a mapping with `models` or `slices`; whole models are one slice."""
    if _one_of(where.rstrip(".") or "recipe", given, ("models", "slices")) == "models":
        sources = _sources(f"{where}models", given["models"], method, ("model", "parameters"))
        if base and base not in [source.model for source, _ in sources]:
            sources.append((Source(base), {}))
        return (_slice(f"{where}models", method, base, sources, chain),)
    pieces = []
    for i, piece in enumerate(_list(f"{where}slices", given["slices"])):
        at = f"{where}slices[{i}]"
        _keys(at, piece, ("sources", "base_model", "parameters"))
        keys = ("model", "layer_range", "parameters")
        sources = _sources(f"{at}.sources", piece.get("sources"), method, keys)
        own = _yaml_settings(f"{at}.parameters", piece.get("parameters"), method)
        start = _text(piece, "base_model", f"{at}.") or base
        pieces.append(_slice(at, method, start, sources, (own, *chain)))
    return tuple(pieces)


def _sources(
    where: str, given: Any, method: str, keys: Sequence[str]
) -> list[tuple[Source, Settings]]:
    sources = []
    for i, source in enumerate(_list(where, given)):
        at = f"{where}[{i}]"
        _keys(at, source, keys)
        if (model := _text(source, "model", f"{at}.")) is None:
            _fail(at, "no 'model'", "a path, or path+lora", "name the model")
        span: Sequence[Any] = (0, None)
        if "layer_range" in keys:
            span = _list(f"{at}.layer_range", source.get("layer_range"))
            if [type(x) for x in span] != [int, int] or not 0 <= span[0] < span[1]:
                wanted = "[start, stop] with 0 <= start < stop"
                _fail(f"{at}.layer_range", list(span), wanted, "correct it")
        own = _yaml_settings(f"{at}.parameters", source.get("parameters"), method, one_member=True)
        sources.append((Source(model, *span), own))
    return sources


def _slice(
    where: str, method: str, base: str | None, sources: list[tuple[Source, Settings]], chain: Chain
) -> Slice:
    """Tells base from members, as mergekit's methods do."""
    _no_repeats(where, [source.model for source, _ in sources])
    start = next((source for source, _ in sources if source.model == base), None)
    others = [pair for pair in sources if pair[0] is not start]
    use = METHODS[method].base
    alone = others if method == "multislerp" and others else sources
    if len(alone) == 1 and (method in SAME_ALONE or (use != "unread" and alone[0][0] is start)):
        return Slice(where, Formula("passthrough", (), ((),)), (alone[0][0],), None)
    needed = use == "required" or method == "slerp" or (method == "nuslerp" and base)
    if needed and start is None:
        found = f"base_model {base!r} not among its models" if base else "no base_model"
        _fail(where, found, f"a base among the models, for {method}", "name it and list it")
    if method == "slerp":
        others = [pair for pair in sources if pair[0] is start] + others
    members = sources if use == "unread" and method != "slerp" else others
    formula = Formula(method, chain, tuple((own, *chain) for _, own in members))
    return Slice(where, formula, tuple(s for s, _ in members), start if use != "unread" else None)


def _yaml_settings(where: str, given: Any, method: str, one_member: bool = False) -> Settings:
    """A `parameters` mapping by our names, its values as our methods want them."""
    renamed = YAML_NAMES[""] | YAML_NAMES.get(method, {})
    known = {renamed.get(ours, ours): ours for ours in METHODS[method].params}
    settings = {}
    for key, value in _mapping(where, given).items():
        if key in NO_EFFECT:
            continue
        kind = _kind(where, key, method, known)
        if one_member and not _is_members(method, kind):
            fix = "move it to the parameters of the slice, module or recipe"
            _fail(f"{where}.{key}", "a value of one model", "one for all", fix)

        def convert(x: Any, ours: str = known[key], kind: Any = kind) -> Any:
            if ours == "rescale":
                return RESCALE.get(x, x)
            if kind is bool:
                return bool(x) if x in (0, 1) else x
            return _number(x)

        settings[known[key]] = _setting(f"{where}.{key}", value, convert)
    return settings


def _number(x: Any) -> Any:
    """YAML 1.1 reads 1e-5 as a string; what is no number is left for `find` to refuse."""
    try:
        return float(x) if isinstance(x, str) else x
    except ValueError:
        return x


def from_config(config: Any) -> Recipe:
    """The recipe of our own form, all whole models.

    Keys: `method`; `members`, a list of labels; `base`, a label or None; `params`, by the names in
    `METHODS`; `rules`, a list of (regex, {"method", "params"} or {"take": label}). A parameter of
    one number a member is a tuple of settings, one a member, where a setting is a number, a list
    (gradient) or a list of {filter, value}; one that may also be one number for all takes a setting
    too. The first rule whose regex is found in the output name counts: `take` copies the tensor of
    one member or of the base, `params` go over the recipe's, and `method` replaces the method, to
    which those of the recipe's parameters apply that it has.

    Args:
        config: mapping, or ConfigDict of ml_collections.

    Returns:
        The recipe.

    Raises:
        InputError: unknown key, method, label or parameter; value of the wrong type; a bad regex.
    """
    given = config.to_dict() if hasattr(config, "to_dict") else config
    _keys("recipe", given, CONFIG_KEYS)
    method, base = _method(given.get("method"), "method"), _text(given, "base")
    members = _list("members", given.get("members"))
    if wrong := [label for label in members if not isinstance(label, str)]:
        _fail("members", repr(wrong[0]), "labels", "name the members")
    _no_repeats("members", members)
    outer = _levels("params", given.get("params"), method, len(members))
    labels = tuple(dict.fromkeys([base, *members] if base else members))
    rules = []
    for i, rule in enumerate(_list("rules", given["rules"]) if given.get("rules") else []):
        at = f"rules[{i}]"
        if not isinstance(rule, Sequence) or len(rule) != 2 or not isinstance(rule[0], str):
            _fail(at, repr(rule), "(regex, mapping)", "correct it")
        try:
            pattern = re.compile(rule[0])
        except re.error as error:
            _fail(at, f"{rule[0]!r} ({error})", "a regular expression", "correct it")
        rules.append((pattern, _action(at, rule[1], method, outer, labels, len(members))))
    start = Source(base) if base else None
    piece = Slice("members", _formula(method, [outer]), tuple(map(Source, members)), start)
    return Recipe(models=labels, modules={"": (piece,)}, base=base, rules=tuple(rules))


def _action(
    where: str, given: Any, method: str, outer: Levels, labels: Sequence[str], count: int
) -> str | Formula:
    _keys(where, given, ("method", "params", "take"))
    if "take" not in given:
        method = _method(given.get("method", method), f"{where}.method")
        own = _levels(f"{where}.params", given.get("params"), method, count)
        return _formula(method, [own, outer])
    if len(given) > 1:
        _fail(where, ", ".join(given), "take alone, or method and params", "split the rule")
    if given["take"] not in labels:
        _fail(f"{where}.take", repr(given["take"]), ", ".join(labels), "name one of these")
    return str(given["take"])


def _levels(where: str, given: Any, method: str, count: int) -> Levels:
    shared: dict[str, Setting] = {}
    own: list[dict[str, Setting]] = [{} for _ in range(count)]
    for key, value in _mapping(where, given).items():
        at = f"{where}.{key}"
        kind = _kind(where, key, method, {name: name for name in METHODS[method].params})
        if kind == Weights or (kind == Each and isinstance(value, tuple)):
            if not isinstance(value, list | tuple) or len(value) != count:
                _fail(at, repr(value), f"{count} values, one a member", "correct it")
            for settings, one in zip(own, value, strict=True):
                settings[key] = _setting(at, one)
        else:
            shared[key] = _setting(at, value)
    return shared, list(own)


def _formula(method: str, levels: Sequence[Levels]) -> Formula:
    """Looks up in the first level first, and there in a member's own before all members'."""
    count = len(levels[0][1])
    each = (tuple(x for shared, own in levels for x in (own[i], shared)) for i in range(count))
    return Formula(method, tuple(shared for shared, _ in levels), tuple(each))


def _kind(where: str, key: str, method: str, known: Mapping[str, str]) -> Any:
    """The annotation of a parameter by the name that `known` maps to ours."""
    if key not in known:
        wanted = ", ".join(known) or "none"
        _fail(where, f"{key!r}", f"parameters of {method}: {wanted}", "remove or rename it")
    return METHODS[method].params[known[key]].annotation


def _is_members(method: str, kind: Any) -> bool:
    """A parameter that each member may have its own of; passthrough has but one member."""
    return kind in (Weights, Each) or method == "passthrough"


def _setting(where: str, given: Any, convert: Callable[[Any], Any] = lambda x: x) -> Setting:
    filtered = isinstance(given, list | tuple) and any(isinstance(case, Mapping) for case in given)
    cases = []
    for case in given if filtered else [{"value": given}]:
        _keys(where, case, ("filter", "value"))
        value = case.get("value")
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not values or not all(isinstance(x, int | float | str) for x in values):
            wanted = "a number, switch or string, a list of them, or a list of {filter, value}"
            _fail(where, repr(value), wanted, "correct it")
        part = case.get("filter")
        if not isinstance(part, str | None):
            _fail(f"{where}.filter", repr(part), "a part of a tensor's name", "quote it")
        cases.append(("" if part in (None, "*") else part, tuple(map(convert, values))))
    return tuple(cases)


def _method(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in METHODS:
        _fail(where, repr(name), ", ".join(METHODS), "choose one of these")
    return name


def _one_of(where: str, given: Mapping[str, Any], keys: Sequence[str]) -> str:
    held = [key for key in keys if given.get(key)]
    if len(held) != 1:
        wanted = f"exactly one of {', '.join(keys)}"
        _fail(where, " and ".join(held) or "none", wanted, "keep one")
    return held[0]


def _keys(where: str, given: Any, known: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        _fail(where, repr(given), f"a mapping with {', '.join(known)}", "correct it")
    if unknown := [key for key in given if key not in known]:
        _fail(where, f"key {unknown[0]!r}", ", ".join(known), "remove or rename it")


def _mapping(where: str, given: Any) -> Mapping[str, Any]:
    """The mapping, empty for None."""
    if not isinstance(given, Mapping | None):
        _fail(where, repr(given), "a mapping", "correct it")
    return given or {}


def _list(where: str, given: Any) -> list[Any]:
    if not isinstance(given, list | tuple) or not given:
        _fail(where, repr(given), "a list of one or more", "correct it")
    return list(given)


def _text(given: Mapping[str, Any], key: str, where: str = "") -> str | None:
    value = given.get(key)
    if not isinstance(value, str | None):
        _fail(f"{where}{key}", repr(value), "a string", "correct it")
    return value


def _no_repeats(where: str, labels: Sequence[str]) -> None:
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
        _fail(where, f"{repeated[0]} twice", "each model once", "remove one")


def _fail(where: str, found: object, expected: object, fix: str) -> NoReturn:
    raise InputError(where, found=found, expected=expected, fix=fix)
