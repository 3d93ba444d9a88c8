"""Layout distributions: what the layouts of training, of evaluation and of a checkpoint's promise are drawn from.

A distribution partitions *spans* (runs of tokens that are not given) into blocks. It draws block starts for many
spans at once, and it can say exactly how often each configuration (p, w) occurs: p tokens of the span before the
block, w tokens in it. Support and token shares follow from that table, ends of spans included.

Users give *token shares*: `uniform` puts equal shares of the tokens in blocks of each size, `log_uniform` equal shares
in each octave. Lengths are therefore drawn with probability proportional to share / size.

Sources: fixed grids are BD3-LM (arXiv 2503.09573); per-sequence mixtures of grids BlockGen (2606.02241); a distribution
over (prefix, window) Adaptive Block Diffusion (2606.29275). `scale_mixture` is ours.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from blockdiff.own_layouts import FORBID_EXTRA as FORBID_EXTRA
from blockdiff.own_layouts import LayoutDistribution as LayoutDistribution
from blockdiff.own_layouts import Own
from blockdiff.partitions import (
    cut_counts,
    cut_table,
    gauss_legendre,
    geometric_draw,
    geometric_lengths,
    grid_counts,
    grids,
    independent_draw,
    independent_lengths,
    random_offset_table,
    random_offsets,
    tabulate,
)


@dataclass(frozen=True)
class Fixed(LayoutDistribution):
    """Blocks of `size`; the first one ends at `offset` (0: the grid starts with the span). BD3-LM."""

    size: int
    offset: int = 0
    kind: Literal["fixed"] = "fixed"

    def __post_init__(self) -> None:
        _check_size(self.size)
        if self.offset < 0:
            raise ValueError(f"layout fixed: offset {self.offset} is negative; give 0 or more")

    @property
    def largest_named(self) -> int:
        return self.size

    def draw(self, lengths: Tensor, generator: Generator) -> Tensor:
        return grids(torch.full_like(lengths, self.size), torch.full_like(lengths, self.offset), int(lengths.max()))

    def configurations(self, length: int) -> Tensor:
        starts = grids(torch.tensor([self.size]), torch.tensor([self.offset]), length)
        return tabulate(starts, torch.ones(1, dtype=torch.float64))

    def block_counts(self, length: int) -> Tensor:
        return grid_counts(self.size, self.offset % self.size, length)


@dataclass(frozen=True)
class RandomOffset(LayoutDistribution):
    """Blocks of `size` on a grid whose phase is uniform in each span: every p is trained at this one size."""

    size: int
    kind: Literal["random_offset"] = "random_offset"

    def __post_init__(self) -> None:
        _check_size(self.size)

    @property
    def largest_named(self) -> int:
        return self.size

    def draw(self, lengths: Tensor, generator: Generator) -> Tensor:
        sizes = torch.full_like(lengths, self.size)
        return grids(sizes, random_offsets(sizes, generator), int(lengths.max()))

    def configurations(self, length: int) -> Tensor:
        return random_offset_table(self.size, length)

    def block_counts(self, length: int) -> Tensor:
        counts = torch.zeros(length + 1, dtype=torch.float64)
        for offset in range(self.size):
            counts += grid_counts(self.size, offset, length) / self.size
        return counts


@dataclass(frozen=True)
class Mixture(LayoutDistribution):
    """Each span draws one block size, `shares` {size: token share}, and lies on its aligned grid. BlockGen."""

    shares: dict[int, float]
    kind: Literal["mixture"] = "mixture"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", _normalised("mixture", self.shares))

    @property
    def largest_named(self) -> int:
        return max(self.shares)

    def draw(self, lengths: Tensor, generator: Generator) -> Tensor:
        sizes = _choose(self.shares, len(lengths), generator).to(lengths)
        return grids(sizes, torch.zeros_like(sizes), int(lengths.max()))

    def configurations(self, length: int) -> Tensor:
        sizes = torch.tensor(list(self.shares))
        weight = torch.tensor(list(self.shares.values()), dtype=torch.float64)
        return tabulate(grids(sizes, torch.zeros_like(sizes), length), weight)

    def block_counts(self, length: int) -> Tensor:
        counts = torch.zeros(length + 1, dtype=torch.float64)
        for size, share in self.shares.items():
            counts += share * grid_counts(size, 0, length)
        return counts


@dataclass(frozen=True)
class _IndependentLengths(LayoutDistribution):
    """Independent block lengths 1..`max_size`, each drawn with a weight of its own."""

    max_size: int

    def __post_init__(self) -> None:
        _check_size(self.max_size)

    @property
    def largest_named(self) -> int:
        return self.max_size

    @property
    @abstractmethod
    def token_weights(self) -> Tensor:
        """Share of the tokens that blocks of size 1..max_size have in a long text, up to a factor."""

    @property
    def _length_weights(self) -> Tensor:
        return self.token_weights / torch.arange(1, self.max_size + 1, dtype=torch.float64)

    def draw(self, lengths: Tensor, generator: Generator) -> Tensor:
        return independent_draw(self._length_weights, lengths, generator)

    def configurations(self, length: int) -> Tensor:
        return cut_table(*independent_lengths(self._length_weights, length))

    def block_counts(self, length: int) -> Tensor:
        return cut_counts(*independent_lengths(self._length_weights, length))


@dataclass(frozen=True)
class Uniform(_IndependentLengths):
    """Independent block lengths 1..`max_size`, every size with the same share of the tokens."""

    kind: Literal["uniform"] = "uniform"

    @property
    def token_weights(self) -> Tensor:
        return torch.ones(self.max_size, dtype=torch.float64)


@dataclass(frozen=True)
class LogUniform(_IndependentLengths):
    """Independent block lengths 1..`max_size`, every octave of sizes with about the same share of the tokens."""

    kind: Literal["log_uniform"] = "log_uniform"

    @property
    def token_weights(self) -> Tensor:
        return 1 / torch.arange(1, self.max_size + 1, dtype=torch.float64)


@dataclass(frozen=True)
class Geometric(LayoutDistribution):
    """Independent geometric block lengths: a block ends after each token with probability 1 / `mean`."""

    mean: float
    kind: Literal["geometric"] = "geometric"

    def __post_init__(self) -> None:
        if not 1 <= self.mean < float("inf"):
            raise ValueError(f"layout geometric: mean block length {self.mean} is not possible; give 1 or more")

    def draw(self, lengths: Tensor, generator: Generator) -> Tensor:
        rate = torch.full((len(lengths), 1), 1 / self.mean, dtype=torch.float64)
        return geometric_draw(rate, int(lengths.max()), generator).to(lengths.device)

    def configurations(self, length: int) -> Tensor:
        return cut_table(*geometric_lengths(1 / self.mean, length))

    def block_counts(self, length: int) -> Tensor:
        return cut_counts(*geometric_lengths(1 / self.mean, length))


@dataclass(frozen=True)
class ScaleMixture(LayoutDistribution):
    """Every scale at once: the default for a model that should be good at every block size.

    Each span draws a mean block length log-uniformly from 1 to `max_size` and then geometric lengths; with the
    probabilities `atoms` {size: token share} it draws instead a grid of that size at a random offset, so that the
    sizes that will be deployed are trained often.
    """

    max_size: int
    atoms: dict[int, float] = field(default_factory=dict)
    kind: Literal["scale_mixture"] = "scale_mixture"

    def __post_init__(self) -> None:
        _check_size(self.max_size)
        object.__setattr__(self, "atoms", {int(size): float(share) for size, share in self.atoms.items()})
        for size, share in self.atoms.items():
            _check_size(size)
            if not share > 0:
                raise ValueError(f"layout scale_mixture: atom {size} has share {share}; give a positive share")
        if sum(self.atoms.values()) > 1:
            raise ValueError(f"layout scale_mixture: the atoms' shares add up to {sum(self.atoms.values())}, above 1")

    @property
    def largest_named(self) -> int:
        return max([self.max_size, *self.atoms])

    def _with_scales(self) -> dict[int, float]:
        return {0: max(0.0, 1.0 - sum(self.atoms.values())), **self.atoms}

    def draw(self, lengths: Tensor, generator: Generator) -> Tensor:
        width = int(lengths.max())
        size = _choose(self._with_scales(), len(lengths), generator).to(lengths)
        octave = torch.rand(len(lengths), 1, dtype=torch.float64, generator=generator)
        scales = geometric_draw(self.max_size**-octave, width, generator).to(lengths.device)
        grid_size = size.clamp(min=1)
        atoms = grids(grid_size, random_offsets(grid_size, generator), width)
        return torch.where((size == 0)[:, None], scales, atoms)

    def configurations(self, length: int) -> Tensor:
        table = torch.zeros(length, length + 1, dtype=torch.float64)
        for rate, share in self._rates():
            table += share * cut_table(*geometric_lengths(rate, length))
        for size, share in self.atoms.items():
            table += share * random_offset_table(size, length)
        return table

    def block_counts(self, length: int) -> Tensor:
        counts = torch.zeros(length + 1, dtype=torch.float64)
        for rate, share in self._rates():
            counts += share * cut_counts(*geometric_lengths(rate, length))
        for size, share in self.atoms.items():
            counts += share * RandomOffset(size).block_counts(length)
        return counts

    def _rates(self) -> list[tuple[float, float]]:
        """The continuum of scales as geometric rates with their shares (quadrature)."""
        nodes, weights = gauss_legendre(64)
        rates, shares = self.max_size**-nodes, weights * self._with_scales()[0]
        return list(zip(rates.tolist(), shares.tolist(), strict=True))


@dataclass(frozen=True)
class AdaptiveMixture(LayoutDistribution):
    """Grids at random offsets whose token shares follow the measured excess of each size (`curriculum.ShareSearch`).

    Each span draws one of the sizes. `shares` {size: token share} are those to begin with (empty: equal ones) and, in a
    checkpoint, their mean over the training. Every `every` steps each size's bound is measured on `batches` batches of
    held-out rows; a share `floor` stays spread evenly, so that every size keeps its support. `reference` {size: nats}
    are the bounds that the excess is counted from, such as those of specialists; empty: the model's own value at the
    smallest size, which a perfect model has at every size (the chain rule holds in any order).
    """

    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    shares: dict[int, float] = field(default_factory=dict)
    reference: dict[int, float] = field(default_factory=dict)
    every: int = 100
    batches: int = 2
    floor: float = 0.2
    kind: Literal["adaptive_mixture"] = "adaptive_mixture"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(sorted(int(size) for size in self.sizes)))
        if len(set(self.sizes)) < max(2, len(self.sizes)):
            raise ValueError(f"layout adaptive_mixture: sizes {self.sizes}; give two or more different ones")
        for size in self.sizes:
            _check_size(size)
        shares = _normalised("adaptive_mixture", self.shares or dict.fromkeys(self.sizes, 1.0))
        object.__setattr__(self, "shares", shares)
        object.__setattr__(self, "reference", {int(size): float(nats) for size, nats in self.reference.items()})
        for name in ("shares", "reference"):
            known = getattr(self, name)
            if known and set(known) != set(self.sizes):
                raise ValueError(f"layout adaptive_mixture: {name} are of {sorted(known)}, the sizes {self.sizes}")
        if self.every < 1 or self.batches < 1 or not 0 < self.floor <= 1:
            raise ValueError("layout adaptive_mixture: every and batches must be 1 or more, floor in (0, 1]")

    @property
    def largest_named(self) -> int:
        return self.sizes[-1]

    def draw(self, lengths: Tensor, generator: Generator) -> Tensor:
        sizes = _choose(self.shares, len(lengths), generator).to(lengths)
        return grids(sizes, random_offsets(sizes, generator), int(lengths.max()))

    def configurations(self, length: int) -> Tensor:
        table = torch.zeros(length, length + 1, dtype=torch.float64)
        for size, share in self.shares.items():
            table += share * random_offset_table(size, length)
        return table

    def block_counts(self, length: int) -> Tensor:
        counts = torch.zeros(length + 1, dtype=torch.float64)
        for size, share in self.shares.items():
            counts += share * RandomOffset(size).block_counts(length)
        return counts


@dataclass(frozen=True)
class Full(LayoutDistribution):
    """One block over the whole span: masked diffusion (MDLM, LLaDA)."""

    kind: Literal["full"] = "full"

    def draw(self, lengths: Tensor, generator: Generator) -> Tensor:
        starts = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.bool, device=lengths.device)
        starts[:, 0] = True
        return starts

    def configurations(self, length: int) -> Tensor:
        return Fixed(length).configurations(length)

    def block_counts(self, length: int) -> Tensor:
        return Fixed(length).block_counts(length)


@dataclass(frozen=True)
class AR(LayoutDistribution):
    """Blocks of one token: an autoregressive model."""

    kind: Literal["ar"] = "ar"

    def draw(self, lengths: Tensor, generator: Generator) -> Tensor:
        return Fixed(1).draw(lengths, generator)

    def configurations(self, length: int) -> Tensor:
        return Fixed(1).configurations(length)

    def block_counts(self, length: int) -> Tensor:
        return Fixed(1).block_counts(length)


AnyLayout = (
    Fixed | RandomOffset | Mixture | Uniform | LogUniform | Geometric | ScaleMixture | AdaptiveMixture | Full | AR | Own
)
DISTRIBUTIONS: dict[str, type[LayoutDistribution]] = {
    str(cls.__dataclass_fields__["kind"].default): cls for cls in AnyLayout.__args__
}


def from_dict(spec: dict[str, Any]) -> LayoutDistribution:
    """The distribution that `asdict` of one wrote; raises ValueError for an unknown kind."""
    if spec.get("kind") not in DISTRIBUTIONS:
        raise ValueError(f"layout kind {spec.get('kind')!r} is unknown; known: {', '.join(DISTRIBUTIONS)}")
    return DISTRIBUTIONS[spec["kind"]](**spec)


def to_dict(distribution: LayoutDistribution) -> dict[str, Any]:
    """A JSON-ready description of the distribution, read back by `from_dict`."""
    assert is_dataclass(distribution)
    return asdict(distribution)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"block size {size} is not possible; give 1 or more")


def _normalised(kind: str, shares: dict[Any, float]) -> dict[int, float]:
    if not shares or not all(0 < share < float("inf") for share in shares.values()):
        raise ValueError(f"layout {kind}: shares {shares} must be positive, one for each block size")
    total = sum(shares.values())
    total = 1.0 if abs(total - 1) < 1e-9 else total  # what was normalised once stays as it is, to the last digit
    result = {int(size): float(share) / total for size, share in shares.items()}
    for size in result:
        _check_size(size)
    return result


def _choose(shares: dict[int, float], count: int, generator: Generator) -> Tensor:
    """`count` independent draws of a key, with its share as probability."""
    probabilities = torch.tensor(list(shares.values()), dtype=torch.float64)
    picks = torch.multinomial(probabilities, count, replacement=True, generator=generator)
    return torch.tensor(list(shares))[picks]
