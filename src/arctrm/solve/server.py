"""Questions to a server that speaks the chat completions of OpenAI, many at once.

The key comes from OPENAI_API_KEY and is written nowhere. What may pass (a stall, a cut connection,
nonsense, 408, 429, 5xx) is asked again, later each time; what cannot pass ends the command.
"""

import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from huggingface_hub import InferenceClient, close_session

from arctrm.config import BaselineConfig
from arctrm.errors import ConfigError

KEY = "OPENAI_API_KEY"
PASSING = (408, 409, 425, 429)  # statuses that may pass, beside 5xx
ATTEMPTS, FIRST_WAIT, LONGEST_WAIT, PARALLEL = 5, 0.5, 60.0, 8  # waits in seconds


class Reply(NamedTuple):
    """What a server answers to one prompt."""

    text: str = ""
    prompt_tokens: int = 0  # as the server counts them; 0 where it does not
    new_tokens: int = 0
    note: str = ""  # why there is no text


class Server:
    """The model `config.hub.name` of the server `config.server`."""

    def __init__(self, config: BaselineConfig):
        self.config = config
        # Without a key of ours the client would send the login of the Hugging Face hub.
        self.key, wait = os.environ.get(KEY) or "none", config.server_timeout
        self.client = InferenceClient(base_url=config.server, api_key=self.key, timeout=wait)

    def answer(self, prompts: Sequence[str]) -> list[Reply]:
        """Replies in the order of the prompts. Raises ConfigError where none can be had."""
        pool = ThreadPoolExecutor(self.config.batch_size or PARALLEL)
        try:
            return list(pool.map(self._ask, prompts))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            close_session()  # ends the requests under way
            raise
        finally:
            pool.shutdown(wait=False)

    def _ask(self, prompt: str) -> Reply:
        problem = ""
        for attempt in range(ATTEMPTS):
            try:
                return self._asked_once(prompt)
            except Exception as error:  # of the HTTP library, JSON or the shape of the answer
                problem = _refusal(error).replace(self.key, "***")  # servers quote it
                wait = FIRST_WAIT * 2**attempt
                status, after = _status(error)
                if _is_too_long(error, status):
                    return Reply(note=problem)
                if status in (401, 403):
                    raise self._error(f"refuses the key ({problem}); set {KEY} to one") from error
                if status is not None and status < 500 and status not in PASSING:
                    raise self._error(f"refuses ({problem}); check --server and --model") from error
                last = error
            if attempt < ATTEMPTS - 1:
                time.sleep(min(after or wait * random.uniform(0.75, 1.25), LONGEST_WAIT))
        cure = "see that it runs, or give another --server; answers so far are kept for --resume"
        raise self._error(f"{ATTEMPTS} requests failed (the last: {problem}); {cure}") from last

    def _asked_once(self, prompt: str) -> Reply:
        out: Any = self.client.chat_completion(
            [{"role": "user", "content": prompt}],
            model=self.config.hub.name,
            max_tokens=self.config.max_new_tokens,
            temperature=0.0,
            seed=self.config.seed,
        )
        if not out.choices or not isinstance(out.choices[0].message.content, str | None):
            raise ValueError("an answer without text")
        text = out.choices[0].message.content or ""  # None: it thought until it was cut off
        count = lambda kind: int(getattr(out.usage, f"{kind}_tokens", 0) or 0)
        return Reply(text, count("prompt"), count("completion"))

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.config.server}: {problem}")


def _status(error: BaseException) -> tuple[int | None, float]:
    """HTTP status, and the seconds that the server asks to wait (0: it does not say)."""
    response: Any = getattr(error, "response", None)
    if response is None:
        return None, 0.0
    after = response.headers.get("Retry-After", "")
    return response.status_code, float(after) if after.isdecimal() else 0.0


def _is_too_long(error: BaseException, status: int | None) -> bool:
    return status == 413 or (status == 400 and "context" in _body(error).lower())


def _body(error: BaseException) -> str:
    response: Any = getattr(error, "response", None)
    try:
        return "" if response is None else response.text
    except Exception:  # a stream that was never read
        return str(error)


def _refusal(error: BaseException) -> str:
    """One line on what went wrong."""
    lines = [_status(error)[0], " ".join(_body(error).split()) or " ".join(str(error).split())]
    return ", ".join(str(part)[:200].rstrip(".") for part in lines if part) or type(error).__name__
