"""Which matrices could become the identity at a point of the stream, and why others cannot."""

from dataclasses import replace

from ..network.model import ModelArgs
from ..network.names import HEAD
from ..network.wiring import LETTERS, Point, find_points, parse_layer, parse_letter


def find_candidates(point: Point) -> dict[str, str]:
    """Find what could become the identity at a point: module paths by the paper's letter."""
    sides = {"q": point.consumers, "k": point.consumers, "v": point.consumers, "p": point.producers}
    return {x: path for x, paths in sides.items() for path in paths if path.endswith(LETTERS[x])}


def find_measurable(args: ModelArgs, remove: str) -> list[str]:
    """Find the matrices whose inverse a removal may need, in the order of the stream.

    Args:
        args: the network.
        remove: "auto", "none" or the letters to remove.
    """
    letters = "" if remove == "none" else "qkvp" if remove == "auto" else remove
    points = find_points(args)
    return [
        path
        for index, point in enumerate(points)
        for letter, path in find_candidates(point).items()
        if letter in letters
        and point.pinned is None
        and not needs_no_inverse(args, points, index, path)
        and explain_shape(args, letter) is None
    ]


def find_mixed(args: ModelArgs, points: list[Point], index: int, path: str) -> list[str]:
    """Find the matrices whose values a removal mixes through an inverse.

    There are none where ``needs_no_inverse`` says so.

    Args:
        args: the network.
        points: its points.
        index: the point whose basis changes.
        path: the matrix that becomes the identity there.
    """
    if needs_no_inverse(args, points, index, path):
        return []
    touched = [points[0], points[-1]] if is_tied_end(args, points, index) else [points[index]]
    matrices = [m for point in touched for m in (*point.producers, *point.consumers) if m != path]
    return [m for m in matrices if m != HEAD or not args.tie_word_embeddings]


def needs_no_inverse(args: ModelArgs, points: list[Point], index: int, path: str) -> bool:
    """Tell whether the matrix at a path can go from a point without an inverse.

    P can where nothing else writes the point. Q can where nothing else reads it and it has no bias,
    which would have to enter the stream before it. No tied embedding may begin or end there.
    """
    point, biased = points[index], parse_layer(path) in args.biases.get("q_proj", ())
    alone = point.producers == [path] or (point.consumers == [path] and not biased)
    return alone and not is_tied_end(args, points, index)


def is_tied_end(args: ModelArgs, points: list[Point], index: int) -> bool:
    """Tell whether a point is one end of the stream and the embedding is tied to the head."""
    return args.tie_word_embeddings and index in (0, len(points) - 1)


def explain_obstacle(args: ModelArgs, points: list[Point], index: int, path: str) -> str | None:
    """Explain why the matrix at a path cannot become the identity at a point; None if it can."""
    point, layer = points[index], parse_layer(path)
    if point.pinned:
        return point.pinned
    width = args.num_attention_heads * args.head_dim
    if parse_letter(path) == "p" and width != args.hidden_size and args.lacks("ffn", layer):
        return f"only an FFN can read heads that are {width} wide, and layer {layer} has none"
    if layer in args.biases.get(path.rpartition(".")[2], ()):
        if point.head:
            return "its bias would need a bias on the head"
        if args.tie_word_embeddings and index == 0:
            return "its bias would reach the head through the tied embedding"
    return None


def explain_shape(args: ModelArgs, letter: str) -> str | None:
    """Explain why the shape of Q, K, V or P forbids its removal; None if it does not."""
    name, d = letter.upper(), args.hidden_size
    width = args.num_attention_heads * args.head_dim
    kv_width = args.num_key_value_heads * args.head_dim
    if letter in "kv" and letter not in args.stream_readers:
        return f"{name} reads a norm of the queries, and no matrix moves across a norm"
    if letter in "kv" and kv_width != d:
        return (
            f"{name} maps {d} to {kv_width} and has no inverse ({args.num_key_value_heads} "
            f"key-value heads, {args.num_attention_heads} query heads)"
        )
    if letter == "q" and width < d:
        return f"Q narrows the stream from {d} to {width} and K and V need what it drops"
    if letter == "q" and width > d:
        return (
            f"Q widens the stream from {d} to {width}, so the matrices that feed it would grow by "
            "more than Q weighs"
        )
    if letter == "p" and width != d and (args.block == "parallel" or args.skip == "ffn"):
        return f"P maps {width} to {d} and has no inverse, which this block needs"
    return None


def find_removable(args: ModelArgs) -> set[str]:
    """Find the letters of which something can go from a network as it is."""
    points = find_points(args)
    return {
        letter
        for index, point in enumerate(points)
        for letter, path in find_candidates(point).items()
        if explain_shape(args, letter) is None
        and explain_obstacle(args, points, index, path) is None
    }


def suggest_removals(args: ModelArgs) -> str:
    """Suggest what can go from a network of which something else cannot."""
    skipless = not find_removable(args) and can_be_skipless(args)
    bare = replace(args, skip="none", norm="qkv", shared_norm=False) if skipless else args
    removable = find_removable(bare)
    cut = ("".join(letter for letter in way if letter in removable) for way in _find_ways(bare))
    ways = list(dict.fromkeys(filter(None, cut))) or sorted(removable)
    if not ways:
        return "nothing can go"
    together = len(ways[0]) > 1
    what = " or ".join(way[0].upper() for way in ways) + (" and P" if together else "")
    if skipless:
        how = " or ".join(f"--skipless --remove {way}" for way in ways)
        network = "of its skipless network, which needs training"
        return f"{say_what_else_helps(args)}; {network}, {what} can go, {how}"
    return f"only {what} can go, --remove {' or --remove '.join(ways)}"


def can_be_skipless(args: ModelArgs) -> bool:
    """Whether ``--skipless`` takes a network."""
    return args.norm == "pre" and not args.precomputed


def say_what_else_helps(args: ModelArgs) -> str:
    """Say what makes a model smaller of which nothing can go."""
    if args.skip == "both":
        return "-q and --drop-attention auto make the model smaller as it is"
    return "-q makes the model smaller as it is"


def name_all_with(args: ModelArgs, letter: str) -> str:
    """Return the letters to ask for where a matrix of one letter shall go."""
    return "qp" if letter == "q" and _takes_both(args) else letter


def _find_ways(args: ModelArgs) -> list[str]:
    """Find the largest sets of letters that can go by their shapes, from a skipless network."""
    free = [letter for letter in "qkvp" if explain_shape(args, letter) is None]
    readers = ["q"] if "q" in free else [letter for letter in free if letter != "p"]
    writers = ["p"] if "p" in free and (not readers or count_saved_by_p(args) > 0) else []
    if readers and writers and _takes_both(args):
        return [f"{reader}p" for reader in readers]
    return [*readers, *writers]


def _takes_both(args: ModelArgs) -> bool:
    """Whether P and one of Q, K and V become the identity at points of their own."""
    return args.block == "serial" and args.skip != "ffn"


def count_saved_by_p(args: ModelArgs) -> int:
    """Count the weights that removing one layer's P saves; negative if it costs some."""
    width = args.num_attention_heads * args.head_dim
    inner = max(args.num_local_experts, 1) * args.intermediate_size * (2 if args.gated else 1)
    return width * args.hidden_size - (width - args.hidden_size) * (inner + args.num_local_experts)
