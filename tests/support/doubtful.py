"""Teachers whose answers cannot be trusted, and some that only look so. Named by build files."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from support.toys import NUM_CLASSES, TinyNet, tiny_net


class Wrapped(nn.Module):
    """A network behind an attribute that torch does not see."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.members = [network]
        self.register_buffer("one", torch.ones(()))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.members[0](images_B3HW) * self.one


class Disguised(nn.Module):
    """Answers that depend on what no tensor holds, as those of an ONNX session do."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.network = tiny_net()

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.network(images_B3HW) * self.gain


class Dropped(TinyNet):
    """Dropout that evaluation mode does not switch off."""

    def forward_head(self, map_BDHW: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward_head(map_BDHW), 0.1, training=True)


class Sampled(TinyNet):
    """Answers of a random member."""

    def forward_head(self, map_BDHW: Tensor) -> Tensor:
        return super().forward_head(map_BDHW) + torch.rand(())


class Centered(TinyNet):
    """Logits relative to the mean of the batch."""

    def forward(self, images_B3HW: Tensor) -> Tensor:
        logits_BC = super().forward(images_B3HW)
        return logits_BC - logits_BC.mean(0)


class Lazy(TinyNet):
    """Makes a table on its first run, as some position embeddings do."""

    def forward(self, images_B3HW: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.table = torch.zeros(NUM_CLASSES)
        return super().forward(images_B3HW) + self.table


class Session(nn.Module):
    """Weights that torch does not know of: those of a closure here, of a file elsewhere."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        weight = torch.eye(3, NUM_CLASSES) * gain
        self.run = lambda means_B3: means_B3 @ weight

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.run(images_B3HW.mean((2, 3)))


class NamedSession(Session):
    """The same, with a name for its weights."""

    def __init__(self, gain: float) -> None:
        super().__init__(gain)
        self.weights_digest = f"weights of gain {gain}"


def _scaled(kind: type[TinyNet]) -> TinyNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = kind()
        with torch.no_grad():
            net.head.weight.mul_(20)
    return net


def dropped(num_classes: int) -> nn.Module:
    return _scaled(Dropped)


def sampled(num_classes: int) -> nn.Module:
    return _scaled(Sampled)


def centered(num_classes: int) -> nn.Module:
    return _scaled(Centered)


def lazy(num_classes: int) -> nn.Module:
    return _scaled(Lazy)


def training_member(num_classes: int) -> nn.Module:
    return Wrapped(tiny_net())


def member(num_classes: int) -> nn.Module:
    return Wrapped(tiny_net(scale=float(os.environ.get("TEACHER_SCALE", "20"))).eval())


def disguised(num_classes: int) -> nn.Module:
    return Disguised(float(os.environ.get("TEACHER_GAIN", "1")))


def session(num_classes: int) -> nn.Module:
    return Session(float(os.environ.get("TEACHER_GAIN", "20")))


def named_session(num_classes: int) -> nn.Module:
    return NamedSession(float(os.environ.get("TEACHER_GAIN", "20")))
