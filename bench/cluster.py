#!/usr/bin/env python3
"""The cost of data parallelism at any size: the formulas of docs/distributed.md compared with a simulation.

  bench/cluster.py                       tables for the tutorial's model and for one with 10^9 parameters
  bench/cluster.py --parameters 3e8 --forward 0.2 --backward 0.4

The simulation passes every message of every ring between neighbors and draws every failure; the formulas do neither.
Only needs Python.
"""

import argparse
import functools
import math
import random

BUCKET = 25 * 2**20  # bytes, as in framework/src/collective/flat.rs


def ring(ranks, size, latency, bandwidth):
    """Seconds for an all-reduce over a ring, by the formula."""
    return 2 * (ranks - 1) * (latency + size / ranks / bandwidth)


@functools.cache
def simulated_ring(ranks, size, latency, bandwidth, start=0.0):
    """Like `ring`, simulated: in each round every rank sends a part to the next rank and waits for the previous one."""
    ready = [start] * ranks
    sending = latency + size / ranks / bandwidth
    for _ in range(2 * (ranks - 1)):
        sent = [time + sending for time in ready]
        ready = [max(sent[rank], sent[rank - 1]) for rank in range(ranks)]
    return max(ready)


def buckets(size):
    count = max(1, math.ceil(size / BUCKET))
    return [size / count] * count


def levels(ranks, per_node):
    """Ring sizes: within a node, and between nodes."""
    return (min(ranks, per_node), max(1, ranks // per_node))


class Cluster:
    def __init__(self, a):
        self.a = a

    def sum(self, ranks, size, one_ring=ring):
        """Seconds for an all-reduce in two levels."""
        inside, nodes = levels(ranks, self.a.per_node)
        seconds = one_ring(inside, size, self.a.latency, self.a.node_bandwidth) if inside > 1 else 0.0
        return seconds + (one_ring(nodes, size / inside, self.a.latency, self.a.bandwidth) if nodes > 1 else 0.0)

    def step(self, ranks, parameters, forward, backward, overlap):
        """Seconds for a step, by the formula."""
        parts = [self.sum(ranks, part) for part in buckets(4 * parameters)]
        if not overlap:
            return forward + backward + sum(parts)
        first = backward / len(parts)
        return forward + max(backward + parts[-1], first + sum(parts))

    def simulated_step(self, ranks, parameters, forward, backward, overlap):
        """Like `step`, simulated: each bucket waits for its gradients and for the previous bucket."""
        parts = buckets(4 * parameters)
        free = forward + (0.0 if overlap else backward)
        for i, part in enumerate(parts):
            ready = forward + backward * (i + 1) / len(parts) if overlap else free
            free = max(free, ready) + self.sum(ranks, part, simulated_ring)
        return max(free, forward + backward)

    def failures(self, ranks, parameters):
        """The best checkpoint interval in seconds, and the share of time lost to failures, by the formulas."""
        a = self.a
        write, mean = 12 * parameters / a.disk, a.mean_time_to_failure / ranks
        return math.sqrt(2 * write * mean), math.sqrt(2 * write / mean) + a.restart / mean

    def simulated_loss(self, ranks, parameters, draws):
        """The share of time lost with random failures and checkpoints that block training, simulated."""
        a = self.a
        write, mean = 12 * parameters / a.disk, a.mean_time_to_failure / ranks
        interval = math.sqrt(2 * write * mean)
        chance = random.Random(1)
        good = total = 0.0
        for _ in range(draws):
            lasts = chance.expovariate(1 / mean)
            saved = int(lasts // (interval + write))
            good += saved * interval
            total += lasts + a.restart
        return 1 - good / total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parameters", type=float, help="of the model; without it, two models")
    add("--forward", type=float, default=0.15, help="seconds of a forward pass on one rank")
    add("--backward", type=float, default=0.30, help="seconds of a backward pass on one rank")
    add("--per-node", type=int, default=8, help="ranks in a node")
    add("--bandwidth", type=float, default=25e9, help="bytes a second between nodes, for each rank")
    add("--node-bandwidth", type=float, default=200e9, help="bytes a second inside a node, for each rank")
    add("--latency", type=float, default=10e-6, help="seconds before a message's first byte")
    add("--disk", type=float, default=1e9, help="bytes a second of checkpoints")
    add("--mean-time-to-failure", type=float, default=5 * 365 * 86400.0, help="seconds, of one rank")
    add("--restart", type=float, default=60.0, help="seconds from a failure to the next step")
    add("--draws", type=int, default=20000, help="failures that are drawn")
    a = parser.parse_args()
    cluster = Cluster(a)
    worst = 0.0
    for parameters in [a.parameters] if a.parameters else [1.04e6, 1e9]:
        print(f"{parameters:.3g} parameters, {4 * parameters / 1e6:.0f} MB of gradients, {12 * parameters / 1e6:.0f} MB a checkpoint")
        print("ranks    step s    efficiency    with overlap    save every    lost to failures    simulated: the same four")
        for ranks in [1, 2, 8, 64, 512, 1024, 4096]:
            run = (ranks, parameters, a.forward, a.backward)
            formula = [cluster.step(*run, overlap) for overlap in (False, True)]
            formula += [cluster.failures(ranks, parameters)[1]]
            simulated = [cluster.simulated_step(*run, overlap) for overlap in (False, True)]
            simulated += [cluster.simulated_loss(ranks, parameters, a.draws)]
            worst = max([worst] + [abs(s / f - 1) for f, s in zip(formula[:2], simulated[:2])])
            worst = max(worst, abs(simulated[2] - formula[2]) * 10)  # for shares, 0.1 percentage points count as 1 %
            alone = a.forward + a.backward
            every = cluster.failures(ranks, parameters)[0]
            print(
                f"{ranks:5}    {formula[0]:6.3f}    {alone / formula[0]:9.1%}     {alone / formula[1]:9.1%}    "
                f"{every / 60:7.1f} min    {formula[2]:15.2%}     {simulated[0]:6.3f} {alone / simulated[0]:6.1%} "
                f"{alone / simulated[1]:6.1%} {simulated[2]:6.2%}"
            )
        print()
    print(f"formulas and simulation differ by at most {worst:.1%}")
    if worst > 0.05:
        raise SystemExit("that is more than 5 %")


if __name__ == "__main__":
    main()
