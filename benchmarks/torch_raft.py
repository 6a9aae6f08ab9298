"""RAFT (Teed and Deng, ECCV 2020) in PyTorch, small and large, for comparison: written from the paper and our Flax module.

Parameters bear the names of the authors' checkpoints, which load with strict=True (`load`). Correlations are sampled with
grid_sample, convolutions are plain modules: the way one writes it in PyTorch.
"""

import torch
from torch import nn
from torch.nn import functional

LEVELS = 4


class Block(nn.Module):
    """Residual block of two 3x3 convolutions, or a bottleneck of 1x1, 3x3, 1x1."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: type[nn.Module], bottleneck: bool):
        super().__init__()
        inner = outputs // 4
        if bottleneck:
            shapes = [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)]
        else:
            shapes = [(inputs, outputs, 3, stride), (outputs, outputs, 3, 1)]
        self.depth = len(shapes)
        for i, (a, b, kernel, step) in enumerate(shapes, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2))
            setattr(self, f"norm{i}", norm(b))
        if stride > 1:
            shortcut = norm(outputs)
            setattr(self, f"norm{self.depth + 1}", shortcut)  # the authors' files hold it under both names
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), shortcut)
        else:
            self.downsample = nn.Identity()

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = torch.relu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(y)))
        return torch.relu(self.downsample(x) + y)


class Encoder(nn.Module):
    def __init__(self, stem: int, stages: tuple[int, ...], outputs: int, norm: type[nn.Module], bottleneck: bool):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, stem, 7, 2, 3), norm(stem)
        width = stem
        for i, (outer, stride) in enumerate(zip(stages, (1, 2, 2), strict=True), 1):
            blocks = Block(width, outer, stride, norm, bottleneck), Block(outer, outer, 1, norm, bottleneck)
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
            width = outer
        self.conv2 = nn.Conv2d(width, outputs, 1)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class MotionEncoder(nn.Module):
    def __init__(self, window: int, correlation: tuple[int, ...], flow: tuple[int, int], outputs: int):
        super().__init__()
        self.convc1 = nn.Conv2d(window, correlation[0], 1)
        self.convc2 = nn.Conv2d(*correlation, 3, 1, 1) if len(correlation) == 2 else None
        self.convf1, self.convf2 = nn.Conv2d(2, flow[0], 7, 1, 3), nn.Conv2d(*flow, 3, 1, 1)
        self.conv = nn.Conv2d(correlation[-1] + flow[1], outputs, 3, 1, 1)

    def forward(self, flow, window):
        c = torch.relu(self.convc1(window))
        if self.convc2 is not None:
            c = torch.relu(self.convc2(c))
        f = torch.relu(self.convf2(torch.relu(self.convf1(flow))))
        return torch.cat([torch.relu(self.conv(torch.cat([c, f], 1))), flow], 1)


class ConvGRU(nn.Module):
    """One GRU step per entry of `kernels`: name suffix -> kernel size."""

    def __init__(self, hidden: int, inputs: int, kernels: dict[str, tuple[int, int]]):
        super().__init__()
        self.suffixes = list(kernels)
        for suffix, kernel in kernels.items():
            for gate in "zrq":
                convolution = nn.Conv2d(hidden + inputs, hidden, kernel, padding=tuple(k // 2 for k in kernel))
                setattr(self, f"conv{gate}{suffix}", convolution)

    def forward(self, h, x):
        for suffix in self.suffixes:
            z, r, q = (getattr(self, f"conv{gate}{suffix}") for gate in "zrq")
            both = torch.cat([h, x], 1)
            update = torch.sigmoid(z(both))
            h = (1 - update) * h + update * torch.tanh(q(torch.cat([torch.sigmoid(r(both)) * h, x], 1)))
        return h


class FlowHead(nn.Module):
    def __init__(self, inputs: int, inner: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, inner, 3, 1, 1), nn.Conv2d(inner, 2, 3, 1, 1)

    def forward(self, h):
        return self.conv2(torch.relu(self.conv1(h)))


class UpdateBlock(nn.Module):
    def __init__(self, large: bool, hidden: int, context: int, window: int):
        super().__init__()
        if large:
            self.encoder = MotionEncoder(window, (256, 192), (128, 64), 126)
            self.gru = ConvGRU(hidden, context + 128, {"1": (1, 5), "2": (5, 1)})
            self.flow_head = FlowHead(hidden, 256)
            self.mask = nn.Sequential(nn.Conv2d(hidden, 256, 3, 1, 1), nn.ReLU(), nn.Conv2d(256, 576, 1))
        else:
            self.encoder = MotionEncoder(window, (96,), (64, 32), 80)
            self.gru = ConvGRU(hidden, context + 82, {"": (3, 3)})
            self.flow_head = FlowHead(hidden, 128)


class RAFT(nn.Module):
    """forward(first, second, iterations): frames [B, 3, H, W] in 0..255, sides multiples of 8 -> flow [B, 2, H, W] in pixels."""

    def __init__(self, large: bool):
        super().__init__()
        self.large, self.radius = large, 4 if large else 3
        self.hidden, self.context = (128, 128) if large else (96, 64)
        stem, stages, features = (64, (64, 96, 128), 256) if large else (32, (32, 64, 96), 128)
        self.fnet = Encoder(stem, stages, features, nn.InstanceNorm2d, not large)
        self.cnet = Encoder(stem, stages, self.hidden + self.context, nn.BatchNorm2d if large else nn.Identity, not large)
        self.update_block = UpdateBlock(large, self.hidden, self.context, LEVELS * (2 * self.radius + 1) ** 2)

    def forward(self, first, second, iterations: int = 12):
        first, second = 2 * first / 255 - 1, 2 * second / 255 - 1
        pyramid = self._correlate(*self.fnet(torch.cat([first, second])).chunk(2))
        h, x = self.cnet(first).split([self.hidden, self.context], 1)
        h, x = torch.tanh(h), torch.relu(x)
        b, _, height, width = h.shape
        rows, columns = (torch.arange(n, dtype=h.dtype, device=h.device) for n in (height, width))
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))[None]
        position = grid.repeat(b, 1, 1, 1)
        for _ in range(iterations):
            motion = self.update_block.encoder(position - grid, self._lookup(pyramid, position))
            h = self.update_block.gru(h, torch.cat([x, motion], 1))
            position = position + self.update_block.flow_head(h)
        flow = position - grid
        if not self.large:
            return 8 * functional.interpolate(flow, scale_factor=8, mode="bilinear", align_corners=True)
        weights = (0.25 * self.update_block.mask(h)).view(b, 1, 9, 8, 8, height, width).softmax(2)
        near = functional.unfold(8 * flow, 3, padding=1).view(b, 2, 9, 1, 1, height, width)
        return (weights * near).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(b, 2, 8 * height, 8 * width)

    def _correlate(self, first, second):
        b, c, h, w = first.shape
        products = torch.einsum("bcn,bcm->bnm", first.flatten(2), second.flatten(2)) / c**0.5
        pyramid = [products.view(b * h * w, 1, h, w)]
        for _ in range(LEVELS - 1):
            pyramid.append(functional.avg_pool2d(pyramid[-1], 2))
        # Widths and heights once: a GPU would wait for them at every look-up.
        return [(level, torch.tensor(level.shape[:-3:-1]).to(level)) for level in pyramid]

    def _lookup(self, pyramid, position):
        b, _, h, w = position.shape
        offset = torch.arange(-self.radius, self.radius + 1, dtype=position.dtype, device=position.device)
        # The slow index of a window moves x.
        window = torch.stack(torch.meshgrid(offset, offset, indexing="ij"), -1)
        centre = position.permute(0, 2, 3, 1).reshape(b * h * w, 1, 1, 2)
        found = []
        for level, (products, size) in enumerate(pyramid):
            points = 2 * (centre / 2**level + window) / (size - 1) - 1
            found.append(functional.grid_sample(products, points, align_corners=True).view(b, h, w, -1))
        return torch.cat(found, -1).permute(0, 3, 1, 2)


def load(path, large: bool) -> RAFT:
    """A RAFT with the weights of an authors' file (.safetensors, with or without `module.`)."""
    import safetensors.torch

    model = RAFT(large)
    tensors = safetensors.torch.load_file(str(path))
    model.load_state_dict({k.removeprefix("module."): v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    return model.eval()
