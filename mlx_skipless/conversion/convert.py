"""One conversion from a user's options to a folder: open, plan, decide, write, check.

Knows nothing of terminals and of training.
"""

import dataclasses
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints import hub
from ..checkpoints.checkpoint import Blueprint, open_checkpoint
from ..checkpoints.guarded import GuardedTokenizer
from ..checkpoints.tokenizer import carry_tokenizer, load_tokenizer
from ..checkpoints.writer import SHARD_BYTES, Writer, check_free
from ..constants import BUNDLED
from ..errors import UserError
from ..inference.loading import load_network
from ..inference.sizes import count_bytes_read
from ..inference.stock import open_network
from ..inference.unpacking import unpack
from ..memory import machine_memory_bytes, peak_memory_bytes, reuse_memory
from ..network import model as model_module
from ..network.driver import RESIDENT_BYTES, Driver, StreamedNetwork
from ..network.parts import tensors_of
from ..network.stock import StockNetwork
from ..options import expand_path
from ..progress import Progress, Stopwatch
from ..quantization import bits
from ..quantization.calibration import NearestParts
from ..quantization.coverage import find_widest
from ..quantization.distillation import LOGITS_BYTES
from ..quantization.fitting import estimate_memory
from ..quantization.layout import Layout
from ..text import samples
from ..text.samples import Passages
from .card import write_card
from .check import (
    CERTAIN,
    Verification,
    WrittenParts,
    compare_networks,
    compare_with_rounding,
)
from .decisions import check_size, decide, measure_mixtures, search_bits
from .healing import Healing, Trainer, Ward, open_ward
from .job import Job
from .options import Options
from .planning import plan, size_text
from .report import (
    Report,
    add_calibration,
    add_check,
    add_healing,
    add_target,
    add_tokenizer,
    add_wishes,
    explain_difference,
    make_report,
)
from .stock import (
    StockJob,
    check_job,
    check_ways,
    find_source,
    restore_all,
    take_text,
    write_beside,
)
from .stock import check as check_stock
from .stock import check_memory as check_stock_memory
from .stock import decide as decide_stock
from .stock_healing import heal_reduced
from .stock_quantization import check_dense
from .stock_quantization import check_size as check_stock_size
from .stock_quantization import write as write_stock
from .stock_report import add_wishes as add_stock_wishes
from .stock_report import make_report as make_stock_report
from .stock_search import reach_target
from .writing import MODEL_FILE, make_config, write


@reuse_memory()
def convert(
    model: str | Path | None = None,
    mlx_path: str | Path | None = None,
    *,
    options: Options | None = None,
    progress: Progress = lambda stage, done, total: None,
    trainer: Trainer | None = None,
    **fields: Any,
) -> Report:
    """Remove weights from a model and write one that mlx-lm runs.

    The arguments are those of ``mlx_skipless.convert``, and a trainer, without which ``--heal`` is
    refused.

    Raises:
        UserError: for anything the user can mend; nothing is left at ``mlx_path`` then.
    """
    started, watch = time.perf_counter(), Stopwatch(progress)
    mx.reset_peak_memory()
    fields |= {} if model is None else {"model": model}
    fields |= {} if mlx_path is None else {"mlx_path": mlx_path}
    if unknown := fields.keys() - {one.name for one in dataclasses.fields(Options)}:
        raise TypeError(f"convert() got an unexpected keyword argument {min(unknown)!r}")
    options = replace(options or Options(), **fields)
    options = replace(options, mlx_path=expand_path(options.mlx_path))
    if not options.dry_run:
        check_free(Path(options.mlx_path))
    text = None if options.calibration is None else samples.read_text(options.calibration)
    if (stock := find_source(options)) is None:
        report = _convert(Job(options, open_source(options), text), watch, trainer)
    else:
        job = StockJob(options, stock, text, notes=stock.notes)
        report = _convert_stock(job, watch, trainer)
    if options.dry_run:
        report = add_target(report, options)
    elif options.upload_repo is not None:
        watch("uploading", 0, 1)
        hub.upload(Path(options.mlx_path), options.upload_repo)
        watch("uploading", 1, 1)
    seconds, peak = time.perf_counter() - started, peak_memory_bytes()
    rest = seconds - sum(watch.seconds.values())
    stages = {**watch.seconds, "other": rest}
    return replace(report, seconds=seconds, stages=stages, peak_memory_bytes=peak)


