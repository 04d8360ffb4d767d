"""What a conversion removes and what comes out: decisions, no weights.

At each point of the stream (``network/wiring.py``) one matrix can be chosen to become the identity,
which is every exact removal (Graef, arXiv 2404.12362, section 2). A plan is these choices.
``choices.py`` makes them among the candidates of ``candidates.py``, and ``networks.py`` says what
the network looks like behind each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import mlx.core as mx

from ..network.model import ModelArgs
from .algebra import Conditioning
from .choices import RemovalCost, Request, choose_eliminated
from .networks import (
    add_table,
    can_centre,
    choose_folded,
    group_by_letter,
    remove_matrices,
    simplify_norms,
    strip_skips,
    unite_layers,
)


@dataclass(frozen=True)
class Plan:
    """One conversion.

    Attributes:
        before: the network that the removals start from.
        merged: the network behind them, all but the table.
        eliminated: for each point that gets a new basis, the matrix that becomes the identity.
        folded: norms whose weights and biases go into the matrices that read them.
        notes: what the user should know, one line each.
        dropped: the layers whose whole "attention" or "ffn" goes.
        table: whether layer 0's projections become a table by token.
        centred: whether all that writes the stream has its mean taken out, so that LayerNorms
            become RMS norms.
    """

    before: ModelArgs
    merged: ModelArgs
    eliminated: dict[int, str]
    folded: tuple[str, ...]
    notes: tuple[str, ...] = ()
    dropped: Mapping[str, list[int]] = field(default_factory=dict)
    table: bool = False
    centred: bool = False

    @property
    def gone(self) -> dict[str, list[int]]:
        """The layers of the matrices that become the identity, by the paper's letter."""
        return group_by_letter(self.eliminated)

    @property
    def after(self) -> ModelArgs:
        """The network that comes out."""
        return add_table(self.merged) if self.table else self.merged


def make_plan(
    args: ModelArgs,
    *,
    remove: str = "auto",
    skipless: bool = False,
    fold_norms: bool = False,
    conditioning: Mapping[str, Conditioning] | None = None,
    dtype: mx.Dtype = mx.float32,
    quantized: bool = False,
    costs: Mapping[str, RemovalCost] | None = None,
    dropped: Mapping[str, list[int]] | None = None,
    precompute: bool = False,
    stock: bool = False,
) -> Plan:
    """Decide what goes.

    Args:
        args: the source network.
        remove: "auto", "none" or the letters to remove; letters are obeyed or refused.
        skipless: whether to strip skips and the norms on the stream first.
        fold_norms: whether to put every norm's weight and bias into the matrices that read it.
        conditioning: measured, by module path; None where no weights are at hand.
        dtype: the type of the result; decides with ``conditioning`` what `auto` dares.
        quantized: whether the result gets quantized, against text.
        costs: measured, of removals by module path; `auto` leaves in place what does not pay.
        dropped: layers whose whole "attention" or "ffn" goes.
        precompute: whether the first layer's projections become a table.
        stock: whether the result stays a network of mlx-lm's own. That wants every norm's weight
            and bias that it has and no more biases: folded ones are written as ones and zeros.

    Raises:
        UserError: if an explicit removal is impossible.
    """
    before = strip_skips(args) if skipless else args
    request = Request(before, remove, conditioning, dtype, quantized, costs or {}, precompute)
    eliminated, notes = choose_eliminated(request)
    folded = choose_folded(args, before, fold_norms, stock)
    centred = not stock and can_centre(args, before, folded)
    if stock:
        merged = before
        notes += _explain_unfolded(choose_folded(args, before, fold_norms, False), folded)
    else:
        merged = simplify_norms(remove_matrices(request, eliminated, folded), centred)
    dropped = {part: layers for part, layers in (dropped or {}).items() if layers}
    merged = replace(merged, removed=unite_layers(merged.removed, dropped))
    return Plan(before, merged, eliminated, folded, tuple(notes), dropped, precompute, centred)


def isolate_removal(plan: Plan, index: int) -> Plan:
    """Make the plan of one removal of a plan, that at one of its points."""
    eliminated = {index: plan.eliminated[index]}
    merged = remove_matrices(Request(plan.before), eliminated, plan.folded)
    return replace(plan, eliminated=eliminated, merged=merged, table=False, centred=False)


def _explain_unfolded(foldable: tuple[str, ...], folded: tuple[str, ...]) -> list[str]:
    kept = [norm.replace("final", "head") for norm in foldable if norm not in folded]
    if not kept:
        return []
    return [
        f"norm gains stay before the {' and the '.join(kept)}: "
        "mlx-lm's own network has no bias there to take the norm's"
    ]
