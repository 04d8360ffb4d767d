"""The way through: read, plan, merge layer by layer, quantize, write, verify."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints import hub
from ..checkpoints.checkpoint import FLOAT_NAMES, Checkpoint, open_checkpoint
from ..checkpoints.tokenizer import carry_tokenizer, load_tokenizer
from ..checkpoints.writer import SHARD_BYTES, Writer, check_free
from ..errors import UserError
from ..inference.loading import BUNDLED
from ..memory import machine_memory_bytes, peak_memory_bytes
from ..network import model as model_module
from ..network.driver import RESIDENT_BYTES, Driver, StreamedNetwork
from ..network.model import Model, ModelArgs
from ..network.names import HEAD
from ..network.parts import Parts
from ..progress import Progress, Stopwatch
from ..quantization import bits as budget
from ..quantization.calibration import CalibratedParts, NearestParts
from ..quantization.distillation import LOGITS_BYTES, distill
from ..quantization.fitting import estimate_memory
from ..quantization.layout import Layout, PackedLayout, compare_sizes, make_quantization
from ..removal import sublayers
from ..removal import table as first_layer
from ..removal.merger import Merger
from ..removal.plan import REMOVALS, Conditioning, Plan, RemovalCost, find_measurable, make_plan
from ..text import samples
from . import card, decisions
from . import check as verification
from .check import Verification
from .decisions import Goal
from .job import MODEL_FILE, Job, PackedParts
from .report import Report

STOCK_CANNOT = (
    "no network of mlx-lm's own is the same function (they may not know this activation, width, "
    "window or these biases): the result carries one that is"
)
NO_STOCK_DROPS = (
    "mlx-lm has no network of this architecture without some attentions or FFNs: the result "
    "carries one"
)
NO_STOCK_TABLE = (
    "mlx-lm's own network computes its first layer: the result carries one that reads it"
)
SKIPLESS_NETWORK = (
    "for the speed and size of its skipless network (no language model until it is trained): {}"
)
BUFFER_CACHE_BYTES = 256 << 20


def convert(
    model: str | Path | None = None,
    mlx_path: str | Path = "mlx_model",
    *,
    remove: str = "auto",
    skipless: bool = False,
    fold_norms: bool = False,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    calibration: str | Path | None = None,
    target_bytes: int | None = None,
    target_kl: float | None = None,
    distill: int = 0,
    drop_attention: int | str | None = None,
    drop_ffn: int | str | None = None,
    drop_block: int | str | None = None,
    greedy: bool = False,
    max_loss: float | None = None,
    precompute_first_layer: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    upload_repo: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    dry_run: bool = False,
    verify: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Remove weights from a model and write one that mlx-lm runs.

    Args:
        model: a Hub id, a Hugging Face folder, a .gguf file, or with ``dry_run`` a config.json;
            None: the bundled model.
        mlx_path: the folder to write; must not exist.
        remove: "auto", "none", or letters to remove: "qp", "kp", "vp", "q", "k", "v", "p".
        skipless: first make the skipless network of a pretrained one.
        fold_norms: put every norm's gain into the matrices behind it; ``remove="auto"`` does that
            to a pretrained model unasked, unless it is to be quantized.
        quantize: quantize the result.
        q_bits: bits of a weight; default: the mode's own.
        q_group_size: weights that share a scale; default: the mode's own.
        q_mode: mlx-lm's: "affine", "mxfp4", "nvfp4" or "mxfp8".
        calibration: a text file or data set of the Hub to quantize against, its end to check with;
            default: text sampled from the model.
        target_bytes: quantize to the best mixture of bits whose weights take at most so many bytes.
        target_kl: quantize to the smallest whose check finds at most so many nats per token of KL.
        distill: steps of training the quantized result's scales and biases towards the source;
            both are in memory then.
        drop_attention: how many layers lose their attention, by importance on the text (arXiv
            2406.15786), or "auto": one after another until ``max_loss``.
        drop_ffn: likewise of their FFN.
        drop_block: likewise of both.
        greedy: measure again after each drop, also where a number is given.
        max_loss: the share by which "auto" may raise the loss, nats per token; default 0.01.
        precompute_first_layer: "auto" makes the first layer's projections a table by token where
            that pays (arXiv 2402.13388), "force" in any case.
        dtype: "float16", "bfloat16" or "float32"; default: the source's.
        revision: of a Hub id.
        upload_repo: upload the result there.
        trust_remote_code: let the source's tokenizer run its code.
        seed: of the sampled text.
        dry_run: plan only; nothing is written.
        verify: compare source and result when done.
        progress: called with (stage, done, total).

    Returns:
        What was done, its check included; with ``dry_run`` what would be.

    Raises:
        UserError: for anything the user can mend; nothing is left at ``mlx_path`` then.
    """
    started = time.perf_counter()
    progress = stopwatch = Stopwatch(progress)
    mx.reset_peak_memory()
    goal = None
    if target_bytes is not None or target_kl is not None:
        goal = _goal(target_bytes, target_kl, q_bits, q_mode, verify)
    quantization = make_quantization(quantize or goal is not None, q_bits, q_group_size, q_mode)
    if distill < 0:
        raise UserError(f"--distill {distill}: must be a number of steps, 0 or more")
    if distill and (quantization is None or quantization.mode != "affine"):
        raise UserError("--distill trains scales and biases: it needs -q in affine mode")
    if precompute_first_layer not in (None, "auto", "force"):
        raise UserError(f"--precompute-first-layer {precompute_first_layer}: give nothing or force")
    kinds = {"attention": drop_attention, "ffn": drop_ffn, "block": drop_block}
    drops = _drops({kind: n for kind, n in kinds.items() if n is not None}, greedy, max_loss)
    if remove not in REMOVALS:
        raise UserError(f"--remove {remove}: choose one of {', '.join(REMOVALS)}")
    if dtype is not None and dtype not in FLOAT_NAMES:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(FLOAT_NAMES)}")
    model = BUNDLED if model is None else model
    out = Path(mlx_path)
    if not dry_run:
        check_free(out)
    samples.check_seed(seed)
    if upload_repo is not None and not hub.HUB_ID.fullmatch(upload_repo):
        raise UserError(f"--upload-repo {upload_repo}: a repository is called owner/name")
    text = None if calibration is None else samples.read_text(calibration)
    checkpoint = open_checkpoint(
        model, revision=revision, config_only=dry_run, trust_remote_code=trust_remote_code
    )
    if checkpoint.store is None and not dry_run:
        raise UserError(f"{model} is a config without weights: add --dry-run, or give the model")
    target = getattr(mx, dtype) if dtype else checkpoint.dtype
    args = checkpoint.args
    if distill and args.num_local_experts:
        raise UserError("--distill is not for models with experts: drop it")
    if drops is not None:
        if skipless:
            raise UserError("--skipless drops every skip connection: drop it to drop sub-layers")
        tables = precompute_first_layer is not None
        sublayers.check_wishes(args, drops.wishes, first_layer.find_needed(args) if tables else {})
    # What nothing touches stays packed as it is.
    packed = drops is not None or precompute_first_layer is not None
    packed = packed and checkpoint.packed_by_mlx and quantization is None and not dtype
    packed = packed and not fold_norms and not skipless
    packed = packed and not make_plan(args, remove=remove).eliminated
    # Folding is what is exact for it; but gains of many sizes in one matrix round worse.
    pretrained = args.norm == "pre" and not skipless and not packed
    options: dict[str, Any] = {
        "remove": remove,
        "skipless": skipless,
        "fold_norms": fold_norms or (pretrained and remove == "auto" and quantization is None),
        "dtype": target,
        "quantized": quantization is not None,
    }

    def layout_of(plan: Plan) -> Layout:
        if not packed:
            return Layout(plan.after, target, quantization)
        stored = checkpoint.packed_placeholders()
        if args.tie_word_embeddings:  # a head on disk is not read
            stored = {name: a for name, a in stored.items() if not name.startswith(f"{HEAD}.")}
        return PackedLayout(plan.after, target, None, stored, checkpoint.packed_settings)

    declined = None
    if precompute_first_layer is not None:
        if (reason := first_layer.find_obstacle(args)) is not None:
            raise UserError(f"--precompute-first-layer: {reason}")
        if precompute_first_layer == "auto":
            both = (make_plan(args, **options, precompute=done) for done in (False, True))
            declined = first_layer.explain_price(*compare_sizes(*map(layout_of, both)))
        options["precompute"] = declined is None
    known = None if skipless else checkpoint.family.stock
    expressed = known is not None and (known.expresses if drops is None else known.drops)(args)
    # What one matrix holds has bits of its own only as a whole.
    mixed = goal is not None and bool(checkpoint.family.fused)
    stock = expressed and not options.get("precompute") and not mixed
    options["stock"] = stock
    plan = make_plan(args, **options)
    if checkpoint.store is not None:
        options["conditioning"] = _measure(checkpoint, plan, remove, target, progress)
        plan = make_plan(args, **options)
    more: tuple[str, ...] = ()
    if known is not None and not expressed:
        more += (NO_STOCK_DROPS if known.expresses(args) else STOCK_CANNOT,)
    more += (NO_STOCK_TABLE,) if expressed and plan.table else ()
    if stock and (letters := "".join(make_plan(args, skipless=True).gone)):
        more += (SKIPLESS_NETWORK.format(f"--model {model} --skipless --remove {letters}"),)
    if declined is not None:
        more += (f"the first layer stays computed: {declined} (--precompute-first-layer force)",)

    def planned(costs: Mapping[str, RemovalCost], dropped: Mapping[str, list[int]]) -> Plan:
        plan = make_plan(args, **options, costs=costs, dropped=dropped)
        return replace(plan, notes=(*plan.notes, *more))

    plan = planned({}, {})
    job = Job(
        checkpoint, plan, layout_of(plan), stock, trust_remote_code, upload_repo, options, planned
    )
    if dry_run:
        report = job.report()
        if drops is not None:
            report = replace(
                report, notes=(*report.notes, sublayers.describe_wishes(args, drops.wishes))
            )
    else:
        calibrating = quantization is not None and (
            text is not None
            or goal is not None
            or distill > 0
            or bool(decisions.find_inverses(plan))
        )
        prose = Prose(str(calibration), text, seed, verify, calibrating, distill)
        with _small_buffer_cache():
            report = _write(job, out, prose, goal, drops, progress)
        if upload_repo is not None:
            hub.upload(out, upload_repo)
    return replace(
        report,
        seconds=time.perf_counter() - started,
        stages=stopwatch.seconds,
        peak_memory_bytes=peak_memory_bytes(),
    )