def _convert(job: Job, watch: Stopwatch, trainer: Trainer | None) -> Report:
    """Convert a network that this package knows."""
    options, job = job.options, plan(job, watch)
    if not options.drops:  # which of the sub-layers go has to be known first
        check_size(job)
    if options.dry_run:
        return add_wishes(make_report(job), job)
    _check_memory(job)
    with (
        Writer(Path(options.mlx_path), _most_bytes(job)) as writer,
        open_ward(options, trainer, job.opened.path, job.text, watch) as ward,
    ):
        tokenizer = _write_beside(job, writer)
        passages = _take_text(job, tokenizer, watch)
        job = decide(job, passages, watch)

        def attempt(job: Job) -> Verification | None:
            write(job, writer, passages, watch)
            job.opened.store.check_unchanged()
            return check(job, writer, passages, watch)

        if options.target_kl is None:
            outcome = attempt(job)
        else:
            assert passages is not None and passages.calibration is not None
            mixtures = measure_mixtures(job, passages.calibration, watch).mixtures()
            job, outcome = search_bits(job, mixtures, attempt)
        healing = _heal_written(ward, writer)
        if healing is not None and healing.kept:
            outcome = check(job, writer, passages, watch)
        report = add_healing(add_tokenizer(make_report(job), tokenizer), healing)
        if job.calibrated and passages is not None:
            report = add_calibration(report, passages)
        return _finish(options, report, writer, outcome, job.unchanged)


def _heal_written(ward: Ward | None, writer: Writer) -> Healing | None:
    """Train a result that is written, if that is asked for."""
    if ward is None:
        return None
    healing = ward.train_in_place(writer.folder)
    return replace(healing, rounded=ward.options.quantization is not None)


def _convert_stock(job: StockJob, watch: Stopwatch, trainer: Trainer | None) -> Report:
    """Convert a network that only mlx-lm knows."""
    options, source = job.options, job.source
    if options.target_speed is not None:
        job = replace(job, bytes_read=count_bytes_read(source.model))
    if options.dry_run:
        return _convert_folder(job, watch, trainer)
    dtype: mx.Dtype | None = getattr(mx, options.dtype) if options.dtype else None
    where, packed = Path(options.mlx_path), not job.requantized
    if source.gguf is not None:  # before what takes long
        network = open_network(source)
        check_job(job, network)
        check_stock_size(job, network, *job.build_result(network))
    with unpack(source, where, dtype=dtype, packed=packed, progress=watch) as folder:
        return _convert_folder(replace(job, source=folder), watch, trainer)


def _convert_folder(job: StockJob, watch: Stopwatch, trainer: Trainer | None) -> Report:
    """Convert what mlx-lm loads; a plan alone may do without weights."""
    options, source, network = job.options, job.source, open_network(job.source)
    check_job(job, network)
    model, config = job.build_result(network)
    check_stock_size(job, network, model, config)
    report = make_stock_report(job, network, model, config, model)
    if options.dry_run:
        check_ways(job, network)
        return add_stock_wishes(report, job, network)
    check_stock_memory(job, network)
    check_ways(job, network)
    sizes = (sum(a.nbytes for a in tensors_of(one).values()) for one in (model, source.model))
    with (
        Writer(Path(options.mlx_path), max(sizes)) as writer,
        open_ward(options, trainer, source.path, job.text, watch) as ward,
    ):
        tokenizer = write_beside(job, writer, config)
        check_dense(job, network)
        passages = take_text(job, network, tokenizer, watch)
        job = decide_stock(job, network, passages, watch)

        def attempt(job: StockJob) -> Verification | None:
            write_stock(job, network, writer, passages, watch)
            assert source.store is not None
            source.store.check_unchanged()
            return check_stock(job, network, writer.folder, passages, watch)

        def treat(job: StockJob) -> StockJob:
            lost = bool(job.dropped or job.stand_ins)
            return heal_reduced(job, network, passages, ward) if ward is not None and lost else job

        if not options.mixes_bits:
            outcome = attempt(job := treat(job))
        else:
            assert passages is not None
            job, outcome = reach_target(job, network, passages, attempt, treat, watch)
        if job.healing is None and (healing := _heal_written(ward, writer)) is not None:
            job = job.learn(healing=healing)
            outcome = check_stock(job, network, writer.folder, passages, watch)
        model, config = job.build_result(network)
        whole, _ = restore_all(job, network).build_result(network)
        report = make_stock_report(job, network, model, config, whole)
        report = add_healing(add_tokenizer(report, tokenizer), job.healing)
        if job.calibrated and passages is not None:
            report = add_calibration(report, passages)
        return _finish(options, report, writer, outcome)


def open_source(options: Options) -> Blueprint:
    """Open the source, of an architecture that this package knows; no weight is read yet.

    Raises:
        UserError: if it cannot be read.
    """
    return open_checkpoint(
        BUNDLED if options.model is None else options.model,
        revision=options.revision,
        config_only=options.dry_run,
        trust_remote_code=options.trust_remote_code,
    )


