"""LoRAX's strategies, tensor by tensor: those of `lorax_server.utils.merges.strategies`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lorax_async.errors import UsageError
from lorax_async.io.merging import combine_weighted
from lorax_async.merge import MajoritySign


class MergeStrategy(ABC):
    """One tensor out of several of one shape."""

    @abstractmethod
    def merge(self, task_tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """In float32; `weights` are float32 `[len(task_tensors)]`."""


class LinearMerge(MergeStrategy):
    """The weighted sum: right for whole deltas, never for A and B by themselves."""

    def merge(self, task_tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        return _combined(task_tensors, weights)


@dataclass(frozen=True, slots=True)
class TiesMerge(MergeStrategy):
    """Keep the largest, elect a sign for each weight, and take the mean of those that have it."""

    density: float
    majority_sign_method: MajoritySign = "total"

    def merge(self, task_tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        sign = self.majority_sign_method
        return _combined(task_tensors, weights, density=self.density, sign=sign)


@dataclass(frozen=True, slots=True)
class DareLinearMerge(MergeStrategy):
    """Drop at random, divide the others by the density, and add up."""

    density: float
    generator: torch.Generator

    def merge(self, task_tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        return _combined(task_tensors, weights, density=self.density, generator=self.generator)


@dataclass(frozen=True, slots=True)
class DareTiesMerge(MergeStrategy):
    """Drop at random, divide the others by the density, and go on as `TiesMerge`."""

    density: float
    generator: torch.Generator
    majority_sign_method: MajoritySign = "total"

    def merge(self, task_tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        sign, generator = self.majority_sign_method, self.generator
        return _combined(
            task_tensors, weights, density=self.density, sign=sign, generator=generator
        )


strategy_registry: Mapping[str, type[MergeStrategy]] = {
    "linear": LinearMerge,
    "ties": TiesMerge,
    "dare_linear": DareLinearMerge,
    "dare_ties": DareTiesMerge,
}


def _combined(
    tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    *,
    density: float = 1.0,
    sign: MajoritySign | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    if not 0 < density <= 1:
        raise UsageError(f"a density is above 0 and up to 1, not {density!r}")
    return combine_weighted(
        [tensor.float() for tensor in tensors],
        weights.float(),
        drops=generator is not None,
        sign=sign,
        density=density,
        generator=generator,
    )
