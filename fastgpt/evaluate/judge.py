"""A judge model behind an OpenAI-compatible API: a score from 0 to 100 for each answer."""

import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from fastgpt.errors import UserError

QUESTION = """Judge an answer to an instruction. What a good answer says is given for comparison; another that is as \
right and as helpful deserves as much.

Instruction:
{prompt}

A good answer:
{expected}

The answer to judge:
{answer}

Reply with one integer and nothing else: 0 for a useless answer, 100 for one as good as the good answer."""


class _Stay(HTTPRedirectHandler):
    """Follows no redirect: it would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class Judge:
    """`POST {url}/chat/completions`, as OpenAI's API and many local servers understand it.

    Args:
        url: up to and with the version, such as https://api.openai.com/v1 or http://localhost:11434/v1.
        model: the judge's name there.
        key: sent as a bearer token; never part of a message.
        timeout: seconds for one reply.
        attempts: how often one question is asked where the server is busy (429), fails (5xx) or does not answer.
        wait: seconds before the second attempt; doubled before each further one.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 120.0
    attempts: int = 5
    wait: float = 1.0

    def __post_init__(self) -> None:
        self._options = {"temperature": 0}
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--judge-url {self.url} must begin with http:// or https://")

    def scores(self, items: Sequence[dict[str, Any]], at_once: int = 8) -> list[dict[str, Any]]:
        """For each {"prompt", "expected", "answer"}: {"judge": int or None, "judge_reply": str}.

        None where the reply is not an integer from 0 to 100 and nothing else.

        Args:
            at_once: questions under way together.

        Raises:
            UserError: the server cannot be reached, or refuses.
        """
        pool = ThreadPoolExecutor(at_once)
        try:
            return list(pool.map(lambda item: self._score(**item), items))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the rest is not asked

    def _score(self, prompt: str, expected: str, answer: str) -> dict[str, Any]:
        reply = self.ask(QUESTION.format(prompt=prompt, expected=expected, answer=answer))
        number = int(reply) if re.fullmatch(r"\d{1,3}", reply.strip(), re.ASCII) else 101
        return {"judge": number if number <= 100 else None, "judge_reply": reply}

    def ask(self, question: str) -> str:
        """The judge's reply to one message.

        Raises:
            UserError: there is none.
        """
        content = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        where = f"the judge at {self.url}"
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                reply = self._post({**content, **self._options})
                return str(reply["choices"][0]["message"]["content"] or "")
            except HTTPError as error:
                said = self._said(error)
                problem = f"answered {error.code} {error.reason}{said}"
                if error.code == 400 and "temperature" in said and attempt == 0:
                    self._options = {}  # some models of OpenAI's take their own temperature alone
                elif error.code != 429 and error.code < 500:
                    raise UserError(f"{where} {problem}: check --judge-url, --judge-model and OPENAI_API_KEY") from None
            except (OSError, HTTPException) as error:  # refused, no such host, timed out, broken off
                problem = f"cannot be reached: {getattr(error, 'reason', None) or error or type(error).__name__}"
            except (ValueError, KeyError, IndexError, TypeError):
                raise UserError(f"{where} gave no chat completion: check --judge-url") from None
        raise UserError(f"{where} {problem}, {self.attempts} times: check --judge-url, or try again later")

    def _post(self, content: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = self.url.rstrip("/") + "/chat/completions"
        request = Request(url, json.dumps(content).encode(), headers)
        with build_opener(_Stay).open(request, timeout=self.timeout) as response:
            return json.loads(response.read())

    def _said(self, error: HTTPError) -> str:
        """The beginning of an error's body, on one line and without the key."""
        try:
            text = " ".join(error.read(2000).decode("utf-8", "replace").split())
        except (OSError, HTTPException):
            text = ""
        if self.key:
            text = text.replace(self.key, "***")
        return f" ({text[:200]})" if text else ""
