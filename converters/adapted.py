"""The tensors of a base with an adapter's in their place, beside them or added to them.

Names are those of PEFT's state dicts (peft/utils/save_and_load.py) and, of LLaVA's files, those of
its llava/model/builder.py.
"""

import functools
import itertools
import re
from collections.abc import Mapping
from typing import Final

from converters.adapter_config import (
    MERGE,
    TRAIN,
    kept_whole,
    parameter_targeted,
    rank_and_scale,
    refused,
    targeted,
    token_numbers,
)
from converters.adapters import Contents
from converters.files.names import ADAPTER, SETTINGS
from converters.lora import LoRATensor, Part, RowsReplaced, Shifted, Transposed, factors_fit
from converters.params.table import Names, Place, placed, rename
from vfjax import InputError
from vfjax.errors import counted
from vfjax.merge import LazyTensor, equal

STARTS = (("base_model.model.", ""), ("model.model.", "model."), ("", ""))
"""What PEFT puts before a model's own names -> what is left of it."""

WRAPPER = re.compile(
    r"\.(?:(token_adapter\.base_layer|base_layer|original_module)|modules_to_save(?:\.default)?)(?=\.)"
)
"""What it puts inside the names of whole tensors; of the group, those of the model below."""

FACTOR = re.compile(
    r"(.+)\.(?:lora_(A|B|embedding_A|embedding_B|magnitude_vector)|token_adapter\.(trainable_tokens)"
    r"_delta)(?:\.default)?(?:\.weight|\.(bias))?"
)
"""Name of a module's own tensor: the module, what it is, whether it is a bias."""

IDLE = re.compile(r".*\.lora_(velora_embed|monteclora_sampler)\b.*")
"""Tensors that only training reads."""

Found = tuple[str, LazyTensor]
"""Where a tensor is, the tensor."""

Factors = dict[str, Found]
"""Of one module: what it is -> the tensor."""

TOKENS = "trainable_tokens"
INDICES: Final = "trainable_token_indices"
"""What PEFT's rows of single tokens are, and the setting that says of which."""

EXPERTS = re.compile(r"(.+)\.mlp\.experts(\.base_layer)?")
"""Fused experts of transformers 5, perhaps of their first parameter where both have factors."""

MIXTRAL = "block_sparse_moe"
"""Its name in files."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Names in the tables of LLMs."""


def completed(contents: Contents, names: Names, *, tied: bool) -> dict[str, LazyTensor]:
    """The base's tensors with the folder's own in their place, beside them or added to them.

    Where the base's embedding is its head too, PEFT changes the one without the other unless
    `ensure_weight_tying` is set; whole tensors that are not in `modules_to_save` are both's.

    Args:
        contents: of the folder.
        names: the spellings that its layout reads: an adapter has those of the code that it was
            trained by, the base's files perhaps others.
        tied: whether the base's config ties its head to the embedding.

    Returns:
        All tensors, under the base's names where it has them; with a head where it is no longer the
        embedding.

    Raises:
        InputError: tensors that don't fit the base, or that the settings promise and that are not
            there.
    """
    return _Completion(contents, names, tied).run()


