"""Where the stream's basis can be chosen: the network's wiring, no weights.

A decoder's stream is linear between two nonlinearities, so its basis there is free. Each such
``Point`` has producers (matrices that write it) and consumers (matrices that read it). A consumer's
or a producer's own matrix, chosen as the change of basis, becomes the identity and can go. One
point has one basis, so at most one matrix goes there.
"""

from dataclasses import dataclass, field

from .model import ModelArgs
from .names import EMBEDDING, HEAD, module_path

LETTERS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "p": "o_proj"}  # the paper's


def parse_layer(path: str) -> int:
    """Return the layer in a module path: 3 for "model.layers.3.self_attn.q_proj"."""
    return int(path.split(".")[2])


def parse_letter(path: str) -> str:
    """Return the paper's letter for a module path: "q" for a ``q_proj``, "p" for an ``o_proj``."""
    return next(letter for letter, name in LETTERS.items() if path.endswith(name))


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
        """Say why the basis cannot change; the first reason stays."""
        self.pinned = self.pinned or why


def find_points(args: ModelArgs) -> list[Point]:
    """Find every point of the stream, from the embedding (first) to the head (last)."""
    points = [Point(producers=[EMBEDDING])]
    if args.skip == "both" or (args.skip == "ffn" and args.block == "parallel"):
        points[0].pin("its skip connections make the whole stream share one basis")
    for layer in range(args.num_hidden_layers):
        if args.norm == "pre":
            points[-1].pin("a norm acts on the stream")
        _pass_attention(args, layer, points)
        _pass_ffn(args, layer, points)
        if args.has_output_skip(layer):
            points[-1].pin(f"the heads of layer {layer} are added to it")
    last = points[-1]
    last.head = True
    last.consumers.append(HEAD)
    if args.final_norm:
        last.pin("the final norm acts on it")
    if args.tie_word_embeddings:
        for end, other in ((last, points[0]), (points[0], last)):
            if end.pinned:
                other.pin(f"the embedding is tied to the other end of the stream: {end.pinned}")
    return points


def find_query_readers(args: ModelArgs) -> list[str]:
    """Find the matrices, K and V perhaps, that read a norm of the queries and thus no point."""
    letters = [letter for letter in "kv" if letter not in args.stream_readers]
    return [
        module_path(layer, LETTERS[letter])
        for layer in range(args.num_hidden_layers)
        for letter in letters
        if not args.lacks(letter, layer)
    ]


def _pass_attention(args: ModelArgs, layer: int, points: list[Point]) -> None:
    """Add what a layer's attention reads to the latest point, and the point that it writes."""
    if args.lacks("attention", layer):
        return
    for part in args.stream_readers:
        _read(args, layer, part, points[-1])
    if args.block == "parallel":
        return  # its output joins the FFN's
    p = _find_p(args, layer)
    if args.skip == "both":
        points[-1].producers += p
    else:
        points.append(Point(producers=p))
    if not p:
        points[-1].pin(f"P of layer {layer} is gone already")
    if args.norm == "pre":
        points[-1].pin("a norm acts on the stream")


def _pass_ffn(args: ModelArgs, layer: int, points: list[Point]) -> None:
    """Add what a layer's FFN reads to the latest point, and the point that the block writes."""
    ffn, parallel = not args.lacks("ffn", layer), args.block == "parallel"
    for part in args.ffn_readers if ffn else ():
        _read(args, layer, part, points[-1])
    p = _find_p(args, layer) if parallel else []
    writers = [*p, *([module_path(layer, "down_proj")] if ffn else [])]
    heads = parallel and not p and not args.lacks("attention", layer)  # they write it themselves
    if args.skip != "none" or not (writers or heads):
        points[-1].producers += writers
        return
    points.append(Point(producers=writers))
    if heads:
        points[-1].pin(f"P of layer {layer} is gone already")
    if layer == 0 and args.reads_table("ffn"):
        points[-1].pin("a table writes it")


def _find_p(args: ModelArgs, layer: int) -> list[str]:
    return [] if args.lacks("p", layer) else [module_path(layer, "o_proj")]


def _read(args: ModelArgs, layer: int, part: str, point: Point) -> None:
    """Add a reader, "q", "k", "v" or a matrix's name, to a point, or pin it if that is gone."""
    if layer == 0 and args.reads_table(part):
        point.pin("a table holds what layer 0 makes of it")
    elif part in LETTERS and args.lacks(part, layer):
        point.pin(f"{part.upper()} of layer {layer} is gone already")
    else:
        point.consumers.append(module_path(layer, LETTERS.get(part, part)))