@dataclass(frozen=True)
class Prose:
    """What text to use, the user's or with None the model's own by ``seed``, and what for."""

    name: str
    text: str | None
    seed: int
    check: bool
    calibrate: bool
    distill: int  # steps


def _goal(nbytes: int | None, kl: float | None, bits: int | None, mode: str, verify: bool) -> Goal:
    if nbytes is not None and kl is not None:
        raise UserError("--target-bytes and --target-kl are two ends of one trade: drop one")
    if bits is not None or mode != "affine":
        raise UserError(
            "--target-bytes and --target-kl choose the bits, of affine mode: drop --q-bits and "
            "--q-mode"
        )
    if kl is not None and not 0 < kl < math.inf:
        raise UserError(f"--target-kl {kl}: must be a positive number of nats per token")
    if kl is not None and not verify:
        raise UserError("--target-kl measures the result: drop --no-verify")
    return Goal(nbytes, kl)


def _drops(
    kinds: Mapping[str, int | str], greedy: bool, max_loss: float | None
) -> decisions.Drops | None:
    wishes = []
    for kind, n in kinds.items():
        if n != "auto" and not isinstance(n, int):
            raise UserError(f"--drop-{kind} {n}: give a number of layers, or auto")
        wishes.append(sublayers.Wish(kind, None if n == "auto" else int(n)))
    open_ended = any(wish.count is None for wish in wishes)
    if max_loss is not None and not open_ended:
        raise UserError("--max-loss is for --drop-attention auto, --drop-ffn auto or -block auto")
    if max_loss is not None and not 0 < max_loss < math.inf:
        raise UserError(f"--max-loss {max_loss}: must be a positive share, for instance 1%")
    if greedy and not wishes:
        raise UserError("--greedy is for --drop-attention, --drop-ffn and --drop-block")
    if not wishes:
        return None
    return decisions.Drops(tuple(wishes), greedy, 0.01 if max_loss is None else max_loss)