class _Completion:
    """See `completed`."""

    def __init__(self, contents: Contents, names: Names, tied: bool):
        self.contents, self.settings = contents, contents.settings
        self.tensors = dict(contents.tensors)
        self.places = functools.partial(placed, prefixes=names)
        self.known = {new: old for old, (new, _) in self.places(self.tensors).items()}
        self.embedding = self.known.setdefault(Place("llm", EMBEDDING), EMBEDDING)
        self.head = self.known.setdefault(Place("llm", HEAD), HEAD)
        own = [self.tensors[x] for x in (self.embedding, self.head) if x in self.tensors]
        self.tied = len(own) == 1 or (tied and self._adapts_words() and equal(*own))
        if self.tied:
            self._set_words(own[0])

    def _adapts_words(self) -> bool:
        tensors = self.contents.added.get(ADAPTER, {})
        return any(word in name for name in tensors for word in ("embed_tokens", "lm_head"))

    def _set_words(self, tensor: LazyTensor) -> None:
        self.tensors |= dict.fromkeys((self.embedding, self.head), tensor)

    def spelled(self, name: str) -> str:
        """The base's name of a tensor in any spelling; itself if the base has none.

        PEFT wraps whole models, or the one inside of another: then a start is missing.
        """
        for spelling in (name, f"model.{name}", name.replace(".mlp.gate.", f".{MIXTRAL}.gate.")):
            for place, _ in self.places([spelling]).values():
                if place in self.known:
                    return self.known[place]
        inner = (self.known.get(Place("llm", start + name)) for start in ("", "model."))
        return next((found for found in inner if found), name)

    def run(self) -> dict[str, LazyTensor]:
        below, kept, modules = self._sorted()
        for name in sorted(below, key=lambda name: name == self.head):  # a tied head comes last
            self._replace(name, below[name])
            if self.tied and name in (self.embedding, self.head):
                self._set_words(below[name][1])
        shared = self.tensors.get(self.head)
        for name, found in kept.items():
            self._replace(name, found)
        if self.settings.get(INDICES) and not any(TOKENS in parts for parts in modules.values()):
            expected = "tokens with rows in the files"
            raise refused(self.contents.path, INDICES, self.settings[INDICES], expected)
        for module, parts in modules.items():
            if match := EXPERTS.fullmatch(module):
                both = f"{match[1]}.mlp.experts.base_layer" in modules
                self._update_experts(match[1], parts, first=bool(match[2]) if both else None)
            else:
                self._update(module, parts)
        self._check_rows()
        if self.tied:
            self._tie(shared, modules)
        return self.tensors

    def _sorted(self) -> tuple[dict[str, Found], dict[str, Found], dict[str, Factors]]:
        """Whole tensors of the model below, of modules beside it, and what updates a module."""
        below: dict[str, Found] = {}
        kept: dict[str, Found] = {}
        modules: dict[str, Factors] = {}
        whole: set[str] = set()
        for stem, tensors in self.contents.added.items():
            for name, (own, _) in rename(tensors, STARTS).items():
                found = f"{tensors[name].path}: {name}", tensors[name]
                if stem != ADAPTER:
                    below[self.spelled(own)] = found
                elif IDLE.fullmatch(own):
                    continue
                elif match := FACTOR.fullmatch(own):
                    kind = "_".join(word for word in match.groups()[1:] if word)
                    modules.setdefault(match[1], {})[kind] = found
                elif ".lora_" in own:
                    raise InputError(
                        found[0],
                        found="a LoRA of another kind",
                        expected="the tensors of PEFT's Linear, Embedding and Conv2d",
                        fix=MERGE,
                    )
                else:
                    plain, wrapper = WRAPPER.sub("", own), WRAPPER.search(own)
                    whole.add(plain)
                    new = self.spelled(plain)
                    beside = kept_whole(self.settings, plain)
                    if (wrapper and wrapper[1]) or not (wrapper or beside):
                        below[new] = found
                    elif not wrapper or new not in kept:  # PEFT reads the plain name
                        kept[new] = found
        self._check_kept(whole)
        return below, kept, modules

    def _check_kept(self, whole: set[str]) -> None:
        """Checks that modules to save, if the base has them, are in the files."""
        for module in self.settings.get("modules_to_save") or ():
            last = module.rpartition(".")[2] + "."
            if not any(f"{module}." in x for x in whole) and any(last in x for x in self.tensors):
                expected = "modules with tensors in the files"
                raise refused(self.contents.path, "modules_to_save", module, expected)

    def _replace(self, name: str, found: Found) -> None:
        """A whole tensor in place of the base's, or beside them."""
        where, tensor = found
        other, skip = self.tensors.get(name), int(name in (self.embedding, self.head))
        if other is not None and tensor.shape[skip:] != other.shape[skip:]:
            expected = f"{other.shape} as in {self.contents.base}"
            raise self._other_base(where, f"shape {tensor.shape}", expected)
        self.tensors[name] = tensor

    def _check_rows(self) -> None:
        """Checks that embedding and head have one vocabulary where an adapter resized one."""
        embedding, head = (self.tensors.get(name) for name in (self.embedding, self.head))
        if embedding is not None and head is not None and embedding.shape[0] != head.shape[0]:
            raise InputError(
                f"{self.contents.path}: {HEAD}",
                found=f"{head.shape[0]} rows, and {embedding.shape[0]} of {EMBEDDING}",
                expected="one vocabulary",
                fix="save the adapter with both (save_pretrained with save_embedding_layers=True)",
            )

    def _tie(self, shared: LazyTensor | None, modules: Mapping[str, Factors]) -> None:
        """A head that is the embedding, and one that PEFT keeps so, is no tensor of its own."""
        names = self.embedding, self.head
        tokens = {self.spelled(f"{m}.weight") for m, parts in modules.items() if TOKENS in parts}
        if self.settings.get("ensure_weight_tying") and self.tensors[self.head] is not shared:
            self._set_words(self.tensors[self.head])
        elif self.settings.get("ensure_weight_tying") or tokens.intersection(names) == {names[0]}:
            self._set_words(self.tensors[self.embedding])
        if self.tensors[self.head] is self.tensors[self.embedding]:
            for name in set(names) - set(self.contents.tensors):
                del self.tensors[name]

    def _update(self, module: str, parts: Factors) -> None:
        """Puts a module's updated weight and bias in place."""
        name, where = self.spelled(f"{module}.weight"), next(iter(parts.values()))[0]
        weight = self.tensors.get(name)
        if weight is None:
            last = "." + ".".join(name.split(".")[-2:])
            like = next((x for x in self.tensors if x.endswith(last)), None)
            expected = f"{module}.weight in {self.contents.base}"
            expected += f", which has {like}" if like else ""
            raise self._other_base(where, "a module that the base lacks", expected)
        if TOKENS in parts:
            self.tensors[name] = self._rows(module, weight, parts[TOKENS])
            return
        key = self._key(module, where, parts)
        rank, scale = rank_and_scale(self.contents.path, self.settings, key)
        columns = "embedding_A" in parts
        pair = ("embedding_B", "embedding_A") if columns else ("A", "B")
        if not set(pair) <= set(parts):
            fix = "download the adapter again"
            raise InputError(where, found="one factor", expected="lora_A and lora_B", fix=fix)
        for place, factor in (parts[kind] for kind in pair):
            if len(factor.shape) < 2 or 0 in factor.shape:
                raise InputError(
                    place,
                    found=f"shape {factor.shape}",
                    expected="a whole matrix",
                    fix="save the adapter again with gathered weights (DeepSpeed ZeRO-3, FSDP)",
                )
        a, b = (Transposed(parts[x][1]) if columns else parts[x][1] for x in pair)
        if a.shape[:1] != (rank,):
            raise refused(
                self.contents.path,
                "r" if self.settings["r"] == rank else "rank_pattern",
                rank,
                f"{a.shape[0]}, the rank of {module} in the file",
                "correct it: the first pattern that fits a name counts, and PEFT sorts them",
            )
        if not factors_fit(weight.shape, a, b, rank):
            found = f"a product of {tuple(b.shape)} and {tuple(a.shape)}"
            expected = f"rank {rank} and {weight.shape} as in {self.contents.base}"
            raise self._other_base(where, found, expected)
        magnitude = parts["magnitude_vector"][1] if "magnitude_vector" in parts else None
        self.tensors[name] = LoRATensor(weight, a, b, scale, magnitude, columns)
        if "B_bias" in parts:
            self._shift(module, parts["B_bias"], scale)

    def _update_experts(self, start: str, parts: Factors, first: bool | None) -> None:
        """Puts the updated weights of a layer's experts in place.

        PEFT's ParamWrapper (peft/tuners/lora/layer.py) has factors [rank * experts, in] and
        [out, rank * experts]: of the first, an expert's rows are together, of the second its
        columns lie `experts` apart. Of transformers' `gate_up_proj` the gate's rows come first.

        Args:
            start: name of the layer.
            parts: the factors.
            first: whether they are of `gate_up_proj` or `down_proj`; None: as the settings say.
        """
        where, experts = next(iter(parts.values()))[0], f"{start}.mlp.experts"
        if first is None:
            first = parameter_targeted(self.settings, f"{experts}.gate_up_proj")
        key = f"{experts}.{'gate_up_proj' if first else 'down_proj'}"
        found = (self._expert(start, number, first=first) for number in itertools.count())
        names = list(itertools.takewhile(lambda each: each[0] in self.tensors, found))
        if not names or set(parts) != {"A", "B"} or not parameter_targeted(self.settings, key):
            raise InputError(
                where,
                found=f"factors {', '.join(sorted(parts))} of {experts}",
                expected=f"factors A and B of parameters that {SETTINGS} targets, in a Mixtral",
                fix=MERGE,
            )
        a, b = (parts[kind][1] for kind in "AB")
        rank, scale = rank_and_scale(self.contents.path, self.settings, key)
        count = len(names)
        for number, each in enumerate(names):
            for i, name in enumerate(each):
                out, into = self.tensors[name].shape
                if (a.shape, b.shape) != ((rank * count, into), (out * len(each), rank * count)):
                    product = f"a product of {tuple(b.shape)} and {tuple(a.shape)}"
                    expected = f"rank {rank} and {(out, into)} of {counted(count, 'expert')}"
                    raise self._other_base(where, product, f"{expected} as in {self.contents.base}")
                own = Part(a, number * rank, rank), Part(b, i * out, out, number, count)
                self.tensors[name] = LoRATensor(self.tensors[name], *own, scale)

    def _expert(self, start: str, number: int, *, first: bool) -> list[str]:
        """Names of an expert's weights: gate and up, or down."""
        names = ("w1", "w3") if first else ("w2",)
        return [self.spelled(f"{start}.{MIXTRAL}.experts.{number}.{x}.weight") for x in names]

    def _key(self, module: str, where: str, parts: Factors) -> str:
        """What the settings call a module, or its weight, that they give these parts.

        Raises:
            InputError: they don't.
        """
        fix = "take both files from one training run"
        tying = self.tied and self.settings.get("ensure_weight_tying")
        follows = tying and self.spelled(f"{module}.weight") == self.head  # the embedding
        alone = parameter_targeted(self.settings, f"{module}.weight")
        if not follows and not alone and not targeted(self.settings, module):
            raise InputError(
                where,
                found=f"an update of {module}, which {SETTINGS} leaves out",
                expected="the modules of target_modules, target_parameters, exclude_modules, "
                "layers_to_transform, layers_pattern and modules_to_save",
                fix=fix,
            )
        dora, bias = (bool(self.settings.get(key)) for key in ("use_dora", "lora_bias"))
        if dora != ("magnitude_vector" in parts):
            expected = f"as in the file, which has {'no' if dora else 'a'} magnitude of {module}"
            raise refused(self.contents.path, "use_dora", dora, expected, fix)
        if "B_bias" in parts and not bias:
            expected = f"true, as in the file, which has a bias of {module}"
            raise refused(self.contents.path, "lora_bias", bias, expected, fix)
        return f"{module}.weight" if alone else module

    def _rows(self, module: str, weight: LazyTensor, found: Found) -> RowsReplaced:
        """An embedding with rows of single tokens."""
        (where, rows), numbers = found, token_numbers(self.settings, module)
        fits = rows.shape == (len(numbers), *weight.shape[1:])
        if not fits or not all(0 <= number < weight.shape[0] for number in numbers):
            numbered = f"{counted(len(numbers), 'number')}, up to {max(numbers, default=None)}"
            expected = f"those of {rows.shape[0]} rows of {where}, below {weight.shape[0]}"
            path = self.contents.path
            raise refused(path, INDICES, numbered, expected, "correct it")
        return RowsReplaced(weight, numbers, rows)

    def _shift(self, module: str, found: Found, scale: float) -> None:
        """Puts a module's bias with LoRA's own in place."""
        where, bias = found
        name = self.spelled(f"{module}.bias")
        other = self.tensors.get(name)
        if other is None:
            raise InputError(
                where,
                found=f"a bias for {module}, which has none",
                expected="lora_bias on layers with a bias",
                fix=TRAIN,
            )
        if other.shape != bias.shape:
            raise self._other_base(where, f"shape {bias.shape}", f"{other.shape}")
        self.tensors[name] = Shifted(other, bias, scale)

    def _other_base(self, where: str, found: str, expected: str) -> InputError:
        named = self.settings.get("base_model_name_or_path")
        fix = "pass base= the model that it was trained on" + (f", {named!r}" if named else "")
        return InputError(where, found=found, expected=expected, fix=fix)
