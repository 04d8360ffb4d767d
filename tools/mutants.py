"""Faults put into the code on purpose, one at a time: does the default test suite find each?

    python tools/mutants.py [WORD ...] [--list] [--jobs N] [--thorough] [--source FOLDER]

copies the tree, changes one place in the copy, runs the tests that should fail, and prints
"killed", "SURVIVED", or "stale" where the text to change is no longer there exactly once. Words
pick the mutants whose text, name or tests hold one of them. Exit code 1 unless all are killed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds for the tests of a mutant; one that hangs is found, too
TAKEN = ("mlx_skipless", "tests", "tools", "docs", "*.py", "*.toml", "README.md", "LICENSE")

EXACT = "tests/removal/test_exactness.py -k test_removal"
CONSTANTS = "tests/removal/test_constants.py"
WIDENING = "tests/network/test_widening.py"
ARGUMENTS = "tests/cli/test_arguments.py -k no_file_makes_right"
YAML = "tests/training/test_pretraining.py -k yaml_that_is_no_recipe"
SETTINGS = "tests/training/test_broken_runs.py -k settings_that_are_none"
INFINITIES = "tests/conversion/test_every_architecture.py -k infinities"
STOCK = "tests/network/test_stock.py"
REFUSAL = "tests/conversion/test_refusal.py"
PLAN = (
    "tests/removal tests/conversion/test_bad_input.py "
    "-k 'test_plan or test_removal or twice or same_function or impossible'"
)
FAMILY = "tests/architectures/test_architectures.py -k"
BAD = "tests/conversion/test_bad_input.py -k"
CALIBRATION = "tests/quantization/test_calibration.py -k"
MODEL = "tests/network/test_model.py"
LAUNCHES = "tests/network/test_launches.py"
GROWTH = f"{MODEL} -k queries_that_grow"
WRAPPERS = "tests/architectures/test_wrappers.py"
SCALED, SCALED_SOURCES = (
    "tests/checkpoints/test_scaled.py",
    "tests/conversion/test_scaled_sources.py",
)
SKIPS = "tests/removal/test_skips.py"
RECIPE = "tests/training/test_recipe.py"
DROPS = "tests/removal/test_sublayers.py -k"
GGUF, GGUF_PACKED = (
    "tests/checkpoints/test_gguf_architectures.py",
    "tests/checkpoints/test_gguf_packed.py",
)
HUB = "tests/checkpoints/test_hub.py -k"
TRAIN = "tests/training/test_pretraining.py -k"
HEAL = "tests/training/test_healing.py -k"
TOGETHER = "tests/quantization/test_together.py"
LOADING = "tests/inference/test_loading.py -k 'transformers_5 or text_model_of or packed_model'"
MOMENTS = "tests/removal/test_moments.py"
ENDS, ROLES = "tests/quantization/test_ends.py", "tests/quantization/test_roles.py --thorough"
MODULES = "tests/quantization/test_modules.py -k"
MAKES_UP = f"{MODULES} makes_up"
STAND_INS = "tests/removal/test_standins.py"
PUBLISHED = "tests/architectures/test_published.py"
TEKKEN = "tests/checkpoints/test_tokenizer.py -k tekken"

# A station, the text that is there exactly once in the package (or once in the file that is named
# behind "@@"), what takes its place, and pytest's arguments.
MUTANTS: list[tuple[str, str, str, str]] = [
    # Attention on a CPU, wrong arguments, sizes out of reach, tagged infinities.
    ("widening", "mx.fast.scaled_dot_product_attention = _attend_widely", "pass", WIDENING),
    ("widening", "if any(x.dtype != mx.bfloat16 for x in arrays)", "if False", WIDENING),
    ("widening", "if not _callers:", "if True:", WIDENING),
    ("cli.main", "return 2  # as argparse does", "return 1", ARGUMENTS),
    ("cli.train", "except (ValueError, RecursionError,", "except (RecursionError,", YAML),
    ("training.tokens", "and 0 <= value < 1", "", SETTINGS),
    ("pretraining", "make_model_args(recipe)\n    return Settings(", "return Settings(", SETTINGS),
    ("recipe", "abs(value) >= LARGEST", "value >= LARGEST", SETTINGS),
    (
        "conversion.convert",
        "if not options.drops:  #",
        "if False:  #",
        f"{CALIBRATION} out_of_reach",
    ),
    ("bits", "if self._least.nbytes > limit:", "if False:", f"{CALIBRATION} out_of_reach"),
    ("inference.stock", "config = _decode_tagged_floats(config)", "pass", INFINITIES),
    ("conversion.stock", "_encode_tagged_floats(dict(config))", "config", INFINITIES),
    # Networks of mlx-lm's own without sub-layers.
    ("reduced", "if state is None:", "if False:", STOCK),
    ("reduced", "sanitize({**gone, **weights})", "sanitize(weights)", STOCK),
    ("reduced", "not isinstance(cache, _StaysDense) and", "False and", STOCK),
    ("trial", "if any(one.given for one in met):", "if False:", STOCK),
    # Queries that grow, and language models that others are wrapped around.
    ("model", "mx.maximum(positions, 0) // step", "positions / step", GROWTH),
    ("model", "offset % self.step + length <= self.step", "True", GROWTH),
    ("families", '"query_growth": growth,', '"query_growth": 0.0,', WRAPPERS),
    ("wrappers", "text if whole in (None, text) else None", "text", WRAPPERS),
    ("wrappers", "*family.others, *wrapper.others", "*family.others,", WRAPPERS),
    # Matrices in the place of sub-layers.
    ("together", "if nbytes[0] > target.nbytes:", "if False:", TOGETHER),
    ("together", "min(added, self._least.get(last, added))", "added", f"{TOGETHER} --thorough"),
    ("together", "there[self._numbers[part.stand_in]] = way == REPLACE", "pass", TOGETHER),
    (
        "together",
        "prices = [((after - kl) / (size - less), move)",
        "prices = [(less, move)",
        TOGETHER,
    ),
    ("modules", "self._pass(self._kept[-1] + 1,", "self._pass(self._kept[-1] + 9,", MAKES_UP),
    (
        "passage",
        "_Reading(reader.x, wanted, held_out, weights,",
        "_Reading(reader.x, wanted, held_out, None,",
        MAKES_UP,
    ),
    ("roles", "(wanted - stream) / self.scale", "wanted - stream", ROLES),
    ("roles", "return y + change - along * y,", "return y + change,", ROLES),
    ("roles", "weights * inverse", "weights", ROLES),
    ("roles", "norms.get(group[0], (group[0], None))", "(group[0], None)", ROLES),
    ("settings", "abs(bits - mean)", "bits", "tests/conversion/test_allow.py -k told_as"),
    (
        "conversion/stock",
        'bits.get(name or "", others)',
        "others",
        "tests/conversion/test_allow.py -k told_as",
    ),
    (
        "quantization/formats",
        "if weight.size % EVEN:",
        "if False:",
        "tests/quantization/test_formats.py",
    ),
    ("old_keys", "longest <= window", "False", "tests/inference/test_old_keys.py"),
    (
        "old_keys",
        "for name in read) or not uses:",
        "for name in read):",
        "tests/inference/test_old_keys.py",
    ),
    (
        "old_keys",
        "stock is not None and stock.slides",
        "stock is not None",
        "tests/inference/test_context.py -k window_of_some",
    ),
    ("old_keys", "text.get(key) or _spell_rope", "_spell_rope", "tests/inference/test_old_keys.py"),
    (
        "safetensors",
        "not in find_weight_files(folder)",
        "in ()",
        "tests/inference/test_weight_files.py",
    ),
    (
        "checkpoints/checkpoint",
        "own.get(key) is False and biased",
        "biased",
        "tests/architectures/test_families.py -k denies",
    ),
    ("roles", "block = silence(block, self.behind, h)\n", "pass\n", MAKES_UP),
    ("roles", "behind <= silent", "True", ROLES),
    ("roles", "TOLERANCE * np.abs", "1e9 * np.abs", ROLES),
    ("sensitivity", "others = tokens[len(rows) :]", "others = tokens", f"{MODULES} weighed_by"),
    ("ends", "return gram / energy", "return gram", ENDS),
    ("ends", "HEAD_TOKENS * width - 1", "HEAD_TOKENS * width + 99", ENDS),
    ("modules", "        self._round_tied()\n", "", ENDS),
    ("calibration", "if self._layout.args.precomputed:", "if False:", f"{CALIBRATION} table"),
    ("standins", "weigh_tokens(after)", "weigh_tokens(before)", STAND_INS),
    ("standins", "y = y + (before - now) / share", "y = y + (before - now)", STAND_INS),
    ("standins", "wrong * scale**2", "wrong", STAND_INS),
    ("standins", "off <= ADDS**2", "True", STAND_INS),
    # What transformers 5 writes elsewhere, and what mlx-lm alone knows of a known architecture.
    ("old_keys", "config.get(key) is None and (whole or key in read)]", "False]", PUBLISHED),
    ("old_keys", 'None if kind == "default" else scaling', "None", PUBLISHED),
    ("old_keys", 'whole=not read or "text_config" in read', "whole=False", LOADING),
    ("old_keys", 'if whole or read.get("rope_scaling") else set()', "if False else set()", LOADING),
    ("loading", "if family.to_own_keys(config).get(TIED) is None:", "if False:", LOADING),
    # Least squares of wide matrices.
    ("moments", "if not (np.diag(lower) > 0).all():", "if False:", MOMENTS),
    ("moments", "diagonal[:] = kept", "pass", MOMENTS),
    ("moments", "lower[start + BLOCK :, own].T @ x[start + BLOCK :]", "0", MOMENTS),
    ("stock", "is True and key in read}", "is True}", "tests/architectures/test_families.py"),
    ("config", "rel_tol=1e-6)@@rope", "rel_tol=9.0)", "tests/architectures/test_families.py"),
    ("config", 'rope.get("truncate") is False', "False", "tests/architectures/test_families.py"),
    ("tokenizer", "CONFIG_MAPPING_NAMES else NO_MODEL_TYPE", "() else {}", PUBLISHED),
    # Chats of Mistral's versions.
    ("tokenizer", '"1" if version == "v13" else "chat.users"', '"chat.users"', TEKKEN),
    ("tokenizer", "turn.said.rstrip(' ')", "turn.said", TEKKEN),
    ("tokenizer", "[last.said, said] | select | join", "[last.said, said] | join", TEKKEN),
    ("tokenizer", "chat.system | select | join", "chat.system | join", TEKKEN),
    # The algebra: signs, transposes, biases.
    ("algebra", "else q.bias @ inverse)", "else -q.bias @ inverse)", EXACT),
    ("algebra", "else -p.bias)", "else p.bias)", EXACT),
    ("algebra", "- reads.shift @ weight", "+ reads.shift @ weight", EXACT),
    ("algebra", "+ shift_share * writes.shift", "+ writes.shift", CONSTANTS),
    ("algebra", "return 1 / self._plan.before.embedding_scale if", "return 1.0 if", CONSTANTS),
    (
        "algebra",
        "Basis(basis.inverse.T, basis.matrix.T)",
        "Basis(basis.inverse, basis.matrix)",
        EXACT,
    ),
    (
        "algebra",
        "bias = None if bias is None else bias @ writes.matrix",
        "bias = bias",
        EXACT,
    ),
    (
        "algebra",
        "(0 if bias is None else bias) + norm_bias @ weight",
        "bias",
        f"{FAMILY} 'layer_norms_become or do_without and gpt_neox'",
    ),
    (
        "algebra",
        "None if bias is None else subtract_mean(bias)",
        "bias",
        f"{FAMILY} 'layer_norms_become or do_without and gpt_neox'",
    ),
    (
        "algebra",
        "np.repeat(weight.reshape(args.num_key_value_heads, -1), group, axis=0)",
        "np.tile(weight.reshape(args.num_key_value_heads, -1), (group, 1))",
        "tests/removal/test_exactness.py -k projections_fold",
    ),
    (
        "algebra",
        "array[start : start + rows] for name",
        "array[:rows] for name",
        "tests/removal/test_exactness.py -k projections_fold",
    ),
    (
        "algebra",
        "matrix[:, i : i + columns]) for i in starts",
        "matrix[:, :columns]) for i in starts",
        "tests/removal/test_side_by_side.py",
    ),
    (
        "algebra",
        "bias = None if new.bias is None else new.bias",
        "bias = None if True else new.bias",
        EXACT,
    ),
    (
        "algebra",
        "array = mx.array(rows, dtype=mx.float64)",
        "array = mx.array(rows.astype(np.float32)).astype(mx.float64)",
        "tests/removal/test_factors.py tests/removal/test_products.py",
    ),
    (
        "algebra",
        "np.float64 if stored == mx.float32 else np.float32",
        "np.float32",
        "tests/removal/test_products.py tests/removal/test_merger.py",
    ),
    ("algebra", "if not is_finite(cast):", "if False:", f"{BAD} 'narrow or not_a_number'"),
    # What is planned.
    (
        "plan",
        "return max(0, round(math.log2(min(self.amplification, 2.0**32))))",
        "return 0",
        "tests/removal/test_plan.py tests/conversion/test_convert.py",
    ),
    ("plan", "NOISE_LIMIT = 0.02", "NOISE_LIMIT = 20.0", "tests/removal/test_plan.py"),
    ("plan", "HOPELESS = 1e12", "HOPELESS = 1e300", f"{BAD} singular"),
    ("plan", "biases[name].discard(layer)", "pass", PLAN),
    ("plan", "index == request.last and 0 in eliminated", "False", PLAN),
    ("plan", 'if letter in "kv" and kv_width != d', 'if letter in "k" and kv_width != d', PLAN),
    (
        "plan",
        'head_bias=args.head_bias or ("final" in folded and "final" in args.shifts)',
        "head_bias=args.head_bias",
        f"{FAMILY} 'layer_norms_become or do_without and gpt_neox'",
    ),
    ("plan", 'and not source.removed.get("p")', "", CONSTANTS),
    (
        "plan",
        'heads = parallel and not p and not args.lacks("attention", layer)',
        "heads = False",
        CONSTANTS,
    ),
    (
        "plan",
        "return alone and not is_tied_end(args, points, index)",
        "return alone",
        CONSTANTS,
    ),
    (
        "plan",
        'width != args.hidden_size and args.lacks("ffn", layer)',
        "False",
        CONSTANTS,
    ),
    ("architectures", "if bare or not alone:", "if not alone:", CONSTANTS),
    (
        "quantization",
        "if not (self.args.num_local_experts and path.endswith(EXPERTS)):",
        "if array.ndim < 3:",
        CONSTANTS,
    ),
    # The network: scales, masks, caches, offsets, experts, machines.
    ("network", "self.scale = args.head_dim**-0.5", "self.scale = 1.0", EXACT),
    ("network", "offset = cache.offset if cache is not None else 0", "offset = 0", EXACT),
    (
        "network",
        "window = self.sliding_window if layer.use_sliding else None",
        "window = None",
        f"{MODEL} -k sliding",
    ),
    (
        "network",
        "RotatingKVCache(max_size=self.args.sliding_window) if layer.use_sliding else KVCache()",
        "KVCache()",
        MODEL,
    ),
    ("network", ", -self.uniform_gain[", ", self.uniform_gain[", EXACT),
    ("network", ", self.value_skip[", ", -self.value_skip[", EXACT),
    ("network", "mx.argpartition(-scores,", "mx.argpartition(scores,", f"{FAMILY} mixtral"),
    ("network", "else logits * self.logit_scale", "else logits", f"{FAMILY} cohere"),
    (
        "network",
        "else rows * self.embedding_scale",
        "else rows",
        "tests/architectures/test_gemma.py",
    ),
    (
        "network",
        "row[..., :passed] + h if passed else h",
        "h",
        "tests/removal/test_table.py",
    ),
    (
        "network",
        "[None if layer.self_attn is None else next(left, None) for layer in layers]",
        "[next(left, None) for layer in layers]",
        f"{MODEL} tests/removal/test_sublayers.py",
    ),
    (
        "network",
        "least = bits + extra if bits else max(8, 4 + extra)",
        "least = bits or 4",
        "tests/network/test_fused.py tests/test_mlx_lm.py -k 'bits or protects'",
    ),
    (
        "network",
        "size, -1, self.head_dim)[:, :, rank]",
        "size, -1, self.head_dim)[:, :, 0]",
        "tests/network/test_parallel.py",
    ),
    (
        "network",
        "square = mx.distributed.all_sum(square, group=self.group) / self.group.size()",
        "square = square",
        "tests/network/test_parallel.py",
    ),
    # Query skips and head skips, and norms on some of the projections.
    ("network", 'heads["q"] = add_products((heads["q"],), skipped)', "pass", SKIPS),
    # K and V that read the queries.
    ("network", 'x = self.norm_queries(heads["q"])', "pass", SKIPS),
    ("network", 'runs.sort(key=lambda run: "q" not in run)', "pass", SKIPS),
    ("network", 'return "q" if "kv" in self.norms else "qkv"', 'return "qkv"', SKIPS),
    (
        "network",
        "self.kv_norm(q if self.group is None else gather_last_axis(q, self.group))",
        "self.kv_norm(q)",
        "tests/network/test_parallel.py",
    ),
    ("network", 'and not (table and name == "kv")', "", "tests/removal/test_table.py"),
    ("removal", "(point.consumers == [path] and not biased)", "point.consumers == [path]", SKIPS),
    ("removal", "(point.consumers == [path] and not biased)", "False", SKIPS),
    ("removal", 'or source.removed.get("v") else ["kv"]', 'else ["kv"]', SKIPS),
    (
        "removal",
        'norm in ("attention", "kv") and args.precomputed',
        'norm == "attention" and args.precomputed',
        "tests/removal/test_table.py",
    ),
    ("quantization", "if name not in apart]", "]", "tests/network/test_fused.py"),
    ("architectures", "if heads * width != args.hidden_size:", "if False:", f"{BAD} broken_config"),
    ("architectures", 'if "q_proj" in FUSED[name]:', "if False:", f"{BAD} broken_config"),
    ("training", "mx.zeros_like(x) if name.endswith(held) else x", "x", RECIPE),
    ("training", "if i in inverted}", "}", RECIPE),
    ("training", "own.learn_skips is None and not own.reads_queries", "False", RECIPE),
    ("training", 'self.reads_queries and "v" not in', 'self.reads_queries and "x" not in', RECIPE),
    ("quantization", "for m in (*self.around, self.where)]", "for m in self.around]", SKIPS),
    ("training", "queries = None if own.reads_queries else", "queries =", RECIPE),
    ("network", "terms.append((q, self.separate_heads(self.query_skip)))", "pass", SKIPS),
    ("network", "terms = [(attend(queries), *beta)]", "terms = [(attend(queries),)]", SKIPS),
    ("network", 'scales.pop("k"), scales.pop("v")', 'scales.pop("v"), scales.pop("k")', EXACT),
    # Heads that lie side by side, in one kernel: where they may, and only there.
    ("network", 'if kinds["k"] == kinds["v"]:', "if False:", LAUNCHES),
    ("network", "untouched and kinds[", "False and kinds[", LAUNCHES),
    ("network", 'not self._weighted and "head_skip"', '"head_skip"', EXACT),
    ("network", 'if untouched and kinds["q"] == kinds["k"]', "if untouched", SKIPS),
    (
        "network",
        "return (out, heads) if self.gives_heads",
        "return (out, out) if self.gives_heads",
        SKIPS,
    ),
    (
        "network",
        'return self.head_skip and not self.lacks("attention", layer)',
        "return self.head_skip",
        SKIPS,
    ),
    (
        "network",
        "return layer > 0 and self.passes_heads(layer) and self.passes_heads(layer - 1)",
        "return layer > 0 and self.passes_heads(layer)",
        SKIPS,
    ),
    (
        "network",
        "weights[name] = mx.repeat(weights[name], self.args.head_dim)",
        "weights[name] = mx.tile(weights[name], self.args.head_dim)",
        SKIPS,
    ),
    (
        "network",
        "passed = d + heads if self.args.passes_heads(self.start_idx - 1) else d",
        "passed = d + heads if self.args.head_skip else d",
        "tests/network/test_parallel.py",
    ),
    (
        "network",
        '"query_skip", "head_skip", "output_skip")\n        for',
        '"query_skip", "output_skip")\n        for',
        "tests/network/test_parallel.py",
    ),
    (
        "network",
        "return x + gather_last_axis(scaled, self.group)",
        "return x + gather_last_axis(heads, self.group)",
        "tests/network/test_parallel.py",
    ),
    (
        "network",
        "return self.output_skip and last and not",
        "return self.output_skip and last or not",
        SKIPS,
    ),
    (
        "network",
        "return add_products((x,), (heads, delta)).flatten(-2)",
        "return x.flatten(-2)",
        SKIPS,
    ),
    ("network", 'points[-1].pin(f"the heads of layer', 'str(f"the heads of layer', SKIPS),
    ("removal", "        and not source.output_skip\n", "", SKIPS),
    ("network", "raise _Reached(take_stream(out))", "raise _Reached(out)", f"{DROPS} converted"),
    ("network", "if norm in args.norms}", "}", f"{BAD} broken_config"),
    ("network", 'if "hidden" in args.norms:', 'if args.norm == "qkv":', SKIPS),
    ("network", "shared or letter in args.norms", 'shared or args.norm == "qkv"', SKIPS),
    (
        "removal",
        "found = mx.repeat(found, absent.size // found.size)",
        "found = mx.tile(found, absent.size // found.size)",
        SKIPS,
    ),
    ("removal", '("head_skip", args.has_head_skip(layer), skips),', "", SKIPS),
    (
        "removal",
        "skips = source.query_skip or source.head_skip or source.output_skip",
        "skips = source.query_skip or source.output_skip",
        SKIPS,
    ),
    ("removal", "skips = source.query_skip or source.head_skip", "skips = source.head_skip", SKIPS),
    ("removal", "or source.head_skip or source.output_skip", "or source.head_skip", SKIPS),
    ("removal", ' or "heads" in source.norms', "", SKIPS),
    (
        "removal",
        '"v": kv_width, "kv": width, "heads": width}',
        '"v": kv_width, "kv": width}',
        SKIPS,
    ),
    (
        "network",
        "out = heads if self.heads_norm is None else",
        "out = heads if self.heads_norm is None or self.o_proj is None else",
        SKIPS,
    ),
    ("architectures", "and [*shape] == per_channel for", "for", SKIPS),
    (
        "conversion",
        "checkpoint.packed_by_mlx and checkpoint.is_whole",
        "checkpoint.packed_by_mlx",
        SKIPS,
    ),
    ("architectures", 'if args.norms and args.norm != "qkv":', "if False:", f"{BAD} broken_config"),
    (
        "checkpoints",
        "per_head = name.endswith(CHANNEL_PATHS) and found ==",
        "per_head = found ==",
        f"{BAD} tensor",
    ),
    (
        "checkpoints",
        "if (needed := _find_needed(name)) and name not in expected:",
        "if False and (needed := ''):",
        f"{BAD} tensor",
    ),
    # What a source means.
    (
        "architectures",
        "fused_by_head=True",
        "fused_by_head=False",
        f"{FAMILY} gpt_neox",
    ),
    (
        "architectures",
        "gain_offset=1.0@@families",
        "gain_offset=0.0",
        "tests/architectures/test_gemma.py",
    ),
    (
        "architectures",
        "(array - family.gain_offset).astype(dtype)",
        "array.astype(dtype)",
        "tests/architectures/test_gemma.py",
    ),
    (
        "architectures",
        "Place(tuple(numbered[i] for i in sorted(numbered)), stacked=True)",
        "Place(tuple(numbered[i] for i in sorted(numbered, reverse=True)), stacked=True)",
        f"{FAMILY} mixtral",
    ),
    (
        "architectures",
        "if sorted(numbered) == [*range(len(numbered))]:",
        "if True:",
        f"{FAMILY} missing_expert",
    ),
    (
        "architectures",
        "        if canonical in found:\n            raise UserError",
        "        if False:\n            raise UserError",
        f"{FAMILY} two_names",
    ),
    (
        "architectures",
        '"logit_scale": 0.0625',
        '"logit_scale": 1.0',
        "tests/architectures",
    ),
    ("architectures", "if heads % kv_heads:", "if False:", f"{BAD} 'broken_config or sizes'"),
    ("architectures", "if args.rotary_dim > args.head_dim:", "if False:", "tests/architectures"),
    (
        "architectures",
        'f"{HEAD}.weight" not in tensors',
        "False",
        "tests/architectures/test_families.py",
    ),
    # Tables and dropped sub-layers.
    (
        "removal",
        "self.vocab_size * (self.row - self.hidden_size) + head - gone",
        "self.vocab_size * (self.row - self.hidden_size) + head",
        "tests/removal/test_table.py",
    ),
    (
        "removal",
        "mx.sum(1 - _cosine(a, b))",
        "mx.sum(_cosine(a, b))",
        "tests/removal/test_sublayers.py",
    ),
    (
        "removal",
        "best.loss > whole.loss * (1 + self._max_loss)",
        "best.loss > steps[-1].loss * (1 + self._max_loss)",
        "tests/removal/test_sublayers.py -k limit --thorough",
    ),
    (
        "removal",
        "(step.loss - loss) / count(*which)",
        "(step.loss - loss)",
        "tests/removal/test_sublayers.py",
    ),
    # Quantization.
    (
        "quantization",
        "due[i - start + 1 :] += within",
        "due[i - start + 1 :] -= within",
        "tests/quantization/test_formats.py",
    ),
    (
        "quantization",
        'axis=1, bitorder="little"',
        'axis=1, bitorder="big"',
        "tests/quantization/test_formats.py",
    ),
    (
        "quantization",
        "- 2 * np.vdot(weight, cross)",
        "- np.vdot(weight, cross)",
        f"{CALIBRATION} moments",
    ),
    ("quantization", "if error < self._least:", "if error > self._least:", f"{CALIBRATION} fit"),
    (
        "quantization",
        'targets[path] - modules[path]["bias"]\n',
        "targets[path]\n",
        f"{CALIBRATION} 'without_rounding or survives'",
    ),
    (
        "quantization",
        "if last.nbytes + more > limit:",
        "if False:",
        "tests/quantization/test_bits.py",
    ),
    (
        "quantization",
        "if kl <= limit else (last, high)",
        "if kl >= limit else (last, high)",
        "tests/quantization/test_bits.py",
    ),
    (
        "quantization",
        "self.zero_shift = 0 if",
        "self.zero_shift = 1 if",
        "tests/checkpoints/test_packed.py",
    ),
    (
        "quantization",
        "AWQ_ORDER, dtype=mx.uint32) * 4",
        "sorted(AWQ_ORDER), dtype=mx.uint32) * 4",
        "tests/checkpoints/test_packed.py",
    ),
    (
        "quantization",
        "crosses = offset + bits > 32",
        "crosses = offset + bits > 64",
        "tests/checkpoints/test_packed.py",
    ),
    ("scaled", "-rows % high, -columns % wide", "0, -columns % wide", SCALED),
    ("scaled", "dense / one if common == DIVISOR else", "dense * one if one.size else", SCALED),
    ("scaled", "split[..., : out[-1], :] - middle", "split[..., : out[-1], :]", SCALED),
    ("scaled", "array == 0, 1 << 22", "array == 0, 0", SCALED),
    ("declared", "return named or of_class or [", "return [", SCALED),
    ("decoding", "weights = model.sanitize(weights)@@decoding", "pass", SCALED_SOURCES),
    ("stock", 'if not key.startswith("quantiz")', "if True", SCALED_SOURCES),
    ("stock", "check_finite(written)", "pass", SCALED_SOURCES),
    # Measures, the closing check and what is told of it.
    (
        "metrics",
        "return (difference - p * log_ratio).sum(-1)",
        "return (difference + p * log_ratio).sum(-1)",
        "tests/network/test_metrics.py",
    ),
    (
        "metrics",
        "largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True))",
        "np.log(np.exp(logits - largest).sum(-1, keepdims=True))",
        "tests/network/test_metrics.py",
    ),
    (
        "metrics",
        "np.abs(wanted - got).max(-1) / np.where(largest",
        "np.abs(wanted - got).mean(-1) / np.where(largest",
        "tests/conversion/test_check.py",
    ),
    (
        "check",
        "divergences.append(measure_kl(a, b))",
        "divergences.append(measure_kl(b, a))",
        "tests/conversion/test_check.py",
    ),
    (
        "check",
        "        nll.append(measure_nll(b[:-1], row[1:]))",
        "        nll.append(measure_nll(b[:-1], row[:-1]))",
        "tests/conversion/test_check.py",
    ),
    (
        "check",
        "job.exact and found.max_rel_logit_error > CERTAIN",
        "False",
        REFUSAL,
    ),
    ("check", "check.rounding_ratio <= 1", "check.rounding_ratio <= 1000", REFUSAL),
    ("check", "self._size * mx.random.normal", "0 * mx.random.normal", REFUSAL),
    (
        "check",
        "and not job.options.force",
        "and False",
        REFUSAL,
    ),
    (
        "check",
        "return self.dtype == mx.float32 and not approximate",
        "return not approximate",
        REFUSAL,
    ),
    (
        "plan",
        "not quantized and not self.form.stock",
        "not quantized",
        "tests/conversion/test_convert.py -k stays_as_it_is",
    ),
    (
        "plan",
        "(args.sliding_window or 0) >= LONG_WINDOW",
        "args.sliding_window",
        "tests/conversion/test_convert.py -k with_the_window",
    ),
    (
        "check",
        "if not np.isfinite(b[:, ~forbidden]).all():",
        "if False:",
        "tests/conversion/test_check.py",
    ),
    (
        "card",
        "'fewer' if saved >= 0 else 'more'",
        "'more' if saved >= 0 else 'fewer'",
        "tests/conversion/test_convert.py -k card",
    ),
    (
        "card",
        '("", "") if report.stock else (',
        '("", "") if True else (',
        "tests/conversion/test_convert.py -k card",
    ),
    # Files: bounds, links, what is whole.
    (
        "files",
        "if found < view.nbytes:",
        "if False:",
        "tests/checkpoints/test_files.py -k shorter",
    ),
    ("files", "if len(found) < len(pairs):", "if False:", f"{BAD} twice"),
    ("files", "if Path(name).name != name or not name", "if not name", f"{BAD} broken_files"),
    (
        "files",
        "if name not in expected and not (tied_head or ignored or name in dropped):",
        "if False:",
        f"{BAD} another_model",
    ),
    (
        "files",
        "if not target.is_relative_to(root) and target.parent != blobs:",
        "if False:",
        f"{BAD} link",
    ),
    ("files", "if _is_deeper(read, DEEPEST):", "if False:", f"{BAD} depth"),
    (
        "files",
        'if config.get("model_file") is not None and',
        "if False and",
        "tests/test_trust.py -k own_code",
    ),
    # The writer.
    (
        "writer",
        "with ignore_signals():\n                    shutil.rmtree(folder, ignore_errors=True)",
        "pass",
        f"{BAD} 'interrupt or fills_up'",
    ),
    ("writer", "if os.path.lexists(out):", "if os.path.exists(out):", f"{BAD} existing_place"),
    (
        "writer",
        "    except BlockingIOError:\n        ours = False",
        "    except BlockingIOError:\n        ours = True",
        f"{BAD} another_run",
    ),
    ("writer", "if needed > free:@@checkpoints", "if False:", f"{BAD} little_disk"),
    (
        "writer",
        "self.folder.chmod(0o777 & ~umask)",
        "pass",
        "tests/checkpoints/test_writer.py tests/conversion/test_convert.py",
    ),
    # Signals and exit codes.
    (
        "cli",
        "_complain(UserError(_describe(error)))\n    return 1",
        "_complain(UserError(_describe(error)))\n    return 0",
        f"{BAD} interrupt tests/cli/test_cli.py",
    ),
    (
        "cli",
        "for end in (signal.SIGTERM, signal.SIGHUP):",
        "for end in (signal.SIGTERM,):",
        f"{BAD} signal",
    ),
    (
        "cli",
        "if signal.getsignal(end) != signal.SIG_IGN:",
        "if True:",
        "tests/cli/test_cli.py -k hangups",
    ),
    (
        "cli",
        'in ((0, "stdin", "r"), (1,',
        "in ((1,",
        "tests/inference/test_generation.py -k closed_standard",
    ),
    # The Hub.
    ("hub", ".exists() and not config_only", ".exists()", f"{HUB} dry_run"),
    ("hub", "revision=revision,\n                allow", "allow", f"{HUB} revision"),
    ("hub", "if code else [])", "if True else [])", f"{HUB} fetched_once"),
    ("hub", "in (401, 403):", "in (401,):", f"{HUB} refusal"),
    (
        "hub",
        "case GatedRepoError():",
        "case EOFError():",
        f"{HUB} refusal",
    ),
    # Text and tokenizers.
    ("text", "[*row, end]", "[*row]", "tests/text/test_corpus.py"),
    ("text", "self._starts(i // self._windows)[", "self._starts(0)[", "tests/text/test_corpus.py"),
    (
        "text",
        "tokens[s : s + length + 1] for s in starts[i",
        "tokens[s : s + length] for s in starts[i",
        "tests/text/test_corpus.py",
    ),
    ("text", '{TURN_END}\\n" for', '{TURN_END}" for', "tests/text/test_corpus.py"),
    (
        "text",
        "eos_token=TURN_END if chat else END",
        "eos_token=END",
        "tests/text/test_corpus.py tests/training/test_pretraining.py -k 'chat or tokenizer'",
    ),
    (
        "text",
        "mx.random.categorical(mx.nan_to_num(logits), key=now)",
        "mx.random.categorical(mx.nan_to_num(logits) * 0, key=now)",
        "tests/text/test_samples.py",
    ),
    # Training: what is resumed, and figures.
    (
        "training",
        "[mx.array(loss) for loss in losses]",
        "[]",
        f"{TRAIN} two_lines",
    ),
    (
        "training",
        'self._optimizer.state = both["optimizer"]',
        "pass",
        f"{TRAIN} 'goes_on or interrupted'",
    ),
    ("training", "if not bool(mx.isfinite(loss)):", "if False:", f"{TRAIN} no_number"),
    (
        "training",
        '[event for event in read_log(self.path) if event["step"] <= step]',
        "[event for event in read_log(self.path)]",
        f"{TRAIN} 'killed or cannot_be_written'",
    ),
    (
        "training",
        "state = [model.state, optimizer.state]@@training/pretraining.py",
        "state = [model.state]",
        f"{TRAIN} compiled",
    ),
    (
        "training",
        "state = [model.state, optimizer.state]@@training/healing.py",
        "state = [model.state]",
        f"{HEAL} 'resumed_run or says_what'",
    ),
    (
        "training",
        "if not resume and not self.state.exists():",
        "if False:",
        f"{TRAIN} leaves_nothing",
    ),
    (
        "training",
        "signum != signal.SIGHUP and {signal.SIGINT, signal.SIGTERM} & {*found.came}",
        "False",
        f"{TRAIN} second_signal",
    ),
    (
        "training",
        "signum != signal.SIGHUP and {signal.SIGINT, signal.SIGTERM} & {*found.came}",
        "found.came",
        f"{TRAIN} interrupted_run",
    ),
    (
        "training",
        "STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)",
        "STOPS = (signal.SIGINT, signal.SIGTERM)",
        f"{TRAIN} interrupted_run",
    ),
    (
        "training",
        "(self.signals.came or self._unheard)",
        "self.signals.came",
        f"{TRAIN} nobody_hears",
    ),
    ("training", "if len(self.came) == before:", "if True:", f"{TRAIN} compiler_that"),
    ("training", "folder.cut_log(-1)", "pass", f"{TRAIN} killed_before"),
    (
        "training",
        "{one.name for one in fields(kind)} - {*given}",
        "set()",
        "tests/training/test_broken_runs.py -k settings",
    ),
    (
        "training",
        "kinds[0] != kinds[1]",
        "{*arrays} != {*own}",
        "tests/training/test_broken_runs.py -k another_state",
    ),
    (
        "evaluation",
        'event.get("tokens", event["step"] * per_step)',
        'event.get("tokens", 0)',
        f"{TRAIN} evaluations_between",
    ),
    (
        "evaluation",
        '"svg.fonttype": "none"',
        '"svg.fonttype": "path"',
        "tests/cli/test_figures.py -k ground",
    ),
    (
        "figures",
        "nats / math.log(2) / max(1, characters)",
        "nats / max(1, characters)",
        "tests/evaluation/test_perplexity.py",
    ),
    (
        "figures",
        "count += batch[:, 1:].size",
        "count += batch.size",
        "tests/evaluation/test_perplexity.py",
    ),
    # Generation.
    (
        "inference",
        "if _asks_what_is_ignored(config, family, family.stock):",
        "if False:",
        "tests/inference/test_loading.py -k stock_network_would",
    ),
    (
        "inference",
        'if kind != "full" and (missing :=',
        'if kind == "" and (missing :=',
        "tests/inference/test_loading.py -k broken_adapters",
    ),
    ("training", "if ours is False:", "if False:", f"{TRAIN} two_at_once"),
    ("training", "if given not in (usual, own):", "if False:", f"{TRAIN} no_other_recipe"),
    (
        "training",
        "folder.write_settings(run.settings)  # which",
        "pass  # which",
        f"{TRAIN} more_steps",
    ),
    (
        "text",
        'if not getattr(tokenizer, "has_chat_template", template):',
        "if True:",
        "tests/text/test_corpus.py -k template",
    ),
    (
        "conversion",
        "if report.kept_packed and report.first_layer is not None:",
        "if False:",
        "tests/conversion/test_convert.py -k packed_table",
    ),
    (
        "conversion",
        "and not _has_fewer_bits(report)",
        "",
        "tests/conversion/test_convert.py -k chosen_bits",
    ),
    (
        "inference",
        "if bool(mx.isnan(response.logprobs[response.token])):",
        "if False:",
        "tests/inference/test_generation.py -k no_numbers",
    ),
    (
        "inference",
        "generation_tps=last.generation_tps * steps",
        "generation_tps=last.generation_tps",
        "tests/inference/test_generation.py",
    ),
    (
        "inference",
        "mx.random.seed(seed)@@generation",
        "            pass",
        "tests/inference/test_generation.py -k seed",
    ),
    (
        "inference",
        "2 * layers * args.num_key_value_heads",
        "layers * args.num_key_value_heads",
        "tests/removal/test_sublayers.py -k converted",
    ),
    # GGUF: what the converter did is undone, what a block means stays.
    ("gguf_packed", 'Type.Q4_0: (4, "affine", 8)', 'Type.Q4_0: (4, "affine", 7)', GGUF_PACKED),
    ("gguf_packed", "rest ^ np.uint8(128)", "rest ^ np.uint8(0)", GGUF_PACKED),
    ("gguf_packed", "if not (np.isfinite(scales).all() and", "if False and (", GGUF_PACKED),
    ("gguf_packed", "if path not in forms}", "if False}", GGUF_PACKED),
    ("gguf_file", "return _split_rotary_pairs(rows, self.config[key])", "return rows", GGUF),
    ("gguf_file", "offset = self._architecture.gain_offset", "offset = 0.0", GGUF),
    ("gguf_architectures", '"model_type": "ministral3"', '"model_type": "mistral"', GGUF),
    ("gguf_architectures", '"long_factor": long,', '"long_factor": short,', GGUF),
    ("gguf_architectures", "int((n + 1) % 4 != 0)", "1", GGUF),
    ("gguf_architectures", '"full" if n % 2 else "sliding"', '"full"', GGUF),
    ("gguf_architectures", "!= largest:", "!= 0:", GGUF),
    ("unpacking", "    check_tensors(source)\n    usual", "    usual", GGUF),
    ("unpacking", "if 2 * size > free:", "if False:", GGUF),
    ("planning", "in_place |= isinstance", "in_place &= isinstance", GGUF_PACKED),
    ("layout", "and self.scale == 1", "", "tests/architectures/test_gemma.py -k scaled_rows"),
    ("tokenizer", "if read(text).input_ids != tokenizer", "if [] and tokenizer", GGUF),
    (
        "tokenizer",
        "read_json(folder / CONFIG) | kept",
        "read_json(folder / CONFIG)",
        "tests/checkpoints/test_tokenizer.py -k legacy",
    ),
    ("gguf_tokenizer", "and i not in no_ends", "", "tests/checkpoints/test_gguf.py -k ends"),
    (
        "gguf_tokenizer",
        "and token not in PHI3_PLAIN",
        "",
        "tests/checkpoints/test_gguf.py -k phi_3",
    ),
    (
        "caches",
        "in (kind, type(own))",
        "is type(own)",
        "tests/inference/test_generation.py -k lacks_an_attention",
    ),
]


@dataclass(frozen=True)
class Mutant:
    """A change of one place; ``tests`` are pytest's arguments."""

    station: str
    old: str
    new: str
    tests: str

    def place(self, root: Path) -> tuple[Path, str] | None:
        """The file that is changed and the text there; None unless there is exactly one place."""
        old, _, file = self.old.partition("@@")
        found = [
            path
            for path in sorted((root / "mlx_skipless").rglob("*.py"))
            if file in str(path.relative_to(root)) and old in path.read_text(encoding="utf-8")
        ]
        if len(found) != 1 or found[0].read_text(encoding="utf-8").count(old) != 1:
            return None
        return found[0], old

    def __str__(self) -> str:
        return f"{self.station}: {' '.join(self.old.split())}  ->  {' '.join(self.new.split())}"


