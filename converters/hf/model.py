"""A fused model in torch: branches whose tokens are spliced into one LLM of transformers.

The twin of `vfjax.model`. Positions and masks are those of `vfjax.fusion.segments`; the LLM reads
them as it reads anyone's, and decodes with its own cache.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from converters.hf import branch as contract
from converters.hf import reading
from converters.hf.branch import Branch, Prompt, VisualTokens, gathered, joined
from converters.hf.config import VisionFuseConfig
from converters.hf.segments import block, parallel, running
from converters.hf.within import ASKED, Asked, asking, listen
from vfjax import InputError
from vfjax.errors import counted

Pictures = Mapping[str, Mapping[str, Any]]
"""Branch -> what it is shown: the fields of its `Inputs`, and those of `vfjax.model.Batch.images`
as "gather.indices", "gather.weights", "prompt.ids" and "prompt.mask"."""

Mask: TypeAlias = "Tensor | dict[str, Tensor] | None"
"""What an LLM of transformers takes as `attention_mask`: [b, t], [b, 1, t, s], or one a kind of its
layers."""

Llm = tuple[nn.Module, nn.Module]
"""An LLM without its head, and its head."""

ROWS = {"visual": -1, "segments": 0, "place": 0, "steps": 1}
"""Arguments of `forward` with a value for each token of a prompt -> that of text."""


@dataclasses.dataclass
class VisionFuseOutput(CausalLMOutputWithPast):
    """What `VisionFuseForConditionalGeneration` gives.

    Attributes:
        attention_mask: of a prompt with pictures, int64[b, t] where something is read.
        position_ids: of these int64[b, t] or [3, b, t], at the last token the row's last.
    """

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None


class Spliced(NamedTuple):
    """A prompt as the LLM reads it.

    Attributes:
        embeds: [b, t, d].
        mask: bool[b, t], False where nothing is read.
        deep: [k, b, t, d], see `VisualTokens`; None: nothing.
        asked: what is asked for within the LLM; None: nothing.
    """

    embeds: Tensor
    mask: Tensor
    deep: Tensor | None
    asked: Asked | None


class VisionFusePreTrainedModel(PreTrainedModel):
    """What transformers knows of the class."""

    config_class = VisionFuseConfig
    base_model_prefix = ""  # an LLM's own changes of names, as Mixtral's, are for its names alone
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _keys_to_ignore_on_load_missing = [r"^lm_head\.bias$"]  # LLaVA's code around a Phi has none


class VisionFuseForConditionalGeneration(VisionFusePreTrainedModel, GenerationMixin):
    """K branches and one LLM; called with what `VisionFuseProcessor` gives."""

    def __init__(self, config: VisionFuseConfig):
        super().__init__(config)
        own = config.vfjax()
        self.model, self.lm_head = build_llm(config.text_config)
        self.branches = nn.ModuleDict(
            {b.name: contract.build(b.architecture, f"branch {b.name!r}") for b in own.branches}
        )
        listen(self.model, self.branches.values())
        self.scaled = {b.name: b.scaled for b in own.branches}
        self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self._keys_to_ignore_on_load_unexpected = reading.spare(config)
        self._no_split_modules = list({type(each).__name__ for each in self.branches.values()})
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *args: object,
        output_loading_info: bool = False,
        **kwargs: object,
    ) -> PreTrainedModel:
        """See transformers; also of one member's folder in any layout that `converters.load` reads.

        A name on the hub may end in `@revision`. Answers end at the stops of the folder's tokenizer
        and template, too.

        Raises:
            InputError: tensors that are missing, unknown or of another shape than by the config; of
                a member's folder, and of what the hub refuses, as `converters.load`.
        """
        name, given = pretrained_model_name_or_path, dict(kwargs)
        path = None if name is None else reading.whole(name, given)
        opened = isinstance(given.get("config"), VisionFuseConfig) or "state_dict" in given
        member = None if path is None or name is None or opened else reading.member(path, name)
        if member is not None:
            given |= {"config": VisionFuseConfig(**member.config), "state_dict": member.state()}
            path = None
        lenient = given.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **given
        )
        wrong = {
            "missing": info["missing_keys"],
            "unknown": info["unexpected_keys"],
            "of another shape": () if lenient else info["mismatched_keys"],
        }
        for kind, found in wrong.items():
            if found:
                first = min(str(key if isinstance(key, str) else key[0]) for key in found)
                raise InputError(
                    f"{name}: {first}",
                    found=f"{counted(len(found), 'tensor')} {kind}",
                    expected="each parameter's tensor and no other",
                    fix="check that config.json belongs to these weights",
                )
        own = member and member.processor
        if path is not None:
            own = reading.processor_of(model.config, reading.small(path, given))
        if name is not None:
            model.name_or_path = model.config.name_or_path = str(name)
        if own is not None and own.stops:
            model.generation_config.eos_token_id = list(own.stops)
        return (model, info) if output_loading_info else model

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows [..., d] of the embedding table, not scaled, where the ids are."""
        table = self.get_input_embeddings()
        if table.weight.device.type == "meta":  # fetched when it is called
            rows = table(ids)
            return rows / _scale(table, rows)
        return embedding(ids.to(table.weight.device), table.weight).to(ids.device)

    def memory(self, name: str, pictures: Pictures) -> VisualTokens:
        """A branch's visual tokens of all pictures as the LLM reads them.

        Args:
            name: of the branch.
            pictures: see `Pictures`.
        """
        branch: Branch = self.branches[name]
        table = self.get_input_embeddings()
        shown = {
            key: value.to(_device(branch, value)) if isinstance(value, Tensor) else value
            for key, value in pictures[name].items()
        }
        prompt = None
        if "prompt.ids" in shown:
            prompt = Prompt(shown["prompt.ids"], shown["prompt.mask"])
        memory = branch.visual_tokens(branch.encode(shown), self.lookup, prompt)
        values = memory.values.to(table.weight.dtype)
        if self.scaled[name]:
            values = values * _scale(table, values)
        memory = memory._replace(values=values)
        if "gather.indices" not in shown:
            return memory
        return gathered(memory, shown["gather.indices"], shown.get("gather.weights"))

    def memories(self, pictures: Pictures) -> list[VisualTokens]:
        """All branches' memories."""
        return [self.memory(branch["name"], pictures) for branch in self.config.branches]

    def splice(
        self, text: Tensor, mask: Tensor, visual: Tensor, pictures: Pictures | None
    ) -> Spliced:
        """Text embeddings with the visual tokens spliced in; see `vfjax.model.splice`.

        Args:
            text: [b, t, d].
            mask: [b, t], 0 at padding.
            visual: int64[b, t], see `vfjax.model.Batch`.
            pictures: None or {} where no row has one.
        """
        mask, deep, asked = mask.to(text.device).bool(), None, None
        if pictures:
            memories = self.memories(pictures)
            memory = joined(memories)
            visual = visual.to(text.device)
            seen, at = visual >= 0, visual.clamp(min=0)
            text = torch.where(seen[..., None], memory.values.to(text)[at], text)
            mask = mask & (~seen | memory.keep.to(text.device)[at])
            if memory.deep is not None:
                read = (seen & mask)[..., None]
                deep = torch.where(read, memory.deep.to(text)[:, at], 0)
            asked = asking(visual, mask, memories, self.branches.values())
        return Spliced(torch.where(mask[..., None], text, 0), mask, deep, asked)

    def positions(
        self, mask: Tensor, segments: Tensor, place: Tensor | None, steps: Tensor | None
    ) -> Tensor:
        """Where the tokens stand, int64[b, t], or [3, b, t] with `place`; 0 at what is not read."""
        count = len(self.config.branches)
        if count > 1 and self.config.positions == "parallel":
            found = parallel(segments, mask, count, place, steps)
        elif place is not None and steps is not None:
            found = running(mask, place, steps)
        else:
            found = (mask.cumsum(1) - 1)[None]
        found = torch.where(mask, found, 0)
        return found if len(found) > 1 else found[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: transformers.Cache | None = None,
        inputs_embeds: Tensor | None = None,
        visual: Tensor | None = None,
        segments: Tensor | None = None,
        place: Tensor | None = None,
        steps: Tensor | None = None,
        pictures: Pictures | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> VisionFuseOutput:
        """Logits, and the loss of `labels`.

        Args:
            input_ids: int64[b, t], 0 at visual tokens.
            attention_mask: [b, t], 0 at padding; None: there is none.
            position_ids: None: by `config.positions`.
            cache: transformers' cache; a prompt with pictures needs a new one.
            inputs_embeds: in place of `input_ids`, [b, t, d].
            visual: int64[b, t] number of the visual token that stands here, -1 at text; None: text
                alone, or what goes on after a prompt.
            segments: int64[b, t], see `vfjax.model.Batch`.
            place: int64[b, t, 3], see `vfjax.model.Batch`.
            steps: int64[b, t], see `vfjax.model.Batch`.
            pictures: see `Pictures`.
            labels: int64[b, t], -100 where nothing is learnt.
            use_cache: whether to give a cache back.
            logits_to_keep: last positions that logits are computed for, 0 for all.
            kwargs: of the LLM and the loss.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        text = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        out = VisionFuseOutput()
        read: Mask = attention_mask
        if visual is not None:
            rows = {"visual": visual, "segments": segments, "place": place, "steps": steps}
            rows = {k: _longer(x, text, ROWS[k]) for k, x in rows.items() if x is not None}
            if attention_mask is None:
                attention_mask = torch.ones(text.shape[:2], dtype=torch.long)
            text, mask, deep, asked = self.splice(
                text, attention_mask, rows.pop("visual"), pictures
            )
            order = rows.get("segments", torch.zeros_like(mask, dtype=torch.long))
            if position_ids is None:
                position_ids = self.positions(mask, order, rows.get("place"), rows.get("steps"))
            out.attention_mask, out.position_ids = mask.long(), position_ids
            read = self._mask(text, mask, order, cache, position_ids)
            if asked is not None:
                kwargs[ASKED] = asked
            if deep is not None:
                kwargs["visual_pos_masks"] = mask
                kwargs["deepstack_visual_embeds"] = [each[mask] for each in deep]
        made = self.model(
            inputs_embeds=text,
            attention_mask=read,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        out.logits = self.lm_head(made.last_hidden_state[:, keep])
        out.cache, out.hidden_states, out.attentions = (
            made.cache,
            made.hidden_states,
            made.attentions,
        )
        if labels is not None:
            size = self.config.text_config.vocab_size
            out.loss = self.loss_function(out.logits, labels, vocab_size=size, **kwargs)
        return out

    def _mask(
        self,
        text: Tensor,
        mask: Tensor,
        segments: Tensor,
        cache: transformers.Cache | None,
        positions: Tensor,
    ) -> Mask:
        """What the LLM takes as `attention_mask` of a prompt."""
        if self.config.mask != "block" or len(self.config.branches) < 2 or not segments.any():
            return mask.long()
        kind = self.config.text_config._attn_implementation
        if "flash" in (kind or ""):
            raise InputError(
                "attn_implementation",
                found=repr(kind),
                expected="'sdpa' or 'eager': with mask 'block', who sees whom is no triangle",
                fix="load the model with one of these",
            )
        # Of the whole prompt, within a sliding window too: `vfjax`'s context ends where that does.
        return create_causal_mask(
            config=self.config.text_config,
            inputs_embeds=text,
            attention_mask=mask,
            cache=cache,
            position_ids=positions if positions.ndim == 2 else positions[0],
            and_mask_function=block(segments),
        )

    @staticmethod
    def create_masks_for_generate(config: VisionFuseConfig, **given: object) -> Tensor:
        """See transformers; one for all layers, as Qwen3-VL's text model alone takes it.

        Its config may say kinds of layers, as other classes' of the base do.
        """
        read = ("inputs_embeds", "attention_mask", "cache", "position_ids")
        return create_causal_mask(config=config.text_config, **{key: given[key] for key in read})

    def generate(self, inputs: Tensor | None = None, **kwargs: object) -> Tensor | ModelOutput:
        """See transformers; rows that are padded on the right are first padded on the left."""
        given: dict[str, Any] = {**kwargs, **({} if inputs is None else {"input_ids": inputs})}
        mask = given.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            rows = {
                k: given[k]
                for k in ("input_ids", "inputs_embeds", "attention_mask", *ROWS)
                if given.get(k) is not None
            }
            given |= to_the_right(rows, mask)
        return super().generate(**given)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs: object
    ) -> dict[str, Any]:
        """See transformers; pictures are read with the prompt alone, or again without a cache."""
        prompt = is_first_iteration or not kwargs.get("use_cache", True)
        own = {key: kwargs.pop(key) for key in (*ROWS, "pictures") if key in kwargs}
        if not prompt or own.get("visual") is None:
            return super().prepare_inputs_for_generation(
                input_ids, is_first_iteration=is_first_iteration, **kwargs
            )
        mask = kwargs.pop("attention_mask", None)
        kwargs.pop("position_ids", None)  # counted without pictures
        made = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        return {**made, **own, "attention_mask": mask, "position_ids": None}

    def _update_model_kwargs_for_generation(
        self,
        outputs: VisionFuseOutput,
        model_kwargs: dict[str, Any],
        *args: object,
        **kwargs: object,
    ) -> dict[str, Any]:
        """See transformers; new text stands after the row's last position of any axis."""
        if outputs.attention_mask is not None and outputs.position_ids is not None:
            positions = outputs.position_ids
            last = positions.amax(tuple({0, positions.ndim - 1} - {positions.ndim - 2}))
            positions = positions.clone()
            positions[..., -1] = last
            model_kwargs |= {"attention_mask": outputs.attention_mask, "position_ids": positions}
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)


