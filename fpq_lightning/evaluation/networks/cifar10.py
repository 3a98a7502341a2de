"""The feature network that is shipped: metrics without downloads."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fpq_lightning.evaluation.networks.network import FeatureNetwork


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class CIFAR10Network(FeatureNetwork):
    """A CIFAR-10 classifier whose 256 pooled features measure image distributions.

    Fréchet distances on it are called FD (cifar10-features). They cannot be compared with FID.
    """

    name = "cifar10-features"
    num_features = 256
    image_size = 32
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(self) -> None:
        super().__init__()
        self.stem = _layer(3, 64)
        self.d1 = _layer(64, 128)
        self.r1 = nn.Sequential(_layer(128, 128), _layer(128, 128))
        self.d2 = _layer(128, 256)
        self.d3 = _layer(256, 256)
        self.r3 = nn.Sequential(_layer(256, 256), _layer(256, 256))
        self.head = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Features `[n, 256]` of images `[n, 3, height, width]` in [-1, 1], averaged over areas to 32 x 32."""
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = nn.functional.adaptive_avg_pool2d(images, size)
        pool = nn.functional.max_pool2d
        x = pool(self.d1(self.stem(images)), 2)
        x = x + self.r1(x)
        x = pool(self.d3(pool(self.d2(x), 2)), 2)
        x = x + self.r3(x)
        return x.mean(dim=(2, 3))

    def describe(self, images: Tensor) -> dict[str, Tensor]:
        """``pooled`` `[n, 256]` and ``logits`` `[n, 10]`."""
        pooled = self(images)
        return {"pooled": pooled, "logits": self.head(pooled)}

    @classmethod
    def load(cls, directory: str | Path) -> CIFAR10Network:
        """Loads ``model.safetensors`` from a directory.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else.
        """
        file = Path(directory) / "model.safetensors"
        if not file.is_file():
            raise FileNotFoundError(
                f"there is no feature network at {file}: evaluation.features must name its directory, or be null"
            )
        network = cls()
        try:
            network.load_state_dict({k: v.float() for k, v in load_file(file).items()})
        except (RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{file} holds no feature network of this package: {reason}") from error
        return network.eval().requires_grad_(False)