def _measure(
    checkpoint: Checkpoint, plan: Plan, remove: str, dtype: mx.Dtype, progress: Progress
) -> dict[str, Conditioning]:
    wanted = find_measurable(plan.before, remove)
    merger = Merger(checkpoint, plan, dtype)
    measured = {}
    for done, where in enumerate(wanted):
        progress("measuring", done, len(wanted))
        measured[where] = merger.conditioning(where)
    progress("measuring", len(wanted), len(wanted))
    return measured


def _check_memory(job: Job, prose: Prose) -> None:
    """Refuse what cannot fit.

    Three bases and the largest matrix in float64, two shards, the check.
    """
    args = job.plan.before
    hidden, ffn = args.hidden_size, args.intermediate_size
    width = args.num_attention_heads * args.head_dim
    float64 = 8 * (6 * hidden * max(hidden, width) + 3 * max(hidden, width) * ffn)
    largest = max(array.nbytes for array in job.layout.tensors.values())
    needed = float64 + 2 * SHARD_BYTES + 4 * job.layout.count("model.layers.0.") + 3 * largest
    needed += estimate_memory(args) if prose.calibrate else 0
    if prose.distill:  # the source, the result's codes, its dense matrices and their gradients
        needed += 5 * Layout(args, mx.float32).nbytes() + 8 * LOGITS_BYTES
    available = machine_memory_bytes()
    if needed > available:
        raise UserError(
            f"converting this model takes about {needed / 1e9:.0f} GB of memory and this machine "
            f"has {available / 1e9:.0f} GB: use a larger one"
        )


