"""A training step of a recurrent model in PyTorch, of the form and size in configs/MODEL.toml: prints its time and memory
as one JSON line.

The models are written from their equations, like the Rust ones, and operation by operation, as PyTorch code usually is:
one convolution per input of a cell, whose output is split into gates. Parameters that the reference creates and never
uses are left out. Frames are random numbers, generated before the first step, so only PyTorch is timed; all frames beyond
the given ones are the model's own predictions.
"""

import argparse

import pytorch_step
import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, kernel):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)


class ConvLstmCell(nn.Module):
    def __init__(self, inputs, n, k):
        super().__init__()
        self.x, self.h = conv(inputs, 4 * n, k), conv(n, 4 * n, k)

    def forward(self, x, h, c, m):
        i, f, g, o = (self.x(x) + self.h(h)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c, m


class StLstmCell(nn.Module):
    def __init__(self, inputs, n, k):
        super().__init__()
        self.x, self.h, self.m = conv(inputs, 7 * n, k), conv(n, 4 * n, k), conv(n, 3 * n, k)
        self.o, self.last = conv(2 * n, n, k), conv(2 * n, n, 1)
        self.increments = None

    def forward(self, x, h, c, m):
        ix, fx, gx, iix, ffx, ggx, ox = self.x(x).chunk(7, 1)
        ih, fh, gh, oh = self.h(h).chunk(4, 1)
        im, fm, gm = self.m(m).chunk(3, 1)
        taken = torch.sigmoid(ix + ih) * torch.tanh(gx + gh)
        taken_m = torch.sigmoid(iix + im) * torch.tanh(ggx + gm)
        self.increments = taken, taken_m
        c = torch.sigmoid(fx + fh + 1) * c + taken
        m = torch.sigmoid(ffx + fm + 1) * m + taken_m
        both = torch.cat([c, m], 1)
        return torch.sigmoid(ox + oh + self.o(both)) * torch.tanh(self.last(both)), c, m


class CausalCell(nn.Module):
    def __init__(self, inputs, n, k):
        super().__init__()
        self.x, self.h, self.c = conv(inputs, 7 * n, k), conv(n, 4 * n, k), conv(n, 3 * n, k)
        self.m, self.c2m, self.om, self.last = conv(n, 3 * n, k), conv(n, 4 * n, k), conv(n, n, k), conv(2 * n, n, 1)

    def forward(self, x, h, c, m):
        ix, fx, gx, iix, ffx, ggx, ox = self.x(x).chunk(7, 1)
        ih, fh, gh, oh = self.h(h).chunk(4, 1)
        ic, fc, gc = self.c(c).chunk(3, 1)
        im, fm, mm = self.m(m).chunk(3, 1)
        c = torch.sigmoid(fx + fh + fc + 1) * c + torch.sigmoid(ix + ih + ic) * torch.tanh(gx + gh + gc)
        ic, gc, fc, oc = self.c2m(c).chunk(4, 1)
        m = torch.sigmoid(ffx + fm + fc + 1) * torch.tanh(mm) + torch.sigmoid(iix + im + ic) * torch.tanh(ggx + gc)
        o = torch.tanh(ox + oh + oc + self.om(m))
        return o * torch.tanh(self.last(torch.cat([c, m], 1))), c, m


class Highway(nn.Module):
    def __init__(self, n, k):
        super().__init__()
        self.x, self.z = conv(n, 2 * n, k), conv(n, 2 * n, k)

    def forward(self, x, z):
        p, u = (self.x(x) + self.z(z)).chunk(2, 1)
        u = torch.sigmoid(u)
        return u * torch.tanh(p) + (1 - u) * z


class PeepholeCell(nn.Module):
    def __init__(self, n, k, size):
        super().__init__()
        self.x, self.h = conv(n, 4 * n, k), conv(n, 4 * n, k)
        self.before = nn.Parameter(torch.zeros(2 * n, size, size))
        self.after = nn.Parameter(torch.zeros(n, size, size))

    def forward(self, x, h, c):
        ip, fp = (c.repeat(1, 2, 1, 1) * self.before).chunk(2, 1)
        ih, gh, fh, oh = self.h(h).chunk(4, 1)
        ix, gx, fx, ox = self.x(x).chunk(4, 1)
        c = torch.sigmoid(fh + fx + fp + 1) * c + torch.sigmoid(ih + ix + ip) * torch.tanh(gh + gx)
        return torch.sigmoid(oh + ox + c * self.after) * torch.tanh(c), c


class MimBlock(nn.Module):
    def __init__(self, n, k, size):
        super().__init__()
        self.t, self.s, self.x, self.last = conv(n, 3 * n, k), conv(n, 4 * n, k), conv(n, 4 * n, k), conv(2 * n, n, 1)
        self.stays = PeepholeCell(n, k, size)

    def forward(self, x, change, h, c, m, staying):
        it, gt, ot = self.t(h).chunk(3, 1)
        im, gm, fm, om = self.s(m).chunk(4, 1)
        ix, gx, fx, ox = self.x(x).chunk(4, 1)
        m = torch.sigmoid(fx + fm + 1) * m + torch.sigmoid(ix + im) * torch.tanh(gx + gm)
        c, staying = self.stays(change, c, staying.detach())
        c = c + torch.sigmoid(ix + it) * torch.tanh(gx + gt)
        y = self.last(torch.cat([c, m], 1))
        return torch.sigmoid(ox + ot + om) * torch.tanh(y), c, m, staying


class Stack(nn.Module):
    """Layers of one kind of cell, each with its own h and c, one shared memory, and a 1x1 convolution that produces frames."""

    def __init__(self, cell, channels, n, k, layers, highway=False, decouple=False):
        super().__init__()
        self.cells = nn.ModuleList([cell(n if layer else channels, n, k) for layer in range(layers)])
        self.highway = Highway(n, k) if highway else None
        self.adapter = conv(n, n, 1) if decouple else None
        self.last, self.n = conv(n, channels, 1), n

    def start(self, frame):
        zeros = frame.new_zeros(frame.shape[0], self.n, *frame.shape[2:])
        self.h, self.c = [zeros] * len(self.cells), [zeros] * len(self.cells)
        self.m, self.z, self.unlike = zeros, zeros, []

    def step(self, x):
        for layer, cell in enumerate(self.cells):
            self.h[layer], self.c[layer], self.m = cell(x, self.h[layer], self.c[layer], self.m)
            x = self.h[layer]
            if self.highway and layer == 0:
                x = self.z = self.highway(x, self.z)
            if self.adapter:
                pair = [F.normalize(self.adapter(delta).flatten(2), dim=2) for delta in cell.increments]
                self.unlike.append(F.cosine_similarity(*pair, dim=2).abs().mean())
        return self.last(x)

    def extra_loss(self):
        return 0.1 * torch.stack(self.unlike).mean() if self.adapter else 0


class Mim(nn.Module):
    def __init__(self, channels, n, k, layers, size):
        super().__init__()
        self.lowest = StLstmCell(channels, n, k)
        self.blocks = nn.ModuleList([MimBlock(n, k, size) for _ in range(layers - 1)])
        self.changes = nn.ModuleList([PeepholeCell(n, k, size) for _ in range(layers - 1)])
        self.last, self.n = conv(n, channels, 1), n

    def start(self, frame):
        zeros = frame.new_zeros(frame.shape[0], self.n, *frame.shape[2:])
        self.h = self.c = self.m = zeros
        self.states = [(zeros, zeros, zeros) for _ in self.blocks]
        self.differences = [(zeros, zeros) for _ in self.changes]
        self.first = True

    def step(self, x):
        before = self.h
        self.h, self.c, self.m = self.lowest(x, self.h, self.c, self.m)
        if not self.first:
            change = self.h - before
            for layer, cell in enumerate(self.changes):
                self.differences[layer] = cell(change, *self.differences[layer])
                change = self.differences[layer][0]
        self.first = False
        x = self.h
        for layer, block in enumerate(self.blocks):
            h, c, staying = self.states[layer]
            h, c, self.m, staying = block(x, self.differences[layer][0], h, c, self.m, staying)
            self.states[layer] = h, c, staying
            x = h
        return self.last(x)

    def extra_loss(self):
        return 0


class EideticCell(nn.Module):
    """States are (B, N, 2, H, W); convolutions read both depths, and their result is repeated at both."""

    def __init__(self, inputs, n, k, size):
        super().__init__()
        deep = lambda inputs, outputs: nn.Conv3d(inputs, outputs, (2, k, k), padding=(0, k // 2, k // 2), bias=False)
        self.x, self.h, self.m = deep(inputs, 7 * n), deep(n, 4 * n), deep(n, 4 * n)
        self.new_c, self.new_m = deep(n, n), deep(n, n)
        self.last = nn.Conv3d(2 * n, n, 1, bias=False)
        self.norm = nn.LayerNorm([n, 2, size, size])

    def forward(self, x, h, c, m, past):
        fill = lambda y: F.interpolate(y, size=(2, *y.shape[3:]), mode="nearest")
        ix, gx, rx, ox, iix, ggx, ffx = fill(self.x(x)).chunk(7, 1)
        ih, gh, rh, oh = fill(self.h(h)).chunk(4, 1)
        im, fm, gm, mm = fill(self.m(m)).chunk(4, 1)
        asked = torch.sigmoid(rx + rh).reshape(x.shape[0], -1, h.shape[1])
        past = past.reshape(x.shape[0], -1, h.shape[1])
        recalled = (torch.softmax(asked @ past.transpose(1, 2), -1) @ past).reshape(c.shape)
        c = self.norm(c + recalled) + torch.sigmoid(ix + ih) * torch.tanh(gx + gh)
        new = torch.sigmoid(ffx + fm + 1) * torch.tanh(mm) + torch.sigmoid(iix + im) * torch.tanh(ggx + gm)
        o = torch.tanh(ox + oh + fill(self.new_c(c)) + fill(self.new_m(new)))
        return torch.tanh(self.last(torch.cat([c, new], 1))) * torch.sigmoid(o), c


class E3d(nn.Module):
    def __init__(self, channels, n, k, layers, size):
        super().__init__()
        self.cells = nn.ModuleList([EideticCell(n if layer else channels, n, k, size) for layer in range(layers)])
        self.last, self.n = nn.Conv3d(n, channels, (2, 1, 1), bias=False), n

    def start(self, frame):
        zeros = frame.new_zeros(frame.shape[0], self.n, 2, *frame.shape[2:])
        self.h, self.c = [zeros] * len(self.cells), [zeros] * len(self.cells)
        self.m, self.past, self.before = zeros, [None] * len(self.cells), torch.zeros_like(frame)

    def step(self, frame):
        x = torch.stack([self.before, frame], 2)
        self.before = frame
        for layer, cell in enumerate(self.cells):
            c = self.c[layer]
            self.past[layer] = c if self.past[layer] is None else torch.cat([self.past[layer], c], 1)
            self.h[layer], self.c[layer] = cell(x, self.h[layer], c, self.m, self.past[layer])
            x = self.h[layer]
        return self.last(x).squeeze(2)

    def extra_loss(self):
        return 0


class MauCell(nn.Module):
    def __init__(self, n, k, size):
        super().__init__()
        part = lambda outputs: nn.Sequential(
            nn.Conv2d(n, outputs, k, padding=k // 2), nn.LayerNorm([outputs, size, size]))
        self.t_next, self.s_next, self.t, self.s = part(n), part(n), part(3 * n), part(3 * n)

    def forward(self, t, s, ts, ss):
        size = s[0].numel()
        weights = torch.softmax((torch.stack(ss) * self.s_next(s)).sum((2, 3, 4)) / size**0.5, 0)
        trend = (torch.stack(ts) * weights[..., None, None, None]).sum(0)
        keep = torch.sigmoid(self.t_next(t))
        tg, tt, ts = self.t(t * keep + (1 - keep) * trend).chunk(3, 1)
        sg, st, ss = self.s(s).chunk(3, 1)
        tg, sg = torch.sigmoid(tg), torch.sigmoid(sg)
        return tg * tt + (1 - tg) * st, sg * ss + (1 - sg) * ts


class Mau(nn.Module):
    def __init__(self, channels, n, k, layers, size, reduction, window=5):
        super().__init__()
        halvings = range(reduction.bit_length() - 1)
        leak = lambda layer: nn.Sequential(layer, nn.LeakyReLU(0.2))
        halve = lambda: nn.Conv2d(n, n, 3, stride=2, padding=1)
        double = lambda: nn.ConvTranspose2d(n, n, 3, stride=2, padding=1, output_padding=1)
        self.encoder = nn.Sequential(leak(nn.Conv2d(channels, n, 1)), *(leak(halve()) for _ in halvings))
        self.cells = nn.ModuleList([MauCell(n, k, size // reduction) for _ in range(layers)])
        decoder = [double() if index == halvings[-1] else leak(double()) for index in halvings]
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(n, channels, 1))
        self.n, self.window, self.reduction = n, window, reduction

    def start(self, frame):
        zeros = frame.new_zeros(
            frame.shape[0], self.n, frame.shape[2] // self.reduction, frame.shape[3] // self.reduction)
        self.t = [zeros] * len(self.cells)
        self.ts = [[zeros] * self.window for _ in self.cells]
        self.ss = [[zeros] * self.window for _ in self.cells]

    def step(self, frame):
        s = self.encoder(frame)
        for layer, cell in enumerate(self.cells):
            seen = s
            self.t[layer], s = cell(self.t[layer], s, self.ts[layer], self.ss[layer])
            self.ts[layer] = [*self.ts[layer][1:], self.t[layer]]
            self.ss[layer] = [*self.ss[layer][1:], seen]
        return self.decoder(s)

    def extra_loss(self):
        return 0


def build(model, channels, hidden, kernel, layers, size, reduction):
    """The model for frames of `size` x `size` patches."""
    stack = lambda cell, **more: Stack(cell, channels, hidden, kernel, layers, **more)
    return {
        "conv_lstm_stack": lambda: stack(ConvLstmCell),
        "predrnn": lambda: stack(StLstmCell),
        "predrnn_v2": lambda: stack(StLstmCell, decouple=True),
        "predrnn_pp": lambda: stack(CausalCell, highway=True),
        "mim": lambda: Mim(channels, hidden, kernel, layers, size),
        "e3d_lstm": lambda: E3d(channels, hidden, kernel, layers, size),
        "mau": lambda: Mau(channels, hidden, kernel, layers, size, reduction),
    }[model]()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    sizes = [("batch", 2), ("size", 64), ("frames-in", 10), ("frames-out", 10), ("layers", 4), ("kernel", 5)]
    for name, value in sizes:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--hidden", type=int, help="default: as published, 64 for mau and 128 for the others")
    parser.add_argument("--patch", type=int, help="default: as published, 1 for mau and 4 for the others")
    parser.add_argument("--reduction", type=int, default=4, help="of mau: by how much its encoder makes rows fewer")
    pytorch_step.add_arguments(parser)
    args = parser.parse_args()
    pytorch_step.prepare(args)
    mau = args.model == "mau"
    patch, hidden = args.patch or (1 if mau else 4), args.hidden or (64 if mau else 128)
    network = build(args.model, patch**2, hidden, args.kernel, args.layers, args.size // patch, args.reduction)
    network = network.to(args.device)
    times, side = args.frames_in + args.frames_out, args.size // patch
    frames = torch.rand(times, args.batch, patch**2, side, side, device=args.device)

    def loss():
        network.start(frames[0])
        predictions = []
        for t in range(len(frames) - 1):
            predictions.append(network.step(frames[t] if t < args.frames_in else predictions[-1]))
        predictions = torch.stack(predictions)
        value = F.mse_loss(predictions.float(), frames[1:]) + network.extra_loss()
        if args.model == "e3d_lstm":
            value = value + F.l1_loss(predictions.float(), frames[1:])
        return value

    pytorch_step.measure(args, network, loss, lr=1e-4)


if __name__ == "__main__":
    main()