def build_llm(config: transformers.PreTrainedConfig) -> Llm:
    """The LLM of a config; one that transformers has without a head gets one."""
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        return transformers.AutoModel.from_config(config), head
    whole = transformers.AutoModelForCausalLM.from_config(config)
    return whole.base_model, whole.get_output_embeddings()


def to_the_right(rows: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Arrays [b, t, ...] whose rows end where [b, t] `mask` has their last token."""
    t = mask.shape[1]
    empty = mask.flip(1).long().argmax(1)
    at = (torch.arange(t, device=mask.device)[None] - empty[:, None]) % t
    return {key: x[torch.arange(len(x))[:, None], at.to(x.device)] for key, x in rows.items()}


def _device(module: nn.Module, value: Tensor) -> torch.device:
    """Where a module computes; where the value is if its parameters are fetched as they're used."""
    found = next(module.parameters()).device
    return value.device if found.type == "meta" else found


def _scale(table: nn.Module, values: Tensor) -> Tensor:
    """What an LLM multiplies its embeddings with (Gemma), in the dtype of `values`."""
    return torch.as_tensor(getattr(table, "embed_scale", 1.0)).to(values)


def _longer(x: Tensor, text: Tensor, fill: int) -> Tensor:
    """Rows [b, t', ...] of a prompt with text behind it, up to the t of [b, t, d] `text`."""
    new = text.shape[1] - x.shape[1]
    if new < 0:
        raise InputError(
            "visual",
            found=f"{x.shape[1]} tokens a row, for {text.shape[1]} of input_ids",
            expected="a whole prompt, pictures and all, and an empty cache",
            fix="pass the prompt again without a cache, and no prefill_chunk_size",
        )
    x = x.to(text.device)
    return torch.cat([x, x.new_full((len(x), new, *x.shape[2:]), fill)], dim=1) if new else x