def _write(
    job: Job,
    out: Path,
    prose: Prose,
    goal: Goal | None,
    drops: decisions.Drops | None,
    progress: Progress,
) -> Report:
    """Do what is planned; the report with the check's outcome."""
    _check_memory(job, prose)
    with Writer(out, _most_bytes(job, goal)) as writer:
        if not job.stock:
            code = Path(str(model_module.__file__)).read_text(encoding="utf-8")
            writer.write_text(MODEL_FILE, code)
        config = job.config()  # transformers reads it with the tokenizer
        writer.write_json("config.json", config)
        trust = {"trust_remote_code": job.trust_remote_code}
        tokenizer = None
        same_type = job.stock and drops is None
        if carry_tokenizer(job.checkpoint, writer.folder, stock=same_type, **trust):
            name = job.checkpoint.name
            tokenizer = load_tokenizer(writer.folder, config, name=name, **trust)
        wanted = replace(prose, calibrate=prose.calibrate or drops is not None)
        found = _passages(job, tokenizer, wanted, progress)
        if found is not None and found.calibration is not None:
            if drops is not None:
                job = decisions.choose_sublayers(job, drops, found.calibration, progress)
            if prose.calibrate:
                job = decisions.choose_removals(job, found.calibration, progress)

        def attempt(job: Job) -> Verification | None:
            return _attempt(job, writer, found, prose, progress)

        if goal is None:
            check = attempt(job)
        else:
            assert found is not None and found.calibration is not None
            job, check = decisions.choose_bits(goal, job, found.calibration, attempt, progress)

        report = replace(job.report(), output=str(out))
        if found is not None and found.calibration is not None and prose.calibrate:
            report = report.calibrated(found.calibration.size, found.origin)
        if check is not None:
            report = report.verified(check)
        writer.write_text("README.md", card.write_card(report, job.upload_repo or out.name))
        writer.commit()
    return report


def _most_bytes(job: Job, goal: Goal | None) -> int:
    """What the weights take if nothing goes after all, and a goal takes the most bits there are."""
    unremoved = job.unremoved()
    if goal is not None and unremoved.quantization is not None:
        widest = replace(unremoved.quantization, bits=budget.BITS[-1])
        unremoved = replace(unremoved, quantization=widest)
    return max(unremoved.nbytes(), job.layout.nbytes())


def _attempt(
    job: Job, writer: Writer, found: samples.Passages | None, prose: Prose, progress: Progress
) -> Verification | None:
    """Write config and weights, in the place of earlier ones; then check them if asked."""
    layers = job.plan.before.num_hidden_layers
    writer.discard_weights()
    writer.write_json("config.json", job.config())
    text = found.calibration if found is not None and prose.calibrate else None
    parts = _result_parts(job, text)
    progress("converting", 0, layers)
    writer.add(job.named(parts.embedding()))
    for layer in range(layers):
        progress("converting", layer, layers)
        writer.add(job.named(parts.layer(layer)))
    writer.add(job.named(parts.head()))
    writer.finish_weights(job.layout.count())
    progress("converting", layers, layers)
    if prose.distill and found is not None and found.calibration is not None:
        _distill(job, writer, found.calibration, prose, progress)
    if prose.check and found is not None:
        return _verify(job, writer.folder, found, progress)
    return None


