"""Train other decoders on this repository's encoder, with its data, loss and scoring.

The network is segmentation_models_pytorch's, the rest is train.py: its flags, its run folder, its --resume
and --evaluate. The library and what it needs beyond requirements.txt are installed into a folder that this
script alone uses.
"""
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts lie flat in the repository's root

import model as models  # noqa: E402
import train  # noqa: E402

PACKAGES = ROOT / "data" / "peers"  # git ignores it
USAGE = """usage: python tests/peers.py unet|fpn [flags of train.py]

  python tests/peers.py unet --num_epochs 15 --learning_rate 1e-3
  python tests/peers.py fpn --finetune_encoder --learning_rate 1e-3
  python tests/peers.py unet --resume runs/x/last.pth"""


def install() -> None:
    """segmentation_models_pytorch and timm beside the torch that is here, at the first call."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(PACKAGES)]
    if not (PACKAGES / "segmentation_models_pytorch").exists():
        for packages in (["huggingface_hub", "safetensors"],
                         ["--no-deps", "timm", "segmentation-models-pytorch"]):
            if subprocess.run([*pip, *packages]).returncode:
                raise SystemExit("peers.py: error: pip could not install it; see above")
    sys.path.append(str(PACKAGES))


class Peer(models.EfficientSegNet):
    """segmentation_models_pytorch's Unet or FPN on timm's EfficientNet-B0, in two halves.

    The encoder's tensors are torchvision's in the same order, with the same features.
    """

    def __init__(self, architecture: str, n_classes: int, encoder_weights: str | Path | None = "imagenet", *,
                 finetune_encoder: bool = False) -> None:
        import segmentation_models_pytorch as smp
        from timm.layers import DropPath

        nn.Module.__init__(self)
        build = {"unet": smp.Unet, "fpn": smp.FPN}[architecture]
        network = build("timm-efficientnet-b0", encoder_weights=None, classes=n_classes)
        self.encoder, self.decoder, self.out = network.encoder, network.decoder, network.segmentation_head[0]
        self.upsample = network.segmentation_head[1]
        features = models.load_features(encoder_weights)
        values = features.state_dict().values()
        self.encoder.load_state_dict(dict(zip(self.encoder.state_dict(), values, strict=True)))
        self.finetune_encoder = finetune_encoder
        for parameter in self.encoder_parameters():
            parameter.requires_grad_(finetune_encoder)
        for module in self.encoder.modules():  # as in ours
            if isinstance(module, DropPath):
                module.drop_prob = 0.0  # no stochastic depth
        models.use_depthwise(self.encoder)
        check_features(self.eval(), features)
        self.train()

    def encoder_stages(self) -> list[nn.Module]:
        return [self.encoder]

    def encode(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) to maps of 1/2 to 1/32 of their size."""
        return self.encoder(images if self.finetune_encoder else images.detach())[1:]

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """The maps of `encode` to logits (B, n_classes, H, W)."""
        B, _, H, W = features[0].shape
        image = features[0].new_empty((B, 0, 2 * H, 2 * W))  # the decoders look at its size alone
        return self.upsample(self.out(self.decoder([image, *features])))


@torch.no_grad()
def check_features(network: Peer, features: nn.Sequential) -> None:
    """SystemExit if the encoder's features are not those of torchvision's within 1e-6 of the largest."""
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = images
    found = iter(network.double().encode(images.double()))
    for index, stage in enumerate(features.double().eval()):
        expected = stage(expected.double())
        if index in (0, 2, 3, 5, 7):  # the last of each size
            error = (next(found) - expected).abs().max() / expected.abs().max()
            if error > 1e-6:
                raise SystemExit(f"peers.py: error: features of stage {index} differ by {error:.1e}")
    network.float()


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in ("unet", "fpn"):
        raise SystemExit(USAGE)
    install()
    models.EfficientSegNet = partial(Peer, sys.argv[1])
    started = time.monotonic()
    train.main(sys.argv[2:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{sys.argv[1]}: {(time.monotonic() - started) / 60:.1f} minutes, peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    main()
