"""Conversation templates and chunk-wise tokenisation; `vfjax.text.labels` has training labels.

A fused model speaks the prompt format its members were trained with, so the templates here are
literal copies of what LLaVA, Mini-Gemini (MGM), SliME, Dense Connector, InternVL and Cambrian feed
their LLMs, odd parts included: the Llama-3 templates of MGM and Dense Connector call the assistant
`system`, and that is what the checkpoints learnt. "Upstream" below means `conversation.py`,
`mm_utils.py` and `train/train.py` of those repositories.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from vfjax.errors import InputError, require
from vfjax.text.tokenizer import TextTokenizer, Tokenizer

IMAGE_TOKEN = "<image>"
IMAGE_ID = -200
IGNORE = -100

Turn = tuple[str, str | None]


@dataclass(frozen=True)
class Template:
    """The strings a conversation is wrapped in.

    A prompt is `head question middle space answer tail again question middle ...`; an open
    assistant turn ends after `middle`.

    Attributes:
        name: key in `TEMPLATES`.
        head: all before the first question: system text and user header.
        middle: between a question and the answer: end of the user turn and assistant header.
        tail: after an answer. None where upstream cannot render answers (`plain`).
        again: before every question but the first.
        stop: strings that end an answer while generating, beside the tokenizer's own eos.
        space: between `middle` and an answer; not part of an open turn.
        trained_tail: `tail` of the training text. None: upstream trains in another format.
        image: what stands for a picture in the training text.
        auto_bos: upstream's loss mask fits tokenizers that add BOS (True) or not (False).
    """

    name: str
    head: str
    middle: str
    tail: str | None
    again: str
    stop: tuple[str, ...]
    space: str = ""
    trained_tail: str | None = None
    image: str = IMAGE_TOKEN
    auto_bos: bool = True

    @property
    def text(self) -> str:
        """All of its strings that a prompt or an answer may have."""
        return "".join((self.head, self.middle, self.tail or "", self.again, *self.stop))


_POLITE = "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
_CURIOUS = "A chat between a curious {0} and an artificial intelligence assistant. " + _POLITE
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able "
    "to understand the visual content that the user provides, and assist the user with a variety "
    "of tasks using natural language.The visual content will be provided with the following "
    "format: <Image>visual content</Image>."
)
_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
_SAFE = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information."
)
_SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# The example talk that the first LLaVA release put before every user turn.
_ENERGY = (
    "What are the key differences between renewable and non-renewable energy sources?"
    "###Assistant: Renewable energy sources are those that can be replenished naturally in a "
    "relatively short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
    "Non-renewable energy sources, on the other hand, are finite and will eventually be depleted, "
    "such as coal, oil, and natural gas. Here are some key differences between renewable and "
    "non-renewable energy sources:\n1. Availability: Renewable energy sources are virtually "
    "inexhaustible, while non-renewable energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
    "and other negative effects.\n3. Cost: Renewable energy sources can be more expensive to "
    "initially set up, but they typically have lower operational costs than non-renewable "
    "sources.\n4. Reliability: Renewable energy sources are often more reliable and can be used in "
    "more remote locations than non-renewable sources.\n5. Flexibility: Renewable energy sources "
    "are often more flexible and can be adapted to different situations and needs, while "
    "non-renewable sources are more rigid and inflexible.\n6. Sustainability: Renewable energy "
    "sources are more sustainable over the long term, while non-renewable sources are not, and "
    "their depletion can lead to economic and social instability.\n###Human: "
)


def _single(name: str, system: str, example: str = "") -> Template:
    """LLaVA v0 style: `###Human: q###Assistant: a###`."""
    return Template(
        name=name,
        head=f"{system}###Human: {example}",
        middle="###Assistant:",
        space=" ",
        tail="###",
        again="Human: ",
        stop=("###",),
    )


def _two(
    name: str,
    system: str,
    end: str = "</s>",
    image: str = IMAGE_TOKEN,
    auto_bos: bool = True,
) -> Template:
    """Vicuna style: `USER: q ASSISTANT: a</s>`."""
    return Template(
        name=name,
        head=f"{system} USER: ",
        middle=" ASSISTANT:",
        space=" ",
        tail=end,
        again="USER: ",
        stop=(end,),
        trained_tail=end,
        image=image,
        auto_bos=auto_bos,
    )


def _inst(name: str, system: str = "", sep: str = "<s>") -> Template:
    """Llama-2 and Mistral style: `[INST] q [/INST] a </s>`.

    Upstream's evaluation stops at `sep`, which no answer ends with; `</s>` is what does.
    """
    system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return Template(
        name=name,
        head=f"[INST] {system}",
        middle=" [/INST]",
        space=" ",
        tail=" </s>",
        again=f"{sep}[INST] ",
        stop=("</s>",),
        trained_tail=" </s>",
    )


def _chatml(name: str, system: str, line: str = "") -> Template:
    """MPT and Yi style, with no newline after `<|im_end|>`; Qwen's has one, `line`."""
    user, end = "<|im_start|>user\n", f"<|im_end|>{line}"
    return Template(
        name=name,
        head=f"<|im_start|>system\n{system}{end}{user}",
        middle=f"{end}<|im_start|>assistant\n",
        tail=end,
        again=user,
        stop=("<|im_end|>",),
        trained_tail=end,
        auto_bos=False,
    )


