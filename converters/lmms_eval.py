"""lmms-eval finds vfjax here: the entry point of its group `lmms_eval.models`."""

from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval 0.7 registers: `--model vfjax`, its classes imported when they are used."""
    from lmms_eval.models.registry_v2 import ModelManifest

    classes = "converters.lmms_eval_models"
    return [
        ModelManifest(
            model_id="vfjax",
            simple_class_path=f"{classes}.Simple",
            chat_class_path=f"{classes}.Chat",
        )
    ]
