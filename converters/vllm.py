"""vLLM finds fused models here: the entry point of its group `vllm.general_plugins`.

See docs/pytorch.md for what of this was run.
"""

ARCHITECTURES = ("VisionFuse", "VisionFuseForConditionalGeneration")
"""Names in `architectures` of a fused folder's config.json: as `converters.fuse` writes it, and as
transformers saves it."""

BACKEND = "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM"
"""vLLM's class that runs models of transformers."""


def register() -> None:
    """Registers fused models with transformers' Auto classes and vLLM's Transformers backend.

    vLLM calls this in each of its processes, in some of them several times.
    """
    import vllm

    import converters.hf  # noqa: F401  (it registers)

    known = vllm.ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            vllm.ModelRegistry.register_model(name, BACKEND)
