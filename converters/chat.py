"""The chat template of a folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from vfjax import InputError
from vfjax.atomic import contents, read_json
from vfjax.errors import cut
from vfjax.text.prompts import Template

FILES = ("chat_template.json", "chat_template.jinja", "tokenizer_config.json")
"""Files that may hold one, beside processor_config.json."""


def _is_text(value: object) -> bool:
    """Text that a file can hold: JSON may have half a character."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def read_chat_template(folder: Path) -> str:
    """The chat template, Jinja, that transformers' processor of a folder takes, or its tokenizer.

    "" if there is none. It is the first of those in processor_config.json, the old
    chat_template.json, chat_template.jinja and tokenizer_config.json (transformers
    processing_utils.py, get_processor_dict).

    Raises:
        InputError: several templates, none of them the default; or a file that is no text.
    """
    for name in ("processor_config.json", *FILES):
        file = folder / name
        if not file.is_file():
            continue
        if name.endswith(".jinja"):
            try:
                return contents(file).decode()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(
                    file, found=f"no text ({error})", expected="Jinja in UTF-8", fix="copy it again"
                ) from None
        given = found = read_json(file).get("chat_template")
        if isinstance(found, list):
            named = [one for one in found if isinstance(one, dict)]
            found = {str(one.get("name")): one.get("template") for one in named}
        if isinstance(found, dict):
            found = found.get("default", found)
        if found is not None and not _is_text(found):
            raise InputError(
                f"{file}: chat_template",
                found=cut(repr(given), 60),
                expected="a template, or several by name, one of them 'default'",
                fix="keep the one that the model was trained with",
            )
        if found is not None:
            return found
    return ""


def jinja(template: Template, tokens: Sequence[str]) -> str:
    """A named prompt template as Jinja, for transformers' messages of texts and pictures.

    As `vfjax.text.messages` has it: system texts stand before the first question, pictures first in
    their message unless they stand between texts, one part a line. Roles in another order, and an
    answer that the template cannot hold, are errors of the template.

    Args:
        template: one of `vfjax.text.prompts.TEMPLATES`.
        tokens: what stands for a picture and, if there are two, for a video.
    """
    visual = dict(zip(("image", "video"), tokens, strict=False))
    words = {"head": template.head, "middle": template.middle, "again": template.again}
    answer = "{{- raise_exception('this template holds no answers') -}}"
    if template.tail is not None:
        space, tail = _literal(template.space), _literal(template.tail)
        answer = f"{{{{- {space} + ns.text + {tail} -}}}}"
    said = {key: _literal(text) for key, text in words.items()}
    return _JINJA % {**said, "answer": answer, "visual": _literal(visual)}


def _literal(value: object) -> str:
    """A text, or texts by name, as Jinja has it."""
    return json.dumps(value, ensure_ascii=False)


_JINJA = """{%%- set ns = namespace(system='', text='', runs=0, last='', said=false, role='') -%%}
{%%- set visual = %(visual)s -%%}
{{- %(head)s -}}
{%%- for message in messages -%%}
  {%%- set ns.text = '' -%%}
  {%%- if message['content'] is string -%%}
    {%%- set ns.text = message['content'] -%%}
  {%%- else -%%}
    {%%- set ns.runs = 0 -%%}
    {%%- set ns.last = '' -%%}
    {%%- for part in message['content'] -%%}
      {%%- if part['type'] != 'text' and part['type'] not in visual -%%}
        {{- raise_exception('no part of a message is of type ' + part['type']) -}}
      {%%- endif -%%}
      {%%- if part['type'] == 'text' and ns.last != 'text' -%%}
        {%%- set ns.runs = ns.runs + 1 -%%}
      {%%- endif -%%}
      {%%- set ns.last = part['type'] -%%}
    {%%- endfor -%%}
    {%%- if ns.runs < 2 -%%}
      {%%- for part in message['content'] if part['type'] in visual -%%}
        {%%- set ns.text = ns.text + visual[part['type']] + '\n' -%%}
      {%%- endfor -%%}
    {%%- endif -%%}
    {%%- for part in message['content'] if part['type'] == 'text' or ns.runs > 1 -%%}
      {%%- set said = part['text'] if part['type'] == 'text' else visual[part['type']] -%%}
      {%%- set ns.text = ns.text + said + '\n' -%%}
    {%%- endfor -%%}
    {%%- set ns.text = ns.text[:-1] -%%}
  {%%- endif -%%}
  {%%- if message['role'] == 'system' and ns.role in ['', 'system'] -%%}
    {%%- set more = not loop.last and messages[loop.index]['role'] == 'system' -%%}
    {%%- set ns.system = ns.system + ns.text + ('\n' if more else '\n\n') -%%}
  {%%- elif message['role'] == 'user' and ns.role != 'user' -%%}
    {{- (%(again)s if ns.said else ns.system) + ns.text -}}
    {%%- set ns.said = true -%%}
    {%%- if not loop.last or add_generation_prompt -%%}
      {{- %(middle)s -}}
    {%%- endif -%%}
  {%%- elif message['role'] == 'assistant' and ns.role == 'user' -%%}
    %(answer)s
  {%%- else -%%}
    {{- raise_exception('roles are: system, then user and assistant in turn') -}}
  {%%- endif -%%}
  {%%- set ns.role = message['role'] -%%}
{%%- endfor -%%}
"""
