"""Members' folders -> one fused folder: merged LLM, branches as they are; files to files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from converters.files.push import check_push, push
from converters.folder import open_source
from converters.fusion import Fusion
from converters.request import Request, by_name
from converters.source import Source
from vfjax import InputError
from vfjax.atomic import JSON


@by_name
def fuse(
    members: Mapping[str, str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    method: str = "task_arithmetic",
    params: Mapping[str, JSON] | None = None,
    rules: Sequence[tuple[str, Mapping[str, JSON]]] = (),
    recipe: str | Path | None = None,
    export: str = "model",
    template: str | None = None,
    dtype: DTypeLike | None = None,
    positions: str = "running",
    mask: str = "causal",
    router: str = "merged",
    towers: Mapping[str, str | Path] | None = None,
    vocab: str | None = None,
    family: bool = True,
    seed: int = 0,
    shard_bytes: float = 5e9,
    checksums: bool = True,
    account: bool = True,
    progress: Callable[[int], object] | None = None,
    resume: bool = False,
    remote_code: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
) -> Source:
    """Fuses MLLMs of one family (VisionFuse, arXiv 2412.01289) and writes the result.

    All source files are read once before anything is written, if they have changed since they last
    were: for NaN, infinities and SHA-256.

    Args:
        members: name -> folder, or name on the hub (`org/name[@revision]`, see `converters.load`),
            in the order in which their visual tokens will be read; plain LLMs among them add to the
            merged LLM alone. `base`, `towers` and models of a `recipe` may be on the hub, too.
        out: folder to make.
        base: folder of the LLM that all members were fine-tuned from; members that are adapters or
            projectors are completed from the LLM that they name, or else from this one.
        method: a key of `vfjax.merge.METHODS`.
        params: the method's parameters, such as {"weights": (0.5, 0.5)}; each may vary over the
            layers, see `vfjax.merge.from_config`. Weights are 1 / members each by default.
            A text expert, a plain LLM of the base among the members, may come in late, so that the
            first layers see as they did: {"weights": ((1, 1, 0.4), (0, 0, 0.6))} is, at layer l of
            L, linear in t = l / (L - 1) between these values at t = 0, 1/2 and 1. Embeddings, final
            norm and head are at t = 0.
        rules: (regex, changes of method or params) for the tensors whose names the regex is found
            in, such as ("embed_tokens|lm_head", {"take": "base"}); see `vfjax.merge.from_config`.
        recipe: a mergekit YAML file, in place of members, base, method, params and rules.
        export: "model" writes merged LLM and branches, and "llm" a plain Hugging Face causal LM.
            "whole" writes a model of the members' own architecture, towers and connectors merged,
            too, with layout, processor, chat template and generation_config.json of the first
            multimodal one. `base` has that architecture then, and a `recipe` may have mergekit's
            modules text_decoder, vision_tower and multi_modal_projector. `rules` are about the
            names in the files, behind "vision_tower/" where a tower has that folder of its own: for
            example ("visual[.]merger|multi_modal_projector", {"params": {"weights": (0.7, 0.3)}}).
            One multimodal LLM beside plain ones keeps its tower and connector as they are. So it
            does beside those of other architectures, of which the LLMs alone are merged, if rules
            say so. AdaMMS (arXiv 2503.23733): method "linear", weights (1 - alpha, alpha), rules
            [("visual|embed_tokens|lm_head", {"take": "qwen"})] for a Qwen2-VL "qwen", which keeps
            its tokens, too, and a LLaVA-OneVision.
        template: prompt template; by default that of the first multimodal member.
        dtype: of the merged LLM; by default that of the base's tensors, without a base of the first
            member's; a recipe's as mergekit has it.
        positions: of the branches' tokens, "running" or "parallel", see `vfjax.model.ModelConfig`;
            where members with M-RoPE (Qwen2-VL) see, the merged LLM has it.
        mask: "causal", or "block": a branch's tokens don't see another's.
        router: embeddings of the prompt that a connector reads (SliME's router): "merged", the
            fused LLM's, or "member", the member's own, which are then kept beside it.
        towers: see `converters.load`.
        vocab: where the models have other numbers of tokens, which must be the same up to the end
            of the shortest: "base" keeps the base's, a member's name that member's. None is an
            error then. What is dropped or added is logged, and stands in MERGE.md.
        family: refuse members whose weights are not a fine-tune of the base (without one: of the
            first member's origin), see `vfjax.merge.compatibility.check_weights`, which of a recipe
            are not checked; or whose rope_theta is another.
        seed: of methods that draw random numbers.
        shard_bytes: largest size of a weights file.
        checksums: take the SHA-256 of all source files, for config.json and MERGE.md.
        account: count what the members did to the base, for MERGE.md.
        progress: called with the number of bytes after each write.
        resume: go on where a killed run of the same request stopped, if there is one.
        remote_code: add the code with which transformers runs the folder without vfjax, by
            `trust_remote_code=True`; needs torch. See `converters.hf.remote.add_code`, which adds
            it to a folder that is there.
        push_to_hub: `org/name` on the Hugging Face hub, where the folder is sent to, too, with a
            model card, in one commit.
        private: whether that is made so that others do not see it; None: as the account has it.

    Returns:
        The fused folder, opened.

    Raises:
        InputError: members of different families, unreadable folders, wrong arguments, NaN in a
            source, a source that changes meanwhile, `out` exists, disk full; nothing is left at
            `out` then. `remote_code` where torch lacks a branch, or no branches are written. Before
            anything is read, a login that may not write to `push_to_hub`; but if the hub refuses it
            in the end, `out` is whole.
    """
    if remote_code and export != "model":
        raise InputError(
            "remote_code",
            found=f"export={export!r}",
            expected="a model with branches, which transformers has no code for",
            fix="leave remote_code out: transformers reads the folder as it is",
        )
    request = Request(
        members,
        out,
        base=base,
        method=method,
        params=params,
        rules=rules,
        recipe=recipe,
        export=export,
        template=template,
        dtype=dtype,
        positions=positions,
        mask=mask,
        router=router,
        towers=towers,
        vocab=vocab,
        family=family,
        seed=seed,
        shard_bytes=shard_bytes,
        checksums=checksums,
        account=account,
    )
    repo = None if push_to_hub is None else check_push(push_to_hub, out, private)
    fusion = Fusion(request)
    if remote_code:
        from converters.hf import remote  # torch, which takes seconds

        remote.check_place(out)
        remote.check(fusion.result)
    readme = None if repo is None else fusion.readme(repo.name, remote_code)
    fusion.write(progress, resume, readme)
    if remote_code:
        remote.add_code(out)
    if repo is not None:
        push(Path(out), repo, private)
    return open_source(out)


@by_name
def dry_run(
    members: Mapping[str, str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    method: str = "task_arithmetic",
    params: Mapping[str, JSON] | None = None,
    rules: Sequence[tuple[str, Mapping[str, JSON]]] = (),
    recipe: str | Path | None = None,
    export: str = "model",
    template: str | None = None,
    dtype: DTypeLike | None = None,
    positions: str = "running",
    mask: str = "causal",
    router: str = "merged",
    towers: Mapping[str, str | Path] | None = None,
    vocab: str | None = None,
    family: bool = True,
    seed: int = 0,
    shard_bytes: float = 5e9,
    checksums: bool = True,
    account: bool = True,
) -> dict[str, Any]:
    """What `fuse` would do with the same arguments; reads headers only, of files on a disk.

    Returns:
        "files", name -> bytes; "tensors", how many; "parameters"; "read", bytes of the sources;
        "methods", name -> number of tensors; "vocabulary", what becomes of rows and tokens, where
        they differ.

    Raises:
        InputError: as `fuse`, but for what only the values tell.
    """
    request = Request(
        members,
        out,
        base=base,
        method=method,
        params=params,
        rules=rules,
        recipe=recipe,
        export=export,
        template=template,
        dtype=dtype,
        positions=positions,
        mask=mask,
        router=router,
        towers=towers,
        vocab=vocab,
        family=family,
        seed=seed,
        shard_bytes=shard_bytes,
        checksums=checksums,
        account=account,
    )
    return Fusion(request).describe()
