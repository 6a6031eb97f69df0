"""vfjax: several multimodal LLMs fused into one, without training, in JAX.

Models are read and written by the package `converters` (see its help); what runs them is here.

    model, processor = converters.load("path/to/llava-1.5")
    batch = processor(images=["cat.jpg"], prompts=[processor.chat("What is on the sofa?")])

Ask:

    logits = vfjax.forward(model, batch)                      # float32[b, t, vocab]
    texts = vfjax.generate(model, processor, batch, max_new_tokens=64)
    drawn = vfjax.Sampling(temperature=0.7, top_p=0.9)        # in place of the likeliest tokens
    texts = vfjax.generate(model, processor, batch, sampling=drawn)
    for texts in vfjax.stream(model, processor, batch):       # as they grow
        print(texts)
    ids = vfjax.generate_ids(model, batch, stop=processor.stop_ids)
    for written in vfjax.stream_ids(model, batch, stop=processor.stop_ids):
        print(written)
    seen = vfjax.encode(model, batch)                         # another prompt, the same pictures
    other = processor(images=["cat.jpg"], prompts=[processor.chat("Is it asleep?")])
    texts = vfjax.generate(model, processor, other.with_pictures(seen))

Show a video in place of a picture (a `Video`):

    batch = processor(images=[vfjax.open_video("cat.mp4", frames=8)], prompts=[...])

Let the LLM read half of the visual tokens only:

    model, processor = converters.load("path/to/llava-1.5", prune=vfjax.Prune(keep=0.5))

Answer without what the folder's generation_config.json asks for (`Settings`):

    processor.settings = vfjax.Settings()

Types, for annotations: `Model` and its `Processor`, which makes a `Batch`; other ways of fusing
than one merged LLM are `CacheFusion` and `LogitsFusion` with its `MemberProcessors`, which
`converters.load_fused(..., mode="cache" or "logits")` makes. What a user can mend is said in one
line, an `InputError`.

Deeper: `vfjax.merge` (methods and recipes), `vfjax.train`, `vfjax.data`, `vfjax.eval`,
`vfjax.analysis`, `vfjax.sharding` (`make_mesh`). `help(vfjax.generate)` and the like say all about
one name.
"""

# ruff: noqa: F401  (no `__all__`: help() would print all classes, flax's methods included)

from vfjax.errors import InputError
from vfjax.fusion.modes import CacheFusion, LogitsFusion, MemberProcessors
from vfjax.fusion.prune import Prune
from vfjax.generate import generate, generate_ids, stream_ids
from vfjax.model import Batch, Model, encode, forward
from vfjax.processor import Processor
from vfjax.sampling import Sampling
from vfjax.settings import Settings
from vfjax.text.stream import stream
from vfjax.vision.video import Video, open_video

__version__ = "0.1.0"