@contextmanager
def applied(mutant: Mutant, root: Path) -> Iterator[bool]:
    """The copy of the tree at ``root`` with the mutant in it; False if it has no place there."""
    place = mutant.place(root)
    if place is None:
        yield False
        return
    file, old = place
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(old, mutant.new), encoding="utf-8")
    try:
        yield True
    finally:
        file.write_text(text, encoding="utf-8")


def verdict(mutant: Mutant, root: Path, thorough: bool) -> str:
    """What becomes of a mutant in a copy of the tree, and the test that found it."""
    with applied(mutant, root) as there:
        if not there:
            return "stale"
        given = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", *shlex.split(mutant.tests)]
        given += ["--thorough"] if thorough else []
        temporary = root.parent / "tmp"
        temporary.mkdir(exist_ok=True)
        try:
            run = subprocess.run(
                [sys.executable, "-m", "pytest", *given],
                cwd=root,
                env=os.environ | {"PYTHONPATH": str(root), "TMPDIR": str(temporary)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired:
            return "killed    (no end)"
    if run.returncode == 0:
        return "SURVIVED"
    found = [x for x in run.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    if run.returncode == 1 and found:
        return f"killed    {found[0].partition(' - ')[0].partition('::')[2]}"
    return f"no verdict ({run.returncode}): {run.stdout.strip().splitlines()[-1]}"


def copy_tree(source: Path, to: Path) -> Path:
    """A copy of what the tests need."""
    for pattern in TAKEN:
        for path in source.glob(pattern):
            if path.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, to / path.name, ignore=ignored)
            else:
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to)
    return to


def try_all(mutants: Sequence[Mutant], source: Path, jobs: int, thorough: bool) -> list[str]:
    """The verdict of each, printed as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        copies: Queue[Path] = Queue()
        for i in range(jobs):
            copies.put(copy_tree(source, Path(folder) / str(i) / "tree"))

        def one(mutant: Mutant) -> str:
            copy = copies.get()
            try:
                found = verdict(mutant, copy, thorough)
            finally:
                copies.put(copy)
            print(f"{found:60} {mutant}", flush=True)
            return found

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, mutants))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="default: all")
    parser.add_argument(
        "--list", action="store_true", help="show them and whether they have a place"
    )
    parser.add_argument("--jobs", type=int, default=1, help="at once (default: 1)")
    parser.add_argument("--thorough", action="store_true", help="the exhaustive grids, too")
    parser.add_argument("--source", type=Path, default=ROOT, help="the tree (default: this one)")
    given = parser.parse_args()
    chosen = [
        mutant
        for mutant in (Mutant(*row) for row in MUTANTS)
        if not given.words or any(word in f"{mutant} {mutant.tests}" for word in given.words)
    ]
    if given.list:
        for mutant in chosen:
            print(f"{'' if mutant.place(given.source) else 'STALE '}{mutant}")
        return 0
    found = try_all(chosen, given.source, given.jobs, given.thorough)
    killed = sum(one.startswith("killed") for one in found)
    print(f"{killed} of {len(found)} killed")
    return 0 if killed == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
