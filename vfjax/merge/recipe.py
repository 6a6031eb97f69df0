"""Merge recipes, of our configs or of mergekit's YAML: one plan for each output tensor.

No files and no arrays: a recipe sees tensor names and numbers of layers, so a wrong one fails
before any work.

A parameter is a scalar, a list (a gradient: linear for numbers, in steps for switches and strings,
over the layers of a slice, whose first is at 0 and last at 1; a lone layer is at 1, tensors outside
the layers at 0) or a list of {filter, value}, the first filter found in the tensor's name counting.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from vfjax.errors import counted
from vfjax.merge import parse
from vfjax.merge.methods.registry import METHODS, Each, Weights, find

CONFIG_KEYS = ("method", "base", "members", "params", "rules")
LAYER = re.compile(
    r"(?!(?:.*[./])?vision_sampler_)"  # Cambrian's connector numbers samplers so
    r"((?:.*?[./])?(?:layers?|blocks|stages|deepstack_merger_list)\.)(\d+)(\..+)"
)
"""Name of a layer's tensor: what is before its number, the number, what is behind."""
LAST = re.compile(r"visual\.merger\.mlp\.")
"""Tensors outside the layers that gradients see at 1: mergekit has them as two layers of one name,
of which the second is written."""

Settings = Mapping[str, parse.Setting]
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
    """A method, and where its parameters are found: those for all members, and each member's.

    `words` are what the user calls parameters, where that is not our name.
    """

    method: str
    shared: Chain
    each: tuple[Chain, ...]
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)


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
        unread: parameters of the YAML that its method does not read.
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
    unread: tuple[str, ...] = ()

    def plan(
        self, names: Mapping[str, Sequence[str]], layers: Mapping[str, int], module: str = ""
    ) -> dict[str, TensorPlan]:
        """The plan of every output tensor.

        Output layers are numbered in the slices' order. The embedding is planned with the first
        slice, the final norm and the head with the last, as in mergekit's plan.py.

        Args:
            names: model -> names of its tensors ("model.layers.3.mlp.up_proj.weight").
            layers: model -> number of its decoder layers.
            module: sub-module to plan, if the recipe has several `modules`.

        Returns:
            Output name -> plan, in natural order (layer 2 before layer 10).

        Raises:
            InputError: unknown module; a rule that fits no tensor; layers that a model lacks or
                that differ in number; a tensor that one source has and another lacks; a parameter
                that is missing or ill-typed, or a number of members that the method does not take.
        """
        plans = self.plan_module(names, layers, module)
        self.check_rules(plans)
        return plans

    def plan_module(
        self, names: Mapping[str, Sequence[str]], layers: Mapping[str, int], module: str
    ) -> dict[str, TensorPlan]:
        """`plan` of one module of several, whose rules may be for the tensors of another."""
        slices = self._slices(module)
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

    def check_rules(self, names: Collection[str]) -> None:
        """Raises InputError for a rule that fits none of these names."""
        for pattern, _ in self.rules:
            if not any(map(pattern.search, names)):
                expected = "a part of some tensor's name, as 'embed_tokens' or 'layers.0.mlp'"
                parse.fail("rules", repr(pattern.pattern), expected, "correct the pattern")

    def rule(self, name: str) -> str | Formula | None:
        """What the first rule that fits a tensor says: whose it takes, or how it is merged."""
        return next((action for pattern, action in self.rules if pattern.search(name)), None)

    @property
    def reads_base(self) -> bool:
        """Some tensor may be merged by a method that reads the base."""
        pieces = [piece for slices in self.modules.values() for piece in slices]
        found = [piece.formula for piece in pieces] + [action for _, action in self.rules]
        return any(METHODS[x.method].base != "unread" for x in found if isinstance(x, Formula))

    def only(self, module: str) -> "Recipe":
        """The recipe of one module, and of the models that are merged there."""
        slices = self._slices(module)
        used = {source.model for piece in slices for source in piece.sources}
        models = tuple(model for model in self.models if model in used)
        return dataclasses.replace(self, models=models, modules={module: slices})

    def without_base(self) -> "Recipe":
        """The recipe for tensors that the base lacks; see `reads_base`."""
        modules = {
            key: tuple(dataclasses.replace(piece, base=None) for piece in pieces)
            for key, pieces in self.modules.items()
        }
        models = tuple(model for model in self.models if model != self.base)
        return dataclasses.replace(self, models=models, modules=modules, base=None)

    @property
    def is_sliced(self) -> bool:
        """It names the layers that it takes, so that models may have other numbers of them."""
        pieces = [piece for slices in self.modules.values() for piece in slices]
        return all(source.stop is not None for piece in pieces for source in piece.sources)

    def origins(self, layers: Mapping[str, int], module: str = "") -> list[dict[str, int]]:
        """Of each output layer, model -> its layer that is merged there; see `plan`."""
        return [
            {source.model: source.start + step for source in piece.sources}
            for piece in self._slices(module)
            for step in range(_layer_count(piece, layers))
        ]

    def _slices(self, module: str) -> tuple[Slice, ...]:
        if not module and len(self.modules) == 1:
            (module,) = self.modules
        key = "" if "" in self.modules else module
        if key not in self.modules:
            expected = f"one module, or one of {', '.join(self.modules)}"
            parse.fail("modules", repr(module or list(self.modules)), expected, "keep the LLM's")
        return self.modules[key]

    def _outside(
        self, piece: Slice, tensors: Mapping[str, Tensors], embedding: bool
    ) -> dict[str, TensorPlan]:
        here = {s.model: tensors[s.model][None] for s in piece.sources}
        names = dict.fromkeys(name for held in here.values() for name, _ in held)
        return {
            name: self._tensor(
                name,
                piece,
                {m: held.get((name, "")) for m, held in here.items()},
                1.0 if LAST.search(name) else 0.0,
            )
            for name in names
            if ("embed" in name) == embedding
        }

    def _tensor(
        self, name: str, piece: Slice, found: Mapping[str, str | None], t: float
    ) -> TensorPlan:
        """One plan; `found` has each source's tensor, None where it lacks it."""

        def at(model: str) -> tuple[str, str]:
            if (tensor := found[model]) is None:
                has = next(other for other, held in found.items() if held)
                fix = "merge models of one architecture, or take this tensor from one by a rule"
                parse.fail(model, f"no tensor for {name!r}", f"one, as in {has}", fix)
            return model, tensor

        action = self.rule(name)
        if isinstance(action, str):
            return TensorPlan("passthrough", None, (at(action),), {})
        formula = action or piece.formula
        members = tuple(at(source.model) for source in piece.members)
        base = None
        if METHODS[formula.method].base != "unread":
            base = _start(name, formula.method, piece)
        params = _params(name, formula, members, t)
        find(formula.method, params, len(members), formula.words)
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
        if parse.is_members(formula.method, param.annotation):
            pairs = zip(formula.each, members, strict=True)
            found = [_look_up(key, chain, name, t) for chain, (_, name) in pairs]
        if None not in found:
            params[key] = tuple(found) if param.annotation in (Weights, Each) else found[0]
        elif param.default is param.empty or any(value is not None for value in found):
            whose = f" for {members[found.index(None)][0]}" if len(found) > 1 else ""
            fix = "set it, or add a filter that fits this tensor"
            word = formula.words.get(key, key)
            parse.fail(tensor, f"no {word!r}{whose}", f"a value, for {formula.method}", fix)
    return params