def check(
    job: Job, writer: Writer, passages: Passages | None, progress: Progress
) -> Verification | None:
    """Compare a written result with its source on text; None if that is not wanted.

    The source runs in float32 from the weights it has, the result as it will run; an unchanged
    result's source runs in the type that both have. A quantized result is compared with the source
    quantized alone, too.

    Raises:
        UserError: if a network overflows, or an exact result is not its source's function.
    """
    if not job.options.verify or passages is None:
        return None
    progress("checking", 0, 1)
    dtype = job.dtype if job.unchanged else mx.float32
    source, results = _load_source(job, dtype), [_load_result(job, writer.folder)]
    if job.layout.quantization is not None:
        whole = job.whole_layout
        rounded = NearestParts(job.source_parts(whole.dtype), whole)
        results.append(StreamedNetwork(whole.args, rounded, whole.config_entry))
    found, *alone = compare_networks(
        source, results, passages.check, passages.origin, partial(progress, "checking")
    )
    job.opened.store.check_unchanged()
    if job.exact and found.max_rel_logit_error > CERTAIN:
        parts = WrittenParts(writer.folder, job.layout.args, job.family)
        ratio = compare_with_rounding(source, job.layout.args, parts, passages.check)
        found = replace(found, rounding_ratio=ratio)
    if (wrong := explain_difference(found)) is not None and not job.options.force:
        raise UserError(f"{wrong}. Nothing is written; --force keeps it all the same")
    return found.beside(*alone) if alone else found


def _load_result(job: Job, folder: Path) -> Driver:
    if job.form.stock:
        return StockNetwork(lambda: load_network(folder, lazy=True)[0])
    parts = WrittenParts(folder, job.layout.args, job.family)
    return StreamedNetwork(job.layout.args, parts, job.layout.config_entry)


def _load_source(job: Job, dtype: mx.Dtype = mx.float32) -> StreamedNetwork:
    args = job.plan.before
    resident = Layout(args, dtype).nbytes() <= RESIDENT_BYTES
    return job.source_network(dtype, resident=resident)


def _check_memory(job: Job) -> None:
    """Refuse what cannot fit.

    Three bases and the largest matrix in float64, two shards, the check.
    """
    args = job.plan.before
    hidden, ffn = args.hidden_size, args.intermediate_size
    width = args.num_attention_heads * args.head_dim
    float64 = 8 * (6 * hidden * max(hidden, width) + 3 * max(hidden, width) * ffn)
    largest = max(array.nbytes for array in job.layout.tensors.values())
    needed = float64 + 2 * SHARD_BYTES + 4 * job.layout.count("model.layers.0.") + 3 * largest
    needed += estimate_memory(args) if job.calibrated else 0
    if job.options.distill:  # the source, the result's codes, its dense matrices, their gradients
        needed += 5 * Layout(args, mx.float32).nbytes() + 8 * LOGITS_BYTES
    available = machine_memory_bytes()
    if needed > available:
        raise UserError(
            f"converting this model takes about {needed / 1e9:.0f} GB of memory and this machine "
            f"has {available / 1e9:.0f} GB: use a larger one"
        )


def _most_bytes(job: Job) -> int:
    """What the weights take if nothing goes after all, and a goal takes the most bits there are."""
    whole = job.whole_layout
    if job.options.mixes_bits and whole.quantization is not None:
        whole = replace(whole, quantization=replace(whole.quantization, bits=bits.BITS[-1]))
    return max(whole.nbytes(), job.layout.nbytes())


def _write_beside(job: Job, writer: Writer) -> GuardedTokenizer | None:
    """Write what the result has beside its weights; return its tokenizer."""
    if not job.form.stock:
        code = Path(str(model_module.__file__)).read_text(encoding="utf-8")
        writer.write_text(MODEL_FILE, code)
    config = make_config(job)
    writer.write_json("config.json", config)  # transformers reads it with the tokenizer
    trust = {"trust_remote_code": job.options.trust_remote_code}
    same_type = job.form.stock and (job.form.renumbered or not job.options.drops)
    if not carry_tokenizer(job.opened, writer.folder, stock=same_type, **trust):
        return None
    return load_tokenizer(writer.folder, config, name=job.checkpoint.name, **trust)


def _take_text(job: Job, tokenizer: GuardedTokenizer | None, progress: Progress) -> Passages | None:
    """The tokens that deciding, calibrating and checking need; None if nothing does."""
    options, args = job.options, job.plan.before
    sizes = size_text(options, job.calibrated, job.layout.count(), find_widest(args))
    if sizes is None:
        return None
    return samples.take_passages(
        lambda: _load_source(job),
        tokenizer,
        job.text,
        str(options.calibration),
        seed=options.seed,
        longest=args.max_position_embeddings,
        progress=partial(progress, "sampling text"),
        **sizes,
    )


def _finish(
    options: Options,
    report: Report,
    writer: Writer,
    outcome: Verification | None,
    unchanged: bool = False,
) -> Report:
    """Add the check to a report, write the model card, and make the result's folder appear."""
    out = Path(options.mlx_path)
    report = replace(report, output=str(out))
    if outcome is not None:
        report = add_check(report, outcome, unchanged=unchanged)
    given = [str(path) for path in (report.source, options.calibration) if path is not None]
    writer.write_text("README.md", write_card(report, options.upload_repo or out.name, given))
    writer.commit()
    return report
