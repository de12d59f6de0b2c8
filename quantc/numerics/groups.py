"""Values for groups of weights: spread over the weights, summed over them, or laid out by column."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..spec import Groups


def spread_groups(values: torch.Tensor, groups: Groups, shape: tuple[int, int]) -> torch.Tensor:
    """Repeat per-group values (..., *groups.counts) over the weights of each group: (..., N, K)."""
    n, k = shape
    g = groups.length(shape)
    if groups.per_oc:
        return values.repeat_interleave(g, dim=-1)[..., :k]
    return values.repeat_interleave(g, dim=-2)[..., :n, :]


def by_group(
    weights: torch.Tensor,
    values: torch.Tensor,
    groups: Groups,
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Change contiguous weights (..., N, K) in place by the value of each one's group (..., *groups.counts).

    `change` has the weights of a group side by side where groups are full, so that nothing is spread.
    """
    n, k = weights.shape[-2:]
    g = groups.length((n, k))
    if groups.per_oc and k % g == 0:
        change(weights.view(*weights.shape[:-1], k // g, g), values[..., None])
    elif not groups.per_oc and n % g == 0:
        change(weights.view(*weights.shape[:-2], n // g, g, k), values[..., None, :])
    else:
        change(weights, spread_groups(values, groups, (n, k)))
    return weights


def sums_of_groups(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return sums of values (..., N, K) over the weights of each group, (..., *groups.counts)."""
    g = groups.length((values.shape[-2], values.shape[-1]))
    if groups.per_oc:
        return group_sums(values, g)
    return group_sums(values.transpose(-1, -2), g).transpose(-1, -2)


def group_sums(values: torch.Tensor, g: int) -> torch.Tensor:
    """Return (..., ceil(K/g)): sums over groups of g of the last dimension K."""
    if values.shape[-1] % g == 0:
        return values.unflatten(-1, (-1, g)).sum(-1)
    count = -(-values.shape[-1] // g)
    padded = torch.nn.functional.pad(values, (0, count * g - values.shape[-1]))
    return padded.unflatten(-1, (count, g)).sum(-1)


def to_groups(weight: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return (rows, G, g): a weight (N, K) group by group, the last group filled up with zeros."""
    along = weight if groups.per_oc else weight.T
    g = groups.length((weight.shape[0], weight.shape[1]))
    count = -(-along.shape[1] // g)
    return torch.nn.functional.pad(along, (0, count * g - along.shape[1])).reshape(along.shape[0], count, g)


def to_counts(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return values (rows, G), ordered as in `to_groups`, in the shape of groups.counts."""
    return (values if groups.per_oc else values.T).contiguous()


def importance_by_group(importance: torch.Tensor | None, weight: torch.Tensor, groups: Groups) -> torch.Tensor | None:
    """Return (G, g) for per_oc, where it repeats over output channels; a per_ic group has one input: it cancels."""
    if importance is None or not groups.per_oc:
        return None
    # Over a power of two near the largest: times squares of weights, energies of 1e-30 would vanish in float32.
    importance = importance.float() / torch.exp2(importance.max().clamp(min=1e-38).log2().round())
    return to_groups(importance.reshape(1, -1).expand(1, weight.shape[1]), groups)[0]


def by_column(values: torch.Tensor, groups: Groups, shape: tuple[int, int]) -> torch.Tensor:
    """Return (R, N): per-group values (*groups.counts) as columns of a weight use them, see `row_of_column`."""
    n, _ = shape
    if groups.per_oc:
        return values.T.contiguous()
    return values.T.repeat_interleave(groups.length(shape), dim=1)[:, :n].contiguous()


def row_of_column(groups: Groups, shape: tuple[int, int]) -> list[int]:
    """Return for every input channel the row of `by_column` that it uses."""
    g = groups.length(shape)
    return [channel // g if groups.per_oc else channel for channel in range(shape[1])]