def _distill(job: Job, writer: Writer, tokens: mx.array, prose: Prose, progress: Progress) -> None:
    """Write the weights again with scales and biases that are trained towards the source."""
    written = verification.WrittenParts(writer.folder, job.layout.args, job.family)
    result = _tensors(written, job.layout.args)
    mx.eval(result)
    forms = {
        where: form
        for where in (name.removesuffix(".scales") for name in result if name.endswith(".scales"))
        if (form := job.layout.format_of(where)) is not None
    }
    teacher, student = Model(job.plan.before), Model(job.layout.args)
    teacher.load_weights([*_tensors(job.source_parts(), job.plan.before).items()])
    dense = {name: array for name, array in result.items() if name.rpartition(".")[0] not in forms}
    student.load_weights([*dense.items()], strict=False)
    teacher.set_dtype(mx.float32)
    student.set_dtype(mx.float32)
    changed = distill(
        teacher,
        student,
        result,
        forms,
        tokens,
        steps=prose.distill,
        seed=prose.seed,
        progress=partial(progress, "distilling"),
    )
    writer.discard_weights()
    changed = {name: array.astype(job.layout.dtype) for name, array in changed.items()}
    writer.add(job.named(result | changed))
    writer.finish_weights(job.layout.count())


def _tensors(parts: Parts, args: ModelArgs) -> dict[str, mx.array]:
    layers = [parts.layer(layer) for layer in range(args.num_hidden_layers)]
    return {k: v for part in (parts.embedding(), *layers, parts.head()) for k, v in part.items()}


def _result_parts(job: Job, calibration: mx.array | None) -> Parts:
    dense = job.result_parts()
    if isinstance(job.layout, PackedLayout):
        table = dense if job.plan.table else None
        return PackedParts(job.checkpoint, job.layout, table, job.family.gain_offset)
    if calibration is None:
        return NearestParts(dense, job.layout)
    source = StreamedNetwork(job.plan.before, job.source_parts())
    return CalibratedParts(source, dense, job.layout, calibration)


def _source_network(job: Job) -> StreamedNetwork:
    before = job.plan.before
    resident = Layout(before, mx.float32).nbytes() <= RESIDENT_BYTES
    return StreamedNetwork(before, job.source_parts(), resident=resident)


def _passages(
    job: Job, tokenizer: Any, prose: Prose, progress: Progress
) -> samples.Passages | None:
    """The tokens that checking and calibrating need; None if neither is wanted."""
    if not (prose.check or prose.calibrate):
        return None
    # MLX's quantized products are slow on a CPU.
    affordable = (
        job.layout.count() <= samples.LONG_CHECK_WEIGHTS or mx.default_device().type != mx.cpu
    )
    long_check = prose.calibrate and affordable
    if prose.text is None:
        progress("sampling text", 0, 1)
        begin = None if tokenizer is None else tokenizer.bos_token_id
        network = _source_network(job)
        found = samples.sample_passages(
            network,
            seed=prose.seed,
            start=begin,
            calibrating=prose.calibrate,
            long_check=long_check,
        )
        progress("sampling text", 1, 1)
        return found
    if tokenizer is None:
        raise UserError("--calibration needs a tokenizer and the source has none: drop it")
    return samples.cut_passages(
        prose.name,
        prose.text,
        lambda text: tokenizer.encode(text, verbose=False),  # of its length; pieces get cut
        calibrating=prose.calibrate,
        long_check=long_check,
        longest=job.plan.before.max_position_embeddings,
    )


@contextmanager
def _small_buffer_cache() -> Iterator[None]:
    """MLX keeps freed buffers for reuse; layers come one at a time here and need not be kept."""
    before = mx.set_cache_limit(BUFFER_CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def _verify(job: Job, folder: Path, found: samples.Passages, progress: Progress) -> Verification:
    # The source runs in float32 from the weights it has; the result as it will run.
    progress("checking", 0, 1)
    result: Driver
    if job.stock:
        result = verification.StockNetwork(folder)
    else:
        parts = verification.WrittenParts(folder, job.layout.args, job.family)
        result = StreamedNetwork(job.layout.args, parts, job.layout.settings)
    source = _source_network(job)
    if job.layout.quantization is None:
        (outcome,) = verification.compare_networks(source, [result], found.check, found.origin)
    else:
        unremoved = job.unremoved()
        rounded = NearestParts(job.source_parts(unremoved.dtype), unremoved)
        plain = StreamedNetwork(unremoved.args, rounded, unremoved.settings)
        of_result, of_plain = verification.compare_networks(
            source, [result, plain], found.check, found.origin
        )
        outcome = of_result.beside(of_plain)
    progress("checking", 1, 1)
    return outcome
