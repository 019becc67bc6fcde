"""The roofline once more, one layer or head at a time, with every number written out: no curves, no tables."""

from __future__ import annotations

import math


def read_or_compute(size: float, operations: float, machine: dict) -> float:
    return max(size / machine["bandwidth"], operations / machine["flops"])


def all_reduce(size: float, devices: int, machine: dict) -> float:
    if devices == 1:
        return 0.0
    messages = 2 * math.ceil(math.log2(devices))
    return messages * machine["latency"] + 2 * (devices - 1) / devices * size / machine["link"]


def all_gather(size: float, devices: int, machine: dict) -> float:
    return all_reduce(size, devices, machine) / 2


def layer(model: dict, rows: int, batch: int, positions: int, devices: int, machine: dict) -> float:
    """One layer on each of `devices` that split it: `rows` rows in all, of `batch` sequences."""
    weights = model["layer"] / devices
    products = read_or_compute(machine["item"] * weights, 2 * rows * weights, machine)
    cached = batch * positions * model["cached"] / devices
    operations = 4 * rows * model["attention"] * positions / devices
    attention = read_or_compute(machine["item"] * cached, operations, machine)
    exchanged = 2 * all_reduce(rows * model["width"] * machine["item"], devices, machine)
    return products + attention + 10 * machine["kernel"] + exchanged


def logits(model: dict, columns: int, rows: int, devices: int, machine: dict) -> float:
    numbers = columns * model["width"] / devices
    product = read_or_compute(machine["item"] * numbers, 2 * rows * numbers, machine)
    return product + 4 * 4 * rows * columns / devices / machine["bandwidth"]


def head(model: dict, rows: int, devices: int, machine: dict) -> float:
    gathered = all_gather(4 * rows * model["vocabulary"], devices, machine)
    embedded = all_reduce(rows * model["width"] * machine["item"], devices, machine)
    return logits(model, model["vocabulary"], rows, devices, machine) + 4 * machine["kernel"] + gathered + embedded


def ar_step(model: dict, batch: int, context: int, devices: int, machine: dict) -> float:
    layers = model["layers"] * layer(model, batch, batch, context, devices, machine)
    return layers + head(model, batch, devices, machine)


def tick(
    model: dict,
    longest: int,
    stages: int,
    rows: int,
    batch: int,
    context: int,
    ticks: float,
    machine: dict,
    last: int | None = None,
) -> float:
    """A stage a device, full rows, exits that are the model's own head; the last stage may have fewer layers."""
    positions = context + stages * rows
    layers = longest * layer(model, batch * rows, batch, positions, 1, machine)
    exits = logits(model, model["vocabulary"], batch * rows, 1, machine)
    final = logits(model, model["vocabulary"], batch, 1, machine)
    commits = 1 - (1 - 1 / ticks) ** batch
    one = layers / longest
    # The last stage's device needs so long, the others so long.
    late = (longest if last is None else last) * one + final - (layers + exits)
    heads = exits + commits * (max(late, 0) + 4 * machine["kernel"])
    moved = machine["latency"] + batch * rows * model["width"] * machine["item"] / machine["link"]
    told = all_gather(8 * stages * batch * rows, stages, machine)
    return layers + heads + moved + told + (12 + 200) * machine["kernel"]
