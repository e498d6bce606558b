"""The layers with weights of `_core`. For type checkers alone: there is no such module at run time.

Tensors are handed over as in `_core_kernels`.
"""

from collections.abc import Sequence
from typing import final

@final
class Linear:
    """`x @ weight.T + bias` on torch's own OpenMP threads where there are some.

    The weights are copied, laid out as the kernel wants them. A row's result depends on that row alone, to the bit.

    Args:
        shape: Outputs and inputs.
        dtype: `float32` or `bfloat16`, of the weights and of every tensor; sums are `float32`.
        weight_ptr: Address of `[outputs, inputs]`, read before this returns.
        bias_ptr: Address of `[outputs]`.
        portable: Whether to leave away what only some processors can.

    Raises:
        InvalidRequestError: A size is out of range; `key` names it.
        InternalError: There is no memory for the copy.
    """

    def __new__(
        cls,
        shape: tuple[int, int],
        dtype: str,
        weight_ptr: int,
        bias_ptr: int | None = None,
        *,
        portable: bool = False,
    ) -> Linear: ...
    def forward(self, count: int, input: tuple[int, int], output_ptr: int, threads: int) -> None:
        """Computes some rows.

        Args:
            count: How many.
            input: Address of `[count, inputs]`, and numbers from one row's inputs to the next one's.
            output_ptr: Where `[count, outputs]` goes.
            threads: On how many to compute.
        """

@final
class ExpertRouter:
    """Which experts of a mixture tokens go to, and with what weights, all in `float32`.

    Of equal experts it takes the first; one whose score is NaN comes after all others.

    Args:
        linear: Scores from inputs, a `float32` layer with an output for each expert.
        bias_ptr: Address of `float32[experts]`, read before this returns: added to the scores for the choice alone.
        picks: Experts of a token.
        is_sigmoid: Whether an expert's score is a sigmoid of its own; else all of them are one softmax.
        groups: Groups of equally many experts, and how many of them a token uses: those with the best expert, or with a
            bias with the best two together.
        is_normalised: Whether the weights of a token are made to add up to 1.
        scale: Multiplies them after that.

    Raises:
        InvalidRequestError: So many cannot be chosen, or the layer is of other numbers; `key` names what is wrong.
    """

    def __new__(
        cls,
        linear: Linear,
        bias_ptr: int | None,
        picks: int,
        *,
        is_sigmoid: bool,
        groups: tuple[int, int],
        is_normalised: bool,
        scale: float,
    ) -> ExpertRouter: ...
    def forward(
        self,
        dtype: str,
        count: int,
        input: tuple[int, int],
        weights_ptr: int,
        chosen_ptr: int,
        threads: int,
    ) -> None:
        """Chooses for some tokens.

        Args:
            dtype: `float32` or `bfloat16`, of the input.
            count: How many tokens.
            input: Address of `[count, inputs]`, and numbers from one token's inputs to the next one's.
            weights_ptr: Where `float32[count, picks]` goes.
            chosen_ptr: Where `int32[count, picks]` goes, best first.
            threads: On how many to compute.
        """

@final
class Experts:
    """Experts of a mixture: `down(act(gate(x)) * up(x))` of those that a token goes to, multiplied and added up.

    A token's result depends on that token and its picks alone, to the bit.

    Args:
        first: Number of the first one; the others follow.
        activation: `silu` or `gelu_pytorch_tanh`.
        layers: Of each expert `[2 * width, hidden]`, gates and values side by side, and `[hidden, width]`.

    Raises:
        InvalidRequestError: There are none, or they are not of one shape and dtype; `key` names what is wrong.
    """

    def __new__(
        cls, first: int, activation: str, layers: Sequence[tuple[Linear, Linear]]
    ) -> Experts: ...
    def forward(
        self,
        count: int,
        input_ptr: int,
        picks: tuple[int, int, int],
        output_ptr: int,
        threads: int,
    ) -> None:
        """Computes some tokens.

        Args:
            count: How many.
            input_ptr: Address of `[count, hidden]`, without gaps.
            picks: Addresses of `int32[count, picks]`, the numbers of each token's experts, of which those that are not
                here add nothing, and of `float32[count, picks]`, their weights; and how many picks.
            output_ptr: Where `[count, hidden]` goes.
            threads: On how many to compute.
        """
