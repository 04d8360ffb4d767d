"""mlx_lm.server with a converted model under eight clients at once, for as long as you like.

    python tools/soak.py MODEL [--minutes 60]

Clients ask for answers of random lengths, whole or streamed, and hang up in the middle of some. A
few questions come again and again, greedily, and must get the same answer each time: the first that
was given. Prints what was asked, what went wrong and how much memory the server took.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
from serving import serving

CLIENTS = 8
ASKED = ("Once upon a time", "The fox said", "There was a king", "A long way off")


class Soak:
    """The clients of a server, until a time."""

    def __init__(self, url: str, until: float):
        self._client = openai.OpenAI(base_url=url, api_key="none", timeout=120, max_retries=0)
        self._until = until
        self._lock = threading.Lock()
        self._answers: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def client(self, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < self._until:
            kind = chance.choice(["whole", "streamed", "left", "known"])
            try:
                getattr(self, f"_{kind}")(chance)
            except Exception as error:  # whatever it is, it is what this looks for
                self.wrong.append(f"{kind}: {type(error).__name__}: {error}")
            self.counts[kind] += 1

    def _ask(self, prompt: str, **options: Any) -> Any:
        return self._client.completions.create(model="default_model", prompt=prompt, **options)

    def _whole(self, chance: random.Random) -> None:
        most = chance.randrange(1, 60)
        answer = self._ask(self._words(chance), max_tokens=most, temperature=0.8)
        if not 1 <= answer.usage.completion_tokens <= most:
            raise ValueError(f"{answer.usage.completion_tokens} tokens of at most {most}")

    def _streamed(self, chance: random.Random) -> None:
        pieces = list(self._ask(self._words(chance), max_tokens=40, temperature=0.8, stream=True))
        if pieces[-1].choices[0].finish_reason not in ("stop", "length"):
            raise ValueError("the stream ended without saying why")

    def _left(self, chance: random.Random) -> None:
        with self._ask(self._words(chance), max_tokens=400, stream=True) as pieces:
            for _ in range(chance.randrange(5)):
                next(pieces)

    def _known(self, chance: random.Random) -> None:
        prompt = chance.choice(ASKED)
        text = self._ask(prompt, max_tokens=30, temperature=0).choices[0].text
        with self._lock:
            first = self._answers.setdefault(prompt, text)
        if text != first:
            raise ValueError(f"{prompt!r} got {text!r}, and before {first!r}")

    def _words(self, chance: random.Random) -> str:
        return " ".join(chance.choices(" ".join(ASKED).split(), k=chance.randrange(1, 80)))


def resident_bytes(pid: int) -> int:
    """What a process holds in memory now."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return 1024 * int(shown.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as place,
        serving(given.model.absolute(), Path(place) / "log") as (url, pid),
    ):
        seconds = 60 * given.minutes
        soak = Soak(url, time.monotonic() + seconds)
        memory = []
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(soak.client, seed) for seed in range(CLIENTS)]
            while not all(client.done() for client in clients):
                time.sleep(min(5.0, seconds / 40))
                memory.append(resident_bytes(pid))
    quarter = len(memory) // 4
    print(
        f"{sum(soak.counts.values()):,} requests by {CLIENTS} clients in {given.minutes:g} minutes"
    )
    print(", ".join(f"{kind} {n:,}" for kind, n in sorted(soak.counts.items())))
    early, late = max(memory[: 2 * quarter]), max(memory[-quarter:])
    print(f"memory at most {early / 1e6:,.0f} MB in one half, {late / 1e6:,.0f} in the end")
    print(f"wrong: {len(soak.wrong)}")
    for line in soak.wrong[:20]:
        print(line, file=sys.stderr)
    sys.exit(bool(soak.wrong))
