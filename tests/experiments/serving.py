"""Requests to a server of the shipped family's clip member."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

import vfjax

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "experiments" / "family" / "models" / "clip"
URL = "/v1/chat/completions"
QUESTIONS = ["how many digits ?", "where is the 3 ?", "which digit is red ?"]


def picture(seed: int = 0, side: int = 48) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data(image: Image.Image, kind: str = "PNG") -> str:
    out = io.BytesIO()
    image.save(out, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(out.getvalue()).decode()


def part(address: str) -> dict:
    return {"type": "image_url", "image_url": {"url": address, "detail": "auto"}}


def ask(text: str, *images: str, **more) -> dict:
    content = [{"type": "text", "text": text}, *map(part, images)]
    messages = [{"role": "user", "content": content}]
    return {"model": "clip", "messages": messages, "temperature": 0, "max_tokens": 8} | more


def direct(loaded: tuple, text: str, *images: Image.Image, **how) -> str:
    model, processor = loaded
    batch = processor(list(images), [processor.chat(text, images=len(images))])
    new = how.pop("max_new_tokens")
    sampling = vfjax.Sampling(**how)
    return vfjax.generate(model, processor, batch, max_new_tokens=new, sampling=sampling)[0]
