"""Where the stream's basis can be chosen: the network's wiring, no weights.

A decoder's stream is linear between two nonlinearities, so its basis there is free. Each such
``Point`` has producers (matrices that write it) and consumers (matrices that read it). Choosing a
consumer's or a producer's own matrix as the change of basis turns it into the identity, and it can
go: one point, one basis, one matrix gone.
"""

from dataclasses import dataclass, field

from .model import ModelArgs
from .names import EMBEDDING, HEAD, module_path

LETTERS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "p": "o_proj"}  # the paper's


def parse_layer(where: str) -> int:
    """The layer of a module path."""
    return int(where.split(".")[2])


def parse_letter(where: str) -> str:
    """The paper's letter of a module path: "q" for a ``q_proj``."""
    return next(letter for letter, name in LETTERS.items() if where.endswith(name))


@dataclass
class Point:
    """A place in the stream whose basis can be chosen.

    Attributes:
        producers: module paths that write it; where they add up one after another, in that order.
        consumers: module paths that read it.
        pinned: why its basis cannot change; None if it can.
        head: whether the output head reads it.
    """

    producers: list[str] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    pinned: str | None = None
    head: bool = False

    def pin(self, why: str) -> None:
        self.pinned = self.pinned or why


def find_points(args: ModelArgs) -> list[Point]:
    """Every point of the stream, from the embedding (first) to the head (last)."""
    point = Point(producers=[EMBEDDING])
    found = [point]
    if args.skip == "both" or (args.skip == "ffn" and args.block == "parallel"):
        point.pin("its skip connections make the whole stream share one basis")

    def read(layer: int, part: str) -> None:
        if layer == 0 and args.reads_table(part):
            point.pin("a table holds what layer 0 makes of it")
        elif part in LETTERS and args.lacks(part, layer):
            point.pin(f"{part.upper()} of layer {layer} is gone already")
        else:
            point.consumers.append(module_path(layer, LETTERS.get(part, part)))

    for layer in range(args.num_hidden_layers):
        attention, ffn = not args.lacks("attention", layer), not args.lacks("ffn", layer)
        p = [] if args.lacks("p", layer) or not attention else [module_path(layer, "o_proj")]
        down = [module_path(layer, "down_proj")] if ffn else []
        if args.norm == "pre":
            point.pin("a norm acts on the stream")
        if attention:
            for part in "qkv":
                read(layer, part)
        if args.block == "serial" and attention:
            if args.skip == "both":
                point.producers += p
            else:
                point = Point(producers=p)
                found.append(point)
            if not p:
                point.pin(f"P of layer {layer} is gone already")
            if args.norm == "pre":
                point.pin("a norm acts on the stream")
        if ffn:
            for part in args.ffn_readers:
                read(layer, part)
        writers = [*p, *down] if args.block == "parallel" else down
        if args.skip == "none" and writers:
            point = Point(producers=writers)
            found.append(point)
            if args.block == "parallel" and attention and not p:
                point.pin(f"P of layer {layer} is gone already")
            if layer == 0 and args.reads_table("ffn"):
                point.pin("a table writes it")
        else:
            point.producers += writers
    point.head = True
    point.consumers.append(HEAD)
    if args.final_norm:
        point.pin("the final norm acts on it")
    if args.tie_word_embeddings:
        for end, other in ((point, found[0]), (found[0], point)):
            if end.pinned:
                other.pin(f"the embedding is tied to the other end of the stream: {end.pinned}")
    return found
