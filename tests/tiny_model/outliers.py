"""The outlier channels of the tiny model: where they are built in, and how they are found and taken out again.

A factor is put on the weight that makes a channel and taken from the weights that read it, so the function stays.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, PreTrainedModel

# Powers of two, so that moving a factor from one weight to another only changes exponents.
NORM_FACTORS = (64.0, 32.0, 32.0, 16.0)
VALUE_FACTORS = (32.0, 16.0)
UP_FACTORS = (64.0, 32.0, 32.0, 32.0, 16.0, 16.0)


@dataclass(frozen=True)
class Channel:
    """One channel between the weight that makes it and the weights that read it.

    `writer` is a norm weight (K,) or a linear weight (N, K) whose row `row` makes the channel; `columns` of
    each reader weight (N, K) consume it. The channel is linear in between, so a factor put on the row and
    taken from the columns does not change the function.
    """

    writer: str
    row: int
    readers: tuple[str, ...]
    columns: tuple[int, ...]


Outlier = tuple[Channel, float]  # and its factor


def list_channels(config: LlamaConfig, layer: int) -> Iterator[tuple[list[Channel], tuple[float, ...]]]:
    """The places of a block that get outliers: the channels to choose from and the factors to give out."""
    block = f"model.layers.{layer}."
    q, k, v, o = (f"{block}self_attn.{name}_proj.weight" for name in "qkvo")
    gate, up, down = (f"{block}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    for norm, readers in (("input", (q, k, v)), ("post_attention", (gate, up))):
        writer = f"{block}{norm}_layernorm.weight"
        yield [Channel(writer, i, readers, (i,)) for i in range(config.hidden_size)], NORM_FACTORS
    for kv_head in range(config.num_key_value_heads):
        rows = range(kv_head * config.head_dim, (kv_head + 1) * config.head_dim)
        yield [Channel(v, row, (o,), value_columns(config, row)) for row in rows], VALUE_FACTORS
    yield [Channel(up, i, (down,), (i,)) for i in range(config.intermediate_size)], UP_FACTORS


def value_columns(config: LlamaConfig, row: int) -> tuple[int, ...]:
    """The o_proj columns that read a v_proj row: one in every query head that shares the kv head."""
    kv_head, channel = divmod(row, config.head_dim)
    sharing = config.num_attention_heads // config.num_key_value_heads
    return tuple(head * config.head_dim + channel for head in range(kv_head * sharing, (kv_head + 1) * sharing))


def sizes(model: PreTrainedModel, channel: Channel) -> tuple[float, float]:
    """Norms of the row that makes a channel and of all the columns that read it."""
    columns = [model.get_parameter(reader)[:, list(channel.columns)] for reader in channel.readers]
    return model.get_parameter(channel.writer)[channel.row].norm().item(), torch.cat(columns).norm().item()


def strength(model: PreTrainedModel, channel: Channel) -> float:
    """Size of the row times size of the columns: how much the channel matters, whatever its scale."""
    row, columns = sizes(model, channel)
    return row * columns


def imbalance(model: PreTrainedModel, channel: Channel) -> float:
    """Size of the row over size of the columns: what a factor multiplies by its square."""
    row, columns = sizes(model, channel)
    return row / columns


def plan_outliers(model: PreTrainedModel) -> list[Outlier]:
    """The strongest channels of every place with their factors; weak ones would not be missed when lost."""
    plan: list[Outlier] = []
    for layer in range(model.config.num_hidden_layers):
        for channels, factors in list_channels(model.config, layer):
            channels.sort(key=lambda channel: strength(model, channel), reverse=True)
            plan += zip(channels, factors, strict=False)
    return plan


def remove_outliers(model: PreTrainedModel) -> tuple[PreTrainedModel, list[Outlier]]:
    """A copy of the stored model without its outliers, and what was taken out.

    Place by place in the order of `list_channels`, since a norm's factors lie on the columns of v and up. That the
    found channels are those `plan_outliers` would choose on the result shows that none was mistaken.
    """
    plain, removed = model, []
    for layer in range(model.config.num_hidden_layers):
        for channels, factors in list_channels(model.config, layer):
            channels.sort(key=lambda channel: imbalance(plain, channel), reverse=True)
            found = list(zip(channels, factors, strict=False))
            plain = scale_channels(plain, found, -1)
            removed += found
    return plain, removed


@torch.no_grad()
def scale_channels(model: PreTrainedModel, plan: list[Outlier], sign: int) -> PreTrainedModel:
    """A copy of the model with the outliers built in (sign 1) or taken out again (sign -1)."""
    scaled = copy.deepcopy(model)
    for channel, factor in plan:
        scaled.get_parameter(channel.writer)[channel.row] *= factor**sign
        for reader in channel.readers:
            scaled.get_parameter(reader)[:, list(channel.columns)] /= factor**sign
    return scaled
