"""How much of a device's measurement fits into a time: layers, rounds, prompts, contexts."""

from collections.abc import Iterator
from dataclasses import dataclass

from .timing import Case

CONTEXTS = (128, 2048, 8192)
STEP = 4  # of the number of layers, so that a share of them is a whole number
MARGIN = 1.3  # times what a probe of the plain network says that a measurement takes


@dataclass(frozen=True)
class Pace:
    """What a network with some layers takes, seconds.

    Attributes:
        token: to decode a token.
        prompt: to read a token of a prompt.
        load: to make the weights.
    """

    token: float
    prompt: float
    load: float


@dataclass(frozen=True)
class Effort:
    """What is measured.

    Attributes:
        networks: how many, of those that there are.
        layers: of each.
        repeats: rounds, after one to warm up.
        decode_tokens: tokens to time.
        contexts: lengths behind which to decode.
        prompts: those of them that are read as prompts; before others stand random caches.
    """

    networks: int
    layers: int
    repeats: int
    decode_tokens: int
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]

    def list_cases(self) -> list[Case]:
        """List what to measure, the shortest first."""
        return [Case(n, 1, decode_only=n not in self.prompts) for n in self.contexts]

    def estimate_case(self, case: Case, pace: Pace) -> float:
        """Estimate the seconds that a case takes."""
        prompt = 0.0 if case.decode_only else case.length * pace.prompt
        once = prompt + (self.decode_tokens + 1) * pace.token
        return MARGIN * self.networks * (1 + self.repeats) * once

    def estimate(self, pace: Pace) -> float:
        """Estimate the seconds of all of it."""
        cases = sum(self.estimate_case(case, pace) for case in self.list_cases())
        return pace.load + cases


# The least number of layers, rounds, tokens, how many contexts, how many of them as prompts, and of
# the networks. What stands first is the best; each costs less than the one before. MLX leaves out
# what no cache needs, which is most of a prompt's last layer: a network of one layer has no prompts
# worth measuring.
CHOICES = (
    (8, 3, 32, 3, 3, 6),
    (4, 3, 32, 3, 2, 6),
    (4, 2, 16, 3, 2, 6),
    (2, 2, 16, 3, 1, 6),
    (1, 2, 8, 3, 0, 6),
    (1, 1, 4, 2, 0, 6),
    (1, 1, 2, 1, 0, 6),
    (1, 1, 1, 1, 0, 2),
)


def list_efforts(most_layers: int) -> Iterator[Effort]:
    """List what could be measured of networks of at most so many layers, the best first."""
    counts = [*range(most_layers // STEP * STEP, 0, -STEP)]
    counts = [*dict.fromkeys([most_layers, *counts, *(n for n in (2, 1) if n <= most_layers)])]
    for least, repeats, tokens, contexts, prompts, networks in CHOICES:
        for layers in (n for n in counts if n >= min(least, most_layers)):
            read = CONTEXTS[: prompts if layers > 1 else 0]
            yield Effort(networks, layers, repeats, tokens, CONTEXTS[:contexts], read)


def describe_cuts(effort: Effort, all_layers: int) -> str:
    """Say what was measured less of than a fast device with enough memory measures; "" if none."""
    cuts = []
    if effort.layers < all_layers:
        cuts.append(f"{effort.layers} of {all_layers} layers")
    if effort.contexts != CONTEXTS:
        cuts.append(f"contexts up to {effort.contexts[-1]:,}")
    if effort.prompts != CONTEXTS:
        cuts.append(f"prompts up to {effort.prompts[-1]:,}" if effort.prompts else "no prompts")
    best = CHOICES[0]
    cuts += [f"{effort.networks} of {best[5]} networks"] if effort.networks < best[5] else []
    cuts += ["fewer rounds"] if effort.repeats < best[1] else []
    cuts += ["fewer tokens"] if effort.decode_tokens < best[2] else []
    return ", ".join(cuts)
