"""The training loop that both models share, its optimizer, and the two losses."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

from demo_model.evaluation import held_out_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from demo_model.corpus import WindowSampler
    from demo_model.llama import LlamaForCausalLM

    Loss = Callable[[Tensor], Tensor]

SHORT_WINDOW = 256
LONG_WINDOW = 1024
# One step in four trains on long windows: enough for thousand-token prompts to be familiar.
LONG_WINDOW_PERIOD = 4

WARMUP_STEPS = 20
GRADIENT_NORM_MAX = 1.0
PROGRESS_PERIOD = 10


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train; a budget in steps, so that a seed gives one result."""

    steps: int
    tokens_per_step: int
    matrix_learning_rate: float
    vector_learning_rate: float
    weight_decay: float
    evaluation_period: int = 100


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did; `best_step` is the one whose weights the model now holds."""

    steps: int
    best_step: int
    tokens: int
    seconds: float
    processor_seconds: float


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: every direction of a matrix learns at one rate.

    On a model of this size it needs about half the tokens that AdamW does. torch has its own, which
    computes in bfloat16; ours stays in float32, many times faster on processors without bfloat16.
    """

    MOMENTUM = 0.95
    # The quintic's coefficients drive all singular values towards one in five iterations.
    NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
    ITERATIONS = 5

    def __init__(
        self, matrices: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
    ) -> None:
        """Optimizes `matrices`, all two-dimensional."""
        super().__init__(matrices, {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: nothing here re-evaluates
        """Applies one update from the gradients at hand."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum: Tensor = state["momentum"].mul_(self.MOMENTUM).add_(matrix.grad)
                update = self._orthogonalise(matrix.grad + self.MOMENTUM * momentum)
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _orthogonalise(self, matrix: Tensor) -> Tensor:
        """Approximates U @ V.T of the matrix's singular value decomposition."""
        a, b, c = self.NEWTON_SCHULZ
        is_tall = matrix.shape[0] > matrix.shape[1]
        result: Tensor = matrix.T if is_tall else matrix
        result = result / (result.norm() + 1e-7)
        for _ in range(self.ITERATIONS):
            gram = result @ result.T
            result = a * result + (b * gram + c * gram @ gram) @ result
        return result.T if is_tall else result


def language_loss(model: LlamaForCausalLM) -> Loss:
    """Cross-entropy of the next token."""

    def loss(windows: Tensor) -> Tensor:
        logits = model(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    return loss


def distillation_loss(student: LlamaForCausalLM, teacher: LlamaForCausalLM) -> Loss:
    """KL divergence of the student's next-token distribution from the teacher's."""

    def loss(windows: Tensor) -> Tensor:
        token_ids = windows[:, :-1]
        with torch.no_grad():
            target = F.log_softmax(teacher(token_ids), dim=-1).flatten(0, 1)
        logits = F.log_softmax(student(token_ids), dim=-1).flatten(0, 1)
        return F.kl_div(logits, target, reduction="batchmean", log_target=True)

    return loss


def train(
    model: LlamaForCausalLM,
    loss_of: Loss,
    sampler: WindowSampler,
    held_out: list[int],
    plan: TrainingPlan,
) -> TrainingResult:
    """Trains `model` in place and leaves it with its best weights on the held-out text."""
    optimizers = _optimizers(model, plan)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, plan.steps))
        for optimizer in optimizers
    ]
    progress = Progress(plan)
    best_loss, best_step, best_weights = float("inf"), 0, model.state_dict()
    for step in range(1, plan.steps + 1):
        length = SHORT_WINDOW if step % LONG_WINDOW_PERIOD else LONG_WINDOW
        model.train()
        loss = loss_of(sampler.batch(plan.tokens_per_step // length, length))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM_MAX)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress.report(step, loss.item())
        if step % plan.evaluation_period == 0 or step == plan.steps:
            current = held_out_loss(model, held_out)
            print(f"step {step}: held-out loss {current:.4f}", flush=True)
            if current < best_loss:
                best_loss, best_step = current, step
                best_weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best_weights)
    return progress.result(best_step)


class Progress:
    """Prints how far a run is. Clocks are read for the reader only; nothing depends on them."""

    def __init__(self, plan: TrainingPlan) -> None:
        """Starts the clocks."""
        self._plan = plan
        self._started = time.perf_counter()
        self._processor_started = time.process_time()

    def report(self, step: int, loss: float) -> None:
        """Prints a line every few steps."""
        if step % PROGRESS_PERIOD:
            return
        seconds = time.perf_counter() - self._started
        rate = step * self._plan.tokens_per_step / seconds
        remaining = (self._plan.steps - step) * seconds / step
        print(
            f"step {step}/{self._plan.steps}: loss {loss:.3f}, "
            f"{rate:,.0f} tokens/s, {remaining:.0f} s to go",
            flush=True,
        )

    def result(self, best_step: int) -> TrainingResult:
        """Stops the clocks."""
        return TrainingResult(
            steps=self._plan.steps,
            best_step=best_step,
            tokens=self._plan.steps * self._plan.tokens_per_step,
            seconds=time.perf_counter() - self._started,
            processor_seconds=time.process_time() - self._processor_started,
        )


def _optimizers(model: LlamaForCausalLM, plan: TrainingPlan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    chosen = {id(matrix) for matrix in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        Muon(matrices, plan.matrix_learning_rate, plan.weight_decay),
        torch.optim.AdamW(
            rest, lr=plan.vector_learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]


def _rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.0, 1.0 - step / steps)