def _llama_3(
    name: str, bos: str = "", answers: str = "system", said: str = _VISION, line: str = "\n\n"
) -> Template:
    """Llama-3 style; of MGM and Dense Connector the assistant's header says `system`."""
    user, system, answer = (
        f"<|start_header_id|>{role}<|end_header_id|>{line}" for role in ("user", "system", answers)
    )
    return Template(
        name=name,
        head=f"{bos}{system}{said}<|eot_id|>{user}",
        middle=f"<|eot_id|>{answer}",
        tail="<|eot_id|>",
        again=user,
        stop=("<|eot_id|>",),
        trained_tail="<|eot_id|>",
        auto_bos=not bos,
    )


def _phi3(name: str, system: str, line: str = "") -> Template:
    """Phi-3 style; Microsoft's has a newline after `<|end|>`, `line`."""
    user = f"{line}<|user|>\n"
    return Template(
        name=name,
        head=f"<|system|>\n{system}<|end|>{user}",
        middle=f"<|end|>{line}<|assistant|>\n",
        tail="<|end|>",
        again=user,
        stop=("<|end|>",),
        trained_tail="<|end|>",
    )


# InternVL internvl_chat/internvl/conversation.py: who the models were told to be.
_SHUSHENG = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_WANXIANG = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
)
_HUMAN, _USER = _CURIOUS.format("human"), _CURIOUS.format("user")
# Cambrian cambrian/conversation.py, whose source breaks the lines of Llama-3's.
_CAMBRIAN = (
    "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X. \n    As a "
    "multimodal AI, you have the ability to process and analyze images. Whenever an image is "
    "present in the conversation, very carefully examine it and consider its content when "
    "formulating your response.\n    You should give concise responses to very simple questions, "
    "but provide thorough responses to more complex and open-ended questions. "
)
_SLIME_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
_DEFAULT = _single("default", _HUMAN, _ENERGY)
_VICUNA = _two("vicuna_v1", _USER)
_CHATML = _chatml("chatml_direct", "Answer the questions.")
_INTERNLM = _chatml("internlm2-chat", _SHUSHENG)
_PHI = _two("phi", _USER, end="<|endoftext|>", auto_bos=False)
_PLAIN = Template(
    name="plain", head="", middle="\n", tail=None, again="", stop=("\n",), trained_tail="\n"
)