def _look_up(key: str, chain: Chain, name: str, t: float) -> parse.Value | None:
    for settings in chain:
        for part, values in settings.get(key, ()):
            if part in name:
                return _at(values, t)
    return None


def _at(values: Sequence[parse.Value], t: float) -> parse.Value:
    """The value at t in [0, 1]: linear between numbers, the one before t otherwise."""
    place = t * (len(values) - 1)
    low = int(place)
    numbers = [x for x in values if not isinstance(x, bool | str)]
    if low == place or len(numbers) < len(values):
        return values[low]
    part = place - low
    return (1 - part) * numbers[low] + part * numbers[low + 1]


def _by_layer(model: str, names: Iterable[str], count: int) -> Tensors:
    found: dict[int | None, dict[Stem, str]] = {None: {}} | {i: {} for i in range(count)}
    for name in names:
        match = LAYER.fullmatch(name)
        layer = int(match[2]) if match else None
        if layer not in found:
            parse.fail(
                f"{model}: {name}", f"layer {layer}", counted(count, "layer"), "correct its config"
            )
        found[layer][(match[1], match[3]) if match else (name, "")] = name
    if empty := [layer for layer, held in found.items() if layer is not None and not held]:
        wanted = counted(count, "layer")
        parse.fail(model, f"no tensors of layer {empty[0]}", wanted, "complete the checkpoint")
    return found


