"""Trains what is left of a network of mlx-lm's own towards the whole, before it is quantized."""

from dataclasses import replace

from ..checkpoints.writer import Writer
from ..errors import UserError
from ..memory import weight_bytes
from ..network.stock import StockNetwork
from ..text.samples import Passages
from .healing import Ward
from .stock import StockJob, write_beside
from .stock_quantization import write


def heal_reduced(
    job: StockJob, network: StockNetwork, passages: Passages | None, ward: Ward
) -> StockJob:
    """Train a result that has lost sub-layers, as it is before it is quantized.

    Its matrices are fitted to the text first, which takes less time and gets part of the way.

    Args:
        job: with the sub-layers that go, and the matrices that stand in.
        network: the source's.
        passages: the text.
        ward: where it is trained.

    Raises:
        UserError: if the source has no tokenizer, or training fails.
    """
    dense = replace(
        job.options,
        quantize=False,
        q_group_size=None,
        q_bits=None,
        q_mode="affine",
        target_bytes=None,
        target_kl=None,
        target_speed=None,
        allow=None,
        distill=0,
        heal=0,
    )
    plain = replace(job, options=dense)
    model, config = plain.build_result(network)
    out = ward.make_room() / "reduced"
    with Writer(out, weight_bytes(model)) as writer:
        if write_beside(plain, writer, config) is None:
            raise UserError("--heal needs a tokenizer and the source has none: drop it")
        write(plain, network, writer, passages, ward.progress, unrounded=True)
        writer.commit()
    healing, folder = ward.train(out)
    return job.learn(healing=healing, healed=folder if healing.kept else out)
