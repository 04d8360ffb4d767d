"""What runs of training and healing end with, as ``--json`` writes it."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        output: the run's folder.
        step: the last one.
        tokens: how many were seen, repeated ones each time.
        seconds: of training, earlier sessions of a resumed run included.
        tokens_per_second: over these seconds.
        peak_memory_bytes: the most that the process held.
    """

    output: str
    step: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrainingResult(RunResult):
    """How a training run ended.

    Attributes:
        output: the run's folder.
        step: the last one.
        tokens: how many were seen, repeated ones each time.
        seconds: of training, earlier sessions of a resumed run included.
        tokens_per_second: over these seconds.
        peak_memory_bytes: the most that the process held.
        parameters: weights of the network.
        loss: nats per token, the mean over the steps of the log's last line.
        validation_loss: nats per token of all the held-out text, None if there is none.
        bits_per_character: of all the held-out text, None if there is none.
    """

    parameters: int
    loss: float
    validation_loss: float | None
    bits_per_character: float | None


@dataclass(frozen=True)
class Distance:
    """How far a network is from its teacher, on held-out text.

    Attributes:
        kl: mean KL(teacher || network), nats per token.
        loss: of the network, nats per token.
        teacher_loss: of the teacher, nats per token.
        bits_per_character: of the network.
        teacher_bits_per_character: of the teacher.
        tokens: how many were predicted.
    """

    kl: float
    loss: float
    teacher_loss: float
    bits_per_character: float
    teacher_bits_per_character: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class HealingResult(RunResult):
    """How a distillation ended.

    Attributes:
        output: the run's folder and of the healed model.
        step: the last one.
        tokens: how many were seen, repeated ones each time.
        seconds: of training, earlier sessions of a resumed run included.
        tokens_per_second: over these seconds.
        peak_memory_bytes: the most that the process held.
        fine_tune_type: "lora" or "full".
        trained_parameters: weights that were trained; of low-rank changes, theirs.
        text: names of the files that it learnt from, or "sampled".
        before: the distance from the original before the first step.
        after: the distance from the original of what was written.
    """

    fine_tune_type: str
    trained_parameters: int
    text: str
    before: Distance
    after: Distance