def _layer_count(piece: Slice, layers: Mapping[str, int]) -> int:
    counts = {}
    for source in piece.sources:
        has = layers[source.model]
        stop = has if source.stop is None else source.stop
        if stop > has:
            found = f"layer_range [{source.start}, {stop}]"
            wanted = f"at most {counted(has, 'layer')}"
            parse.fail(f"{piece.where}: {source.model}", found, wanted, "shorten it")
        counts[source.model] = stop - source.start
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} of {model}" for model, count in counts.items())
        parse.fail(
            piece.where, f"layers: {found}", "as many of each model", "correct the layer_range"
        )
    return next(iter(counts.values()))


def _start(tensor: str, method: str, piece: Slice) -> str | None:
    """The base that a method reads."""
    base = piece.base.model if piece.base else None
    if base is None and METHODS[method].base == "required":
        parse.fail(tensor, "no base", f"one, for {method}", "name a base")
    if base in [source.model for source in piece.members]:
        parse.fail(
            tensor, f"the base {base} among the members", f"others, for {method}", "remove it"
        )
    return base


def _natural(name: str) -> list[str | int]:
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]


def from_config(config: object) -> Recipe:
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
    given = parse.keys("recipe", given, CONFIG_KEYS)
    method, base = parse.method(given.get("method"), "method"), parse.text(given, "base")
    members = parse.items("members", given.get("members"))
    if wrong := [label for label in members if not isinstance(label, str)]:
        parse.fail("members", repr(wrong[0]), "labels", "name the members")
    parse.no_repeats("members", members)
    outer = _levels("params", given.get("params"), method, len(members))
    labels = tuple(dict.fromkeys([base, *members] if base else members))
    rules = []
    for i, rule in enumerate(parse.items("rules", given["rules"]) if given.get("rules") else []):
        at = f"rules[{i}]"
        if not isinstance(rule, Sequence) or len(rule) != 2 or not isinstance(rule[0], str):
            parse.fail(at, repr(rule), "(regex, mapping)", "correct it")
        try:
            pattern = re.compile(rule[0])
        except re.error as error:
            parse.fail(at, f"{rule[0]!r} ({error})", "a regular expression", "correct it")
        rules.append((pattern, _action(at, rule[1], method, outer, labels, len(members))))
    start = Source(base) if base else None
    piece = Slice("members", _formula(method, [outer]), tuple(map(Source, members)), start)
    return Recipe(models=labels, modules={"": (piece,)}, base=base, rules=tuple(rules))


def _action(
    where: str, given: object, method: str, outer: Levels, labels: Sequence[str], count: int
) -> str | Formula:
    given = parse.keys(where, given, ("method", "params", "take"))
    if "take" not in given:
        method = parse.method(given.get("method", method), f"{where}.method")
        own = _levels(f"{where}.params", given.get("params"), method, count)
        return _formula(method, [own, outer])
    if len(given) > 1:
        parse.fail(where, ", ".join(given), "take alone, or method and params", "split the rule")
    if given["take"] not in labels:
        parse.fail(f"{where}.take", repr(given["take"]), ", ".join(labels), "name one of these")
    return str(given["take"])


def _levels(where: str, given: object, method: str, count: int) -> Levels:
    shared: dict[str, parse.Setting] = {}
    own: list[dict[str, parse.Setting]] = [{} for _ in range(count)]
    for key, value in parse.mapping(where, given).items():
        at = f"{where}.{key}"
        kind = parse.kind(where, key, method, {name: name for name in METHODS[method].params})
        if kind == Weights or (kind == Each and isinstance(value, tuple)):
            if not isinstance(value, list | tuple) or len(value) != count:
                wanted = f"{counted(count, 'value')}, one a member"
                parse.fail(at, repr(value), wanted, "correct it")
            for settings, one in zip(own, value, strict=True):
                settings[key] = parse.setting(at, one)
        else:
            shared[key] = parse.setting(at, value)
    return shared, list(own)


def _formula(method: str, levels: Sequence[Levels]) -> Formula:
    """Looks up in the first level first, and there in a member's own before all members'."""
    count = len(levels[0][1])
    each = (tuple(x for shared, own in levels for x in (own[i], shared)) for i in range(count))
    return Formula(method, tuple(shared for shared, _ in levels), tuple(each))
