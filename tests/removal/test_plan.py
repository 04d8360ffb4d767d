"""What goes, what stays and why: wiring and decisions, without weights."""

import itertools
import re
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_skipless.errors import UserError
from mlx_skipless.network.model import ModelArgs, quant_predicate
from mlx_skipless.network.wiring import find_points
from mlx_skipless.quantization.layout import Layout, Quantization
from mlx_skipless.removal.algebra import Conditioning
from mlx_skipless.removal.candidates import find_measurable
from mlx_skipless.removal.choices import RemovalCost
from mlx_skipless.removal.plan import isolate_removal, make_plan
from mlx_skipless.removal.sublayers import explain_undroppable

BASE = ModelArgs(
    "skipless", hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4,
    vocab_size=300, num_key_value_heads=2, final_norm=True, gains=["final"],
)  # fmt: skip
MHA = replace(BASE, num_key_value_heads=4)


def wired(args: ModelArgs) -> list[tuple[list[str], list[str]]]:
    def short(path: str) -> str:
        parts = path.split(".")
        return f"{parts[2]}.{parts[-1][0]}" if "layers" in path else parts[-1]

    return [([*map(short, p.producers)], [*map(short, p.consumers)]) for p in find_points(args)]


NETWORKS = [
    replace(BASE, block=block, skip=skip, norm=norm, tie_word_embeddings=tied, removed=removed)
    for block, skip, norm, tied, removed in itertools.product(
        ("serial", "parallel"), ("none", "ffn", "both"), ("none", "qkv", "pre"), (True, False),
        ({}, {"q": [0, 1, 2]}),
    )
    if not (block == "parallel" and skip == "ffn")
]  # fmt: skip
SHAPES = [
    {}, {"num_key_value_heads": 4}, {"head_dim": 32}, {"head_dim": 8},
    {"num_hidden_layers": 1, "num_key_value_heads": 4}, {"num_hidden_layers": 1, "head_dim": 8},
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_way_out_of_a_refusal_is_open(shape: dict[str, int]) -> None:
    """Each `--remove` that a refusal or a note names is obeyed, and takes something."""
    ways = set()
    for network in NETWORKS:
        layers = shape.get("num_hidden_layers", 3)
        removed = {letter: [*range(layers)] for letter in network.removed}
        args = replace(network, **shape, removed=removed)
        noisy = {path: Conditioning(1e5, 1e5) for path in find_measurable(args, "auto")}
        said = make_plan(args, conditioning=noisy, dtype=mx.float16).notes
        for letters in ("q", "k", "v", "p", "qp", "kp", "vp"):
            try:
                make_plan(args, remove=letters)
            except UserError as refusal:
                said = (*said, str(refusal))
        for line in said:
            for skipless, letters in re.findall(r"(--skipless )?--remove ([qkvp]+)\b", line[12:]):
                plan = make_plan(args, remove=letters, skipless=bool(skipless))
                assert any(plan.gone.values()), (line, letters)
                ways.add(letters)
    assert ways


@pytest.mark.parametrize(
    ("changes", "helps"),
    [
        ({"block": "parallel", "norm": "pre"}, "-q makes the model smaller as it is"),
        ({}, "--remove removes weights from this model"),
    ],
    ids=["nothing can go", "skipless"],
)
def test_what_helps_a_network_without_skips_that_shall_lose_a_sub_layer(
    changes: dict[str, str], helps: str
) -> None:
    assert explain_undroppable(replace(BASE, **changes)).endswith(f"leads around it; {helps}")


def test_points_of_a_serial_block() -> None:
    """DESIGN's table: the stream between blocks, and between attention and FFN."""
    assert wired(replace(BASE, num_hidden_layers=2)) == [
        (["embed_tokens"], ["0.q", "0.k", "0.v"]),
        (["0.o"], ["0.g", "0.u"]),
        (["0.d"], ["1.q", "1.k", "1.v"]),
        (["1.o"], ["1.g", "1.u"]),
        (["1.d"], ["lm_head"]),
    ]


def test_points_of_a_parallel_block() -> None:
    assert wired(replace(BASE, num_hidden_layers=2, block="parallel")) == [
        (["embed_tokens"], ["0.q", "0.k", "0.v", "0.g", "0.u"]),
        (["0.o", "0.d"], ["1.q", "1.k", "1.v", "1.g", "1.u"]),
        (["1.o", "1.d"], ["lm_head"]),
    ]


def test_an_ffn_skip_joins_two_points() -> None:
    assert wired(replace(BASE, num_hidden_layers=2, skip="ffn")) == [
        (["embed_tokens"], ["0.q", "0.k", "0.v"]),
        (["0.o", "0.d"], ["0.g", "0.u", "1.q", "1.k", "1.v"]),
        (["1.o", "1.d"], ["1.g", "1.u", "lm_head"]),
    ]


@pytest.mark.parametrize(
    ("args", "remove", "reason"),
    [
        (BASE, "k", "no inverse"),
        (BASE, "vp", "no inverse"),
        (replace(BASE, head_dim=8), "qp", "narrows"),
        (replace(BASE, head_dim=32), "q", "widens"),
        (replace(BASE, block="parallel"), "qp", "only one"),
        (replace(BASE, block="parallel", head_dim=8), "p", "no inverse"),
        (replace(BASE, skip="ffn"), "qp", "only one"),
        (replace(BASE, skip="both"), "q", "skip connections"),
        (replace(BASE, norm="pre"), "p", "norm acts on the stream"),
        (replace(BASE, norm="pre", skip="both"), "qp", "--skipless"),
        (replace(BASE, removed={"q": [0, 1, 2]}), "q", "gone already"),
        (
            replace(BASE, block="parallel", num_hidden_layers=1, output_skip=True),
            "p",
            "heads of layer 0 are added to it",
        ),
    ],
)
def test_refusals_name_the_reason(args: ModelArgs, remove: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"--remove {remove}: .*{reason}"):
        make_plan(args, remove=remove)


@pytest.mark.parametrize(
    ("args", "remove", "instead"),
    [
        (BASE, "k", "only Q and P can go, --remove qp"),
        (replace(BASE, block="parallel"), "k", "only Q or P can go, --remove q or --remove p"),
        (replace(BASE, skip="ffn"), "k", "only Q or P can go, --remove q or --remove p"),
        (replace(BASE, head_dim=8), "k", "only P can go, --remove p"),
        (replace(BASE, head_dim=32), "q", "only K or V can go, --remove k or --remove v"),
        (replace(BASE, head_dim=8, block="parallel"), "q", "nothing can go"),
        (
            replace(BASE, norm="pre", skip="both"),
            "k",
            "smaller as it is; of its skipless network, .* Q and P can go, --skipless --remove qp",
        ),
    ],
)
def test_what_can_go_instead_can(args: ModelArgs, remove: str, instead: str) -> None:
    with pytest.raises(UserError, match=f"{instead}$"):
        make_plan(args, remove=remove)
    for letters in re.findall(r"--remove (\w+)", instead):
        assert make_plan(replace(args, norm="qkv", skip="none"), remove=letters).gone


def test_nothing_to_save_is_said() -> None:
    """Gemma-7B's shapes: heads wider than the stream, on both sides."""
    plan = make_plan(replace(BASE, head_dim=32, num_key_value_heads=1), remove="auto")
    assert not plan.gone
    assert any("Q widens" in note and "without P" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("args", "remove", "gone"),
    [
        (BASE, "qp", {"q": [0, 1, 2], "p": [0, 1, 2]}),
        (replace(BASE, tie_word_embeddings=True), "qp", {"q": [1, 2], "p": [0, 1, 2]}),
        (replace(BASE, block="parallel"), "p", {"p": [0, 1]}),
        (replace(BASE, block="parallel", final_norm=False), "p", {"p": [0, 1, 2]}),
        (replace(BASE, block="parallel"), "auto", {"q": [0, 1, 2]}),
        (replace(BASE, block="parallel", final_norm=False), "auto", {"q": [0, 1, 2], "p": [2]}),
        (replace(BASE, skip="both"), "auto", {}),
        (replace(BASE, head_dim=8), "auto", {"p": [0, 1, 2]}),
        # Two key heads of 32 make K square: it can go although Q and P cannot pay.
        (replace(BASE, head_dim=32), "auto", {"k": [0, 1, 2]}),
        (replace(BASE, head_dim=32, num_key_value_heads=1), "auto", {}),
        (replace(BASE, removed={"q": [1]}), "qp", {"q": [0, 2], "p": [0, 1, 2]}),
        (replace(BASE, removed={"p": [0, 1, 2]}), "auto", {"q": [0, 1, 2]}),
        (MHA, "auto", {"q": [0, 1, 2], "p": [0, 1, 2]}),
        (MHA, "none", {}),
    ],
)
def test_what_goes(args: ModelArgs, remove: str, gone: dict[str, list[int]]) -> None:
    assert make_plan(args, remove=remove).gone == gone


@pytest.mark.parametrize("skip", ["none", "ffn"])
@pytest.mark.parametrize("block", ["serial", "parallel"])
def test_auto_never_grows_a_model(block: str, skip: str) -> None:
    for head_dim, f, tied, final in itertools.product(
        (8, 12, 16, 20, 32), (16, 96, 256), (True, False), (True, False)
    ):
        args = replace(
            BASE, block=block, skip=skip, head_dim=head_dim, intermediate_size=f,
            tie_word_embeddings=tied, final_norm=final, gains=["final"] if final else [],
        )  # fmt: skip
        plan = make_plan(args)
        before, after = (Layout(a, mx.float32).count() for a in (plan.before, plan.after))
        assert after <= before
        assert (after < before) == bool(plan.gone)


def test_auto_takes_the_better_conditioned_of_q_k_and_v() -> None:
    names = {x: f"model.layers.1.self_attn.{x}_proj" for x in "qkv"}
    measured = dict.fromkeys(find_measurable(MHA, "auto"), Conditioning(10, 2.0))
    measured |= {names["q"]: Conditioning(1e6, 1e5), names["k"]: Conditioning(1e6, 1e5)}
    assert make_plan(MHA, conditioning=measured).gone == {
        "q": [0, 2], "v": [1], "p": [0, 1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "amplification", "goes"),
    [(mx.float32, 1e5, True), (mx.float32, 1e6, False), (mx.float16, 20, True),
     (mx.float16, 100, False), (mx.bfloat16, 3, True), (mx.bfloat16, 20, False)],
)  # fmt: skip
def test_auto_weighs_noise_against_the_number_type(
    dtype: mx.Dtype, amplification: float, goes: bool
) -> None:
    measured = dict.fromkeys(find_measurable(BASE, "auto"), Conditioning(1e3, amplification))
    plan = make_plan(BASE, conditioning=measured, dtype=dtype)
    assert ("q" in plan.gone) == goes
    assert goes or any("Q of layers 0, 1, 2 stays" in note for note in plan.notes)


def test_a_singular_matrix_is_refused_or_left() -> None:
    measured = dict.fromkeys(find_measurable(BASE, "auto"), Conditioning(5, 1.5))
    measured["model.layers.1.self_attn.q_proj"] = Conditioning(float("inf"), float("inf"))
    with pytest.raises(UserError, match="Q of layer 1 is singular"):
        make_plan(BASE, remove="qp", conditioning=measured)
    assert make_plan(BASE, conditioning=measured).gone["q"] == [0, 2]


def test_biases_move() -> None:
    """Q's bias goes into what writes the point and out of what reads it."""
    args = replace(BASE, biases={"q_proj": [0, 1, 2]})
    after = make_plan(args, remove="q").after
    assert after.biases == {"down_proj": [0, 1], "k_proj": [0, 1, 2], "v_proj": [0, 1, 2]}
    args = replace(BASE, biases={"o_proj": [0, 1, 2]})
    after = make_plan(args, remove="p").after
    assert after.biases == {"gate_proj": [0, 1, 2], "up_proj": [0, 1, 2]}


def test_extra_bits_around_an_inverse() -> None:
    measured = dict.fromkeys(find_measurable(BASE, "q"), Conditioning(100, 16.0))
    after = make_plan(BASE, remove="qp", conditioning=measured).after
    assert set(after.extra_bits.values()) == {4}
    assert set(after.extra_bits) == {
        "model.embed_tokens",
        *(f"model.layers.{i}.self_attn.{x}_proj" for i in range(3) for x in "kv"),
        *(f"model.layers.{i}.mlp.down_proj" for i in range(2)),
    }
    assert make_plan(BASE, remove="p", conditioning=measured).after.extra_bits == {}


@pytest.mark.parametrize(
    ("extra", "bits", "expected"),
    [(0, 4, True), (2, 4, 6), (4, 4, 8), (5, 4, False), (1, 8, False), (3, 3, 6),
     (1, None, 8), (4, None, 8), (5, None, False)],
)  # fmt: skip
def test_bits_under_protection(extra: int, bits: int | None, expected: int | bool) -> None:
    """Never fewer than the other matrices get; 8 or none where those are unknown."""
    got = quant_predicate({"x": extra}, bits)("x", nn.Linear(64, 64))
    assert (got["bits"] if isinstance(got, dict) else got) == expected


def test_mxfp8_has_eight_bits_of_its_own() -> None:
    args = replace(BASE, extra_bits={"model.layers.0.self_attn.k_proj": 1})
    settings = Layout(args, mx.float32, Quantization(mode="mxfp8")).config_entry
    assert settings is not None and "model.layers.0.self_attn.k_proj" not in settings


def test_layout_counts_bytes_without_weights() -> None:
    huge = replace(BASE, hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
                   num_key_value_heads=8, head_dim=128, num_hidden_layers=80,
                   layer_types=[], vocab_size=128256)  # fmt: skip
    huge.__post_init__()
    before = mx.get_active_memory()
    dense, packed = Layout(huge, mx.bfloat16), Layout(huge, mx.bfloat16, Quantization(bits=4))
    assert dense.nbytes() == 2 * dense.count()
    assert packed.count() == dense.count()
    assert packed.nbytes() / dense.count() * 8 == pytest.approx(4.5, abs=0.01)
    assert mx.get_active_memory() - before < 1 << 20


def test_auto_keeps_what_does_not_pay() -> None:
    """A measured cost decides where the result gets quantized; an explicit removal is obeyed."""
    where = "model.layers.1.self_attn.q_proj"
    dear, cheap = RemovalCost(removed=0.02, rounded=0.01), RemovalCost(0.01, 0.02)
    costs = {where: dear, where.replace("1", "2"): cheap}
    plan = make_plan(BASE, conditioning={}, quantized=True, costs=costs)
    assert plan.gone == {"q": [0, 2], "p": [0, 1, 2]}
    (note,) = plan.notes
    assert note.startswith("Q of layer 1 stays") and "0.02" in note and "0.01" in note
    insists = make_plan(BASE, remove="qp", conditioning={}, quantized=True, costs=costs)
    assert insists.gone["q"] == [0, 1, 2] and not insists.notes


@pytest.mark.parametrize(
    ("args", "remove"),
    [(BASE, "qp"), (MHA, "kp"), (replace(BASE, block="parallel"), "p"), (BASE, "auto")],
)
def test_a_removal_alone(args: ModelArgs, remove: str) -> None:
    plan = make_plan(args, remove=remove, quantized=True)
    for index, where in plan.eliminated.items():
        single = isolate_removal(plan, index)
        assert single.eliminated == {index: where} and single.before == plan.before
        before = set(Layout(plan.before, mx.float32).tensors)
        assert before - set(Layout(single.after, mx.float32).tensors) == {f"{where}.weight"}


def test_what_needs_no_inverse_is_not_chosen_by_arithmetic_alone():
    """Its conditioning would change nothing, so that a note of it would be a false warning."""
    plain = make_plan(replace(BASE, norm="qkv"))
    reading = make_plan(replace(BASE, norm="qkv", norms=["q", "kv"]))
    assert plain.gone["q"] == reading.gone["q"] and plain.gone["p"] == reading.gone["p"]
    assert ["arithmetic alone" in note for note in plain.notes] == [True]
    assert reading.notes == ()
