"""A judge: any OpenAI-compatible address. What it said is kept, so that scoring goes on, too."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from vfjax.errors import InputError
from vfjax.eval import log
from vfjax.eval.extras import needs

Messages = list[dict[str, str]]


class Judge:
    """Asks for a judgement of each answer and remembers it in a file; see `vfjax.eval.log`."""

    def __init__(self, address: str, model: str, key: str, path: Path, *, clients: int = 8):
        """Nothing is asked yet.

        Args:
            address: base URL, such as https://api.openai.com/v1.
            model: its name there.
            key: of the API; local servers take any.
            path: the file.
            clients: requests at once.
        """
        self.address, self.model, self.path, self.clients = address, model, path, clients
        openai = needs("openai", "eval", "openai")
        self._error = openai.OpenAIError
        self._client = openai.OpenAI(base_url=address, api_key=key, max_retries=5)

    def ask(self, questions: Mapping[str, Messages], header: log.Header) -> dict[str, str]:
        """Judgements by id, at temperature 0; only of what the file has not.

        Raises:
            InputError: the address does not answer, or the file is of something else.
        """
        asked = hashlib.sha256(json.dumps(dict(questions)).encode()).hexdigest()
        header = {**header, "judge": self.model, "asked": asked}
        known = log.read(self.path, header)[1] if self.path.exists() else {}
        todo = [id for id in questions if id not in known]
        with log.Log(self.path, header) as out, ThreadPoolExecutor(self.clients) as pool:
            futures = {pool.submit(self._one, questions[id]): id for id in todo}
            try:
                for future in as_completed(futures):
                    known[futures[future]] = future.result()
                    out.write(futures[future], known[futures[future]])
            except self._error as error:
                pool.shutdown(cancel_futures=True)
                raise InputError(
                    f"config.judge {self.address}",
                    found=f"{type(error).__name__}: {error}",
                    expected="chat completions",
                    fix="check address, model and key; the same command goes on",
                ) from None
        return {id: known[id] for id in questions}

    def _one(self, messages: Messages) -> str:
        done = self._client.chat.completions.create(
            model=self.model, messages=messages, temperature=0.0, max_tokens=1024
        )
        return done.choices[0].message.content or ""