# Upstream names. Where a name means different things, the less common meaning is marked with its
# code base: `mistral_instruct_mgm`, `llama_3_dc` (plain `llama_3` is MGM's, `llama3` SliME's).
TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        "default": _DEFAULT,
        "v0": _DEFAULT,
        "llava_v0": _single("llava_v0", _HUMAN),
        "v0_mmtag": _single("v0_mmtag", _MMTAG),
        "vicuna_v1": _VICUNA,
        "v1": _VICUNA,
        "imgsp_v1": _VICUNA,
        "llava_v1": _two("llava_v1", _HUMAN),
        "v1_mmtag": _two("v1_mmtag", _MMTAG, image=f"<Image>{IMAGE_TOKEN}</Image>"),
        "phi": _PHI,
        "phi_2": _PHI,
        "llama_2": _inst("llama_2", _SAFE),
        "llava_llama_2": _inst("llava_llama_2", _VISION),
        "mistral_instruct": _inst("mistral_instruct", sep=""),
        "mistral_instruct_mgm": _inst("mistral_instruct_mgm"),
        "chatml_direct": _CHATML,
        "mistral_direct": _CHATML,
        "mpt": _chatml(
            "mpt",
            "A conversation between a user and an LLM-based AI assistant. "
            "The assistant gives helpful and honest answers.",
        ),
        "llama_3": _llama_3("llama_3"),
        "llama_3_dc": _llama_3("llama_3_dc", bos="<|begin_of_text|>"),
        # LLaVA-NeXT's, which fills in Llama-3's and Qwen's own chat templates.
        "llava_llama_3": _llama_3("llava_llama_3", answers="assistant"),
        "qwen_1_5": _chatml("qwen_1_5", "You are a helpful assistant.", line="\n"),
        "smollm2": _chatml("smollm2", _SMOLLM2, line="\n"),  # its own chat template; no MLLM's
        "llama3": Template(
            name="llama3",
            head=_SLIME_USER,
            middle="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            # SliME's own marker of an answered turn; taken out again before training.
            tail="<|eot_id|><|eot_conversation|>",
            again=_SLIME_USER,
            stop=("<|eot_id|>",),
            trained_tail="<|eot_id|>",
        ),
        "llama_3_cambrian": _llama_3(
            "llama_3_cambrian", "<|begin_of_text|>", "assistant", said=_CAMBRIAN, line=""
        ),
        "chatml_direct_cambrian": _chatml(
            "chatml_direct_cambrian",
            _CAMBRIAN.replace(" \n    ", " ").replace("\n    ", " ").strip(),
        ),
        "phi3": _phi3("phi3", "You are a helpful AI assistant.", line="\n"),
        "gemma": Template(
            name="gemma",
            head="<start_of_turn>user\n",
            middle="<end_of_turn>\n<start_of_turn>model\n",
            tail="<end_of_turn>\n<eos>",
            again="<start_of_turn>user\n",
            stop=("<end_of_turn>", "<eos>"),
            trained_tail="<end_of_turn>\n<eos>",
        ),
        "Hermes-2": _INTERNLM,
        "internlm2-chat": _INTERNLM,
        "internvl2_5": _chatml("internvl2_5", _WANXIANG, line="\n"),
        "internvl_zh": Template(
            name="internvl_zh",
            head=" <human>: ",
            middle=" <bot>:",
            space=" ",
            tail="</s>",
            again="<human>: ",
            stop=("</s>",),
        ),
        "phi3-chat": _phi3("phi3-chat", _SHUSHENG),
        "plain": _PLAIN,
        "v0_plain": _PLAIN,
    }
)


def get_template(name: str) -> Template:
    """Looks a template up by its upstream name.

    Args:
        name: a key of `TEMPLATES`.

    Raises:
        InputError: no such template.
    """
    if name not in TEMPLATES:
        raise InputError(
            "template", found=repr(name), expected=f"one of {', '.join(TEMPLATES)}", fix="rename it"
        )
    return TEMPLATES[name]


def render(template: Template, turns: Sequence[Turn]) -> str:
    """Writes a conversation as the prompt string its model was trained on.

    Args:
        template: one of `TEMPLATES`.
        turns: (question, answer) pairs, oldest first; the last answer may be None, which leaves
            the assistant's turn open for generation. Questions may hold `<image>`.

    Returns:
        The prompt, as by upstream's `Conversation.get_prompt`.

    Raises:
        InputError: no turns, an unanswered turn before the last, or an answer where the template
            cannot hold one (`plain`, for which upstream fails too).
    """
    check_turns(turns)
    text = template.head
    for i, (question, answer) in enumerate(turns):
        text += (template.again if i else "") + question + template.middle
        if answer is None:
            continue
        if template.tail is None:
            raise InputError(
                f"template {template.name!r}",
                found="an answered turn",
                expected="one open question",
                fix="use a conversation template, or labels() for captions",
            )
        text += template.space + answer + template.tail
    return text


def tokenize(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """Tokenises the text around each `<image>` by itself and joins the pieces with -200.

    Piece by piece matters: SentencePiece puts a word-start mark before the text after a picture,
    and the models were trained with it. If the first piece starts with BOS, the first id of every
    later piece is taken for a BOS too and dropped, whatever it is, as in upstream's
    `tokenizer_image_token`.

    Args:
        tokenizer: a transformers tokenizer, or another that has so much.
        prompt: text with any number of `<image>`.

    Returns:
        Token ids with `IMAGE_ID` at every picture.

    Raises:
        InputError: half a character, which no tokenizer takes.
    """
    _check_text(prompt)
    first, *rest = (list(tokenizer(chunk).input_ids) for chunk in prompt.split(IMAGE_TOKEN))
    skip = 1 if first and first[0] == tokenizer.bos_token_id else 0
    ids = first
    for chunk in rest:
        ids += [IMAGE_ID, *chunk[skip:]]
    return ids


def _check_text(prompt: str) -> None:
    good = not re.search("[\ud800-\udfff]", prompt)
    require(good, "prompt", "half a character", "valid Unicode")


def tokenize_whole(
    tokenizer: Tokenizer, prompt: str, image_token: str, *, special: bool = True
) -> list[int]:
    """Tokenises a prompt as transformers' processors do: whole, a picture being a special token.

    So the text after a picture has no word-start mark of its own, unless the tokenizer puts one
    after every special token. BOS is not added to a prompt that begins with it, as in
    apply_chat_template. A tokenizer that lacks the token cuts the text there all the same: the end
    of a text stands in for it.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: text with any number of pictures, as `image_token` or `<image>`.
        image_token: of the folder's processor.
        special: whether BOS is added.

    Returns:
        Token ids with `IMAGE_ID` at every picture.

    Raises:
        InputError: half a character, which no tokenizer takes; or there are pictures, and the
            tokenizer has no special token to stand in for a lacking one.
    """
    _check_text(prompt)
    text = prompt.replace(IMAGE_TOKEN, image_token)
    bos = tokenizer.bos_token
    special = special and not (bos and text.startswith(bos))
    if image_token not in text:
        return list(tokenizer(text, add_special_tokens=special).input_ids)
    added = tokenizer.added_tokens_encoder
    stand = image_token if image_token in added else tokenizer.eos_token
    if stand is None or stand not in added:
        raise InputError(
            "tokenizer",
            found=f"neither {image_token} nor an end of text among its special tokens",
            expected=f"{image_token}, as in the published repository",
            fix="add the token, or pass input_ids in place of prompts",
        )
    places = re.findall(f"{re.escape(image_token)}|{re.escape(stand)}", text)
    ids = list(tokenizer(text.replace(image_token, stand), add_special_tokens=special).input_ids)
    found = [i for i, token in enumerate(ids) if token == added[stand]]
    for i, place in zip(found, places, strict=False):  # one more may be added at the end
        ids[i] = IMAGE_ID if place == image_token else ids[i]
    return ids


def encoded(tokenizer: Tokenizer, prompt: str, image_token: str) -> list[int]:
    """`tokenize_whole` if there is an `image_token`, else `tokenize`."""
    if image_token:
        return tokenize_whole(tokenizer, prompt, image_token)
    return tokenize(tokenizer, prompt)


def tokenize_words(tokenizer: Tokenizer, vocab: int, words: str) -> list[int]:
    """Ids of words that stand between a picture's tokens.

    Raises:
        InputError: one has no row in an embedding of `vocab` rows.
    """
    ids = list(tokenizer(words, add_special_tokens=False).input_ids)
    if ids and max(ids) >= vocab:
        raise InputError(
            "tokenizer",
            found=f"id {max(ids)} in {words!r}",
            expected=f"ids below {vocab}, the rows of the embedding",
            fix="use the checkpoint's own tokenizer",
        )
    return ids


def surround(
    prompts: Sequence[str], words: Sequence[tuple[str, str]], image_token: str
) -> list[str]:
    """Prompts with words written before and behind each picture.

    Args:
        prompts: texts with any number of pictures, as `image_token` or `<image>`.
        words: of each picture of all prompts, in order, those before and those behind it.
        image_token: what stands for a picture in the result.
    """
    rest, out = iter(words), []
    for prompt in prompts:
        first, *pieces = prompt.replace(IMAGE_TOKEN, image_token).split(image_token)
        around = zip(itertools.islice(rest, len(pieces)), pieces, strict=True)
        out.append(first + "".join(f"{a}{image_token}{b}{piece}" for (a, b), piece in around))
    return out


def check_turns(turns: Sequence[Turn], *, trained: bool = False) -> None:
    """Raises InputError for no turns, an open one before the last, or, to train, an empty one."""
    if not turns:
        raise InputError("turns", found="none", expected="at least one question", fix="add one")
    for i, (question, answer) in enumerate(turns):
        if trained and (not question or answer == ""):
            raise InputError(
                f"turns[{i}]",
                found=f"an empty {'answer' if question else 'question'}",
                expected="text",
                fix="write it or drop the sample",
            )
        if answer is None and i + 1 < len(turns):
            raise InputError(
                f"turns[{i}]",
                found="no answer",
                expected="an answer in every turn but the last",
                fix="answer it or drop the turns after it",
            )
